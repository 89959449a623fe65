"""Device code that several kernels share, and what their launches share."""
