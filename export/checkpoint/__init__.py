"""Reads a Hugging Face checkpoint: its directory, tensors and side files."""
