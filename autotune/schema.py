"""A small strict reader of JSON from files: every field, type, length and range is checked, nothing is evaluated.

A check takes a value and where it stands, and returns the value or raises SchemaError, which names the place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

Check = Callable[[Any, str], Any]

# Names of GPUs, kernels, parameters, versions, dtypes. Without slash, quote and bracket none is a path or code.
_TEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+:,-]*")


class SchemaError(ValueError):
    """The message is one line: which file or line, which field, what was expected, what was found."""


class NewerSchema(SchemaError):
    """Written by a version of fastconv that knows more."""


def text(limit: int = 100) -> Check:
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > limit or not _TEXT.fullmatch(value):
            raise SchemaError(f"{where}: expected a name of at most {limit} letters, but got {shown(value)}")
        return value

    return check


def named(value: str, limit: int = 100) -> str:
    """``value`` as `text` takes it: other letters become dashes, a long one is cut."""
    return re.sub(r"[^A-Za-z0-9 ._+:,-]", "-", value).lstrip(" ._+:,-")[:limit] or "unnamed"


def integer(least: int, most: int) -> Check:
    def check(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise SchemaError(f"{where}: expected an integer of {least} to {most}, but got {shown(value)}")
        return value

    return check


def number(least: float, most: float) -> Check:
    def check(value: Any, where: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise SchemaError(f"{where}: expected a number of {least:g} to {most:g}, but got {shown(value)}")
        return float(value)

    return check


def boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise SchemaError(f"{where}: expected true or false, but got {shown(value)}")
    return value


def one_of(*values: Any) -> Check:
    def check(value: Any, where: str) -> Any:
        if not any(value == other and type(value) is type(other) for other in values):
            raise SchemaError(f"{where}: expected one of {', '.join(map(str, values))}, but got {shown(value)}")
        return value

    return check


def either(*checks: Check) -> Check:
    """The first check that passes; the error is the last one's."""

    def check(value: Any, where: str) -> Any:
        for each in checks[:-1]:
            try:
                return each(value, where)
            except SchemaError:
                pass
        return checks[-1](value, where)

    return check


def optional(of: Check) -> Check:
    return lambda value, where: None if value is None else of(value, where)


def listing(of: Check, limit: int) -> Check:
    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > limit:
            raise SchemaError(f"{where}: expected a list of at most {limit}, but got {shown(value)}")
        return [of(each, f"{where}[{index}]") for index, each in enumerate(value)]

    return check


def mapping(of: Check, limit: int = 32) -> Check:
    """Any names, each with a value that passes ``of``."""
    name = text(50)

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > limit:
            raise SchemaError(f"{where}: expected an object of at most {limit} fields, but got {shown(value)}")
        return {name(key, f"{where}, a field's name"): of(each, f"{where}.{key}") for key, each in value.items()}

    return check


def record(fields: Mapping[str, Check], required: int | None = None) -> Check:
    """``fields`` and no others. The first ``required`` of them must be there, by default all."""
    needed = list(fields)[:required]

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise SchemaError(f"{where}: expected an object, but got {shown(value)}")
        for key in needed:
            if key not in value:
                raise SchemaError(f"{where}: the field {key!r} is missing")
        for key in value:
            if key not in fields:
                raise SchemaError(f"{where}: there is no field {shown(key)}; there are {', '.join(fields)}")
        return {key: fields[key](each, f"{where}.{key}") for key, each in value.items()}

    return check


def checks(cls: type) -> dict[str, Check]:
    """The checks in a class's annotations, ``field: Annotated[type, check]``."""
    hints = get_type_hints(cls, include_extras=True).items()
    return {name: hint.__metadata__[0] for name, hint in hints if hasattr(hint, "__metadata__")}


def parse(data: bytes, where: str) -> Any:
    """JSON without NaN and Infinity. Raises SchemaError."""

    def no_constant(name: str) -> None:
        raise SchemaError(f"{where}: {name} is no number")

    try:
        return json.loads(data, parse_constant=no_constant)
    except SchemaError:
        raise
    except RecursionError:
        raise SchemaError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise SchemaError(f"{where}: no JSON: {error}") from None


def check_version(value: Any, current: int, where: str, field: str) -> None:
    """Raises NewerSchema or SchemaError unless ``value[field]`` is a version that this code reads."""
    version = value.get(field) if isinstance(value, dict) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > current:
        raise NewerSchema(f"{where}: schema {version} is of a newer fastconv; this one reads up to {current}")
    integer(1, current)(version, f"{where}.{field}")


def dump(value: Any) -> str:
    """One line, always the same for equal values."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def shown(value: Any) -> str:
    """A value for a message, cut if it is long."""
    whole = repr(value)
    return whole if len(whole) <= 60 else whole[:57] + "..."
