"""Runs a model's source twice, plain and converted, under the same operations, and compares what both show."""

import copy
import io
import linecache
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import fastconv

_PRELUDE = Path(__file__).with_name("prelude.py")
_NAMED = compile(_PRELUDE.read_text(), str(_PRELUDE), "exec", dont_inherit=True)
PATCHED = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential, nn.MaxPool2d)
_INTERNAL = frozenset(vars(nn.Module())) - {"training"} | {"_initialize_hook", "_load_hook"}
# What autograd says of a value that was changed in place: whoever keeps less of them has less to complain about.
_CHANGED = ("modified by an inplace operation", "is being used in an in-place operation", "modified inplace")


class Differs(AssertionError):
    """The converted model is not the plain one's equal. ``kind``: in what."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class World:
    """A model of ``source``'s class Net, in a module of its own; operations are lines of Python that name it ``m``."""

    def __init__(self, source: str, converts: bool) -> None:
        self.converts = converts
        self.handles: list[Any] = []
        self.module = types.ModuleType(f"fuzzed_{'converted' if converts else 'plain'}")
        sys.modules[self.module.__name__] = self.module
        file = f"{self.module.__name__}.py"
        self.module.__file__ = file
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        exec(_NAMED, vars(self.module))
        exec(compile(source, file, "exec", dont_inherit=True), vars(self.module))
        torch.manual_seed(0)
        model = self.module.Net()  # type: ignore[attr-defined]
        self._randomise(model)
        tools = [self.step, self.forward, self.infer, self.half, self.loaded, self.hook, self.unhook, self.patch]
        tools += [self.convert, self.revert, self.report, self.functional]
        self.names = {tool.__name__: tool for tool in tools} | {
            **{"m": model, "g": self.module, "torch": torch, "nn": nn, "F": F, "copy": copy, "pickle": pickle},
            **{"random": random, "types": types, "SimpleNamespace": types.SimpleNamespace},
        }

    @property
    def model(self) -> Any:
        return self.names["m"]

    def do(self, operation: str, seed: int) -> tuple[Exception | None, dict[str, Any]]:
        """What it raised and what can be seen after it."""
        # torch.manual_seed would look for every kind of device.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        for name in ("x", "y"):
            self.names[name] = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(ord(name) + seed))
        self.result: Any = None
        for p in self.model.parameters():
            p.grad = None
        raised = None
        with redirect_stdout(io.StringIO()) as printed:
            try:
                exec(operation, self.names)
            except Exception as error:
                raised = error
        rng = torch.get_rng_state(), hash(random.getstate()), hash(np.random.get_state()[1].tobytes())
        return raised, {"result": self.result, "printed": printed.getvalue(), "rng": rng, **self._state()}

    # Operations

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Forward, backward, SGD."""
        model = self.model
        leaves = [t.clone().requires_grad_() for t in _tensors((args, kwargs))]
        given = iter([leaf.clone() for leaf in leaves])
        args, kwargs = _map(lambda _: next(given), (args, kwargs))
        out = model(*args, **kwargs)
        self.result = {"out": _detached(out), "given": _detached((args, kwargs))}
        self._backward(out)
        grads = {name: p.grad for name, p in model.named_parameters() if not is_lazy(p)}
        self.result["grads"] = {**grads, **{f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}}
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Forward, which may be followed by anything."""
        self.result = _detached(self.model(*args, **kwargs))

    def infer(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.result = self.model(*args, **kwargs), args

    def half(self, *args: Any, **kwargs: Any) -> None:
        """A step whose backward follows another forward, in eval."""
        self.model.train()
        out = self.model(*args, **kwargs)
        self.model.eval()
        other = self.model(*args, **kwargs)
        self._backward(out)
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self._backward(other)
        self.result = _detached((out, other)), grads

    def functional(self, *args: Any) -> None:
        given = {name: p.detach() * 0.5 for name, p in self.model.named_parameters()}
        self.result = _detached(torch.func.functional_call(self.model, given, args))

    def loaded(self, value: Any) -> Any:
        """``value`` saved and loaded."""
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def hook(self, module: nn.Module, kind: str, changes: bool = False) -> None:
        """Note what the hook sees; with ``changes``, double the value too."""
        seen = self.module.SEEN  # type: ignore[attr-defined]

        def note(module: nn.Module, *values: Any) -> Any:
            seen.append([t.detach().clone() for t in _tensors(values)])
            return _map(lambda t: t * 2, values[-1]) if changes else None

        self.handles.append(getattr(module, f"register_{kind}")(note))

    def unhook(self) -> None:
        if self.handles:
            self.handles.pop().remove()

    def patch(self, owner: Any, name: str = "forward") -> None:
        """Replace a function by one that doubles its result; one of torch's own once for both worlds."""
        if self.converts and getattr(owner, "__module__", "").startswith("torch."):
            return
        old = getattr(owner, name)

        def doubled(*args: Any, **kwargs: Any) -> Any:
            return _map(lambda t: t * 2, old(*args, **kwargs))

        setattr(owner, name, doubled)

    def convert(self, model: nn.Module, **options: Any) -> nn.Module:
        return fastconv.convert(model, **options) if self.converts else model

    def revert(self, model: nn.Module) -> nn.Module:
        return fastconv.revert(model) if self.converts else model

    def report(self, model: nn.Module) -> None:
        if self.converts:
            str(fastconv.report(model))

    # What can be seen

    def _state(self) -> dict[str, Any]:
        hidden = (types.ModuleType, types.FunctionType, type)
        space = {name: value for name, value in vars(self.module).items() if not name.startswith("__")}
        modules = {
            name: (type(module).__name__, {k: v for k, v in vars(module).items() if k not in _INTERNAL})
            for name, module in self.model.named_modules(remove_duplicate=False)
        }
        return {
            "state": {name: _plain(value) for name, value in self.model.state_dict().items()},
            "modules": modules,
            "globals": {name: value for name, value in space.items() if not isinstance(value, hidden)},
        }

    def _randomise(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            least = 0.5 if isinstance(module, nn.modules.batchnorm._BatchNorm) else -0.5
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if not is_lazy(value) and value.is_floating_point():
                    value.data.copy_(torch.rand(value.shape, generator=generator) + least)

    def _backward(self, out: Any) -> None:
        loss = sum((t * t.detach().cos()).mean() for t in _tensors(out))
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward(retain_graph=True)


def check(source: str, operations: list[str], real: bool = False) -> None:
    """Raise Differs if the converted model does not equal the plain one after one of ``operations``.

    real: fastconv's kernels run, in float32; otherwise `fused_by_torch` is expected, and numbers are float64.
    """
    with _number_type(torch.float32 if real else torch.float64), _patches_undone():
        plain, converted = World(source, False), World(source, True)
        for seed, operation in enumerate(operations):
            (expected, before), (got, after) = (world.do(operation, seed) for world in (plain, converted))
            where = f"after {operation!r}, number {seed}"
            if type(expected) is not type(got):
                if got is None and any(words in str(expected) for words in _CHANGED):
                    return
                kind = f"{type(expected).__name__} -> {type(got).__name__}"
                raise Differs(kind, f"{where}: PyTorch raises {expected!r}, converted {got!r}") from got
            if expected is not None:
                # A forward that did not come to its end is the same only in what Python sees.
                for outcome in (before, after):
                    del outcome["result"], outcome["state"], outcome["rng"]
            found = difference(before, after, 1e-6 if not real else 5e-2 if "autocast" in operation else 2e-3)
            if found:
                raise Differs(found[0], f"{where}: {''.join(found)}")
            if (expected is not None or real) and not _sync(plain.model, converted.model):
                return


def difference(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> tuple[str, str] | None:
    """Where plain's ``a`` and converted's ``b`` differ, if they do: under which key, and more."""
    for key in a:
        try:
            found = next(_differences(a[key], b[key], tolerance, "", 1.0), None)
        except Exception as error:  # a stand-in for a tensor may raise anything
            found = f": cannot be compared, {error!r}"
        if found is not None:
            return key, found
    return None


def _differences(a: Any, b: Any, tolerance: float, where: str, scale: float) -> Iterator[str]:
    if isinstance(a, types.SimpleNamespace) or (is_dataclass(a) and not isinstance(a, type)):
        a, b = vars(a), vars(b) if hasattr(b, "__dict__") else b
    if type(a).__name__ != type(b).__name__:
        yield f"{where}: {_short(a)} != {_short(b)}"
    elif isinstance(a, Tensor):
        yield from _of_tensors(a.detach(), b.detach(), tolerance, where, scale)
        if a.requires_grad != b.requires_grad:
            yield f"{where}: requires_grad {a.requires_grad} != {b.requires_grad}"
    elif isinstance(a, Mapping):
        if list(a) != list(b):
            yield f"{where}: keys {list(a)} != {list(b)}"
        inner = max([1e-3, *(t.abs().max().item() for t in a.values() if _is_number(t))]) if "grads" in where else scale
        for key in a:
            if key in b:
                yield from _differences(a[key], b[key], tolerance, f"{where}[{key!r}]", inner)
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{where}: {_short(a)} != {_short(b)}"
        for index, (one, other) in enumerate(zip(a, b, strict=False)):
            yield from _differences(one, other, tolerance, f"{where}[{index}]", scale)
    elif isinstance(a, float):
        if not abs(a - b) <= tolerance * max(1.0, abs(a)) and a == a:
            yield f"{where}: {a} != {b}"
    elif isinstance(a, bool | int | str | bytes | set) and a != b:
        yield f"{where}: {_short(a)} != {_short(b)}"
    elif isinstance(a, random.Random) and a.getstate() != b.getstate():
        yield f"{where}: other states of random.Random"
    elif isinstance(a, torch.Generator) and not torch.equal(a.get_state(), b.get_state()):
        yield f"{where}: other states of torch.Generator"


def _of_tensors(a: Tensor, b: Tensor, tolerance: float, where: str, scale: float) -> Iterator[str]:
    if a.shape != b.shape or a.dtype != b.dtype:
        yield f"{where}: {list(a.shape)} {a.dtype} != {list(b.shape)} {b.dtype}"
    elif not a.is_floating_point():
        if not torch.equal(a, b):
            yield f"{where}: {a} != {b}"
    elif not torch.equal(a, b):
        a, b = a.double(), b.double()
        bad = ~torch.isclose(a, b, 0.0, tolerance * max(scale, a.abs().max().item()), equal_nan=True)
        # One element at a kink of an activation moves a few gradients.
        if bad.any() and (tolerance < 1e-4 or "grads" not in where or _rms(a - b) > 0.05 * max(_rms(a), scale)):
            yield f"{where}: {bad.sum()} of {a.numel()} differ, by {(a - b).abs().max():.3g} of {a.abs().max():.3g}"


def _rms(value: Tensor) -> float:
    return value.square().mean().sqrt().item()


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0 and bool(value.isfinite().all())
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return "lazy" if is_lazy(value) else value.detach().clone()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, function, value)


def _detached(value: Any) -> Any:
    return _map(lambda t: t.detach().clone().requires_grad_(t.requires_grad), value)


def _sync(plain: nn.Module, converted: nn.Module) -> bool:
    """Give ``converted`` the values of ``plain``; False if they have other names or shapes."""
    with suppress(Exception), torch.no_grad():
        for (a, x), (b, y) in zip(plain.state_dict().items(), converted.state_dict().items(), strict=True):
            if a != b or is_lazy(x) != is_lazy(y):
                return False
            if isinstance(x, Tensor) and not is_lazy(x):
                y.copy_(x)
        return True
    return False


@contextmanager
def _number_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _patches_undone() -> Iterator[None]:
    """Let nothing that operations do to torch.nn's classes outlive them."""
    before = {layer: vars(layer).get("forward") for layer in PATCHED}
    try:
        yield
    finally:
        for layer, forward in before.items():
            if forward is not None:
                layer.forward = forward  # type: ignore[method-assign]
            elif "forward" in vars(layer):
                del layer.forward
