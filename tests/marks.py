"""Who runs a test: the interpreter or a GPU, on which device, and who cannot."""

import pytest

from fastconv.kernels.launch.device import here
from fastconv.kernels.launch.interpreter import interpreting

DEVICE = "cpu" if interpreting() else here.type
runs_kernels = [pytest.mark.gpu] * (not interpreting())  # a module's ``pytestmark``
interpreted = pytest.mark.skipif(not interpreting(), reason="runs kernels on the CPU: needs TRITON_INTERPRET=1")
compiling = pytest.mark.skipif(interpreting(), reason="one process cannot both interpret and compile")
