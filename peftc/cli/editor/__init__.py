"""What an editor, and whoever writes specs in one, has of peftc: a layout, colours, a language server."""
