"""Layer lists: the convolutions and pools of a network, each with how often the network calls it. JSON lines.

The first line is ``{"schema": "fastconv-layers/1", "network": "resnet50", "image": [3, 224, 224]}``. Each line after it
is a call of a function of torch.nn.functional: ``{"count": 3, "function": "conv2d", "input": [64, 56, 56],
"weight": [64, 64, 3, 3], "padding": 1}``. Shapes are of one image, without the batch. ``"bias": true`` says that there
is one, ``"needs_dx": false`` that the input needs no gradient. Other arguments follow by name, as a number or a list
with one for each axis; those left out have the function's defaults.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch.nn import functional as F

import fastconv.functional
from fastconv.autotune import SchemaError, schema
from fastconv.benchmarks.calls import TENSORS, Operator, plain, read_off
from fastconv.benchmarks.models import LoadedModel
from fastconv.measuring import reason

SCHEMA = "fastconv-layers/1"
FOLDER = Path(__file__).parent / "layers"
HEADER = ("schema", "network", "image")
FUNCTIONS = tuple(name for name in fastconv.functional.__all__ if hasattr(F, name))
MAX_FILE = 1 << 20  # bytes: over a hundred times the longest shipped list
MAX_INTEGER = 2**31 - 1
MAX_ELEMENTS = 2**40  # of input, weight and output for one image: more than any GPU holds
# No list has the argument: what is measured returns no indices.
UNLISTED = ("return_indices",)


@dataclass(frozen=True)
class LayerList:
    """A network's calls, each with its count. Their batch is one, in a list of a user's network that of its input."""

    network: str
    image: tuple[int, ...]
    calls: Mapping[Operator, int]


class _Wrong(Exception):
    """A field of a line is wrong."""

    def __init__(self, field: str, how: str) -> None:
        super().__init__(f"{'fields' if ',' in field else 'field'} {field}: {how}")


def shipped() -> tuple[str, ...]:
    """The names of the lists that come with fastconv."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.jsonl")))


def find(name: str) -> LayerList:
    """The shipped list called ``name``, or the one in the file ``name``. Raises ValueError with the file, the line and
    the field if it is none."""
    return read(FOLDER / f"{name}.jsonl" if name in shipped() else Path(name))


def read(path: Path) -> LayerList:
    """The list in ``path``, every line checked. Raises ValueError with the file, the line and the field."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        why = f"{error.strerror}; those there are: {', '.join(shipped())}"
        raise ValueError(f"cannot read the layer list {path}: {why}") from error
    if len(data) > MAX_FILE:
        raise ValueError(f"cannot read the layer list {path}: over {MAX_FILE >> 20} MiB")
    lines = data.splitlines()
    calls: Counter[Operator] = Counter()
    header: dict[str, Any] = {}
    for number, line in enumerate(lines or [b""], 1):
        where = f"{path}, line {number}"
        try:
            fields = schema.parse(line, where)
            if not isinstance(fields, dict):
                raise SchemaError(f"{where}: an object is expected")
            if number == 1:
                header = _header(fields)
            else:
                operator, count = _call(fields)
                calls[operator] += count
        except SchemaError as error:
            raise ValueError(str(error)) from error
        except _Wrong as error:
            raise ValueError(f"{where}, {error}") from error
    if not calls:
        raise ValueError(f"{path}, line {len(lines) + 1}: no call of a convolution or a pool follows the header")
    return LayerList(header["network"], tuple(header["image"]), calls)


def of(loaded: LoadedModel) -> LayerList:
    """The list of a user's network, for its batch. Raises ValueError if it does not run without data."""
    try:
        calls = read_off(loaded.model, loaded.input_shape)
    except Exception as error:  # the network's own code: anything
        raise ValueError(f"the layers of {loaded.name} cannot be listed without data: {reason(error)}") from error
    return LayerList(loaded.name, loaded.input_shape[1:], calls)


def dump(layers: LayerList) -> str:
    """The list as `read` takes it: in the order of its calls, defaults left out."""
    lines: list[dict[str, Any]] = [{"schema": SCHEMA, "network": layers.network, "image": list(layers.image)}]
    for operator, count in layers.calls.items():
        _, weight, bias = (*operator.shapes, None, None)[:3]
        line: dict[str, Any] = {"count": count, "function": operator.function, "input": list(operator.input[1:])}
        line |= {"weight": list(weight)} if weight else {}
        line |= {"bias": True} if bias else {}
        defaults = _arguments(operator.function)
        line |= {key: value for key, value in operator.arguments if key in defaults and value != defaults[key]}
        lines.append(line | ({} if operator.needs_dx else {"needs_dx": False}))
    return "".join(json.dumps(line) + "\n" for line in lines)


def _header(fields: dict[str, Any]) -> dict[str, Any]:
    if fields.get("schema") != SCHEMA:
        raise _Wrong("schema", f"{schema.shown(fields.get('schema'))}, this fastconv reads {SCHEMA!r}")
    _known(fields, HEADER)
    network = fields.get("network")
    if not isinstance(network, str) or not 0 < len(network) <= 100:
        raise _Wrong("network", f"a name of at most 100 letters is expected, not {schema.shown(network)}")
    _sizes(fields, "image")
    return fields


