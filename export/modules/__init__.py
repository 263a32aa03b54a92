"""Canonical PyTorch blocks: every family is traced through these, and only these."""
