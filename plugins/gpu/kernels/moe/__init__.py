"""Router and experts in Triton."""
