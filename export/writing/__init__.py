"""Writes bundles: streamed files, atomically."""
