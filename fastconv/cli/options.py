"""Values of options that more than one command takes."""

from __future__ import annotations

import torch

from fastconv.autotune import Gpu
from fastconv.autotune.gpus import known_gpus
from fastconv.cli import BadUsage

DTYPES = {
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}


def dtype(name: str) -> torch.dtype:
    """The dtype called ``name``. Raises BadUsage with the names there are."""
    if name not in DTYPES:
        raise BadUsage(f"--dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def gpu(name: str) -> Gpu:
    """The GPU of the table called ``name``, with or without "NVIDIA". Raises BadUsage with the names there are."""
    known = {gpu.name.removeprefix("NVIDIA "): gpu for gpu in known_gpus()}
    if name.removeprefix("NVIDIA ") not in known:
        raise BadUsage(f"--gpu {name!r} is not one of {', '.join(known)}")
    return known[name.removeprefix("NVIDIA ")]
