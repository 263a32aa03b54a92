"""Loads a bundle and generates text."""
