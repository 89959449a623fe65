"""What runs for each convolution of a model, with what is fused into it, and for each pool, found by running its shapes
through it."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from fastconv.arguments import autocast_dtype, why_not_served
from fastconv.convert import convert, revert
from fastconv.dry_run import AloneSyncBatchNorm, copied, rejoined, settled
from fastconv.fuse import norms
from fastconv.kernels import dispatch
from fastconv.kernels.dispatch import Plan
from fastconv.kernels.launch.device import here
from fastconv.nn.fused_call import Steps, call_fused, steps_fused, watchers
from fastconv.nn.patches import patched
from fastconv.report import Layer, Report, convolutions, is_converted, kind, pools, table, why_not_converted
from fastconv.settings import settings
from fastconv.traffic import OperatorPass, Traffic

log = logging.getLogger("fastconv")
COLUMNS = ("", "pass", "family", "kernel", "tile", "tile from", "MB", "predicted", "no other family, since")


@dataclass(frozen=True)
class Moved:
    """Bytes read and written."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __str__(self) -> str:
        if not self.backward:
            return f"{_mb(self.forward)} MB"
        return f"{_mb(self.total)} MB ({_mb(self.forward)} forward, {_mb(self.backward)} backward)"


@dataclass(frozen=True)
class Counted:
    """What was counted in one call of a layer: forward, then backward if gradients are needed."""

    forward: Traffic
    backward: Traffic

    @property
    def passes(self) -> tuple[OperatorPass, ...]:
        return (*self.forward.passes, *self.backward.passes)

    @property
    def moved(self) -> Moved:
        return Moved(self.forward.bytes, self.backward.bytes)


@dataclass(frozen=True)
class Run:
    """The calls of one layer, with what is fused into it, that are alike."""

    fused: bool  # a batch norm is part of the call
    form: str | None  # of a fused layer: what is one call with the convolution, and why the rest is not
    reason: str | None  # why PyTorch's own operator computes the convolution; None: fastconv's kernels do
    ours: Counted  # of one call
    pytorch: Counted  # the same by PyTorch's own operators
    times: int = 1

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(found.plan for found in self.ours.passes if found.plan is not None)


@dataclass(frozen=True)
class ExplainedLayer(Layer):
    """A layer with what runs for each way in which it is called."""

    runs: tuple[Run, ...]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What serves each problem that it is called with: forward, then the gradients that are needed."""
        return tuple(plan for run in self.runs for plan in run.plans)


@dataclass(frozen=True)
class Explanation(Report):
    """A report with what runs in every call, planned for ``gpu``. Times are predictions and bytes are counted, as
    `fastconv.traffic` says: neither is measured."""

    layers: tuple[ExplainedLayer, ...]
    pools: tuple[ExplainedLayer, ...] = field(default=(), kw_only=True)
    gpu: str | None = None  # None: no call is served by fastconv's kernels

    @property
    def moved(self) -> Moved:
        """Bytes that the listed layers move, all their calls together."""
        return self._sum(lambda run: run.ours)

    @property
    def pytorch_moved(self) -> Moved:
        """Bytes that PyTorch's own operators move for the same layers."""
        return self._sum(lambda run: run.pytorch)

    def _sum(self, counted: Callable[[Run], Counted]) -> Moved:
        moved = [(run.times, counted(run).moved) for layer in (*self.layers, *self.pools) for run in layer.runs]
        return Moved(sum(n * of.forward for n, of in moved), sum(n * of.backward for n, of in moved))

    def __str__(self) -> str:
        if not self.layers and not self.pools:
            return super().__str__()
        # Strings are lines; lists are rows of one table.
        lines: list[str | list[str]] = [[*COLUMNS]]
        fused = self.fused_by_conv
        for layer in (*self.layers, *self.pools):
            norm = fused.get(layer.name)
            head = f"{(norm.fused if norm else layer.name) or '(the model)'}  {layer.kind}"
            if not layer.runs:
                lines.append(f"{head}  {f'PyTorch: {layer.reason}' if layer.reason else 'not called'}")
            for run in layer.runs:
                problem = f"  {run.plans[0].problem.describe()}" if run.plans else ""
                lines += [head + problem + (f"  {run.times} times" if run.times > 1 else ""), *_lines(run)]
        lines += [f"{norm.name}  {norm.kind}  PyTorch: {norm.reason}" for norm in self.norms if norm.fused is None]
        rows = iter(table([line for line in lines if isinstance(line, list)]).splitlines())
        text = [line if isinstance(line, str) else next(rows) for line in lines]
        if self.gpu:
            text.append(f"planned for the {self.gpu}")
        text += [*self.notes, self.summary]
        ours, pytorch = self.moved, self.pytorch_moved
        if pytorch.total:
            text.append(f"they move {ours}, PyTorch's own operators {pytorch}: {ours.total / pytorch.total:.2f} of it")
        return "\n".join(text)


