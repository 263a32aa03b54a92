"""The ops that GPU programs are made of: what each takes and gives, and which kernels it launches."""
