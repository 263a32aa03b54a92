"""Defaults that the Python API and the command line share."""

MAX_NEW_TOKENS = 256
CHUNK_TOKENS = 512  # the most prompt tokens in one step
MAX_IMAGE_PIXELS = 50_000_000
