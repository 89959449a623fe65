"""What a user may set: by a call (``fastconv.settings(strict=True)``), in a ``with``, or by ``FASTCONV_STRICT=1``."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType

_NOTHING: Mapping[str, bool] = MappingProxyType({})
_DEFAULTS = MappingProxyType({"strict": False})
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

_in_context: ContextVar[Mapping[str, bool]] = ContextVar("fastconv.settings", default=_NOTHING)
# The contexts that some thread is in, for threads that have none of their own.
_open: list[Change] = []


class Change:
    """A call of ``settings``: in force at once and for the whole process; once entered, only inside its ``with``."""

    def __init__(self, values: Mapping[str, bool], before: Change | None) -> None:
        self.values = values
        self.before = before
        self.entered = False
        self._tokens: list[Token[Mapping[str, bool]]] = []

    def __enter__(self) -> None:
        self.entered = True
        self._tokens.append(_in_context.set({**_in_context.get(), **self.values}))
        _open.append(self)

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        _in_context.reset(self._tokens.pop())


class Settings:
    """``strict``: True makes it an error that PyTorch's own op serves a tensor which fastconv serves (a GPU's, or the
    CPU's under ``TRITON_INTERPRET=1``; fp32, fp16, bf16). Default False.

    ``with settings(...):`` is in force inside the block, for this thread and its asyncio tasks alone; ``settings(...)``
    for the whole process; the variable ``FASTCONV_STRICT``, read once, where neither says anything. A context wins over
    a call, a call over the variable. Other threads see no context, but for autograd's: a backward that runs in no
    context of its thread while some other is in a strict one is strict.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {
            name: _parse(f"FASTCONV_{name.upper()}", value)
            for name in _DEFAULTS
            if (value := environment.get(f"FASTCONV_{name.upper()}"))
        }
        self._lock = threading.Lock()
        self._latest: Change | None = None

    def __call__(self, *, strict: bool | None = None) -> Change:
        """Set what is given. Raises TypeError on another name or type."""
        if strict is not None and not isinstance(strict, bool):
            raise TypeError(f"settings: strict must be True or False, but got {strict!r}")
        values = {name: value for name, value in (("strict", strict),) if value is not None}
        with self._lock:
            self._latest = Change(values, next(self._calls(), None))
            return self._latest

    def _calls(self) -> Iterator[Change]:
        """Newest first, without those that were the beginning of a ``with``."""
        change = self._latest
        while change is not None:
            if not change.entered:
                yield change
            change = change.before

    @property
    def strict(self) -> bool:
        return self._value("strict")

    @property
    def strict_somewhere(self) -> bool:
        """Whether some thread is in a strict context: what autograd's threads go by, which are in none of their own."""
        if "strict" in _in_context.get():
            return self.strict
        return self.strict or any(change.values.get("strict", False) for change in list(_open))

    def _value(self, name: str) -> bool:
        inside = _in_context.get()
        if name in inside:
            return inside[name]
        for change in self._calls():
            if name in change.values:
                return change.values[name]
        return self._environment.get(name, _DEFAULTS[name])

    def __repr__(self) -> str:
        return f"fastconv.settings({', '.join(f'{name}={self._value(name)}' for name in _DEFAULTS)})"


def _parse(variable: str, value: str) -> bool:
    try:
        return _WORDS[value.strip().lower()]
    except KeyError:
        raise ValueError(f"{variable} must be one of {', '.join(_WORDS)}, but is {value!r}") from None


settings = Settings(os.environ)
