"""The result file: one JSON document, rewritten as each part ends, that tables and plots are rendered from.

``{"schema": "fastconv-bench/5", "created", "command", "dry_run", "environment": {...}, "parts": [part, ...]}``; a part
is ``{"id", "kind", "title", "verdict", "reason", ...}`` and the rest depends on its kind. Times are milliseconds,
memory is bytes, errors are relative unless a name says otherwise.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = "fastconv-bench/5"
# The kinds of part and what each holds besides. Version 2 brought "blocks"; 3 "operators" for "layers"; 4 "targets" and
# operators' replayed times, ceilings, means and families; 5 which provider of ours an operator's speeds are of, and the
# problem of a host time.
KINDS = {
    "training": {"losses", "accuracy", "held_out", "loss_difference", "tolerance", "launches"},
    "block": {"rows", "launches"},
    "check": {"rows", "launches"},
    "time": {"rows", "noise"},
    "operators": {"rows", "dtype", "copy_bandwidth", "matrix_rate", "speed_target", "rivals", "share_target"}
    | {"means", "families"},
    "targets": {"rows", "least_target"},
    "blocks": {"rows", "bandwidth"},
    "host": {"rows", "target_us"},
    "compile": {"kernels"},
    "compiler": {"rows"},
}
DOCUMENT = {"created": str, "command": list, "dry_run": bool, "environment": dict, "parts": list}
PART = {"id": str, "kind": str, "title": str, "verdict": str, "reason": object}
CHECKOUT = Path(__file__).resolve().parents[2]
VERDICTS = ("right", "wrong", "failed", "skipped")
Part = dict[str, Any]


class Results:
    """The parts measured so far, on disk after every ``put``, so that a killed run keeps what it had finished."""

    def __init__(self, folder: Path, *, dry_run: bool = False) -> None:
        self.path = folder / "bench.json"
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": ["fastconv", *sys.argv[1:]],
            "dry_run": dry_run,
            "environment": environment(),
            "parts": [],
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error
        self._write()

    @property
    def parts(self) -> list[Part]:
        return self.data["parts"]

    def put(self, part: Part) -> None:
        """Add ``part``, or replace the one with its id, and write the file."""
        check_part(part)
        self.data["parts"] = [other for other in self.parts if other["id"] != part["id"]] + [part]
        self._write()

    @property
    def wrong(self) -> bool:
        """Whether a part found numbers wrong, or could not compare what it should have."""
        return any(part["verdict"] in ("wrong", "failed") for part in self.parts)

    def _write(self) -> None:
        fresh = self.path.with_suffix(".tmp")
        try:
            fresh.write_text(json.dumps(self.data, indent=1) + "\n")
            os.replace(fresh, self.path)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> ValueError:
        return ValueError(f"cannot write to --out {self.path.parent}: {error.strerror}")


def read(path: Path) -> dict[str, Any]:
    """The document at ``path``, checked. Raises ValueError unless it is a result file of this schema."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, this fastconv reads {SCHEMA!r}")
    _check_fields(str(path), data, DOCUMENT)
    for part in data["parts"]:
        check_part(part)
    return data


def check_part(part: Part) -> None:
    """Raise ValueError if a part lacks what every reader relies on."""
    name = f"part {part.get('id')!r}" if isinstance(part, dict) else "a part"
    _check_fields(name, part, PART)
    if re.fullmatch(r"[\w.-]+", part["id"]) is None:  # it names a file
        raise ValueError(f"{name}: its id is no name")
    if part["kind"] not in KINDS:
        raise ValueError(f"{name} is of kind {part['kind']!r}, not one of {', '.join(KINDS)}")
    _check_fields(name, part, {key: list if key == "rows" else object for key in KINDS[part["kind"]]})
    for row in part.get("rows", ()):
        _check_fields(f"a row of {name}", row, {})
    if part["verdict"] not in VERDICTS:
        raise ValueError(f"{name} has verdict {part['verdict']!r}, not one of {', '.join(VERDICTS)}")


def _check_fields(name: str, value: Any, types: Mapping[str, Any]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")
    missing = types.keys() - value.keys()
    if missing:
        raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    for key, expected in types.items():
        if not isinstance(value[key], expected):
            raise ValueError(f"{name}, field {key}: {type(value[key]).__name__} is no {expected.__name__}")


def environment() -> dict[str, Any]:
    """What a figure depends on: machine, driver, versions, commit. Unknown entries are None."""
    import torch

    from fastconv.kernels.launch.device import here

    gpu = here.is_available()
    return {
        "gpu": here.get_device_name() if gpu else None,
        "multiprocessors": here.get_device_properties(0).multi_processor_count if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if gpu and here.real
        else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "torchvision": _installed("torchvision"),
        "python": platform.python_version(),
        "fastconv": _installed("fastconv"),
        "commit": commit(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
    }


def commit() -> str | None:
    """FASTCONV_COMMIT, for a copy without its repository; else what git says of the checkout that holds this file, or
    None."""
    told = os.environ.get("FASTCONV_COMMIT")
    # A checkout's .git is a folder, a worktree's a file. One further up is another project's.
    if told or not (CHECKOUT / ".git").exists():
        return told or None
    return _output("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
