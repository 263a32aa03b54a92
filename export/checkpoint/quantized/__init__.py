"""Checkpoints whose weights are published in codes, read as plain names and lazy weights."""
