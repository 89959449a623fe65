"""Which tile for which problem on which GPU; knows nothing of kernels. Import as ``fastconv.autotune``."""

if __name__ != "fastconv.autotune":
    raise ImportError(f"import 'fastconv.autotune', not {__name__!r}: the folder is part of the fastconv package")
