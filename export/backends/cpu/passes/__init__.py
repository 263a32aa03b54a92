"""Rewrites for our CPU operators."""
