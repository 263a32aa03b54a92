"""The parts of the check on a GPU, see `bench.gpu_check`. They need torch, triton and numpy, and nothing else."""
