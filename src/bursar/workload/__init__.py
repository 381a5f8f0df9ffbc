"""What to run: the model, its batch and its loss, as real PyTorch."""
