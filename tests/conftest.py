"""What every test shares: who needs a GPU, and the table of problems per kernel family that a run ends with."""

import os
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version

import hypothesis
import pytest
import torch

from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.device import here

if interpreter.interpreting():
    from quick_interpreter import quicken

    interpreter.apply()
    quicken()

# Tests measure no time; a first call that imports or interprets is slow by right.
hypothesis.settings.register_profile("fastconv", deadline=None)
hypothesis.settings.load_profile("fastconv")


# A shell's background job begins with Ctrl-C ignored, and so would every process that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    if not here.real:
        config.pluginmanager.import_plugin("tests.emulator.plugin")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", action="store_true", help="run two in five cases of each test function")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("sample"):
        return
    seen: Counter[str] = Counter()
    chosen: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        # What cases take turns in, by twos, threes or fours, all comes up in two of five.
        (chosen if seen[function] % 5 < 2 else left).append(item)
        seen[function] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = chosen


def pytest_report_header() -> str:
    mode = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "numpy")) + f", kernels {mode}"


@pytest.fixture
def set_fp32_precision() -> Iterator[Callable[[str], None]]:
    """Sets how PyTorch is to make fp32 products of convolutions, "ieee" or "tf32", for the length of a test."""

    def set_precision(precision: str) -> None:
        # First the older setting, which Dynamo reads and which raises if the newer one differs from it.
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.conv.fp32_precision = precision

    before = torch.backends.cudnn.conv.fp32_precision
    yield set_precision
    set_precision(before)


@pytest.fixture(autouse=True)
def fp32_products(set_fp32_precision: Callable[[str], None]) -> None:
    """fp32 products are exact in every test that does not say TF32: a convolution's are TF32 on a GPU by default."""
    set_fp32_precision("ieee")


@pytest.fixture(autouse=True, scope="session")
def _nobodys_measurements(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiles are what every machine chooses, not what somebody once measured on this one."""
    os.environ["FASTCONV_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # The same numbers whichever tests ran before in this process.
    torch.manual_seed(0)
    if item.get_closest_marker("gpu") and not here.is_available():
        pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the distinct problems per family and direction that passing tests noted, and repeat their lines.

    A test notes one with ``record_property("problem", (family, direction, description))`` or ``("line", text)``, which
    also reaches here from the worker processes of pytest-xdist.
    """
    problems: dict[tuple[str, str], set[str]] = defaultdict(set)
    lines: list[str] = []
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "problem":
                family, direction, description = value
                problems[family, direction].add(description)
            elif name == "line":
                lines.append(value)
    for line in lines:
        terminalreporter.write_line(line)
    if problems:
        terminalreporter.section("problems per family and direction")
        for (family, direction), descriptions in sorted(problems.items()):
            terminalreporter.write_line(f"{family:24} {direction:8} {len(descriptions):5}")
