"""One file a format that frozen weights lie in. A file here registers itself; nothing else has to be told."""
