"""What the wheel and the sdist hold. Built with the environment's own setuptools, so no network is needed."""

import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import fastconv

ROOT = Path(fastconv.__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "fastconv", "kernels", "autotune", "benchmarks", "tests")

if int(version("setuptools").split(".")[0]) < 77:
    pytest.skip("building needs setuptools 77, as pyproject.toml says", allow_module_level=True)


def build(kind: str, source: Path, out: Path) -> Path:
    """Run the build backend's `build_wheel` or `build_sdist` in `source`; the file that it wrote."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, text=True, capture_output=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return out / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging reads, its symlinks kept, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("a checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", source, tmp_path_factory.mktemp("wheel")))


def modules(folder: str) -> set[str]:
    return {f"fastconv/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}


def test_wheel_holds_fastconv_alone(wheel: zipfile.ZipFile) -> None:
    info = f"fastconv-{fastconv.__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel.namelist()} == {"fastconv", info}
    assert {f"{info}/licenses/LICENSE", "fastconv/py.typed"} <= set(wheel.namelist())


def test_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "fastconv").rglob("*.py")}
    names = set(wheel.namelist())
    tests = {name for name in modules("benchmarks") if name.startswith("fastconv/benchmarks/tests/")}
    measured = modules("benchmarks") - tests
    assert own | modules("kernels") | modules("autotune") | measured <= names
    patterns = ("autotune/tables/*.json", "benchmarks/layers/*.jsonl")
    data = {f"fastconv/{path.relative_to(ROOT)}" for pattern in patterns for path in ROOT.glob(pattern)}
    assert data <= names
    assert not [name for name in names if name.startswith("fastconv/benchmarks/") and name not in data | measured]


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info = f"fastconv-{fastconv.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(required) == ["torch>=2.11", 'triton<4,>=3.6; platform_system == "Linux"']
    assert metadata.get_all("Provides-Extra") == ["cli", "models", "test"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert "fastconv = fastconv.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_wheel_from_sdist_is_the_same(source: Path, wheel: zipfile.ZipFile, tmp_path) -> None:
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data") if sys.version_info >= (3, 12) else archive.extractall(tmp_path)
    again = zipfile.ZipFile(build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path))
    assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_wheel_imports_alone(wheel: zipfile.ZipFile, tmp_path) -> None:
    """Unpacked beside nothing else: the package comes from the wheel, its inner parts are real folders."""
    wheel.extractall(tmp_path)
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from fastconv.kernels import families as f; print(f.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd="/", text=True, capture_output=True, timeout=60
    )
    assert run.stdout.strip() == str(tmp_path / "fastconv/kernels/families/__init__.py"), run.stderr
