"""Training by one command: data of the usual shapes, transformers' Trainer, a run that goes on where it stopped."""
