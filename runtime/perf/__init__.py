"""What the machine can do, and what an engine reaches of it."""
