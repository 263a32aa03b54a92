"""The MoE ops on NVIDIA GPUs: Triton kernels, compiled ahead of time into programs that a TensorRT plugin runs."""
