"""A GPU and TensorRT without either: what an engine launches is run by Triton's interpreter and ONNX Runtime."""
