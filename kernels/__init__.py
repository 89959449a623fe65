"""Triton kernels and their launchers: tensors in, tensors out, no autograd. Import as ``fastconv.kernels``."""

from importlib.util import find_spec

if __name__ != "fastconv.kernels":
    raise ImportError(f"import 'fastconv.kernels', not {__name__!r}: the folder is part of the fastconv package")
# (Sought, not imported: some of what lies here needs neither.)
if find_spec("triton") is None or find_spec("fcntl") is None:
    raise ImportError("fastconv's kernels need Linux and Triton (pip install triton); macOS and Windows have neither")
