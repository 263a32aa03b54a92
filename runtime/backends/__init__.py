"""What engines run on, a folder each."""
