"""What a target writes, a folder for each backend."""