def _call(fields: dict[str, Any]) -> tuple[Operator, int]:
    function = fields.get("function")
    if function not in FUNCTIONS:
        raise _Wrong("function", f"{schema.shown(function)} is not one of {', '.join(FUNCTIONS)}")
    rank, convolution = int(function[-2]), function.startswith("conv")
    defaults = _arguments(function)
    _known(fields, ("function", "count", "input", "needs_dx", *(("weight", "bias") if convolution else ()), *defaults))
    count = fields.get("count")
    if type(count) is not int or not 0 < count <= MAX_INTEGER:
        raise _Wrong("count", f"a positive integer of at most {MAX_INTEGER} is expected, not {schema.shown(count)}")
    for name in ("bias", "needs_dx"):
        if type(fields.get(name, False)) is not bool:
            raise _Wrong(name, f"true or false is expected, not {schema.shown(fields[name])}")
    shapes: tuple[tuple[int, ...] | None, ...] = ((1, *_sizes(fields, "input", rank + 1)),)
    arguments = {name: _argument(name, fields.get(name, default), default, rank) for name, default in defaults.items()}
    if convolution:
        weight = _sizes(fields, "weight", rank + 2)
        outputs = weight[1] * arguments["groups"] if "transpose" in function else weight[0]
        shapes = (*shapes, weight, (outputs,) if fields.get("bias") else None)
    parameters = inspect.signature(getattr(fastconv.functional, function)).parameters
    unlisted = [(name, False) for name in UNLISTED if name in parameters]
    operator = Operator(function, shapes, (*arguments.items(), *unlisted), fields.get("needs_dx", True))
    _check_possible(operator, fields)
    return operator, count


def _known(fields: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in fields:
        if name not in known:
            raise _Wrong(schema.shown(name).strip("'"), f"unknown; there are {', '.join(known)}")


@cache
def _arguments(function: str) -> dict[str, Any]:
    """The function's arguments beside tensors, with their defaults or ``inspect.Parameter.empty``."""
    parameters = inspect.signature(getattr(fastconv.functional, function)).parameters
    return {name: it.default for name, it in parameters.items() if name not in (*TENSORS, *UNLISTED)}


def _sizes(fields: dict[str, Any], name: str, length: int | None = None) -> tuple[int, ...]:
    value = fields.get(name)
    listed = isinstance(value, list) and bool(value) and length in (None, len(value))
    if isinstance(value, list) and listed and all(type(size) is int and 0 < size <= MAX_INTEGER for size in value):
        return tuple(value)
    many = f"{length} " if length else ""
    raise _Wrong(
        name, f"a list of {many}positive integers of at most {MAX_INTEGER} is expected, not {schema.shown(value)}"
    )


def _argument(name: str, value: Any, default: Any, rank: int) -> Any:
    """The argument as calls keep it: of its default's type, or one integer or one for each axis."""
    if value is inspect.Parameter.empty:
        raise _Wrong(name, "missing")
    if type(default) is bool:
        if type(value) is not bool:
            raise _Wrong(name, f"true or false is expected, not {schema.shown(value)}")
        return value
    if name == "norm_type":
        if type(value) not in (int, float) or not 0 < value <= MAX_INTEGER:
            raise _Wrong(name, f"a positive number is expected, not {schema.shown(value)}")
        return value
    if (value is None and default is None) or (name == "padding" and value in ("same", "valid")):
        return value
    axes = value if isinstance(value, list) and name not in ("groups", "divisor_override") else [value]
    # None leaves an axis of an adaptive pool as it is.
    kept = (type(None), int) if name == "output_size" and len(axes) > 1 else (int,)
    if len(axes) not in (1, rank) or not all(type(axis) in kept for axis in axes):
        raise _Wrong(name, f"an integer, or one for each of {rank} axes, is expected, not {schema.shown(value)}")
    if name == "divisor_override" and value == 0:
        raise _Wrong(name, "another number than 0 is expected")
    if any(axis is not None and abs(axis) > MAX_INTEGER for axis in axes):
        raise _Wrong(name, f"at most {MAX_INTEGER} is expected, not {schema.shown(value)}")
    return plain(tuple(axes))


def _check_possible(operator: Operator, fields: dict[str, Any]) -> None:
    """If PyTorch refuses the call, name the fields that its message is about."""
    try:
        output = operator.output
    except (RuntimeError, ValueError, TypeError) as error:
        message = str(error).splitlines()[0].split("Exception raised")[0].strip()
        named = [name for name in fields if re.search(rf"\b{name.replace('_', '[ _]')}", message, re.IGNORECASE)]
        shaped = [name for name in ("input", "weight", "kernel_size", "output_size") if name in fields]
        raise _Wrong(", ".join(named or shaped), message) from error
    if 0 in output:
        raise _Wrong("output_size", f"nothing is left of {list(operator.input[1:])}")
    if operator.elements > MAX_ELEMENTS:
        large = [name for name in ("input", "weight", "padding", "output_size") if name in fields]
        raise _Wrong(", ".join(large), f"{operator.elements:.1e} elements for one image, at most 2^40 are possible")
