"""The two ways to start the command line."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution

import pytest


def test_module_shows_help(tmp_path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastconv", "--help"], cwd=tmp_path, text=True, capture_output=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in ("bench", "check", "explain"))


def test_console_script_is_the_same_command() -> None:
    try:
        scripts = distribution("fastconv").entry_points
    except PackageNotFoundError:
        pytest.skip("fastconv runs from the checkout here and is not installed")
    import fastconv.cli

    (script,) = scripts.select(group="console_scripts", name="fastconv")
    assert script.load() is fastconv.cli.main
