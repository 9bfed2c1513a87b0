"""One pattern a file: what is computed together."""