def explain(model: Module, *inputs: Any) -> Explanation:
    """What runs for each convolution layer of ``model(*inputs)``, with what is fused into it, and for each pool.

    It names each pass's family, kernels, tile, where the tile is from, and bytes, and why PyTorch's own operators do
    the rest. A model without any of fastconv's layers is explained as ``convert(model)`` would make it. In a converted
    model fused layers are explained as they are, and layers that ``convert`` would still take as if it had.

    The model runs once, by PyTorch's own operators, on a copy that has shapes but no data: nothing is computed, and its
    statistics stay. A model that asks for values runs on a true copy. Each layer that it calls runs twice more without
    data: by fastconv, which plans, allocates and counts as ever and launches nothing, and by PyTorch. Plans are made
    for the inputs' device. Gradients are explained if ``requires_grad`` and the caller's grad mode ask for them;
    processes that share statistics are not asked. The forward pass of a transposed convolution is a dgrad.

    Raises what the model raises.
    """
    found = [[*convolutions(model)], [*pools(model)]]
    mode = FakeTensorMode()
    with settings(strict=False):
        watch = _run_without_data(model, inputs, mode)
        if watch is None:
            watch = _WatchedModel(copied(model), mode)
            with here.fork_rng():
                watch.run(inputs)
    fused = []
    for norm in watch.norms:
        runs = tuple(watch.runs.get(norm.conv or "", {}).values()) if norm.fused else ()
        if runs and not any(run.fused for run in runs):
            norm = replace(norm, fused=None, reason=runs[0].form)
        fused.append(norm)
    layers, pooling = (tuple(_explained(*layer, watch) for layer in kinds) for kinds in found)
    return Explanation(layers, tuple(fused), watch.gpu, pools=pooling)


def _explained(name: str, layer: Module, watch: _WatchedModel) -> ExplainedLayer:
    runs = tuple(watch.runs.get(name, {}).values())
    reason = why_not_converted(layer)
    if runs and all(run.reason for run in runs):
        reason = runs[0].reason
    return ExplainedLayer(name, kind(layer), reason, runs)


def _run_without_data(model: Module, inputs: tuple[Any, ...], mode: FakeTensorMode) -> _WatchedModel | None:
    """What was seen; None: the model cannot be run without data."""
    try:
        watch = _WatchedModel(copied(model, mode), mode)
        with mode:
            watch.run(tree_map_only(Tensor, mode.from_tensor, inputs))
    except Exception as error:  # of any kind: the model may do anything with a tensor that has no values
        log.debug("explain needs the model's values: %s: %s", type(error).__name__, error)
        return None
    return watch


