"""What the store, tables and lock files hold: problems, measurements of configs, and what tuning found.

Records are data: read with every field checked, never evaluated. Nothing in one names code or a path.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from math import log2
from typing import Any, ClassVar

from fastconv.autotune import schema
from fastconv.autotune.gpus import Gpu
from fastconv.autotune.space import Config

SCHEMA = 1
# Why a config was not measured or its time does not count; each is final for its problem and version, but for memory,
# which another program may have held, and for what a busy or broken GPU may be the reason of, where that is wished.
OUT_OF_MEMORY = "out_of_memory"
RETRIED = ("crashed", "hung")
FAILURES = (OUT_OF_MEMORY, "wrong", *RETRIED, "failed", "spills", "too_large")
# Of sizes that halve or double: how far from each other two problems may be for one's config to serve the other.
BUCKET = 0.5
REACH = 6.0

_SIZE = schema.integer(0, 2**62)
_CONFIG = schema.mapping(schema.integer(0, 2**31 - 1))
_SECONDS = schema.number(1e-9, 1e6)
_PROBLEM = {
    "space": schema.text(),
    "kind": schema.mapping(schema.either(_SIZE, schema.text())),
    "channels": schema.mapping(_SIZE),
    "sizes": schema.mapping(_SIZE),
}
_DATE = schema.text(40)


@dataclass(frozen=True)
class ProblemKey:
    """A problem as tables know it. Within ``space``, what is of another ``kind`` has nothing to do with it; ``sizes``
    (batch and image) share a bucket where none differs by more than a factor of sqrt(2), if ``channels`` are equal.
    """

    space: str
    kind: tuple[tuple[str, int | str], ...]
    channels: tuple[tuple[str, int], ...]
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(
        cls, space: str, kind: Mapping[str, int | str], channels: Mapping[str, int], sizes: Mapping[str, int]
    ) -> ProblemKey:
        return cls(space, *(tuple(sorted(each.items())) for each in (kind, channels, sizes)))  # type: ignore[arg-type]

    @cached_property
    def json(self) -> dict[str, Any]:
        return {
            "space": self.space,
            "kind": dict(self.kind),
            "channels": dict(self.channels),
            "sizes": dict(self.sizes),
        }

    @cached_property
    def family(self) -> tuple[Any, ...]:
        """Equal for problems that can be compared at all."""
        return (self.space, self.kind, tuple(n for n, _ in self.channels), tuple(n for n, _ in self.sizes))

    def distance(self, other: ProblemKey) -> float:
        """In doublings, of a problem of the same family; a channel count weighs as much as two sizes."""
        return sum(
            weight * abs(log2(1 + a) - log2(1 + b))
            for weight, mine, others in ((2, self.channels, other.channels), (1, self.sizes, other.sizes))
            for (_, a), (_, b) in zip(mine, others, strict=True)
        )

    def same_bucket(self, other: ProblemKey) -> bool:
        return (
            self.family == other.family
            and self.channels == other.channels
            and all(
                abs(log2(1 + a) - log2(1 + b)) <= BUCKET for (_, a), (_, b) in zip(self.sizes, other.sizes, strict=True)
            )
        )

    def describe(self) -> str:
        """For a person: ``conv_gather N=32 H=56 ... C=64``."""
        values = (*self.sizes, *self.channels, *self.kind)
        return " ".join([self.space, *(f"{name}={value}" for name, value in values)])


@dataclass(frozen=True)
class Version:
    """Under which code a measurement was made. Under another it is stale: it seeds a search and serves nobody."""

    triton: str
    source: str  # hash of the kernel's source
    fp_fusion: bool
    policy: int  # of measuring

    @cached_property
    def json(self) -> dict[str, Any]:
        return {"triton": self.triton, "source": self.source, "fp_fusion": self.fp_fusion, "policy": self.policy}


VERSION = {
    "triton": schema.text(40),
    "source": schema.text(64),
    "fp_fusion": schema.boolean,
    "policy": schema.integer(1, 10**6),
}


@dataclass(frozen=True)
class Record:
    """A line of the store. ``gpu`` is named as by ``Gpu``; parts of one GPU (MIG) differ in multiprocessors."""

    kind: ClassVar[str]
    fields: ClassVar[Mapping[str, schema.Check]]

    problem: ProblemKey
    gpu: str
    multiprocessors: int
    version: Version

    def of_gpu(self, gpu: Gpu) -> bool:
        return (self.gpu, self.multiprocessors) == (gpu.name, gpu.multiprocessors)

    @property
    def values(self) -> dict[str, Any]:
        """The JSON of a subclass's own fields."""
        return {}

    @property
    def json(self) -> dict[str, Any]:
        # Readers look for the first two fields where they want one kind of record among many.
        return {
            "schema": SCHEMA,
            "record": self.kind,
            "gpu": self.gpu,
            "multiprocessors": self.multiprocessors,
            "problem": self.problem.json,
            "version": self.version.json,
            **self.values,
        }

    @cached_property
    def line(self) -> str:
        return schema.dump(self.json)


