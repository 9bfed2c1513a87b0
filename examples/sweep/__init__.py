"""What examples/architectures.py is made of: tiny models, batches for them, and a judge."""
