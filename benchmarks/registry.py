"""The benchmarks: an operator is one declaration in `ENTRIES`, a side that runs it one in `PROVIDERS`.

``--provider`` takes a provider's name, and result files hold it. ``fastconv:gather`` is fastconv with one family of
kernels; `fastconv.kernels.dispatch` has the families' names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch.nn import functional as F

import fastconv.functional
from fastconv.benchmarks.calls import Operator
from fastconv.benchmarks.layer_lists import LayerList, find
from fastconv.benchmarks.models import channels_last
from fastconv.kernels.dispatch import FAMILIES, only_family

Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Provider:
    """A side that runs operators: its function for one of them, and the layout of its operands."""

    name: str
    function: Callable[[Operator], Function]
    layout: Callable[[torch.Tensor], torch.Tensor]
    family: str | None = None  # the only one of kernels that serves

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastconv")

    def serving(self) -> contextlib.AbstractContextManager[None]:
        """The context that it runs in: forward, backward and planning."""
        return only_family(self.family) if self.family else contextlib.nullcontext()


def _ours(operator: Operator) -> Function:
    return getattr(fastconv.functional, operator.function)


def _theirs(operator: Operator) -> Function:
    return getattr(F, operator.function)


def _compiled(operator: Operator) -> Function:
    theirs = _theirs(operator)

    # A new function for each operator, because torch.compile keeps what it makes by function.
    def compilable(*operands: Any, **keywords: Any) -> Any:
        return theirs(*operands, **keywords)

    # Without a GPU this is a dry run, which Inductor would spend on compiling C++.
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(compilable, backend=backend, dynamic=False)


# Everything is held against cuDNN's time on channels_last. Contiguous operands are NCHW.
OURS, OURS_NCHW, EAGER, EAGER_NCHW, COMPILED = "fastconv", "fastconv-nchw", "eager", "eager-nchw", "compile"
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(EAGER, _theirs, channels_last),
        Provider(OURS, _ours, channels_last),
        Provider(OURS_NCHW, _ours, torch.Tensor.contiguous),
        Provider(EAGER_NCHW, _theirs, torch.Tensor.contiguous),
        Provider(COMPILED, _compiled, channels_last),
    )
}


def providers(names: Iterable[str]) -> tuple[Provider, ...]:
    """The providers called so, the yardstick before them. Raises ValueError with those there are for an unknown one, or
    if none is fastconv's."""
    families = dict.fromkeys(family.name for listed in FAMILIES.values() for family in listed)
    single = (replace(PROVIDERS[OURS], name=f"{OURS}:{family}", family=family) for family in families)
    known = PROVIDERS | {provider.name: provider for provider in single}
    chosen = dict.fromkeys((EAGER, *names))
    for name in chosen:
        if name not in known:
            raise ValueError(f"--provider {name!r} is not one of {', '.join(known)}")
    if not any(known[name].ours for name in chosen):
        ours = ", ".join(name for name in known if known[name].ours)
        raise ValueError(f"--provider names none of fastconv's: {ours}")
    return tuple(known[name] for name in chosen)


@dataclass(frozen=True)
class Entry:
    """Operators that are alike: their layer lists, the providers that run them, and what is owed."""

    name: str
    lists: tuple[str, ...]  # layer lists, by name
    takes: Callable[[Operator], bool]  # which of their calls
    speed: float  # owed, relative to the fastest of ``rivals``
    rivals: tuple[str, ...]
    share: float | None = None  # owed of a copy's bandwidth if tensors are large
    batches: tuple[int, ...] = (64,)
    turn: int = 1  # cases in the entry's turn, when entries take turns
    providers: tuple[str, ...] = tuple(PROVIDERS)


