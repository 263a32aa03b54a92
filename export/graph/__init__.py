"""Canonical ONNX graphs: weights, trace, translation, bodies of ops."""
