"""What an attention is, of the kinds that there are."""
