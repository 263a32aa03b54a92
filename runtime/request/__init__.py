"""From messages to a step's numbers, and from numbers to text."""
