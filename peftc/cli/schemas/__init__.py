"""What a program can rely on of what commands print with `--json`."""
