"""A small sparse MoE vision-language model, trained here: data, training, evaluation."""

import os

# Threads that spin at a barrier lose their share of a busy machine: measured, 60 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
