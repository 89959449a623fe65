"""What the store, tables and lock files hold: problems, measurements of configs, and what tuning found.

Records are data: every field is checked when it is read, none is evaluated, none names code or a path.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from math import log2
from typing import Annotated, Any, ClassVar

from fastconv.autotune import schema
from fastconv.autotune.gpus import Gpu
from fastconv.autotune.space import Config

SCHEMA = 1
# Why a config has no time. Failures are final for a problem and version, except: the next run retries out of memory,
# because another program may have held it; --again retries crashed and hung.
OUT_OF_MEMORY = "out_of_memory"
RETRIED = ("crashed", "hung")
FAILURES = (OUT_OF_MEMORY, "wrong", *RETRIED, "failed", "spills", "too_large")
# Doublings of sizes that two problems may be apart for one's config to serve the other.
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
Date = Annotated[str, schema.text(40)]
Seconds = Annotated[float, _SECONDS]
AnyConfig = Annotated[Config, _CONFIG]


@dataclass(frozen=True)
class ProblemKey:
    """A problem as tables know it. One of another ``space`` or ``kind`` says nothing about it. Two with equal
    ``channels`` share a bucket if no size of batch and image differs by more than a factor of sqrt(2)."""

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
        return {"space": self.space} | {name: dict(getattr(self, name)) for name in ("kind", "channels", "sizes")}

    @cached_property
    def comparable(self) -> tuple[Any, ...]:
        """Equal for problems that have a distance."""
        return (self.space, self.kind, tuple(n for n, _ in self.channels), tuple(n for n, _ in self.sizes))

    def distance(self, other: ProblemKey) -> float:
        """In doublings, from a problem that is comparable; a channel count weighs as much as two sizes."""
        return sum(
            weight * abs(log2(1 + a) - log2(1 + b))
            for weight, mine, others in ((2, self.channels, other.channels), (1, self.sizes, other.sizes))
            for (_, a), (_, b) in zip(mine, others, strict=True)
        )

    def same_bucket(self, other: ProblemKey) -> bool:
        return (
            self.comparable == other.comparable
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
    """The code that was measured. A measurement of other code is stale: it seeds a search and serves nobody."""

    triton: Annotated[str, schema.text(40)]
    source: Annotated[str, schema.text(64)]  # hash of the kernel's source
    fp_fusion: Annotated[bool, schema.boolean]
    policy: Annotated[int, schema.integer(1, 10**6)]  # number of the procedure that measures

    @cached_property
    def json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in VERSION}


VERSION = schema.checks(Version)
Identity = tuple[ProblemKey, str, int, Version]


@dataclass(frozen=True)
class Record:
    """A line of the store. ``gpu`` is a `Gpu`'s name; parts of one GPU (MIG) differ in multiprocessors."""

    kind: ClassVar[str]
    fields: ClassVar[dict[str, schema.Check]]  # a subclass's own

    problem: ProblemKey
    gpu: str
    multiprocessors: int
    version: Version

    def __init_subclass__(cls) -> None:
        cls.fields = schema.checks(cls)

    @property
    def identity(self) -> Identity:
        return self.problem, self.gpu, self.multiprocessors, self.version

    def of_gpu(self, gpu: Gpu) -> bool:
        return (self.gpu, self.multiprocessors) == (gpu.name, gpu.multiprocessors)

    @property
    def values(self) -> dict[str, Any]:
        """The JSON of a subclass's own fields."""
        return {name: getattr(self, name) for name in self.fields}

    @property
    def json(self) -> dict[str, Any]:
        # Readers that want one kind of record look for the first two fields.
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
    date: Date


@dataclass(frozen=True)
class Measured(Record):
    """One measurement of one config, or why there is none."""

    kind = "measured"
    config: Annotated[Config | None, schema.optional(_CONFIG)]  # None: PyTorch's own op
    status: Annotated[str, schema.one_of("ok", *FAILURES)]
    seconds: Annotated[float | None, schema.optional(_SECONDS)]  # None unless status is "ok"
    predicted: Annotated[float | None, schema.optional(_SECONDS)]  # by the cost model of that time
    date: Date


@dataclass(frozen=True)
class Tuned(Record):
    """What a search found for one problem, in times of one last paired run."""

    kind = "tuned"
    config: AnyConfig  # the winner; the default unless it was beaten by more than the noise
    seconds: Seconds
    default: AnyConfig
    default_seconds: Seconds
    # Other good ones, fastest first, in times of earlier rounds.
    also: Annotated[
        tuple[tuple[Config, float], ...], schema.listing(schema.record({"config": _CONFIG, "seconds": _SECONDS}), 16)
    ]
    pytorch: Annotated[float | None, schema.optional(_SECONDS)]  # PyTorch's own op
    noise: Annotated[float, schema.number(0, 1e3)]  # A/A, relative
    measurements: Annotated[int, schema.integer(0, 10**6)]  # how many configs' times it rests on
    date: Date
    fastconv: Annotated[str, schema.text(60)]  # version or commit

    @property
    def pytorch_faster(self) -> bool:
        """By more than the noise."""
        return self.pytorch is not None and self.pytorch * (1 + self.noise) < self.seconds

    @property
    def values(self) -> dict[str, Any]:
        also = [{"config": dict(config), "seconds": seconds} for config, seconds in self.also]
        return super().values | {"also": also}


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
    """The record, every field checked. Raises SchemaError; NewerSchema if a newer fastconv wrote it."""
    schema.check_version(value, SCHEMA, where, "schema")
    kind = schema.one_of(*KINDS)(value.get("record"), f"{where}.record")
    value = _check(kind)(value, where)
    values = {name: value[name] for name in _KINDS[kind].fields}
    if kind == "tuned":
        values["also"] = tuple((each["config"], each["seconds"]) for each in values["also"])
    if kind == "measured" and (values["status"] == "ok") != (values["seconds"] is not None):
        raise schema.SchemaError(f"{where}.seconds: a time belongs to the status ok and to no other")
    return _KINDS[kind](
        ProblemKey.of(**value["problem"]), value["gpu"], value["multiprocessors"], Version(**value["version"]), **values
    )


def from_line(line: bytes, where: str) -> Record:
    """The record of a line of the store. Raises SchemaError."""
    return from_json(schema.parse(line, where), where)


def now() -> str:
    """The date as records have it, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
