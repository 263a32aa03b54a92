"""Attention: over pages of a cache, and among the patches of images."""
