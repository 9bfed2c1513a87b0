"""One file a way of making a matrix of fewer numbers. A file here registers itself."""
