"""Whether PyTorch can use a GPU here, found without importing torch; starting over with or without the interpreter."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

SWITCH = "TRITON_INTERPRET"
STAND_IN = "FASTCONV_DEVICE"  # kernels.launch.device's


def gpu_present() -> bool:
    """Whether torch is built for CUDA and the driver reports a device, or a stand-in is named.

    ``CUDA_VISIBLE_DEVICES=`` hides devices.
    """
    return STAND_IN in os.environ or (_torch_has_cuda() and _driver_devices() > 0)


def enter_interpreter() -> None:
    """Without a GPU, replace this process by the same command line with Triton's interpreter on.

    Only the console entry calls it, before torch is imported: Triton binds its builtins when a kernel is decorated. A
    process whose environment has the variable, 0 or 1, is not restarted.
    """
    if SWITCH in os.environ or gpu_present():
        return
    _start_over({**os.environ, SWITCH: "1"})


def leave_interpreter() -> None:
    """Replace this process by the same command line without Triton's interpreter, if the environment turns it on."""
    if SWITCH in os.environ:
        _start_over({name: value for name, value in os.environ.items() if name != SWITCH})


def _start_over(environment: dict[str, str]) -> None:
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _torch_has_cuda() -> bool:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    # Only torch/version.py: importing torch takes two seconds and would be too late for the switch.
    version = spec_from_file_location("_torch_version", Path(spec.origin).with_name("version.py"))
    assert version is not None and version.loader is not None
    module = module_from_spec(version)
    version.loader.exec_module(module)
    return bool(module.cuda)


def _driver_devices() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
