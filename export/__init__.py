"""Checkpoint to bundle: trace a Hugging Face MoE VLM to canonical ONNX and lower it to engines."""