@dataclass(frozen=True)
class Untuned(Record):
    """A problem that a program met and no table knew."""

    kind = "met"
    fields = {"date": _DATE}  # noqa: RUF012
    date: str

    @property
    def values(self) -> dict[str, Any]:
        return {"date": self.date}


@dataclass(frozen=True)
class Measured(Record):
    """One measurement of one config, or why there is none."""

    kind = "measured"
    fields = {  # noqa: RUF012
        "config": schema.optional(_CONFIG),
        "status": schema.one_of("ok", *FAILURES),
        "seconds": schema.optional(_SECONDS),
        "predicted": schema.optional(_SECONDS),
        "date": _DATE,
    }
    config: Config | None  # None: PyTorch's own op
    status: str  # "ok" or one of FAILURES
    seconds: float | None  # where status is "ok"
    predicted: float | None  # by the cost model, when it was measured
    date: str

    @property
    def values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.fields}


@dataclass(frozen=True)
class Tuned(Record):
    """What a search found for one problem, in times of one last paired run."""

    kind = "tuned"
    fields = {  # noqa: RUF012
        "config": _CONFIG,
        "seconds": _SECONDS,
        "default": _CONFIG,
        "default_seconds": _SECONDS,
        "also": schema.listing(schema.record({"config": _CONFIG, "seconds": _SECONDS}), 16),
        "pytorch": schema.optional(_SECONDS),
        "noise": schema.number(0, 1e3),
        "measurements": schema.integer(0, 10**6),
        "date": _DATE,
        "fastconv": schema.text(60),
    }
    config: Config  # the winner; the default unless it was beaten by more than the noise
    seconds: float
    default: Config
    default_seconds: float
    also: tuple[tuple[Config, float], ...]  # other good ones, fastest first, in times of earlier rounds
    pytorch: float | None  # seconds of PyTorch's own op
    noise: float  # A/A, relative
    measurements: int  # how many configs' times it rests on
    date: str
    fastconv: str  # version or commit

    @property
    def values(self) -> dict[str, Any]:
        also = [{"config": dict(config), "seconds": seconds} for config, seconds in self.also]
        return {name: getattr(self, name) for name in self.fields} | {"also": also}


_KINDS: dict[str, type[Record]] = {each.kind: each for each in (Untuned, Measured, Tuned)}
KINDS = tuple(_KINDS)


@functools.cache
def _check(kind: str) -> schema.Check:
    return schema.record(
        {
            "schema": schema.integer(1, SCHEMA),
            "record": schema.one_of(kind),
            "gpu": schema.text(),
            "multiprocessors": schema.integer(1, 10**5),
            "problem": schema.record(_PROBLEM),
            "version": schema.record(VERSION),
            **_KINDS[kind].fields,
        }
    )


def from_json(value: Any, where: str) -> Record:
    """The record, every field checked. Raises SchemaError, NewerSchema where a newer fastconv wrote it."""
    schema.check_version(value, SCHEMA, where, "schema")
    kind = schema.one_of(*KINDS)(value.get("record"), f"{where}.record")
    value = _check(kind)(value, where)
    values = {name: value[name] for name in _KINDS[kind].fields}
    if kind == "tuned":
        values["also"] = tuple((each["config"], each["seconds"]) for each in values["also"])
    if kind == "measured" and (values["status"] == "ok") != (values["seconds"] is not None):
        raise schema.SchemaError(f"{where}.seconds: a time belongs to the status ok and to no other")
    return _KINDS[kind](
        ProblemKey.of(**value["problem"]),
        value["gpu"],
        value["multiprocessors"],
        Version(**value["version"]),
        **values,
    )


def from_line(line: bytes, where: str) -> Record:
    """The record of a line of the store. Raises SchemaError."""
    return from_json(schema.parse(line, where), where)


def now() -> str:
    """The date as records have it, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
