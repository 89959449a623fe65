"""How a kernel is launched."""
