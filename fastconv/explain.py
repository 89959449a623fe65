"""Which kernel and tile each convolution of a model gets, found by running its shapes through it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from fastconv import functional
from fastconv.convert import Layer, Report, convolutions, kind, reason_against, revert, table
from fastconv.fuse import norms
from fastconv.kernels import dispatch
from fastconv.kernels.dispatch import Layout, Plan
from fastconv.kernels.problem import ConvProblem, conv_problem, conv_transpose_problem

log = logging.getLogger("fastconv")


@dataclass(frozen=True)
class Explanation(Report):
    """A report with the plans of every call, made for ``gpu``; its figures are predictions, not measurements."""

    gpu: str | None = None  # None: no call is served by fastconv's kernels

    def __str__(self) -> str:
        if not self.layers:
            return super().__str__()
        rows = [["layer", "kind", "problem", "pass", "kernel", "tile", "tile from", "MB", "predicted"]]
        chains = self.chains
        for layer in self.layers:
            chain = chains.get(layer.name)
            head = [(chain.chain if chain else layer.name) or "(the model)", layer.kind]
            if not layer.plans:
                note = f"PyTorch's own op: {layer.reason}" if layer.reason else "not called"
                rows.append([*head, *[""] * 6, note])
            problem = None
            for plan in layer.plans:
                rows.append([*head, "" if plan.problem == problem else plan.problem.describe(), *_cells(plan)])
                head, problem = ["", ""], plan.problem
        rows += [[norm.name, norm.kind, *[""] * 6, norm.reason or ""] for norm in self.norms if norm.chain is None]
        lines = [table(rows), self.summary]
        if self.gpu:
            lines.insert(1, f"planned for the {self.gpu}")
        return "\n".join(lines)


def explain(model: torch.nn.Module, *inputs: Any) -> Explanation:
    """Which kernel serves each convolution of ``model(*inputs)``, in which tile, found where; or why none does.

    The model runs once, on a copy that has shapes but no data, so that nothing is computed and its statistics stay; a
    model that asks for values runs on a true copy, with PyTorch's kernels. Plans are made for the inputs' device, and
    also for the layers that ``convert`` would take. Gradients are explained where ``requires_grad`` and the caller's
    grad mode ask for them; the forward pass of a transposed convolution is a dgrad.

    Raises what the model raises.
    """
    calls: dict[str, _Calls] = {
        name: {} for name, layer in convolutions(model) if isinstance(layer, _ConvNd) and not reason_against(layer)
    }
    gpus: list[str] = []
    if not _run_without_data(model, inputs, calls, gpus):
        for seen in calls.values():
            seen.clear()
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            _run(copy.deepcopy(model), inputs, calls, gpus)
    layers = []
    for name, layer in convolutions(model):
        plans = tuple(plan for passes in calls.get(name, {}).values() for plan in passes)
        reason = reason_against(layer)
        if plans and all(plan.family == "pytorch" for plan in plans):
            reason = _reason(plans[0])
        layers.append(Layer(name, kind(layer), reason, plans))
    return Explanation(tuple(layers), tuple(norms(model)), gpus[0] if gpus else None)


# The plans of each problem that a layer was called with and the directions asked for.
_Calls = dict[tuple[ConvProblem, tuple[str, ...]], tuple[Plan, ...]]


def _run_without_data(
    model: torch.nn.Module, inputs: tuple[Any, ...], calls: dict[str, _Calls], gpus: list[str]
) -> bool:
    """Whether the model could be run so."""
    mode = FakeTensorMode()
    try:
        with FakeCopyMode(mode):
            duplicate = copy.deepcopy(model)
        with mode:
            _run(duplicate, tree_map_only(Tensor, mode.from_tensor, inputs), calls, gpus)
    except Exception as error:  # of any kind: the model may do anything with a tensor that has no values
        log.debug("explain needs the model's values: %s: %s", type(error).__name__, error)
        return False
    return True


def _run(model: torch.nn.Module, inputs: tuple[Any, ...], calls: dict[str, _Calls], gpus: list[str]) -> None:
    """Call ``model``, a copy to be thrown away, and note what its layers named in ``calls`` are called with."""

    def watch(seen: _Calls) -> Callable[..., None]:
        def hook(layer: _ConvNd, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
            x = arguments[0] if arguments else keywords["input"]
            problem = _problem(layer, x, output)
            directions = _directions(layer, x)
            if (problem, directions) in seen:
                return
            reason = functional.served(x, problem.dtype)
            if reason is None:
                gpu = dispatch.target(x.device)
                gpus.append(gpu.name)
                layout = Layout(bias=layer.bias is not None)
                plans = tuple(dispatch.plan(direction, problem, gpu, layout) for direction in directions)
            else:
                plans = tuple(
                    Plan(direction, problem, "pytorch", None, (), (("fastconv", reason),)) for direction in directions
                )
            seen[problem, directions] = plans

        return hook

    # PyTorch's layers give the same shapes, whatever device and dtype.
    revert(model)
    for name, seen in calls.items():
        model.get_submodule(name).register_forward_hook(watch(seen), prepend=True, with_kwargs=True)
    # What torch.compile made of a model calls no hooks.
    with torch.compiler.set_stance("force_eager"):
        model(*inputs)


def _directions(layer: _ConvNd, x: Tensor) -> tuple[str, ...]:
    forward, backward = ("dgrad", "fprop") if layer.transposed else ("fprop", "dgrad")
    needs = torch.is_grad_enabled()
    return (
        forward,
        *((backward,) if needs and x.requires_grad else ()),
        *(("wgrad",) if needs and layer.weight.requires_grad else ()),
    )


def _problem(layer: _ConvNd, x: Tensor, y: Tensor) -> ConvProblem:
    """The problem of one call of ``layer``."""
    rank = len(layer.kernel_size)
    stride = functional._expand("stride", layer.stride, rank)
    dilation = functional._expand("dilation", layer.dilation, rank)
    dtype = functional._autocast_dtype(x) or x.dtype
    batch, channels, *size = x.shape if x.dim() == rank + 2 else (1, *x.shape)
    weight = layer.weight.shape
    if layer.transposed:
        padding = functional._expand("padding", layer.padding, rank)
        least = [
            (p - 1) * s - 2 * pad + d * (r - 1) + 1
            for p, s, pad, d, r in zip(size, stride, padding, dilation, weight[2:], strict=True)
        ]
        extra = [have - want for have, want in zip(y.shape[-rank:], least, strict=True)]
        return conv_transpose_problem(
            (batch, channels, *size), weight, None, stride, padding, extra, dilation, layer.groups, dtype
        )
    if layer.padding_mode != "zeros":
        sides = layer._reversed_padding_repeated_twice
        size = [h + sum(sides[2 * axis : 2 * axis + 2]) for h, axis in zip(size, reversed(range(rank)), strict=True)]
        padding = (0,) * (2 * rank)
    elif isinstance(layer.padding, str):
        padding = functional._named_padding(layer.padding, weight[2:], stride, dilation)
    else:
        padding = functional._expand("padding", layer.padding, rank) * 2
    return conv_problem((batch, channels, *size), weight, None, stride, padding, dilation, layer.groups, dtype)


def _reason(plan: Plan) -> str:
    """Why PyTorch's own op serves it."""
    return "; ".join(reason for _, reason in plan.reasons)


def _cells(plan: Plan) -> list[str]:
    """Pass, kernel, tile, its origin, bytes and prediction."""
    if plan.choice is None:
        return [plan.direction, "PyTorch", "", "", "", _reason(plan)]
    config = plan.choice.config
    blocks = [f"{name.removeprefix('BLOCK_')}{value}" for name, value in config.items() if name.startswith("BLOCK_")]
    rest = [
        f"{name.removeprefix('num_').lower()} {value}"
        for name, value in config.items()
        if not name.startswith("BLOCK_")
    ]
    predicted = f"{plan.choice.seconds * 1e6:.1f} us, bound by {plan.choice.bound}"
    if plan.choice.bound == "interpreter":
        predicted = "interpreted"
    return [
        plan.direction,
        plan.family,
        ", ".join([" ".join(blocks), *rest]),
        plan.choice.source,
        f"{plan.problem.bytes / 1e6:.2f}",
        predicted,
    ]
