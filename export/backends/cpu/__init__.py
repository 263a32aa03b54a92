"""Targets on our CPU operators."""
