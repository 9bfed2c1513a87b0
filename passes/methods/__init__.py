"""One file a method. A file here registers itself; nothing else has to be told."""
