"""The gated delta rule behind a short convolution: token by token, and in chunks."""
