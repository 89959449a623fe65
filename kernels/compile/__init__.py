"""Kernels compiled ahead of their launch, and what the compiler made of them."""
