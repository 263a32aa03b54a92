"""Rewrites for ONNX Runtime's own operators."""
