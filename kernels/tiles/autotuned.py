"""The kernels' adapter to the autotuner: a problem as tables spell it, the version of its code, the user's policy."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import triton
import triton.language as tl

from fastconv.autotune import Adapter, Choice, Config, Gpu, Policy, ProblemKey, Space, Version, Work
from fastconv.autotune import choose as ask
from fastconv.autotune.adapter import MEASURING, TUNE
from fastconv.autotune.choose import by_cost_model
from fastconv.autotune.tune import PROCEDURE
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.device import here
from fastconv.kernels.launch.launch import decided, deciding
from fastconv.kernels.problem.windows import KeyParts
from fastconv.kernels.tiles import ranks
from fastconv.kernels.tiles.shapes import TileSpace, kernels_of


@runtime_checkable
class Keyed(Protocol):
    """A feature of a problem that says itself how tables spell it."""

    @property
    def key_parts(self) -> KeyParts: ...


def problem_of(space: str, features: Any) -> ProblemKey:
    """The problem as tables spell it, from the features that its tile is chosen by."""
    kind: dict[str, int | str] = {}
    channels: dict[str, int] = {}
    sizes: dict[str, int] = {}
    if space.startswith("pass"):
        sizes["pixels"], channels["C"], kind["element"], kind["moved"] = features
        return ProblemKey.of(space, kind, channels, sizes)
    for each in (features,) if isinstance(features, Keyed) else features:
        if isinstance(each, Keyed):
            parts = each.key_parts
            kind, channels, sizes = kind | parts.kind, channels | parts.channels, sizes | parts.sizes
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


@cache
def version_of(space: str) -> Version:
    """The version of a measurement in this space."""
    # True: every launch has products and sums fused.
    return Version(triton.__version__, source_hash(kernels_of(space)), True, PROCEDURE)


@cache
def source_hash(kernels: tuple[Any, ...]) -> str:
    """The hash of all code that is compiled for ``kernels``: no comment and no launcher makes measurements stale."""
    text = "\n".join(f"{name} {code}" for name, code in sorted(compiled_code(kernels).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compiled_code(kernels: Iterable[Any]) -> dict[str, str]:
    """Name -> code of each kernel and of all jit functions and constants that it names, directly or through others."""
    found: dict[str, str] = {}
    waiting = [(kernel.fn.__name__, kernel) for kernel in kernels]
    while waiting:
        name, it = waiting.pop()
        if name in found:
            continue
        if isinstance(it, tl.constexpr):
            found[name] = repr(it.value)
        elif hasattr(it, "fn"):
            code = ast.parse(inspect.getsource(it.fn)).body[0]
            assert isinstance(code, ast.FunctionDef)
            if ast.get_docstring(code) is not None and len(code.body) > 1:
                del code.body[0]
            found[name] = ast.unparse(code)
            named = sorted({each.id for each in ast.walk(code) if isinstance(each, ast.Name)})
            waiting += [(each, it.fn.__globals__[each]) for each in named if each in it.fn.__globals__]
    return found


# Tells the asking thread's settings (prefer, tune, numerics): settings live above the kernels.
_user_policy: list[Callable[[], tuple[str, str, str]]] = []


def set_user_policy(policy: Callable[[], tuple[str, str, str]]) -> None:
    """Take (prefer, tune, numerics) of the asking thread from ``policy()``."""
    _user_policy[:] = [policy]


def policy() -> Policy:
    """What the asking thread's choices are made by."""
    prefer, tune, numerics = _user_policy[0]() if _user_policy else ("fastest", "cached", "fast")
    if tune in MEASURING:
        # A capture can measure nothing. Ranks that measured by their own clocks would disagree.
        capturing = here.is_available() and here.is_current_stream_capturing()
        tune = "cached" if capturing else ranks.may_measure(tune)
    return _POLICIES[prefer, tune, numerics, torch.are_deterministic_algorithms_enabled()]


_POLICIES = {
    (prefer, tune, numerics, ordered): Policy(tune, ordered or numerics == "stable", prefer == "fastest")
    for prefer, tune, numerics, ordered in product(("fastest", "triton"), TUNE, ("fast", "stable"), (False, True))
}


def live(gpu: Gpu) -> bool:
    """Whether this process runs on ``gpu`` and can measure there."""
    if interpreter.interpreting() or deciding() or not here.is_available():
        return False
    return gpu.name == here.get_device_name()


ADAPTER = Adapter(problem_of, version_of, policy, live, ranks.agree, ranks.joined)


class Candidates(NamedTuple):
    """What a problem's tile is chosen from."""

    space: TileSpace
    features: Hashable  # identify the problem
    work: Callable[[Config], Work]  # the work of a config
    gpu: Gpu
    at_least: Mapping[str, int] = {}  # length that a parameter must cover: its smallest value that does

    @property
    def narrowed(self) -> TileSpace:
        space = self.space.for_interpreter if self.gpu.interpreted else self.space
        return space.narrowed(at_least=self.at_least)


# (space, features, work, gpu, chosen) -> the choice that is taken, as `considering` lets it.
Consider = Callable[[Space, Hashable, Callable[[Config], Work], Gpu, Choice], Choice]
_considering: list[Consider] = []


@contextlib.contextmanager
def considering(consider: Consider) -> Iterator[None]:
    """Let ``consider`` replace the chosen tile inside this block, on every thread.

    Calls already kept keep their tiles, so also enter `decisions`.
    """
    _considering.append(consider)
    try:
        yield
    finally:
        _considering.remove(consider)


def choose(candidates: Candidates) -> Choice:
    """The candidate that tables or the cost model choose, or what `considering` makes of it."""
    space, features, work, gpu = candidates.narrowed, *candidates[1:4]
    choice = ask(space, features, work, gpu, ADAPTER)
    for consider in _considering:
        choice = consider(space, features, work, gpu, choice)
    return decided(choice)


def predicted(candidates: Candidates) -> float:
    """Seconds of the best candidate by the cost model only: families compare alike on every machine."""
    return by_cost_model(candidates.narrowed, candidates.work, candidates.gpu).seconds
