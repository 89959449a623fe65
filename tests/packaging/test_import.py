"""Importing: from any folder, nothing heavy, no bare names, and functions that stay functions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv

ROOT = Path(fastconv.__file__).parents[1]


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process that starts in `cwd`."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, text=True, capture_output=True, timeout=60
    )


@pytest.mark.parametrize(
    "folder", [ROOT, ROOT.parent, ROOT / "tests", Path("/")], ids=["clone", "parent", "tests", "root"]
)
def test_import_works_from_any_folder(folder: Path) -> None:
    run = python("import fastconv.kernels.families; print(fastconv.__file__, fastconv.__version__)", folder)
    assert run.stdout.split("\n")[0] == f"{fastconv.__file__} {fastconv.__version__}", run.stderr


def test_import_is_light(tmp_path) -> None:
    """No torch and no Triton means no GPU was touched either."""
    run = python("import sys, fastconv; print(*sys.modules)", tmp_path)
    assert "fastconv" in run.stdout.split(), run.stderr
    assert not {"torch", "triton", "numpy", "fastconv.kernels", "fastconv.cli"} & set(run.stdout.split())


@pytest.mark.parametrize("name", ["kernels", "autotune"])
def test_bare_import_names_the_package(name: str) -> None:
    run = python(f"import {name}", ROOT)
    assert run.returncode == 1
    assert f"import 'fastconv.{name}'" in run.stderr.splitlines()[-1]


def test_functions_stay_functions_beside_modules_of_their_name(tmp_path) -> None:
    code = """
import fastconv, fastconv.convert, fastconv.explain, fastconv.settings, fastconv.warmup
from fastconv.convert import revert
for name in ("convert", "revert", "report", "explain", "settings", "warmup"):
    assert callable(getattr(fastconv, name)), name
assert fastconv.revert is revert
from fastconv import functional, nn
assert fastconv.nn is nn and fastconv.functional is functional
"""
    run = python(code, tmp_path)
    assert run.returncode == 0, run.stderr


def test_unknown_attribute_is_named() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convolve'"):
        fastconv.convolve  # noqa: B018
    assert {"convert", "nn", "functional", "settings"} <= set(dir(fastconv))


def test_without_triton_its_first_use_says_so_in_one_sentence(tmp_path) -> None:
    """As on macOS and Windows."""
    code = """
import sys
sys.modules["triton"] = None
import fastconv
from fastconv import settings
settings(strict=True)
for use in ("fastconv.convert", "from fastconv import nn", "import fastconv.functional", "fastconv.warmup"):
    try:
        exec(use)
    except ImportError as error:
        print(error)
"""
    run = python(code, tmp_path)
    sentence = "fastconv's kernels need Linux and Triton (pip install triton); macOS and Windows have neither"
    assert run.stdout.splitlines() == [sentence] * 4, run.stderr
