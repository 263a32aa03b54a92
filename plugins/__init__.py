"""The MoE ops of domain `moevlm`: what they compute (spec, reference) and how a GPU computes it."""
