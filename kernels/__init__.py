"""Triton kernels and their launchers: tensors in, tensors out, no autograd. Import as ``fastconv.kernels``."""

if __name__ != "fastconv.kernels":
    raise ImportError(f"import 'fastconv.kernels', not {__name__!r}: the folder is part of the fastconv package")
