"""Engines for NVIDIA GPUs: built by TensorRT-RTX on any machine, or by TensorRT on its GPU."""