class _WatchedModel:
    """Runs ``model``, a copy to be thrown away, by PyTorch's own operators, and counts what its layers are called with.

    ``runs``: by the name of the layer, and by what tells calls apart.
    """

    def __init__(self, model: Module, mode: FakeTensorMode) -> None:
        self.model, self.mode = model, mode
        self.runs: dict[str, dict[Any, Run]] = {}
        self.gpu: str | None = None
        convert(model, fuse=not any(is_converted(layer) for _, layer in convolutions(model)))
        self.norms = tuple(norms(model))
        self._names = {module: name for name, module in model.named_modules()}
        self._hooks: set[int] = set()
        self._in_fused = False
        self._thread = get_ident()
        for name, layer in (*convolutions(model), *pools(model)):
            if not why_not_converted(layer):
                revert(layer)
                hook = partial(self._called, name)
                self._hooks.add(layer.register_forward_hook(hook, prepend=True, with_kwargs=True).id)
        for norm in settled(model):
            norm.__class__ = AloneSyncBatchNorm

    def run(self, inputs: tuple[Any, ...]) -> None:
        watchers.append(self._fused)
        try:
            # What torch.compile made of a model calls no hooks.
            with torch.compiler.set_stance("force_eager"):
                self.model(*inputs)
        finally:
            watchers.remove(self._fused)

    def _called(self, name: str, layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._in_fused:
            self._note(name, layer, args, kwargs, ())

    def _fused(self, x: Any, conv: Any, steps: Steps) -> Any:
        """Called in the place of ``run_fused``."""
        if get_ident() != self._thread:
            return call_fused(x, conv, steps, steps_fused(x, conv, steps)[0])
        self._in_fused = True
        try:
            result = call_fused(x, conv, steps, 0)
        finally:
            self._in_fused = False
        self._note(self._names[conv], conv, (x,), {}, steps)
        return result

    def _note(self, name: str, layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any], steps: Steps) -> None:
        runs = self.runs.setdefault(name, {})
        x = args[0] if args else kwargs["input"]
        key = (
            *(_kind(leaf) for leaf in tree_leaves((args, kwargs, [operand for _, operand in steps]))),
            *(torch.is_grad_enabled(), autocast_dtype(x)),
        )
        if key in runs:
            runs[key] = replace(runs[key], times=runs[key].times + 1)
        else:
            runs[key] = self._count(layer, args, kwargs, steps)

    def _count(self, layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any], steps: Steps) -> Run:
        theirs, conv = self._twin(layer), self._twin(layer)
        their_steps, our_steps = (tuple((kind, self._twin(operand)) for kind, operand in steps) for _ in range(2))
        args, kwargs, their_steps, our_steps = self._cut_off((args, kwargs, their_steps, our_steps))
        x = args[0] if args else kwargs["input"]
        with self.mode:
            pytorch = _counted(theirs, args, kwargs, their_steps, 0)
            convert(conv, fuse=False)
            processes = [rejoined(operand) for _, operand in our_steps if type(operand) is AloneSyncBatchNorm]
            end, why = steps_fused(x, conv, our_steps) if steps else (0, None)
            ours = _counted(conv, args, kwargs, our_steps, end)
        if any(found.choice for found in ours.passes):
            self.gpu = dispatch.target(x.device).name
        reason = why_not_served(x, autocast_dtype(x) if isinstance(layer, _ConvNd) else None)
        plans = [found.plan for found in ours.passes if found.plan is not None]
        if plans and all(plan.choice is None for plan in plans):
            reason = "; ".join(reason for _, reason in plans[0].reasons)
        elif not plans and reason is None:
            reason = patched(type(conv))
        form = [", ".join(_form(x, our_steps, ours, processes))] if end else []
        if end < len(steps):
            rest = ", ".join(self._label(operand) for _, operand in steps[end:])
            form.append(f"{rest} apart: {why}" if end else f"unfused, {rest} apart: {why}")
        return Run(end > 0, "; ".join(form) or None, reason, ours, pytorch)

    def _label(self, operand: Any) -> str:
        """What a line calls a step of a fused layer."""
        if isinstance(operand, Tensor):
            return "residual"
        return self._names.get(operand, type(operand).__name__).rpartition(".")[2]

    def _cut_off(self, values: Any) -> Any:
        """``values`` with each tensor replaced by a leaf without data; equal tensors stay one."""
        found: dict[int, Tensor] = {}

        def cut_off(tensor: Tensor) -> Tensor:
            if id(tensor) not in found:
                found[id(tensor)] = self._without_data(tensor).detach().requires_grad_(tensor.requires_grad)
            return found[id(tensor)]

        return tree_map_only(Tensor, cut_off, values)

    def _without_data(self, tensor: Any) -> Any:
        return tensor if tensor is None or isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)

    def _twin(self, value: Any) -> Any:
        """A module like ``value`` with tensors without data and without the watching hooks; or ``value``, no module."""
        if not isinstance(value, Module):
            return value
        twin = object.__new__(type(value))
        vars(twin).update(vars(value))
        hooks = value._forward_hooks.items()
        vars(twin).update(
            _parameters={name: self._without_data(t) for name, t in value._parameters.items()},
            _buffers={name: self._without_data(t) for name, t in value._buffers.items()},
            _modules={name: self._twin(child) for name, child in value._modules.items()},
            _forward_hooks=OrderedDict((number, hook) for number, hook in hooks if number not in self._hooks),
        )
        return twin


