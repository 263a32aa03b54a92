"""Targets on ONNX Runtime as it comes."""
