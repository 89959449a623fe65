"""Device code that several kernels share."""