def _kind(leaf: Any) -> Any:
    """What tells calls with ``leaf`` from others."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad


def _counted(conv: Module, args: tuple[Any, ...], kwargs: dict[str, Any], steps: Steps, end: int) -> Counted:
    """What ``conv`` and ``steps`` move, the first ``end`` steps in one call with ``conv``."""
    operands = [operand for _, operand in steps]
    modules = [module for module in (conv, *operands) if isinstance(module, Module)]
    for module in modules:
        # The user's hooks have run with the model.
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            setattr(module, hooks, OrderedDict())
    tensors = [*tree_leaves((args, kwargs, operands)), *(p for module in modules for p in module.parameters())]
    wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    # Tensors are saved as they are, even in a checkpoint. PyTorch's batch norm writes its running
    # statistics and keeps them for backward, which without data counts as a change.
    buffers = [buffer for module in modules for buffer in module.buffers() if not buffer.is_inference()]
    kept = torch.autograd._unsafe_preserve_version_counter(tuple(buffers))
    with saved_tensors_hooks(Tensor.detach, Tensor.detach), kept, Traffic() as forward:
        z = call_fused(args[0], conv, steps, end) if steps else conv(*args, **kwargs)
    z = z[0] if isinstance(z, tuple) else z  # without a pool's indices
    with torch.autograd.set_multithreading_enabled(False), Traffic() as backward:
        if z.requires_grad:
            torch.autograd.grad(z, wanted, torch.empty_like(z), allow_unused=True)
    return Counted(forward, backward)


def _form(x: Tensor, steps: Steps, ours: Counted, processes: list[int]) -> Iterator[str]:
    """How convolution and batch norm are computed, by what was called."""
    called = [found.operator for found in ours.forward.passes]
    if "conv_statistics" in called:
        yield "statistics from the convolution, one pass"
    else:
        if ours.backward.passes:
            yield "frozen statistics"
        yield "one kernel" if "conv_act" in called else "the convolution and one pass, since backward reads its result"
    yield from (f"synchronised over {count} processes" for count in processes if count > 1)
    norm = next(operand for kind, operand in steps if kind == "norm")
    dtype = autocast_dtype(x) or x.dtype
    own = next((t.dtype for t in (norm.weight, norm.running_mean) if t is not None), dtype)
    if own is not dtype:
        yield f"batch norm in {_name(own)} around a convolution in {_name(dtype)}"


def _lines(run: Run) -> Iterator[str | list[str]]:
    """How a call is made, then a row for each pass."""
    moved, form = run.ours.moved, run.form
    if run.reason is not None:
        form = f"PyTorch: {run.reason}"
    counted = f"{moved}; PyTorch's own operators {run.pytorch.moved}"
    yield f"  {form}: {counted}" if form else f"  {counted}"
    for traffic in (run.ours.forward, run.ours.backward):
        rest = Counter(traffic.operators)
        for found in traffic.passes:
            rest -= found.operators
            yield _row(found, moved.total)
        others = _named(rest, moved.total)
        if others:
            yield ["", "", "", "PyTorch's " + ", ".join(others), "", "", _mb(rest.total()), "", ""]


def _row(found: OperatorPass, total: int) -> list[str]:
    """The cells of `COLUMNS`."""
    kernels = [launched.name.removesuffix("_kernel") for launched in found.launches]
    kernels += [f"PyTorch's {name}" for name in _named(found.operators, total)]
    served = found.plan is not None and found.plan.choice is not None
    cells = ["", found.name, found.plan.family if found.plan and served else "", ", ".join(dict.fromkeys(kernels))]
    others = "; ".join(f"{family}: {reason}" for family, reason in (found.plan.reasons if found.plan else ()))
    if found.choice is None:
        return [*cells, "", "", _mb(found.bytes), "", others]
    # Nothing is said of a value of 1.
    config = {name: value for name, value in found.choice.config.items() if value > 1}
    blocks = " ".join(f"{name.removeprefix('BLOCK_')}{n}" for name, n in config.items() if name.startswith("BLOCK_"))
    rest = [f"{name.removeprefix('num_').lower()} {n}" for name, n in config.items() if not name.startswith("BLOCK_")]
    tile = ", ".join(filter(None, (blocks, *rest)))
    predicted = f"{found.choice.seconds * 1e6:.1f} us, bound by {found.choice.bound}"
    if found.choice.bound == "interpreter":
        predicted = "interpreted"
    return [*cells, tile, found.choice.source, _mb(found.bytes), predicted, others]


def _named(operators: Counter[str], total: int) -> list[str]:
    """PyTorch's operators that move a hundredth of ``total`` or more, the largest first."""
    return [
        name.removeprefix("aten::").partition(".")[0] for name, moved in operators.most_common() if 100 * moved >= total
    ]


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}" if count >= 1e5 or not count else f"{count / 1e6:.4f}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
