"""What kernels tell the autotuner: their problems as tables know them, and under which code they are measured."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Hashable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from fastconv.autotune import Adapter, Choice, Config, Gpu, Policy, ProblemKey, Space, Version, Work
from fastconv.autotune import choose as ask
from fastconv.autotune.adapter import MEASURING, TUNE
from fastconv.autotune.tune import PROCEDURE
from fastconv.kernels import mend, ranks
from fastconv.kernels.conv_rows import Rows
from fastconv.kernels.launch import deciding
from fastconv.kernels.problem import ConvProblem, PoolProblem

# The files whose kernels a space is of, by the beginning of its name, where no file is called as that begins.
FILES = {"pass": ("batch_norm", "reduce"), "pool": ("pool_window", "pool_gradient")}
_SPATIAL = {1: "W", 2: "HW", 3: "DHW"}
_OUTPUTS = {1: "Q", 2: "PQ", 3: "OPQ"}


def problem_of(space: str, features: Any) -> ProblemKey:
    """The problem that a tile function asks about, as tables know it."""
    kind: dict[str, int | str] = {}
    channels: dict[str, int] = {}
    sizes: dict[str, int] = {}
    if isinstance(features, ConvProblem):
        features = (features,)
    if space.startswith("pass"):
        sizes["pixels"], channels["C"], kind["element"], kind["moved"] = features
        return ProblemKey.of(space, kind, channels, sizes)
    for each in features:
        if isinstance(each, ConvProblem):
            _geometry(kind, sizes, each, each.filter_size)
            channels |= {"C": each.in_channels, "K": each.out_channels}
            # Loads are as wide as channels divide: what divides otherwise is another kernel.
            kind |= {
                "groups": each.groups,
                "C_divides": _power(each.in_channels),
                "K_divides": _power(each.out_channels),
            }
        elif isinstance(each, PoolProblem):
            _geometry(kind, sizes, each, each.window)
            channels["C"] = each.channels
            kind |= {"pool": each.kind, "C_divides": _power(each.channels), "adaptive": int(each.adaptive)}
            kind |= {"index": "none" if each.index is None else _name(each.index), "divisor": each.divisor}
            kind |= {"include_padding": int(each.include_padding), "norm": f"p{each.norm!r}"}
        elif isinstance(each, Rows):
            kind |= {f"rows_{name}": getattr(each, name) for name in ("columns", "vec", "shift", "used", "run")}
        elif isinstance(each, bool):
            kind["channels_last"] = int(each)
        elif isinstance(each, int):
            kind["pack"] = each
        elif each in ("ieee", "tf32"):
            kind["precision"] = each
        elif isinstance(each, str):
            kind["direction"] = each
        else:
            raise TypeError(f"the space {space!r}: no table knows what {each!r} is")
    return ProblemKey.of(space, kind, channels, sizes)


def _geometry(
    kind: dict[str, int | str], sizes: dict[str, int], problem: ConvProblem | PoolProblem, window: tuple[int, ...]
) -> None:
    kind |= {"dtype": _name(problem.dtype), "window": _by(window)}
    kind |= {name: _by(getattr(problem, name)) for name in ("stride", "padding", "dilation")}
    sizes["N"] = problem.batch
    sizes |= dict(zip(_SPATIAL[problem.rank], problem.input_size, strict=True))
    sizes |= dict(zip(_OUTPUTS[problem.rank], problem.output_size, strict=True))


def conv_of(problem: ProblemKey) -> ConvProblem:
    """The convolution that `problem_of` wrote down. Raises KeyError, ValueError where it was another operator."""
    kind, sizes, channels = dict(problem.kind), dict(problem.sizes), dict(problem.channels)
    split = {name: _sizes(kind[name]) for name in ("window", "stride", "padding", "dilation")}
    rank = len(split["window"])
    return ConvProblem(
        batch=sizes["N"],
        in_channels=channels["C"],
        out_channels=channels["K"],
        groups=int(kind["groups"]),
        input_size=tuple(sizes[name] for name in _SPATIAL[rank]),
        filter_size=split["window"],
        output_size=tuple(sizes[name] for name in _OUTPUTS[rank]),
        stride=split["stride"],
        padding=split["padding"],
        dilation=split["dilation"],
        dtype=_DTYPES[str(kind["dtype"])],
    )


def pool_of(problem: ProblemKey) -> PoolProblem:
    """The pool that `problem_of` wrote down. Raises KeyError, ValueError where it was another operator."""
    kind, sizes, channels = dict(problem.kind), dict(problem.sizes), dict(problem.channels)
    split = {name: _sizes(kind[name]) for name in ("window", "stride", "padding", "dilation")}
    rank = len(split["window"])
    return PoolProblem(
        kind=str(kind["pool"]),
        batch=sizes["N"],
        channels=channels["C"],
        input_size=tuple(sizes[name] for name in _SPATIAL[rank]),
        output_size=tuple(sizes[name] for name in _OUTPUTS[rank]),
        window=split["window"],
        stride=split["stride"],
        padding=split["padding"],
        dilation=split["dilation"],
        dtype=_DTYPES[str(kind["dtype"])],
        adaptive=bool(kind["adaptive"]),
        index=None if kind["index"] == "none" else _DTYPES[str(kind["index"])],
        divisor=int(kind["divisor"]),
        include_padding=bool(kind["include_padding"]),
        norm=float(str(kind["norm"])[1:]),
    )


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int16, torch.int32, torch.int64)
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _power(channels: int) -> int:
    """The largest power of two to 16 that divides."""
    return min(16, channels & -channels)


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) or "none"


def _sizes(text: int | str) -> tuple[int, ...]:
    return () if text == "none" else tuple(map(int, str(text).split("x")))


@cache
def version_of(space: str) -> Version:
    """The code that a problem of this space would be measured under."""
    # Every launch has products and sums fused.
    return Version(triton.__version__, source_hash(files_of(space)), True, PROCEDURE)


def files_of(space: str) -> tuple[str, ...]:
    """The files of this folder, by their stems, whose kernels the space is of."""
    for name, files in FILES.items():
        if space.startswith(name):
            return files
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return (max((stem for stem in stems if space.startswith(stem)), key=len, default=space),)


@cache
def source_hash(files: tuple[str, ...]) -> str:
    """Of all that is compiled for these files' launchers: its code alone, so that neither a comment nor a launcher
    makes measurements stale."""
    text = "\n".join(f"{key} {code}" for key, code in sorted(compiled_for(files).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compiled_for(files: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """(file, name) -> the code of each kernel that functions of these files launch, of those of other files that they
    call to launch more, and of all that kernels call and name."""
    found: dict[tuple[str, str], str] = {}
    waiting = [(file, name) for file in files for name, it in _names(file).items() if isinstance(it, ast.FunctionDef)]
    met: set[tuple[str, str]] = set()
    while waiting:
        file, name = key = waiting.pop()
        it = _names(file).get(name)
        if it is None or key in met:
            continue
        met.add(key)
        if isinstance(it, tuple):
            waiting.append(it)
            continue
        if isinstance(it, ast.AnnAssign) or any("jit" in ast.unparse(each) for each in it.decorator_list):
            found[key] = ast.unparse(it)
        waiting += [(file, each.id) for each in ast.walk(it) if isinstance(each, ast.Name)]
    return found


@cache
def _names(file: str) -> dict[str, ast.FunctionDef | ast.AnnAssign | tuple[str, str]]:
    """What a file of this folder names: functions without their docstrings, constants that kernels may use, and
    (file, name) of what it imports from another one."""
    path = Path(__file__).with_name(f"{file}.py")
    found: dict[str, ast.FunctionDef | ast.AnnAssign | tuple[str, str]] = {}
    for node in ast.parse(path.read_bytes()).body if path.is_file() else ():
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None and len(node.body) > 1:
                del node.body[0]
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and "constexpr" in ast.unparse(node.annotation):
            found[ast.unparse(node.target)] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastconv.kernels."):
            other = str(node.module).rpartition(".")[2]
            found |= {each.asname or each.name: (other, each.name) for each in node.names}
    return found


# Who tells what the user set: (prefer, tune, numerics) for the thread that asks.
_user_policy: list[Callable[[], tuple[str, str, str]]] = []


def set_user_policy(policy: Callable[[], tuple[str, str, str]]) -> None:
    """Let ``policy()`` tell what the user set, for the thread that asks: settings are not the kernels'."""
    _user_policy[:] = [policy]


def policy() -> Policy:
    """What choices are made by, for the thread that asks."""
    prefer, tune, numerics = _user_policy[0]() if _user_policy else ("fastest", "cached", "fast")
    if tune in MEASURING:
        # Ranks that measured by their own clock would disagree; what is captured must be known.
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        tune = "cached" if capturing else ranks.may_measure(tune)
    return _POLICIES[prefer, tune, numerics, torch.are_deterministic_algorithms_enabled()]


_POLICIES = {
    (prefer, tune, numerics, ordered): Policy(tune, ordered or numerics == "stable", prefer == "fastest")
    for prefer, tune, numerics, ordered in product(("fastest", "triton"), TUNE, ("fast", "stable"), (False, True))
}


def live(gpu: Gpu) -> bool:
    """Whether this process runs on ``gpu`` and is not only asked what it would do."""
    if mend.interpreting() or deciding() or not torch.cuda.is_available():
        return False
    return gpu.name == torch.cuda.get_device_name()


ADAPTER = Adapter(problem_of, version_of, policy, live, ranks.agree, ranks.joined)


def choose(space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu) -> Choice:
    """`fastconv.autotune.choose` for kernels' problems."""
    return ask(space, features, work, gpu, ADAPTER)
