"""What a user may set: by a call (``fastconv.settings(strict=True)``), in a ``with``, or by ``FASTCONV_STRICT=1``."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType
from typing import Any, NamedTuple


class Values(NamedTuple):
    """Every setting, with its default."""

    strict: bool = False
    prefer: str = "fastest"
    tune: str = "cached"
    numerics: str = "fast"


_ALLOWED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "strict": (False, True),
        "prefer": ("fastest", "triton"),
        "tune": ("cached", "off", "first", "force"),
        "numerics": ("fast", "stable"),
    }
)
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_NOTHING: Mapping[str, Any] = MappingProxyType({})

_in_context: ContextVar[Mapping[str, Any]] = ContextVar("fastconv.settings", default=_NOTHING)
# The contexts that some thread is in, for threads without one.
_open: list[Change] = []


class Change:
    """A call of ``settings``: in force at once and for the whole process; once entered, only inside its ``with``."""

    def __init__(self, settings: Settings, values: Mapping[str, Any], before: Change | None) -> None:
        self.values = values
        self.before = before
        self.entered = False
        self._settings = settings
        self._tokens: list[Token[Mapping[str, Any]]] = []

    def __enter__(self) -> None:
        with self._settings._lock:
            self.entered = True
            self._settings._settle()
        self._tokens.append(_in_context.set({**_in_context.get(), **self.values}))
        _open.append(self)

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        _in_context.reset(self._tokens.pop())


class Settings:
    """fastconv's settings.

    ``strict``: True makes it an error that PyTorch's own op serves a tensor which fastconv serves (a GPU's, or the
    CPU's under ``TRITON_INTERPRET=1``; fp32, fp16, bf16). Default False.
    ``prefer``: "fastest" (default) leaves a call to PyTorch's own op if a table measured it faster, "triton" does not.
    ``tune``: "cached" (default) never measures; "off" asks only the cost model; "first" measures a problem that no
    table has, when it is first met; "force" measures every problem again, once a process.
    ``numerics``: "stable" keeps one order of summation for each problem, whatever is tuned, as
    ``torch.use_deterministic_algorithms(True)`` does too. Default "fast".

    ``with settings(...):`` is in force inside the block, only for this thread and its asyncio tasks; ``settings(...)``
    for the whole process; the variable ``FASTCONV_STRICT`` (and so on), read once, if neither says anything. A context
    wins over a call, a call over the variable. Other threads see no context, except autograd's: a backward that runs in
    no context of its thread goes by those that others are in, and is strict if one of them is.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {
            name: _parse(f"FASTCONV_{name.upper()}", value, allowed)
            for name, allowed in _ALLOWED.items()
            if (value := environment.get(f"FASTCONV_{name.upper()}"))
        }
        self._lock = threading.Lock()
        self._latest: Change | None = None
        self._settle()

    def __call__(
        self,
        *,
        strict: bool | None = None,
        prefer: str | None = None,
        tune: str | None = None,
        numerics: str | None = None,
    ) -> Change:
        """Set what is given. Raises TypeError on another name or type, ValueError on another word."""
        if strict is not None and not isinstance(strict, bool):
            raise TypeError(f"settings: strict must be True or False, but got {strict!r}")
        given = {"strict": strict, "prefer": prefer, "tune": tune, "numerics": numerics}
        values = {name: value for name, value in given.items() if value is not None}
        for name, value in values.items():
            if value not in _ALLOWED[name]:
                raise ValueError(f"settings: {name} must be one of {', '.join(_ALLOWED[name])}, but got {value!r}")
        with self._lock:
            self._latest = Change(self, values, next(self._calls(), None))
            self._settle()
            return self._latest

    def _calls(self) -> Iterator[Change]:
        """The calls in force, newest first, without those that began a ``with``."""
        change = self._latest
        while change is not None:
            if not change.entered:
                yield change
            change = change.before

    def _settle(self) -> None:
        """Find the values in force outside every context."""
        calls: dict[str, Any] = {}
        for change in self._calls():
            calls = {**change.values, **calls}
        self._everywhere = Values(**{**self._environment, **calls})

    @property
    def values(self) -> Values:
        """The values in force for this thread."""
        inside = _in_context.get()
        return self._everywhere._replace(**inside) if inside else self._everywhere

    @property
    def values_in_backward(self) -> Values:
        """The values for autograd's threads, which are in no context of their own."""
        values = self.values
        if not _open:
            return values
        inside, others = _in_context.get(), dict[str, Any]()
        for change in list(_open):
            others |= {name: value for name, value in change.values.items() if name not in inside}
        strict = "strict" not in inside and any(change.values.get("strict", False) for change in list(_open))
        return values._replace(**{**others, "strict": strict or values.strict})

    @property
    def strict(self) -> bool:
        return self.values.strict

    @property
    def prefer(self) -> str:
        return self.values.prefer

    @property
    def tune(self) -> str:
        return self.values.tune

    @property
    def numerics(self) -> str:
        return self.values.numerics

    def __repr__(self) -> str:
        return f"fastconv.settings({', '.join(f'{name}={value!r}' for name, value in self.values._asdict().items())})"


def _parse(variable: str, value: str, allowed: tuple[Any, ...]) -> Any:
    word = value.strip().lower()
    words = _WORDS if allowed == (False, True) else {name: name for name in allowed}
    try:
        return words[word]
    except KeyError:
        raise ValueError(f"{variable} must be one of {', '.join(words)}, but is {value!r}") from None


settings = Settings(os.environ)