ENTRIES = (
    Entry(
        "dense",
        ("resnet50", "vgg16", "unet"),
        lambda call: call.groups == 1 and not call.first,
        speed=0.6,
        rivals=(EAGER,),
        batches=(64, 256),
        turn=3,
    ),
    Entry(
        "pool",
        ("resnet50", "vgg16", "googlenet"),
        lambda call: call.pool,
        speed=1.0,
        rivals=(EAGER, EAGER_NCHW, COMPILED),
        share=0.85,
    ),
    Entry(
        "depthwise",
        ("mobilenet_v2", "efficientnet_b0", "convnext_tiny"),
        lambda call: 1 < call.groups == call.input[1],
        speed=2.0,
        rivals=(EAGER,),
        share=0.85,
    ),
    Entry(
        "grouped",
        ("resnext50_32x4d",),
        lambda call: 1 < call.groups < call.input[1],
        speed=1.5,
        rivals=(EAGER, EAGER_NCHW),
    ),
    Entry(
        "first-layer",
        ("resnet50", "vgg16", "unet", "efficientnet_b0"),
        lambda call: call.first,
        speed=1.0,
        rivals=(EAGER, EAGER_NCHW),
        batches=(64, 256),
    ),
)


@dataclass(frozen=True)
class Target:
    """What the layers of some networks together owe against eager channels_last: a geometric mean of each direction's
    speeds, weighted by how often a layer occurs, and a least speed."""

    lists: tuple[str, ...]
    batches: tuple[int, ...]
    means: Mapping[str, float]
    least: float

    def layers(self, direction: str) -> int:
        """How many distinct layers have the direction, each batch counted."""
        found = {call for name in self.lists for call in find(name).calls if direction in call.directions}
        return len(found) * len(self.batches)


TARGET = Target(("resnet50", "vgg16", "unet"), (64, 256), {"fprop": 0.9, "dgrad": 0.85, "wgrad": 0.85}, least=0.6)


def entries(names: Iterable[str]) -> tuple[Entry, ...]:
    """The entries called so, in their own order; all of them for "all" and for no name. Raises ValueError with those
    there are."""
    chosen = set(names) or {"all"}
    known = ["all", *(entry.name for entry in ENTRIES)]
    for name in sorted(chosen.difference(known)):
        raise ValueError(f"--ops {name!r} is not one of {', '.join(known)}")
    return tuple(entry for entry in ENTRIES if {entry.name, "all"} & chosen)


@dataclass(frozen=True)
class Case:
    """An operator to be measured, and how often each network calls it. With an enlarged batch no network does."""

    entry: Entry
    operator: Operator
    networks: Mapping[str, int]
    batch: int


def cases(chosen: Iterable[Entry], layers: Callable[[str], LayerList], dtype: torch.dtype) -> list[Case]:
    """The cases of each entry, the most telling first. Entries take turns.

    The most telling have a batch that no cache holds and owe a bandwidth. Then come layers by the share of their
    network's time that elements and products tell, networks in turn; all batches of a layer before the next layer.
    """
    kept: dict[str, LayerList] = {}
    columns = []
    for entry in chosen:
        found: dict[Operator, dict[str, int]] = {}
        ranks: dict[Operator, int] = {}
        for name in entry.lists:
            if name not in kept:
                kept[name] = layers(name)
            taken = {call: count for call, count in kept[name].calls.items() if entry.takes(call)}
            for rank, call in enumerate(sorted(taken, key=lambda call: -taken[call] * _effort(call))):
                found.setdefault(call, {})[kept[name].network] = taken[call]
                ranks[call] = min(rank, ranks.get(call, rank))
        ordered = sorted(found, key=lambda call: ranks[call])
        scaled = ((call, call.with_batch(n * call.batch)) for call in ordered for n in entry.batches)
        each = [Case(entry, operator, found[call], operator.batch) for call, operator in scaled]
        large = [case.operator.enlarged(dtype.itemsize) for case in each if case.operator.streams and entry.share]
        column = [Case(entry, call, {}, call.batch) for call in dict.fromkeys(large) if call is not None] + each
        columns.append([column[i : i + entry.turn] for i in range(0, len(column), entry.turn)])
    return [case for turn in zip_longest(*columns, fillvalue=()) for some in turn for case in some]


def tiny(found: Iterable[Case]) -> list[Case]:
    """The first case of each entry that a network has, small enough to be interpreted."""
    first: dict[str, Case] = {}
    for case in found:
        if case.networks:
            first.setdefault(case.entry.name, replace(case, operator=case.operator.tiny()))
    return list(first.values())


def _effort(call: Operator) -> float:
    """A layer's time, for comparing layers: its elements, or its products if they take longer at 200 operations a byte
    of two-byte elements."""
    return max(call.elements, call.multiplications / 200)
