"""The CPU operators."""
