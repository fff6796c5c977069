"""Measurements against the PyTorch original, for anyone to repeat: see README.md."""
