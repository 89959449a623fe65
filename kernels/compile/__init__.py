"""Compiling kernels ahead of their launch, and reading the compiler's result."""
