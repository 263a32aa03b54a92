"""What an engine is, and the loop that generates with one."""
