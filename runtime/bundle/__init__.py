"""Reads a bundle: its manifest, the hashes of its files, mapped tensors."""
