"""What the code of several kernels is made of."""
