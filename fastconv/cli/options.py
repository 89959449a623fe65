"""Values of options that more than one command takes."""

from __future__ import annotations

import torch

from fastconv.autotune.gpus import H200, Gpu, gpu_called
from fastconv.cli.errors import BadUsage
from fastconv.kernels import dispatch
from fastconv.kernels.launch.device import here

DTYPES = {
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}


def dtype_option(name: str) -> torch.dtype:
    """The dtype called ``name``. Raises BadUsage with the names there are."""
    if name not in DTYPES:
        raise BadUsage(f"--dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def gpu_option(name: str) -> Gpu:
    """The GPU called ``name``, as `gpu_called` has it. Raises BadUsage with the names there are."""
    try:
        return gpu_called(name)
    except ValueError as error:
        raise BadUsage(f"--{error}") from error


def gpu_here() -> Gpu:
    """The GPU of this machine; the H200 if there is none."""
    return dispatch.target(here.at(0)) if here.is_available() else H200
