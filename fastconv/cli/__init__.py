"""The command ``fastconv``. Exit codes: 0 fine, 1 a wrong result, 2 bad usage (one line on stderr)."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import fastconv
from fastconv.cli.errors import BadUsage
from fastconv.cli.interpreter import STAND_IN, enter_interpreter, leave_interpreter

COMMANDS = ("bench", "cache", "check", "explain", "inspect", "tune")
# Commands that run kernels on a GPU, or interpret them without one.
NUMERIC = ("bench", "check", "explain")
# Commands that compile for GPUs that need not be here.
COMPILING = ("inspect", "tune")
# Variables of the environment beside the settings'.
VARIABLES = ("FASTCONV_CACHE_DIR", "FASTCONV_COMMIT", STAND_IN, "FASTCONV_LOCK")
INTERRUPTED = "interrupted; what was finished has been written"


def main() -> None:
    """The console entry. Without a GPU it starts over with Triton's interpreter on, before torch is imported."""
    if sys.argv[1:2] and not {"--help", "-h"} & set(sys.argv):
        if sys.argv[1] in NUMERIC:
            enter_interpreter()
        elif sys.argv[1] in COMPILING:
            leave_interpreter()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line in this process and return its exit code. Imports only the named command's file."""
    if arguments[:1] == ["--version"]:
        print(f"fastconv {fastconv.__version__}")
        return 0
    if find_spec("typer") is None or find_spec("rich") is None:
        return refuse("the commands need typer and rich: pip install 'fastconv[cli]'")
    import typer

    # Click's class, or newer typers' copy of it.
    usage_error: Any = typer.BadParameter.__bases__[0]
    try:
        if arguments and not {"--help", "-h"} & set(arguments):
            _check_environment(arguments[0])
        # A command's return value is its exit code; --help returns 0 or None.
        command = typer.main.get_command(_app(arguments))
        code = command.main(arguments or ["--help"], "fastconv", standalone_mode=False) or 0
        # Newer typers turn a KeyboardInterrupt into this code, and say nothing.
        return refuse(INTERRUPTED, code) if code == 130 else code
    except (usage_error, BadUsage) as error:
        return refuse(" ".join((error.format_message() if isinstance(error, usage_error) else str(error)).split()))
    except (typer.Abort, KeyboardInterrupt):
        return refuse(INTERRUPTED, 130)


def _check_environment(command: str) -> None:
    """Raise BadUsage if a variable, the lock file or the platform is wrong, before torch takes seconds to import."""
    try:
        import fastconv.kernels

        if os.environ.get(STAND_IN):
            import fastconv.kernels.launch.device  # noqa: F401
    except (ImportError, RuntimeError, ValueError) as error:  # the latter two are a stand-in's
        raise BadUsage(str(error)) from error
    try:
        from fastconv.settings import Values

        known = [*VARIABLES, *(f"FASTCONV_{name.upper()}" for name in Values._fields)]
        for name in set(os.environ).difference(known):
            if name.startswith("FASTCONV_") and (close := get_close_matches(name, known, n=1)):
                raise BadUsage(f"the environment variable {name} means nothing; {close[0]} does")
        if command in (*NUMERIC, *COMPILING) and os.environ.get("FASTCONV_LOCK"):
            from fastconv.autotune.known import lock_entries

            lock_entries()
    except OSError as error:
        raise BadUsage(f"{error.strerror}: {error.filename}") from error
    except ValueError as error:
        raise BadUsage(str(error)) from error


def refuse(line: str, code: int = 2) -> int:
    """Say ``line`` on stderr and return ``code``."""
    print(f"fastconv: {line}", file=sys.stderr)
    return code


def _app(arguments: list[str]):  # type: ignore[no-untyped-def]  # typer comes with an extra
    from importlib import import_module

    import typer

    app = typer.Typer(help="Convolutions in Triton for PyTorch.", add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def _group(version: bool = typer.Option(False, "--version", help="Print the version, and nothing else.")) -> None:
        """Convolutions in Triton for PyTorch."""

    for name in [name for name in COMMANDS if name in arguments[:1]] or COMMANDS:
        command = getattr(import_module(f"fastconv.cli.{name}"), name)
        app.command(name)(command)
    return app
