"""What is done with an artifact: folded in, exported, asked for text."""
