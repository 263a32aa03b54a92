"""Rewrites for TensorRT."""
