"""Holds every step of the pipeline to the one before it."""
