"""Finding chains and rewriting forwards: what is fused, what is not and why, and that the model stays the same model.

The fused call is replaced by PyTorch's own operators, so that every value here is compared bit for bit.
"""

from __future__ import annotations

import builtins
import copy
import importlib.util
import io
import linecache
import math
import operator
import pickle
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
from fastconv import nn as ours
from fastconv.kernels import mend
from plainly import activation, fused_by_torch

DEVICE = "cpu" if mend.interpreting() else "cuda"
pytestmark = [] if mend.interpreting() else [pytest.mark.gpu]


def how(args: tuple[Any, ...]) -> tuple[str | None, str | None]:
    """A fused call's activation, with the residual's place: None, "before" or "after"."""
    residual, after = args[9:11]
    return activation(args), None if residual is None else "after" if after else "before"


@pytest.fixture
def calls() -> Iterator[list[Any]]:
    """The fused calls made."""
    with fused_by_torch(how) as made:
        yield made


class Block(nn.Module):
    """Two of everything, four channels throughout; ``body`` is the forward."""

    def __init__(self, body: Callable[[Any, Any], Any], **children: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=i > 0) for i in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        for name, child in children.items():
            setattr(self, name, child)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


# The bodies are functions of a module, so that models pickle.


def plain_block(m: Any, x: Any) -> Any:
    out = m.relu(m.bn1(m.conv1(x)))
    out = m.bn2(m.conv2(out))
    out += x
    return m.relu(out)


def in_training_only(m: Any, x: Any) -> Any:
    y = m.bn1(m.conv1(x))
    return F.dropout(y, 0.0, m.training) if m.training else F.relu(y)


def writes_its_input(m: Any, x: Any) -> Any:
    y = m.conv1(x)
    x = m.relu(x)
    return m.bn1(y) + x


def twice(m: Any, x: Any) -> Any:
    return m.relu(m.bn1(m.conv1(F.silu(m.bn1(m.conv1(x))))))


def meet(m: Any, x: Any) -> Any:
    return F.relu(m.bn1(m.conv1(x)) + m.bn2(m.conv2(x)))


def meet_swapped(m: Any, x: Any) -> Any:
    second = m.bn2(m.conv2(x))
    return F.relu(m.bn1(m.conv1(x)) + second)


def changed_in_place(m: Any, x: Any) -> Any:
    shortcut = x * 2
    shortcut += m.bn1(m.conv1(x))
    return m.relu(shortcut)


def shortcut_in_place(m: Any, x: Any) -> Any:
    y = m.bn1(m.conv1(x * 1))
    x += y
    return m.conv2(x)


def loop(m: Any, x: Any) -> Any:
    for conv, norm in zip(m.convs, m.norms, strict=True):
        x = F.gelu(norm(conv(x)), approximate="tanh")
    return x


def by_type(m: Any, x: Any) -> Any:
    if isinstance(x, Tensor):
        x = [x]
    return m.relu(m.bn1(m.conv1(torch.cat(x, 1))))


BN1, BN2 = "conv1 + bn1", "conv2 + bn2"
OTHER = {"bn2": "not called by the module that holds it"}
# name -> (forward, further children, fused, unfused, the fused calls)
FOUND: dict[str, tuple[Any, dict[str, Any], list[str], dict[str, str], list[Any]]] = {
    "residual block": (
        plain_block,
        {},
        [f"{BN1} + relu", f"{BN2} + residual + relu"],
        {},
        [("ReLU", None), ("ReLU", "before")],
    ),
    "no activation": (lambda m, x: m.bn1(m.conv1(x)), {}, [BN1], OTHER, [(None, None)]),
    "function": (lambda m, x: F.relu(m.bn1(m.conv1(x)), inplace=True), {}, [f"{BN1} + relu"], OTHER, [("ReLU", None)]),
    "method": (lambda m, x: m.bn1(m.conv1(x)).relu_(), {}, [f"{BN1} + relu"], OTHER, [("ReLU", None)]),
    "torch's function": (lambda m, x: torch.tanh(m.bn1(m.conv1(x))), {}, [f"{BN1} + tanh"], OTHER, [("Tanh", None)]),
    "function of two": (
        lambda m, x: F.leaky_relu(m.bn1(m.conv1(x)), 0.3),
        {},
        [f"{BN1} + leaky_relu"],
        OTHER,
        [("LeakyReLU", None)],
    ),
    "prelu": (
        lambda m, x: m.act(m.bn1(m.conv1(x))),
        {"act": nn.PReLU(4)},
        [f"{BN1} + act"],
        OTHER,
        [("PReLU", None)],
    ),
    "no fused form": (lambda m, x: m.act(m.bn1(m.conv1(x))), {"act": nn.GLU(1)}, [BN1], OTHER, [(None, None)]),
    "after the activation": (
        lambda m, x: x + m.relu(m.bn1(m.conv1(x))),
        {},
        [f"{BN1} + relu + residual"],
        OTHER,
        [("ReLU", "after")],
    ),
    "torch.add": (
        lambda m, x: torch.add(m.bn1(m.conv1(x)), x),
        {},
        [f"{BN1} + residual"],
        OTHER,
        [(None, "after")],
    ),
    "add_": (lambda m, x: m.bn1(m.conv1(x)).add_(x), {}, [f"{BN1} + residual"], OTHER, [(None, "after")]),
    "alpha": (lambda m, x: torch.add(m.bn1(m.conv1(x)), x, alpha=2), {}, [BN1], OTHER, [(None, None)]),
    "number": (lambda m, x: m.bn1(m.conv1(x)) + 3, {}, [BN1], OTHER, [(None, None)]),
    "itself": (lambda m, x: operator.add(*[m.bn1(m.conv1(x))] * 2), {}, [BN1], OTHER, [(None, None)]),
    "broadcast": (
        lambda m, x: m.relu(m.bn1(m.conv1(x)) + x.mean((2, 3), keepdim=True)),
        {},
        [f"{BN1} + residual + relu"],
        OTHER,
        [(None, None)],
    ),
    "promoted": (
        lambda m, x: m.relu(m.bn1(m.conv1(x)) + x.double()),
        {},
        [f"{BN1} + residual + relu"],
        OTHER,
        [(None, None)],
    ),
    "meeting": (
        meet,
        {},
        [BN1, f"{BN2} + residual + relu"],
        {},
        [(None, None), ("ReLU", "before")],
    ),
    "meeting, swapped": (
        meet_swapped,
        {},
        [f"{BN1} + residual + relu", BN2],
        {},
        [(None, None), ("ReLU", "before")],
    ),
    "sum of the shortcut in place": (changed_in_place, {}, [BN1], OTHER, [(None, None)]),
    "twice": (twice, {}, [f"{BN1} + silu"], OTHER, [("SiLU", None), ("ReLU", None)]),
    "dropout": (
        lambda m, x: F.relu(m.drop(m.bn1(m.conv1(x)))),
        {"drop": nn.Dropout(0.0)},
        [f"{BN1} + relu"],
        OTHER,
        [("ReLU", None)],
    ),
    "identity": (
        lambda m, x: m.skip(m.relu(m.skip(m.bn1(m.skip(m.conv1(x)))))),
        {"skip": nn.Identity()},
        [f"{BN1} + relu"],
        OTHER,
        [("ReLU", None)],
    ),
    "mode": (
        lambda m, x: F.dropout(m.relu(m.bn1(m.conv1(x))), 0.5 if m.training else 0.0, m.training),
        {},
        [f"{BN1} + relu"],
        OTHER,
        [("ReLU", None)],
    ),
    "loop": (
        loop,
        {
            "convs": nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2)),
            "norms": nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2)),
        },
        ["convs.0 + norms.0 + gelu", "convs.1 + norms.1 + gelu"],
        {"bn1": OTHER["bn2"], **OTHER},
        [("GELU", None)] * 2,
    ),
    "asks the type": (by_type, {}, [f"{BN1} + relu"], OTHER, [("ReLU", None)]),
    "two readers": (
        lambda m, x: m.bn1(y := m.conv1(x)) + y.sigmoid(),
        {},
        [],
        {"bn1": "the result of conv1 also goes to sigmoid", **OTHER},
        [],
    ),
    "returned as well": (
        lambda m, x: torch.stack([m.bn1(y := m.conv1(x)), y]),
        {},
        [],
        {"bn1": "the result of conv1 also goes to stack", **OTHER},
        [],
    ),
    "read behind the norm": (
        lambda m, x: F.relu(y := m.bn1(m.conv1(x))) * y,
        {},
        [BN1],
        OTHER,
        [(None, None)],
    ),
    "its size is read": (
        lambda m, x: m.bn1(y := m.conv1(x)).reshape(y.shape),
        {},
        [],
        {"bn1": "the result of conv1 also goes to getattr", **OTHER},
        [],
    ),
    "activation in between": (
        lambda m, x: m.bn1(m.relu(m.conv1(x))),
        {},
        [],
        {"bn1": "not behind a convolution but relu, a ReLU", **OTHER},
        [],
    ),
    "norm first": (
        lambda m, x: m.conv1(m.bn1(x)),
        {},
        [],
        {"bn1": "not behind a convolution but the argument x", **OTHER},
        [],
    ),
    "transposed": (
        lambda m, x: m.bn1(m.up(x)),
        {"up": nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)},
        ["up + bn1"],
        OTHER,
        [(None, None)],
    ),
    "transposed to a size": (
        lambda m, x: m.bn1(m.up(x, x.shape)),
        {"up": nn.ConvTranspose2d(4, 4, 3, padding=1)},
        [],
        {"bn1": "up is called with more than its input", **OTHER},
        [],
    ),
    "other in eval": (
        in_training_only,
        {},
        [],
        {"bn1": "called otherwise in training than in eval", **OTHER},
        [],
    ),
    "group norm": (lambda m, x: m.gn(m.conv1(x)), {"gn": nn.GroupNorm(2, 4)}, [], {"bn1": OTHER["bn2"], **OTHER}, []),
}


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model with statistics and affines of its own, converted, and one that is not."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        least = 0.5 if isinstance(module, nn.modules.batchnorm._BatchNorm) else -0.5
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if value.is_floating_point():
                value.data.copy_(torch.rand(value.shape, generator=generator) + least)
    model.to(DEVICE)
    return fastconv.convert(model), fastconv.revert(copy.deepcopy(model))


def step(model: nn.Module, x: Any) -> list[Tensor]:
    """Result, gradients, buffers of one step."""
    torch.manual_seed(2)
    inputs = [x.clone().requires_grad_()] if isinstance(x, Tensor) else [t.clone().requires_grad_() for t in x]
    argument = [t.clone() for t in inputs]
    y = model(argument[0] if isinstance(x, Tensor) else argument)
    y.square().sum().backward()
    grads = [t.grad for t in (*inputs, *model.parameters()) if t.grad is not None]
    model.zero_grad()
    return [y.detach(), *grads, *(b.clone() for b in model.buffers())]


def assert_same(model: nn.Module, plain: nn.Module, x: Any, exact: bool = True) -> None:
    model.train(plain.training)
    ours_, theirs = step(model, x), step(plain, x)
    for a, b in zip(ours_, theirs, strict=True):
        if exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 5, 6), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, calls: list[Any]) -> None:
    body, children, fused, unfused, expected = FOUND[name]
    model, plain = pair(Block(body, **copy.deepcopy(children)))
    report = fastconv.report(model)
    assert (report.fused, dict(report.unfused)) == (fused, unfused)
    for training in (True, False):
        plain.train(training)
        calls.clear()
        assert_same(model, plain, images())
        assert calls == expected


def test_what_ends_a_chain_is_named() -> None:
    body, children, *_ = FOUND["no fused form"]
    report = fastconv.report(fastconv.convert(Block(body, **copy.deepcopy(children))))
    assert report.norms[0].reason == "act has no fused form"
    assert " ".join(str(report).splitlines()[1].split()) == "conv1 + bn1 Conv2d fastconv act has no fused form"


def test_table() -> None:
    model = fastconv.convert(nn.Sequential(Block(plain_block), nn.BatchNorm2d(4)))
    assert str(fastconv.report(model)).splitlines() == [
        "layer                            kind         served by",
        "0.conv1 + bn1 + relu             Conv2d       fastconv",
        "0.conv2 + bn2 + residual + relu  Conv2d       fastconv",
        "1                                BatchNorm2d  PyTorch    not behind a convolution but 0, a Block",
        "2 of 2 convolution layers on fastconv's kernels, 2 of 3 batch norms fused into them",
    ]


def test_what_is_written_before_it_is_normalised(calls: list[Any]) -> None:
    model, plain = pair(Block(writes_its_input))
    assert fastconv.report(model).unfused[0] == ("bn1", "something in between may write in place")
    with torch.no_grad():
        assert torch.equal(model(images()), plain(images()))


def test_a_shortcut_that_is_written_in_place(calls: list[Any]) -> None:
    model, plain = pair(Block(shortcut_in_place))
    assert fastconv.report(model).fused == [BN1]
    assert_same(model, plain, images())
    a, b = images(), images()
    with torch.no_grad():
        model(a), plain(b)
    assert torch.equal(a, b) and not torch.equal(a, images())


# Chains that go on in the module that calls the one they end


class Unit(nn.Module):
    """Convolution, batch norm, activation: with a forward of its own."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Depth(nn.Module):
    """As torchvision's, which is let pass by its name."""

    __module__, __qualname__ = "torchvision.ops.stochastic_depth", "StochasticDepth"

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p if self.training and self.p else x


Depth.__name__ = "StochasticDepth"


def sequence(*before: nn.Module, bn: bool = True) -> nn.Sequential:
    return nn.Sequential(*before, nn.Conv2d(4, 4, 3, padding=1), *([nn.BatchNorm2d(4)] if bn else []))


def added_to(m: Any, x: Any) -> Any:
    return x + m.f(x)


def act_of_sum(m: Any, x: Any) -> Any:
    y = m.f(x)
    y += x
    return m.relu(y)


def both_children(m: Any, x: Any) -> Any:
    out = m.f(x)
    out += m.g(x)
    return F.silu(out)


def sum_of_both(m: Any, x: Any) -> Any:
    return F.silu(m.f(x) + m.g(x))


def norm_of_child(m: Any, x: Any) -> Any:
    return m.relu(m.bn1(m.f(x)))


def through(m: Any, x: Any) -> Any:
    return m.g(m.f(x)) + x


RELU, PLUS = ("ReLU", None), (None, "after")
# name -> (forward, further children, fused, calls of one step in training, and in eval where they differ)
CROSSING: dict[str, tuple[Any, dict[str, Any], list[str], list[Any], list[Any] | None]] = {
    "sequence": (
        added_to,
        {"f": sequence(*sequence(), nn.ReLU())},
        ["f.0 + 1 + 2", "f.3 + 4 + residual"],
        [RELU, PLUS],
        None,
    ),
    "nested sequences": (
        act_of_sum,
        {"f": nn.Sequential(nn.Sequential(*sequence(), nn.ReLU(True)), nn.Sequential(sequence()))},
        ["f.0.0 + 1 + 2", "f.1.0.0 + 1 + residual + relu"],
        [RELU, ("ReLU", "before")],
        None,
    ),
    "forward of its own": (act_of_sum, {"f": Unit()}, ["f.conv + bn + residual + relu"], [("ReLU", "before")], None),
    "after an activation": (
        added_to,
        {"f": Unit(nn.SiLU())},
        ["f.conv + bn + act + residual"],
        [("SiLU", "after")],
        None,
    ),
    "a second activation": (
        act_of_sum,
        {"f": Unit(nn.SiLU())},
        ["f.conv + bn + act + residual"],
        [("SiLU", "after")],
        None,
    ),
    "layer of ours": (
        act_of_sum,
        {"f": ours.ConvBNAct2d(4, 4, 3, padding=1, act=None)},
        ["f.conv + bn + residual + relu"],
        [("ReLU", "before")],
        None,
    ),
    "activation alone": (
        lambda m, x: F.gelu(m.f(x)),
        {"f": sequence()},
        ["f.0 + 1 + gelu"],
        [("GELU", None)],
        None,
    ),
    "a sum of its own": (
        added_to,
        {"f": Block(added_to, f=sequence())},
        ["f.f.0 + 1 + residual"],
        [PLUS],
        None,
    ),
    "writes its input first": (added_to, {"f": sequence(nn.ReLU(True))}, ["f.1 + 2 + residual"], [PLUS], None),
    "norm outside": (
        norm_of_child,
        {"f": nn.Sequential(*sequence(), nn.ReLU(), sequence(bn=False))},
        ["f.0 + 1 + 2", "f.3.0 + bn1 + relu"],
        [RELU, RELU],
        None,
    ),
    "identity as shortcut": (
        sum_of_both,
        {"f": Unit(), "g": nn.Identity()},
        ["f.conv + bn + residual + silu"],
        [("SiLU", "before")],
        None,
    ),
    "both chains": (
        both_children,
        {"f": sequence(), "g": sequence()},
        ["f.0 + 1 + residual + silu", "g.0 + 1"],
        [(None, None), ("SiLU", "before")],
        None,
    ),
    "both chains, one unknown": (
        both_children,
        {"f": Unit(), "g": Unit()},
        ["f.conv + bn", "g.conv + bn"],
        [(None, None)] * 2,
        None,
    ),
    "sum of both": (
        sum_of_both,
        {"f": Unit(), "g": Unit()},
        ["f.conv + bn", "g.conv + bn + residual + silu"],
        [(None, None), ("SiLU", "before")],
        None,
    ),
    "stochastic depth": (
        through,
        {"f": sequence(), "g": Depth(0.5)},
        ["f.0 + 1"],
        [(None, None)],
        [PLUS],
    ),
    "stochastic depth of 0": (through, {"f": sequence(), "g": Depth(0.0)}, ["f.0 + 1 + residual"], [PLUS], None),
    "dropout": (through, {"f": sequence(nn.Dropout2d()), "g": nn.Dropout2d()}, ["f.1 + 2"], [(None, None)], [PLUS]),
    "read twice": (
        lambda m, x: (y := m.f(x)) * y,
        {"f": sequence()},
        ["f.0 + 1"],
        [(None, None)],
        None,
    ),
    "by name": (
        lambda m, x: m.relu(input=m.bn1(input=m.conv1(input=x))),
        {},
        [f"{BN1} + relu"],
        [RELU],
        None,
    ),
}


@pytest.mark.parametrize("name", CROSSING)
def test_crossing(name: str, calls: list[Any]) -> None:
    body, children, fused, in_training, in_eval = CROSSING[name]
    model, plain = pair(Block(body, **copy.deepcopy(children)))
    assert sorted(fastconv.report(model).fused) == fused
    for training, expected in ((True, in_training), (False, in_eval or in_training)):
        plain.train(training)
        calls.clear()
        assert_same(model, plain, images())
        assert calls == expected
    twins = [copy.deepcopy(model)]
    if body.__name__ != "<lambda>" and not isinstance(children.get("g"), Depth):
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        calls.clear()
        assert_same(twin, plain, images())
        assert calls == (in_eval or in_training)
    assert {type(m).__dict__.get("_fastconv_names") for m in fastconv.revert(model).modules()} == {None}


def residual() -> tuple[Any, Any]:
    """A block that adds its input to what a Sequential gives, which ends in another."""
    return pair(Block(lambda m, x: m.relu(m.f(x) + x), f=nn.Sequential(sequence(), sequence()), relu=nn.ReLU()))


ADDED = [(None, None), ("ReLU", "before")]
ALONE = [(None, None)] * 2


@pytest.mark.parametrize("where", ["f", "f.1"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_on_what_a_chain_crosses(kind: str, where: str, calls: list[Any]) -> None:
    model, plain = residual()
    seen: list[Any] = []

    def note(module: nn.Module, *values: Any) -> None:
        seen.append([v.detach().clone() for v in values if isinstance(v, Tensor)])

    handles = [getattr(m.get_submodule(where), f"register_{kind}")(note) for m in (model, plain)]
    report = fastconv.report(model)
    assert report.fused == ["f.0.0 + 1", "f.1.0 + 1"]
    assert report.norms[-1].reason == "a hook on its Sequential"
    assert_same(model, plain, images())
    assert calls == ALONE and len(seen) == 2
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)
    for handle in handles:
        handle.remove()
    calls.clear()
    assert_same(model, plain, images())
    assert calls == ADDED


def test_other_calls_of_what_a_chain_crosses_are_seen(calls: list[Any]) -> None:
    model, plain = residual()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert_same(model, plain, images())
    handle.remove()
    assert calls == []
    model.f.forward = lambda x: x * 2
    assert torch.equal(model(images()), F.relu(images() * 3))
    del model.f.forward
    model.f._compiled_call_impl = lambda x: x * 2
    assert torch.equal(model(images()), F.relu(images() * 3))
    del model.f._compiled_call_impl
    assert calls == []
    assert_same(model, plain, images())
    assert calls == ADDED


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.f.append(nn.Sigmoid()), ALONE),
        (lambda m: m.f[1].append(nn.Sigmoid()), ALONE[:1]),
        (lambda m: m.f[1].append(nn.ReLU(inplace=True)), ALONE[:1]),
        (lambda m: m.f.pop(1), ALONE[:1]),
        (lambda m: m.f.__setitem__(1, nn.Identity()), ALONE[:1]),
        (lambda m: m.f[1].__setitem__(1, nn.Sigmoid()), ALONE[:1]),
        (lambda m: m.f[1].add_module("0", nn.Identity()), ALONE[:1]),
        (lambda m: m.__setattr__("f", sequence().to(DEVICE)), []),
        (lambda m: m.__setattr__("relu", nn.SiLU()), [(None, None), ("SiLU", "before")]),
        (lambda m: m.add_module("relu", nn.SiLU()), [(None, None), ("SiLU", "before")]),
        (lambda m: m.add_module("relu", nn.Softsign()), [(None, None), (None, "after")]),
        (lambda m: m.f[1][1].register_forward_hook(lambda *_: None), ALONE[:1]),
        (lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m), ADDED),
    ],
)
def test_changes_of_what_a_chain_crosses(change: Any, expected: list[Any], calls: list[Any]) -> None:
    model, plain = residual()
    for m in (model, plain):
        torch.manual_seed(4)
        change(m)
    assert_same(model, plain, images())
    assert calls == expected


def test_a_batch_norm_that_is_excluded_ends_no_chain() -> None:
    model = fastconv.convert(Block(added_to, f=sequence()), exclude="f.1")
    assert fastconv.report(model).fused == [] and type(model) is Block
    assert fastconv.report(fastconv.convert(model)).fused == ["f.0 + 1 + residual"]


def test_a_call_of_its_own_is_not_crossed(calls: list[Any]) -> None:
    class Twice(nn.Sequential):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    model, plain = pair(Block(added_to, f=Twice(*sequence())))
    assert_same(model, plain, images())
    assert calls == [(None, None)]


def test_hooks_see_what_is_called_by_name(calls: list[Any]) -> None:
    model, plain = pair(Block(CROSSING["by name"][0]))
    seen: list[Any] = []
    for m in (model, plain):
        m.bn1.register_forward_hook(lambda _, args, kwargs, y: seen.append((len(args), *kwargs)), with_kwargs=True)
    assert_same(model, plain, images())
    assert seen == [(0, "input")] * 2 and not calls


def test_hooks_see_a_shortcut_where_it_is_called(calls: list[Any]) -> None:
    model, plain = pair(Block(sum_of_both, f=sequence(), g=nn.Identity()))
    seen: list[str] = []
    for m in (model, plain):
        m.f[0].register_forward_hook(lambda *_: seen.append("f"))
        m.g.register_forward_hook(lambda *_: seen.append("g"))
    assert_same(model, plain, images())
    assert seen == ["f", "g"] * 2


class Ends(nn.ModuleDict):
    """As torchvision's backbones: a container with a forward, which gives an ordered dictionary."""

    def __init__(self, children: dict[str, nn.Module], returned: dict[str, str]) -> None:
        super().__init__(children)
        self.returned = returned

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = OrderedDict()
        for name, child in self.items():
            x = child(x)
            if name in self.returned:
                out[self.returned[name]] = x
        return out


def test_an_ordered_dictionary_of_results(calls: list[Any]) -> None:
    layers = {"conv": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4), "relu": nn.ReLU(), "last": sequence()}
    model, plain = pair(Ends(layers, {"relu": "low", "last": "high"}))
    assert fastconv.report(model).fused == ["conv + bn + relu", "last.0 + 1"]
    mine, theirs = model(images()), plain(images())
    assert type(mine) is OrderedDict and list(mine) == list(theirs) == ["low", "high"]
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len(calls) == 2


def test_a_dictionary_of_a_class_of_its_own_is_not_made_another(calls: list[Any]) -> None:
    class Results(dict):  # type: ignore[type-arg]
        pass

    model = fastconv.convert(Block(lambda m, x: Results(y=m.bn1(m.conv1(x)))))
    assert dict(fastconv.report(model).unfused)["bn1"] == "Block.forward makes a Results"


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()], ids=["relu", "silu"])
def test_a_shortcut_that_is_written_when_it_is_needed_in_backward(act: nn.Module, calls: list[Any]) -> None:
    def body(m: Any, x: Any) -> Any:
        shortcut = x * 1
        y = m.act(m.bn1(m.conv1(x)) + shortcut)
        shortcut += 1
        return y + shortcut

    model, plain = pair(Block(body, act=act))
    assert fastconv.report(model).fused == [f"{BN1} + residual{'' if isinstance(act, nn.SiLU) else ' + act'}"]
    assert_same(model, plain, images())


def test_a_convolution_replaced_by_something_else(calls: list[Any]) -> None:
    model, plain = pair(Block(FOUND["no activation"][0]))
    for m in (model, plain):
        m.add_module("conv1", nn.Identity())
    assert_same(model, plain, images())
    assert not calls


def test_a_function_is_not_the_module_of_its_name(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who replaces or hooks nn.ReLU does not mean F.relu."""
    model, plain = pair(Block(lambda m, x: F.relu(m.bn1(m.conv1(x))) * F.relu(m.conv2(x))))
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x * 0)
    assert_same(model, plain, images())
    assert calls == [("ReLU", None)]
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: names.append(type(m).__name__))
    with handle:
        model(images())
    assert names == ["Conv2d", "BatchNorm2d", "Conv2d", "Block"]


def test_functions_that_are_overridden_are_called(calls: list[Any]) -> None:
    names: list[str] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model, plain = residual()
    with Mode():
        assert_same(model, plain, images())
    assert not calls and names.count("batch_norm") == 4
    with torch.device(DEVICE):
        assert_same(model, plain, images())
    assert calls == ADDED


# What cannot be traced


def draws(m: Any, x: Any) -> Any:
    return x if random.random() < -1 else m.bn1(m.conv1(x))


def draws_torch(m: Any, x: Any) -> Any:
    return x if torch.rand(()) < -1 else m.bn1(m.conv1(x))


def sets(m: Any, x: Any) -> Any:
    m.seen = x
    return m.bn1(m.conv1(x))


def appends(m: Any, x: Any) -> Any:
    m.log.append(x)
    return m.bn1(m.conv1(x))


def no_grad(m: Any, x: Any) -> Any:
    with torch.no_grad():
        x = m.bn1(m.conv1(x))
    return m.bn2(m.conv2(x))


def autocast(m: Any, x: Any) -> Any:
    with torch.autocast(DEVICE, torch.bfloat16):
        return m.bn1(m.conv1(x)).float()


def checkpointed(m: Any, x: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda x: m.bn1(m.conv1(x)), x, use_reentrant=False)


class Counting:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.times = 0

    @property
    def value(self) -> int:
        self.times += 1
        return self.times

    def __bool__(self) -> bool:
        self.times += 1
        return True


def prints(m: Any, x: Any) -> Any:
    print("called")
    return m.bn1(m.conv1(x))


def sets_global(m: Any, x: Any) -> Any:
    global CALLS
    CALLS += 1
    return m.bn1(m.conv1(x))


def catches(m: Any, x: Any) -> Any:
    try:
        return m.bn1(m.conv1(x))
    except ValueError:
        return x


def changes_an_option(m: Any, x: Any) -> Any:
    m.options["sizes"].append(1)
    return m.bn1(m.conv1(x))


def counts_on_another(m: Any, x: Any) -> Any:
    m.counting.times += 1
    return m.bn1(m.conv1(x))


def raises(m: Any, x: Any) -> Any:
    if m.training:
        raise ValueError("not in training")
    return m.bn1(m.conv1(x))


def generates(m: Any, x: Any) -> Any:
    def parts() -> Any:
        yield m.conv1(x)

    return m.bn1(next(parts()))


CALLS = 0
CONTROL_FLOW = "does what torch.fx cannot trace: .*control flow"
CONTEXT = r"enters a context \(no_grad, autocast or the like\)"
UNTRACEABLE = {
    "values": (lambda m, x: m.bn1(m.conv1(x)) if x.sum() > -1e9 else x, CONTROL_FLOW),
    "size": (lambda m, x: m.bn1(m.conv1(x)) if x.shape[0] > 0 else x, CONTROL_FLOW),
    "sets": (sets, "sets self.seen"),
    "appends": (appends, "changes self.log"),
    "changes what it reads": (changes_an_option, "changes self.options"),
    "counts": (counts_on_another, "sets self.counting.times"),
    "sets a global": (sets_global, "sets variables of others"),
    "property": (lambda m, x: m.bn1(m.conv1(x)) * m.counting.value, "sets self.counting.times"),
    "truth": (lambda m, x: m.bn1(m.conv1(x)) if m.counting else x, "asks whether self.counting, a Counting, is true"),
    "prints": (prints, "calls print"),
    "catches": (catches, "catches exceptions"),
    "raises": (raises, "raises"),
    "generates": (generates, "runs generates, a generator"),
    "random": (draws, "calls random.random"),
    "torch's random": (draws_torch, "calls torch.rand"),
    "numpy's random": (lambda m, x: m.bn1(m.conv1(x)) * np.random.rand(), "calls np.random.rand"),
    "constant": (lambda m, x: m.bn1(m.conv1(x)) + torch.ones(4, 1, 1, device=DEVICE), "calls torch.ones"),
    "another's tensor": (lambda m, x: m.bn1(m.conv1(x)) + ONE, "hands on ONE, a Tensor"),
    "no_grad": (no_grad, CONTEXT),
    "autocast": (autocast, CONTEXT),
    "autocast's state": (
        lambda m, x: m.bn1(m.conv1(x)) + torch.is_autocast_enabled(),
        "calls torch.is_autocast_enabled",
    ),
    "checkpoint": (checkpointed, "imports a module"),
    "grad mode": (lambda m, x: m.bn1(m.conv1(x)) * (1 + torch.is_grad_enabled()), "calls torch.is_grad_enabled"),
    "text of a value": (lambda m, x: m.bn1(m.conv1(x)) * len(f"{x}"), "writes down what a value is"),
    "text by remainder": (
        lambda m, x: m.bn1(m.conv1(x)) * len("%s" % x),  # noqa: UP031
        "writes down what a value is",
    ),
    "type": (lambda m, x: m.bn1(m.conv1(x)) if type(m.conv1) is nn.Conv2d else x, "makes a type"),
    "object in a list": (lambda m, x: m.bn1(m.conv1(x)) * len(m.objects), "reads self.objects, a list, .*"),
    "type of an unknown": (
        lambda m, x: y[0] if isinstance(y := m.block(m.bn1(m.conv1(x))).sum(), tuple) else y,
        "asks what sum_1 is",
    ),
    "module of another": (lambda m, x: OUTSIDE(m.bn1(m.conv1(x))), "calls OUTSIDE, which is not its own"),
}
ONE = torch.ones(())
OUTSIDE = nn.Conv2d(4, 4, 1)


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_untraceable(name: str, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    body, reason = UNTRACEABLE[name]
    module: Any = Block(body, block=Block(plain_block))
    module.log, module.options, module.objects, module.counting = [], {"sizes": []}, [object()], Counting()
    random.seed(3), np.random.seed(3)
    state = copy.deepcopy(vars(module))
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), CALLS
    model = fastconv.convert(module)
    report = fastconv.report(model)
    assert 'torch.compile(backend="fastconv")' in str(report).splitlines()[-2]
    unfused = dict(report.unfused)
    assert type(model) is Block
    assert re.fullmatch(reason, unfused["bn1"].removeprefix("Block.forward ")), unfused
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), CALLS) == numbers
    assert set(vars(module)) == set(state)
    assert (module.log, module.options, module.counting.times) == ([], {"sizes": []}, 0)
    assert capsys.readouterr().out == ""


# What a forward decides by, and a change of it


class Deciding(nn.Module):
    """A forward that chooses by ``how``; every choice but the first has no activation."""

    wanted = True

    def __init__(self, how: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.0)
        self.how, self.flag, self._flag, self.times, self.name, self.rate = how, True, True, 1, "relu", 0.0
        self.config = SimpleNamespace(flag=True, inner=SimpleNamespace(flag=True))
        self.options: dict[str, Any] = {"flag": True, "sizes": [1]}
        self.down: Any = None
        self.act: nn.Module = nn.ReLU()
        self.parts: nn.Module = nn.ModuleList([nn.ReLU()])
        self.choose, self.kind = max, nn.ReLU

    @property
    def is_flag(self) -> bool:
        return self.flag

    def asks(self) -> bool:
        return self.flag

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y) if self.how(self) else y * 2


class Empty(nn.ModuleList):
    def __iter__(self) -> Any:
        return iter(())


def with_default(m: Any, answer: bool = True) -> bool:
    return answer


FLAG = True
SPACE = SimpleNamespace(flag=True)


def set_global(name: str, value: Any) -> Any:
    def change(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(globals(), name, value)

    return change


def assign(name: str, value: Any) -> Any:
    def change(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        *path, last = name.split(".")
        setattr(operator.attrgetter(".".join(path))(module) if path else module, last, value)

    return change


# name -> (what is asked, a change that turns the answer)
DECIDED: dict[str, tuple[Any, Any]] = {
    "attribute": (lambda m: m.flag, assign("flag", False)),
    "private": (lambda m: m._flag, assign("_flag", False)),
    "of a configuration": (lambda m: m.config.flag, assign("config.flag", False)),
    "of a nested one": (lambda m: m.config.inner.flag, assign("config.inner.flag", False)),
    "another configuration": (lambda m: m.config.flag, assign("config", SimpleNamespace(flag=False))),
    "item": (lambda m: m.options["flag"], lambda m, _: m.options.__setitem__("flag", False)),
    "item by get": (lambda m: m.options.get("flag"), lambda m, _: m.options.pop("flag")),
    "item of an item": (lambda m: len(m.options["sizes"]) == 1, lambda m, _: m.options["sizes"].append(1)),
    "True that becomes 1.5": (lambda m: m.flag is True, assign("flag", 1.5)),
    "True that becomes 1": (lambda m: m.flag is True, assign("flag", 1)),
    "number": (lambda m: m.times == 1, assign("times", 2)),
    "loop": (lambda m: [0 for _ in range(m.times)], assign("times", 0)),
    "string": (lambda m: m.name == "relu", assign("name", "none")),
    "rate": (lambda m: not m.rate > 0, assign("rate", 0.5)),
    "None": (lambda m: m.down is None, assign("down", nn.Identity())),
    "a child's training": (lambda m: m.drop.training == m.training, lambda m, _: m.drop.train(not m.training)),
    "batch norm's momentum": (lambda m: m.bn.momentum == 0.1, assign("bn.momentum", 0.2)),
    "type of a child": (lambda m: isinstance(m.act, nn.ReLU), assign("act", nn.SiLU())),
    "truth": (lambda m: m.act, assign("act", nn.Sequential())),
    "an object": (lambda m: m.config is not None, assign("config", None)),
    "by equality with None": (lambda m: m.act != None, assign("act", None)),  # noqa: E711
    "sign of zero": (lambda m: math.copysign(1, m.rate) > 0, assign("rate", -0.0)),
    "global in front of a builtin": (
        lambda m: min(0, 1) == 0,
        lambda m, patch: patch.setitem(globals(), "min", lambda *_: 1),
    ),
    "patched builtin": (lambda m: min(0, 1) == 0, lambda m, patch: patch.setattr(builtins, "min", lambda *_: 1)),
    "builtin function": (lambda m: m.choose((0, 1)), assign("choose", min)),
    "class": (lambda m: isinstance(m.act, m.kind), assign("kind", nn.SiLU)),
    "children": (lambda m: len([0 for _ in m.children()]) == 5, lambda m, _: setattr(m, "act", m.drop)),
    "container": (lambda m: [0 for _ in m.parts], assign("parts", Empty([nn.ReLU()]))),
    "default": (
        lambda m: with_default(m),
        lambda m, patch: patch.setattr(with_default, "__defaults__", (False,)),
    ),
    "what there is": (lambda m: not hasattr(m, "extra"), assign("extra", 1)),
    "what there is by getattr": (lambda m: getattr(m, "extra", True), assign("extra", False)),
    "property": (lambda m: m.is_flag, assign("flag", False)),
    "method": (lambda m: m.asks(), assign("flag", False)),
    "method patched": (lambda m: m.asks(), lambda m, patch: patch.setattr(Deciding, "asks", lambda self: False)),
    "property patched": (
        lambda m: m.is_flag,
        lambda m, patch: patch.setattr(Deciding, "is_flag", property(lambda self: False)),
    ),
    "method of the instance": (lambda m: m.asks(), assign("asks", lambda: False)),
    "class attribute": (lambda m: m.wanted, lambda m, patch: patch.setattr(Deciding, "wanted", False)),
    "class attribute of the instance": (lambda m: m.wanted, assign("wanted", False)),
    "global": (lambda m: FLAG, set_global("FLAG", False)),
    "of a global": (lambda m: SPACE.flag, lambda m, patch: patch.setattr(SPACE, "flag", False)),
    "global function": (lambda m: asked(m), set_global("asked", lambda m: False)),
    "forward patched": (
        lambda m: True,
        lambda m, patch: patch.setattr(Deciding, "forward", lambda self, x: self.bn(self.conv(x))),
    ),
    "forward patched on its type": (
        lambda m: True,
        lambda m, patch: patch.setattr(type(m), "forward", lambda self, x: self.bn(self.conv(x))),
    ),
    "function patched": (lambda m: True, lambda m, patch: patch.setattr(F, "relu", lambda x: x - 1)),
}


def asked(m: Any) -> bool:
    return m.flag


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", DECIDED)
def test_what_a_forward_decides_by(
    name: str, training: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, change = DECIDED[name]
    model, plain = pair(Deciding(how))
    plain.train(training)
    assert_same(model, plain, images())
    assert calls == [("ReLU", None)]
    # (A class, a global: once for both.)
    change(model, monkeypatch)
    if "patch" not in name and "lobal" not in name and name not in ("class attribute", "default"):
        change(plain, monkeypatch)
    calls.clear()
    for ours_, theirs in zip(step(model, images()), step(plain, images()), strict=True):
        assert torch.equal(ours_, theirs)
    assert calls == []
    report = fastconv.report(model)
    assert report.fused == [] and report.unfused[0][1], report


# What Python and PyTorch do that a graph does not show


class Recorder(nn.Module):
    """Keeps what it is called with, how often it is called, and appends to what it is given."""

    def __init__(self, shared: Any = None) -> None:
        super().__init__()
        self.last, self.times, self.shared = torch.zeros((), device=DEVICE), 0, shared

    def forward(self, x: Tensor, seen: Any = None) -> Tensor:
        self.last = x * 2
        self.times += 1
        if self.shared is not None:
            self.shared.times += 1
        if isinstance(seen, list):
            seen.append(x * 3)
        elif seen is not None:
            seen["x"] = x * 3
        return x


class Unused(nn.Module):
    shared = None

    def forward(self, x: Tensor, *unused: Any) -> Tensor:
        return x


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        return x if mask is None else (x, mask)


def reads_behind(read: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """What is read behind a batch norm, in front of an activation and of a sum."""

    def body(m: Any, x: Any) -> Any:
        y = m.bn1(m.conv1(m.recorder(x)))
        other = read(m)
        return m.relu(y) * other

    return body


def reads_of_a_head(m: Any, x: Any) -> Any:
    y = m.f(x)
    last = m.f[0].last
    return y + last


def appends_elsewhere(m: Any, x: Any) -> Any:
    seen: list[Any] = []
    y = m.relu(m.bn1(m.conv1(m.recorder(x, seen))))
    for value in seen:
        y = y + value
    return y


def asks_for_what_is_elsewhere(m: Any, x: Any) -> Any:
    seen: list[Any] = []
    y = m.bn1(m.conv1(m.recorder(x, m.recorder.shared, seen)))
    return y * 2 if seen else y


def sets_elsewhere(m: Any, x: Any) -> Any:
    seen: dict[str, Any] = {}
    return m.relu(m.bn1(m.conv1(m.recorder(x, seen)))) + sum(seen.values())


def asks_of_a_masked(m: Any, x: Any) -> Any:
    y = m.masked(m.bn1(m.conv1(x)) + m.bn2(x), None)
    return y[0] if isinstance(y, tuple) else y


def index_once(m: Any, x: Any) -> Any:
    numbers, places = [1, 2], [0, 1]
    numbers[places.pop()] += 10
    return m.bn1(m.conv1(x)) * numbers[0] + numbers[1]


def sets_an_item_by_function(m: Any, x: Any) -> Any:
    values = [x, x]
    operator.setitem(values, 0, m.bn1(m.conv1(x)))
    return values[0]


def of_children(m: Any, x: Any) -> Any:
    for child in m.children():
        x = child(x)
    return x


def of_a_set(m: Any, x: Any) -> Any:
    y = m.bn1(m.conv1(x))
    for number in m.numbers:
        y = y * number + 1
    return y


def with_another_order() -> set[int]:
    numbers = set(range(100))
    numbers.difference_update(set(numbers) - {1, 8})
    assert list(numbers) != list(set(numbers) | set())  # a copy is {8, 1}
    return numbers


# name -> (forward, further attributes)
SEEN_IN_ORDER: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
    "statistics": (reads_behind(lambda m: m.bn1.running_mean.sum()), lambda: {"recorder": nn.Identity()}),
    "count of batches": (reads_behind(lambda m: m.bn1.num_batches_tracked * 1), lambda: {"recorder": nn.Identity()}),
    "a child's number": (reads_behind(lambda m: m.recorder.times), lambda: {"recorder": Recorder()}),
    "an object's number": (
        reads_behind(lambda m: m.recorder.shared.times),
        lambda: {"recorder": Recorder(SimpleNamespace(times=0))},
    ),
    "a tensor of the head's": (reads_of_a_head, lambda: {"f": sequence(Recorder())}),
    "a list": (appends_elsewhere, lambda: {"recorder": Recorder()}),
    "whether a list is empty": (asks_for_what_is_elsewhere, lambda: {"recorder": Unused()}),
    "a dictionary": (sets_elsewhere, lambda: {"recorder": Recorder()}),
    "a child called with None": (asks_of_a_masked, lambda: {"masked": Masked()}),
    "an index": (index_once, dict),
    "an item": (sets_an_item_by_function, dict),
    "children that are one": (of_children, lambda: {"bn2": nn.Identity(), **dict.fromkeys(("act", "relu"), nn.Tanh())}),
    "a set": (of_a_set, lambda: {"numbers": with_another_order()}),
    "text": (lambda m, x: m.bn1(m.conv1(x)) * len("{x}".format(x=x)), dict),  # noqa: UP032
    "lists by identity": (
        lambda m, x: m.bn1(m.conv1(x)) * (2 if m.numbers is m.numbers else 3),
        lambda: {"numbers": [1]},
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SEEN_IN_ORDER)
def test_what_a_graph_does_not_show(name: str, training: bool, calls: list[Any]) -> None:
    body, attributes = SEEN_IN_ORDER[name]
    model = Block(body, **attributes())
    numbers = getattr(model, "numbers", None)
    model, plain = pair(model)
    plain.numbers = numbers
    plain.train(training)
    for _ in range(2):
        assert_same(model, plain, images())


Mode = Enum("Mode", ["ONE", "TWO"])


@pytest.mark.parametrize(
    ("body", "value", "other"),
    [
        (lambda m, x: m.choice(m.bn1(m.conv1(x))), partial(F.leaky_relu, negative_slope=0.3), partial(F.leaky_relu)),
        (lambda m, x: F.interpolate(m.bn1(m.conv1(x)), m.choice), torch.Size([3, 4]), torch.Size([3, 5])),
        (lambda m, x: m.bn1(m.conv1(x)) * (2 if m.choice == Mode.ONE else 3), Mode.ONE, Mode.TWO),
        (lambda m, x: m.bn1(m.conv1(x)) * (2 if torch.is_tensor(x) else m.choice), 1, 2),
    ],
    ids=["partial", "size", "enumeration", "is_tensor"],
)
def test_what_a_forward_may_read(body: Any, value: Any, other: Any, calls: list[Any]) -> None:
    model, plain = pair(Block(body, choice=value))
    assert_same(model, plain, images())
    assert len(calls) == 1
    model.choice = plain.choice = other
    assert_same(model, plain, images())


class Private(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__conv, self.__bn, self.__scale = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), 2

    def __norm(self, x: Tensor) -> Tensor:
        return self.__bn(x) * self.__scale

    def forward(self, x: Tensor) -> Tensor:
        return self.__norm(self.__conv(x))


def test_private_names(calls: list[Any]) -> None:
    model, plain = pair(Private())
    assert_same(model, plain, images())
    assert len(calls) == 1


def test_a_scripted_child(calls: list[Any]) -> None:
    model = Block(lambda m, x: m.scripted(m.bn1(m.conv1(x))), scripted=torch.jit.script(nn.ReLU())).to(DEVICE)
    assert fastconv.report(fastconv.convert(model)).fused == [BN1]
    assert torch.equal(model(images()), fastconv.revert(model)(images()) if calls else images())


def test_forwards_that_are_no_functions() -> None:
    for forward in (torch.relu, partialmethod(plain_block)):
        kind = type("Odd", (Block,), {"forward": forward})
        assert not fastconv.report(fastconv.convert(kind(plain_block))).fused


@pytest.mark.parametrize("how", ["subclass", "argument", "metaclass"])
def test_new_classes_are_nobodys_business(how: str, calls: list[Any]) -> None:
    seen: list[str] = []

    class Kind(type):
        def __new__(cls, name: str, bases: Any, space: Any, tag: str) -> Any:
            seen.append(name)
            return super().__new__(cls, name, bases, space)

        def __init__(cls, name: str, bases: Any, space: Any, tag: str) -> None:
            super().__init__(name, bases, space)

    class Registered(nn.Module):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            seen.append(kwargs["tag"] if how == "argument" else cls.__name__)

    kind: Any
    if how == "metaclass":
        kind = Kind("Named", (Block,), {}, tag="named")
    else:
        kind = type("Named", (Registered, Block), {}, **({"tag": "Named"} if how == "argument" else {}))
        kind.forward = Block.forward
    model, plain = pair(kind(plain_block))
    assert_same(model, plain, images())
    assert len(calls) == 2 and seen == ["Named"]


def test_a_class_of_somebodys_behind_a_fused_one(calls: list[Any]) -> None:
    model, plain = pair(Unit())

    class Further(type(model)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.further = 2

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.further

    twin = Further().to(DEVICE)
    twin.load_state_dict(model.state_dict())
    assert type(twin) is Further
    assert torch.equal(twin(images()), plain(images()) * 2) and calls == []


def test_wrappers_of_wrappers(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each around what it has found on the converted model's class; the other models of that class have them too."""
    model, plain = pair(Unit())
    expected = plain(images())
    with monkeypatch.context() as patch:
        for do in (lambda y: y * 2, lambda y: y + 1):
            found = type(model).forward
            patch.setattr(type(model), "forward", lambda self, x, do=do, found=found: do(found(self, x)))
            expected = do(expected)
            assert torch.equal(model(images()), expected) and torch.equal(plain(images()), expected)
    calls.clear()
    plain.load_state_dict(model.state_dict())
    assert_same(model, plain, images())
    assert len(calls) == 1


def test_an_activation_that_no_module_can_be(calls: list[Any]) -> None:
    model, plain = pair(Block(lambda m, x: F.hardtanh(m.bn1(m.conv1(x)), 0.0, 0.0)))
    assert_same(model, plain, images())
    assert calls == [(None, None)]


def test_what_is_unpacked_is_counted(calls: list[Any]) -> None:
    def halves(m: Any, x: Any) -> Any:
        first, second = m.bn1(m.conv1(x)).chunk(m.count, 1)
        return first * second

    model, plain = pair(Block(halves, count=2))
    assert_same(model, plain, images())
    assert len(calls) == 1
    for m in (model, plain):
        m.count = 4
        with pytest.raises(ValueError, match="unpack"):
            m(images())


def test_what_is_passed_on_the_way_may_change(calls: list[Any]) -> None:
    """A convolution is called where its batch norm is; in between something begins to write its input."""

    def body(m: Any, x: Any) -> Any:
        y = m.conv1(x)
        other = m.act(x)
        return m.bn1(y) + other

    for change in (
        lambda m: setattr(m.act, "inplace", True),
        lambda m: setattr(m, "act", nn.ReLU(inplace=True)),
        lambda m: m.add_module("act", Writes()),
        lambda m: m.act.register_forward_pre_hook(lambda _, args: (args[0].mul_(2), None)[1]),
    ):
        for before in (nn.ReLU(), nn.Identity()):
            calls.clear()
            model, plain = pair(Block(body, act=before))
            assert_same(model, plain, images())
            assert len(calls) == 1
            change(model), change(plain)
            with torch.no_grad():
                assert torch.equal(model(images()), plain(images()))


def shared_norm(m: Any, x: Any) -> Any:
    """The first chain goes on behind a second call of its batch norm."""
    y = m.bn1(m.conv1(x))
    other = m.bn1(m.conv2(x))
    return m.relu(y) + other


def read_statistics(m: Any, x: Any) -> Any:
    y = m.bn1(m.conv1(x))
    other = m.relu(x) * m.bn1.running_mean.sum()
    return m.relu(y) + other


@pytest.mark.parametrize("body", [shared_norm, read_statistics], ids=["updated", "read"])
def test_statistics_are_kept_in_the_forwards_order(body: Any, calls: list[Any]) -> None:
    model, plain = pair(Block(body, relu=nn.ReLU()))
    assert_same(model, plain, images())
    assert calls == [(None, None), (None, "after")][: 2 if body is shared_norm else 1]


def test_a_norm_that_is_shared_later(calls: list[Any]) -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.bn1(m.conv1(x))
        other = m.bn2(m.conv2(x))
        return m.relu(y) + other

    model, plain = pair(Block(body, relu=nn.ReLU()))
    assert_same(model, plain, images())
    assert sorted(calls, key=str) == [("ReLU", None), (None, "after")]
    for m in (model, plain):
        m.bn2 = m.bn1
    assert_same(model, plain, images())


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_a_source_that_has_changed_is_not_believed(tmp_path: Path) -> None:
    text = "from torch.nn import Module\nclass Net(Module):\n    def forward(self, x): return self.bn(self.conv(x))\n"
    file = tmp_path / "net_of_a_file.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("net_of_a_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nets = [module.Net() for _ in range(2)]
    for net in nets:
        net.conv, net.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    file.write_text(text.replace("self.bn(self.conv(x))", "self.bn(self.conv(x * 2))"))
    assert fastconv.report(fastconv.convert(nets[0])).unfused == [
        ("bn", "Net.forward runs Net.forward, whose source is not that of its file any more")
    ]
    file.write_text(text)
    linecache.clearcache()
    assert fastconv.report(fastconv.convert(nets[1])).fused == ["conv + bn"]


def test_no_source_no_fusion() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Net(nn.Module):\n    def forward(self, x):\n        return self.bn(self.conv(x))", space)
    net = space["Net"]()
    net.conv, net.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    reason = "Net.forward runs Net.forward, whose source is not to be had"
    assert fastconv.report(fastconv.convert(net)).unfused == [("bn", reason)]


def test_buffers_are_not_touched_by_the_trace() -> None:
    def counts(m: Any, x: Any) -> Any:
        m.calls.add_(1)
        return m.bn1(m.conv1(x))

    module = Block(counts)
    module.register_buffer("calls", torch.zeros(1))
    fastconv.convert(module.to(DEVICE))
    assert module.calls.item() == 0
    assert fastconv.report(module).fused == [BN1]
    module(images())
    assert module.calls.item() == 1


def test_a_forward_of_the_instance() -> None:
    module = Block(plain_block)
    module.forward = lambda x: x  # type: ignore[method-assign]
    fastconv.convert(module)
    assert type(module) is Block
    assert dict(fastconv.report(module).unfused)["bn1"] == "Block.forward is the instance's own"


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (type("Mine", (nn.BatchNorm2d,), {}), f"a class of its own: {__name__}.Mine"),
        (nn.BatchNorm3d, "behind a Conv2d"),
        (nn.LazyBatchNorm2d, "a class of its own: torch.nn.modules.batchnorm.LazyBatchNorm2d"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_norms(norm: Any, reason: str) -> None:
    lazy = issubclass(norm, nn.LazyBatchNorm2d)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm() if lazy else norm(4))
    assert fastconv.report(fastconv.convert(model)).unfused == [("1", reason)]


def test_layers_that_are_not_converted_are_not_fused(calls: list[Any]) -> None:
    from torch.nn.utils import parametrizations

    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4), nn.ReLU())
    fastconv.convert(model)
    assert type(model) is nn.Sequential
    assert fastconv.report(model).unfused == [("1", "its convolution, a ParametrizedConv2d, is not converted")]
    model.to(DEVICE)(images())
    assert not calls


# Arguments


class Optional(Block):
    def forward(self, x: Tensor, residual: Tensor | None = None, *, scale: int = 1) -> Tensor:
        y = self.bn1(self.conv1(x))
        return self.relu(y if residual is None else y + residual) * scale


def test_optional_arguments(calls: list[Any]) -> None:
    model, plain = pair(Optional(plain_block))
    x = images()
    assert torch.equal(model(x), plain(x)) and len(calls) == 1
    assert torch.equal(model(x, x), plain(x, x)) and calls == [("ReLU", None), ("ReLU", "before")]
    assert torch.equal(model(x, None), plain(x, None))
    assert torch.equal(model(x=x), plain(x=x)) and len(calls) == 4
    assert torch.equal(model(residual=x, x=x), plain(x, x)) and calls[4:] == [("ReLU", "before")]
    assert torch.equal(model(x, residual=x, scale=2), plain(x, x, scale=2))
    assert len(calls) == 5
    for wrong in ({}, {"residual": x}, {"x": x, "other": x}):
        with pytest.raises(TypeError):
            model(**wrong)


def test_lists(calls: list[Any]) -> None:
    model, plain = pair(Block(by_type))
    halves = [images(2, 1, 5, 6), images(2, 3, 5, 6)]
    assert_same(model, plain, halves)
    assert len(calls) == 1
    plain.eval()
    assert_same(model, plain, halves)
    assert len(calls) == 2
    assert torch.equal(model(tuple(halves)), plain(tuple(halves))) and len(calls) == 2


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2},
        {"kernel_size": 3, "padding": "same", "bias": False},
        {"kernel_size": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_convolutions_arguments(rank: int, arguments: dict[str, Any], calls: list[Any]) -> None:
    conv = getattr(nn, f"Conv{rank}d")(4, 4, **arguments)
    model, plain = pair(nn.Sequential(conv, getattr(nn, f"BatchNorm{rank}d")(4), nn.ReLU6()))
    assert_same(model, plain, images(2, 4, *[6] * rank))
    assert calls == [("ReLU6", None)]


@pytest.mark.parametrize("arguments", [{"stride": 2, "padding": 1}, {"padding": "same"}, {"padding": "valid"}], ids=str)
def test_a_residual_of_the_results_shape(arguments: dict[str, Any], calls: list[Any]) -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.short = nn.Conv2d(4, 4, 3, **arguments), nn.Conv2d(4, 4, 3, **arguments)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            short = self.short(x)
            return F.hardswish(self.bn(self.conv(x)) + short)

    model, plain = pair(Add())
    assert_same(model, plain, images())
    assert calls == [("Hardswish", "before")]


# Batch norm as torch.nn's


@pytest.mark.parametrize(
    "arguments",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm], ids=lambda norm: norm.__name__)
def test_batch_norms_arguments(arguments: dict[str, Any], norm: Any, calls: list[Any]) -> None:
    model, plain = pair(nn.Sequential(nn.Conv2d(4, 4, 3), norm(4, **arguments), nn.ReLU()))
    for _ in range(2):
        assert_same(model, plain, images())
    for change in ("eval", "frozen", "frozen weights"):
        model.train(), plain.train()
        for m in (model, plain):
            if change == "eval":
                m.eval()
            elif change == "frozen":
                m[1].eval()
            else:
                m.requires_grad_(False)
        for a, b in zip((model(images()), *model.buffers()), (plain(images()), *plain.buffers()), strict=True):
            assert torch.equal(a, b)
    assert len(calls) == 5


def test_statistics_are_kept_by_the_module(calls: list[Any]) -> None:
    model, plain = pair(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model(images()), plain(images())
    # As users do: forgetting what was tracked, and stopping to track.
    for m in (model, plain):
        m[1].reset_running_stats()
        m[1].track_running_stats = False
    model(images()), plain(images())
    assert len(calls) == 2
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_synchronised_norm_takes_statistics_over_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fastconv.convert(Block(plain_block)), "the group").to(DEVICE)
    assert fastconv.report(model).fused == [f"{BN1} + relu", f"{BN2} + residual + relu"]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2 if group == "the group" else 1)
    with fused_by_torch(lambda args: args[15]) as groups:
        model(images())
        model.eval()
        model(images())
        model.train()
        model.bn1.process_group = "another, of one"
        model(images())
    assert groups == ["the group"] * 2 + [None] * 2 + [None, "the group"]


def test_one_value_per_channel_raises_as_torch_does() -> None:
    model = fastconv.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).to(DEVICE)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(images(1, 4, 1, 1))


@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 3, 5, 6)], ids=str)
def test_bad_input_raises_as_torch_does(shape: tuple[int, ...]) -> None:
    model, plain = pair(Block(plain_block))
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        plain(images(*shape))
    with pytest.raises(type(theirs.value)):
        model(images(*shape))


def test_other_dtypes_are_the_modules_own(calls: list[Any]) -> None:
    model, plain = pair(Block(plain_block).double())
    x = images().double()
    assert torch.equal(model(x), plain(x))
    assert not calls


def test_autocast(calls: list[Any]) -> None:
    model, plain = pair(Block(plain_block))
    x = images()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(model, plain, x)
    # The shortcut is fp32, so that the sum is not the fused call's.
    assert calls == [("ReLU", None), (None, None)]


# What happens to the model later


def test_hooks_are_called_and_seen(calls: list[Any]) -> None:
    model, plain = pair(Block(plain_block))
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output.detach().clone())

    first, second = f"{BN1} + relu", f"{BN2} + residual + relu"
    for name, left in (("conv1", [second]), ("bn2", [first]), ("relu", [BN1, f"{BN2} + residual"])):
        handles = [m.get_submodule(name).register_forward_hook(note) for m in (model, plain)]
        report = fastconv.report(model)
        assert report.fused == left
        text = str(report)
        assert "a hook on its " in text
        seen.clear()
        assert_same(model, plain, images())
        assert len(seen) == (4 if name == "relu" else 2)
        assert torch.equal(seen[0], seen[len(seen) // 2])
        for handle in handles:
            handle.remove()
    calls.clear()
    assert_same(model, plain, images())
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_other_hooks(kind: str, calls: list[Any]) -> None:
    model, plain = pair(Block(FOUND["no activation"][0]))
    seen: list[int] = []
    for m in (model, plain):
        getattr(m.bn1, f"register_{kind}")(lambda *_: seen.append(0))
    assert_same(model, plain, images())
    assert len(seen) == 2 and not calls
    assert fastconv.report(model).unfused[0] == ("bn1", "a hook on its BatchNorm2d")


def test_hooks_on_every_module(calls: list[Any]) -> None:
    model, _ = pair(Block(plain_block))
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: names.append(type(m).__name__))
    try:
        model(images())
    finally:
        handle.remove()
    assert names == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Block"]
    assert not calls


def parametrised(model: Any) -> None:
    from torch.nn.utils import parametrizations

    torch.manual_seed(0)
    parametrizations.spectral_norm(model.conv1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (parametrised, 1),
        (lambda m: nn.utils.weight_norm(m.conv1), 1),
        (lambda m: setattr(m, "bn1", nn.Identity()), 1),
        (lambda m: m.add_module("bn1", nn.Identity()), 1),
        (lambda m: m.add_module("relu", nn.Sigmoid()), 2),
        (lambda m: m.add_module("relu", nn.Softsign()), 2),
        (lambda m: m.add_module("conv2", nn.Conv2d(4, 4, 1, bias=False, device=DEVICE)), 1),
        (lambda m: setattr(m.bn1, "forward", lambda x: x), 1),
        (lambda m: setattr(m, "body", in_training_only), 0),
        (lambda m: setattr(m, "relu", nn.ReLU()), 2),
        (lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m), 2),
        (lambda m: setattr(m.conv1, "padding", (0, 0)), None),
        (lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}), 2),
        (lambda m: setattr(m.bn1, "eps", 0.5), 2),
        (lambda m: setattr(m, "unread", 1), 2),
        (lambda m: m.half().float(), 2),
    ],
    ids=[
        "parametrised",
        "weight_norm by hook",
        "norm set to another",
        "norm replaced by another",
        "activation replaced",
        "activation replaced by one without a fused form",
        "convolution replaced",
        "forward of the norm",
        "attribute",
        "activation set to its like",
        "convert_sync_batchnorm",
        "arguments",
        "checkpoint",
        "eps",
        "unread attribute",
        "dtype and back",
    ],
)
def test_changes_after_conversion(change: Any, fused: int | None, calls: list[Any]) -> None:
    model, plain = pair(Block(plain_block))
    for m in (model, plain):
        torch.manual_seed(4)
        change(m)
    if fused is None:
        with pytest.raises(RuntimeError, match="size"):
            model(images())
        return
    # spectral_norm's power iteration and the order of parameters are the modules' own
    assert_same(model, plain, images())
    assert len(calls) == fused


def test_children_of_a_sequential(calls: list[Any]) -> None:
    def make() -> nn.Sequential:
        layers = [[nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)] for _ in range(2)]
        return nn.Sequential(*(layer for group in layers for layer in group))

    changes: list[tuple[Any, int]] = [
        (lambda m: m.append(nn.Sigmoid()), 0),
        (lambda m: m.insert(1, nn.Sigmoid()), 0),
        (lambda m: m.__delitem__(2), 0),
        (lambda m: m.pop(0), 0),
        (lambda m: m.__setitem__(2, nn.SiLU()), 2),
        (lambda m: m.extend([nn.ReLU()]), 0),
        (lambda m: None, 2),
    ]
    for change, fused in changes:
        model, plain = pair(make())
        assert type(model) is not nn.Sequential and type(model).__name__ == "Sequential"
        for m in (model, plain):
            change(m)
        calls.clear()
        assert_same(model, plain, images())
        assert len(calls) == fused
        fastconv.convert(model)
        assert_same(model, plain, images())
    model, plain = pair(make())
    assert model[3] is list(model.children())[3]
    assert type(model[2:5]) is nn.Sequential and len(model[2:5]) == 3
    assert torch.equal(model[2:5](images()), plain[2:5](images()))
    # ReLU in place writes its input.
    assert fastconv.report(fastconv.convert(model[1:])).fused == ["3 + 4 + 5"]


def added_behind(m: Any, x: Any) -> Any:
    return x + m.f(m.bn1(m.conv1(x)))


@pytest.mark.parametrize("gone", ["conv1", "bn1", "bn2", "f", "f.0", "f.1"])
@pytest.mark.parametrize("how", ["None", "deleted"])
def test_a_report_where_children_are_gone(gone: str, how: str) -> None:
    model = fastconv.convert(Block(added_behind, f=sequence()))
    assert fastconv.report(model).fused == [BN1, "f.0 + 1 + residual"]
    parent, _, name = gone.rpartition(".")
    if how == "None":
        model.get_submodule(parent)._modules[name] = None
    else:
        delattr(model.get_submodule(parent), name)
    report = fastconv.report(model)
    left = {"conv1": 3, "bn1": 2, "bn2": 2, "f": 2, "f.0": 3, "f.1": 2}[gone]
    assert len(report.norms) == left and str(report)
    assert BN1 not in report.fused if gone in ("conv1", "bn1") else BN1 in report.fused


def test_a_report_of_a_forward_of_the_instance() -> None:
    model: Any = fastconv.convert(nn.Sequential(Block(plain_block), ours.ConvBNAct2d(4, 4, 1)))
    for block in model:
        block.forward = lambda x: x
    report = fastconv.report(model)
    reasons = dict(report.unfused)
    assert report.fused == [] and reasons["0.bn1"] == "a forward of its own on its Block"
    assert reasons["1.bn"] == "a forward of its own on its ConvBNAct2d"


def test_a_report_of_models_converted_around_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fastconv.convert(Block(added_behind, f=sequence()))
    with monkeypatch.context() as patch:
        forward = nn.Sequential.forward
        patch.setattr(nn.Sequential, "forward", lambda self, x: forward(self, x) * 2)
        second = fastconv.convert(Block(added_behind, f=sequence()))
        assert [fastconv.report(model).fused for model in (first, second)] == [[BN1]] * 2
    assert fastconv.report(first).fused == [BN1, "f.0 + 1 + residual"]


def test_children_of_a_list(calls: list[Any]) -> None:
    body, children, *_ = FOUND["loop"]
    model, plain = pair(Block(body, **copy.deepcopy(children)))
    for m in (model, plain):
        m.convs.append(nn.Conv2d(4, 4, 1, device=DEVICE))
        m.norms.append(nn.BatchNorm2d(4, device=DEVICE))
    plain.load_state_dict(model.state_dict())
    assert_same(model, plain, images())
    assert not calls


# The same model


def test_what_the_user_sees(calls: list[Any]) -> None:
    module = Block(plain_block)
    plain, text, keys = copy.deepcopy(module), repr(module), list(module.state_dict())
    names, state = [name for name, _ in module.named_modules()], set(vars(module))
    fastconv.convert(module)
    assert isinstance(module, Block) and type(module).__name__ == "Block" and type(module) is not Block
    assert repr(module) == text
    assert list(module.state_dict()) == keys and [name for name, _ in module.named_modules()] == names
    assert set(vars(module)) == state
    module.load_state_dict(plain.state_dict())
    fused = type(module)
    assert type(fastconv.convert(module)) is fused
    other = fastconv.convert(Block(plain_block))
    assert type(other) is fused, "alike blocks share a class"
    assert fastconv.revert(module) is module
    assert type(module) is Block and type(module.conv1) is nn.Conv2d


def test_shared_blocks_and_layers(calls: list[Any]) -> None:
    block = Block(plain_block)
    model, plain = pair(nn.Sequential(block, nn.Sequential(block), nn.ReLU()))
    assert fastconv.report(model).fused == ["0.conv1 + bn1 + relu", "0.conv2 + bn2 + residual + relu"]
    assert_same(model, plain, images())
    assert len(calls) == 4


def replica(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes one for another GPU."""
    twin: Any = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(twin, name, None if parameter is None else parameter.view_as(parameter))
    for name, child in module._modules.items():
        setattr(twin, name, replica(child))
    for name, buffer in module._buffers.items():
        setattr(twin, name, buffer)
    return twin


def test_replicas_of_data_parallel(calls: list[Any]) -> None:
    model, plain = pair(nn.Sequential(Block(plain_block), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    twin = replica(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    for m in (twin, plain):
        m(images()).square().sum().backward()
    assert len(calls) == 3
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save", "weights_only"])
def test_copies(how: str, calls: list[Any]) -> None:
    blocks = Block(plain_block), Block(twice)
    model, plain = pair(nn.Sequential(*blocks, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    types = [type(m) for m in model.modules()]
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "copy":
        twin = copy.copy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        allowed = [nn.Sequential, nn.BatchNorm2d, nn.ReLU, Block, plain_block, twice]
        for _ in range(2):
            file.seek(0)
            with torch.serialization.safe_globals(allowed):
                twin = torch.load(file, weights_only=how == "weights_only")
    assert [type(m) for m in model.modules()] == types
    assert [type(m) for m in twin.modules()] == types
    assert_same(twin, plain, images())
    assert len(calls) == 5
    assert type(fastconv.revert(twin)) is nn.Sequential


def scaled(m: Any, x: Any) -> Any:
    y = m.bn1(m.conv1(x))
    return y if m.scale is None else y * m.scale


def test_a_fused_module_that_is_parametrised_itself(calls: list[Any]) -> None:
    module = Block(scaled)
    module.scale = nn.Parameter(torch.ones(4, 1, 1))
    model, plain = pair(module)
    for m in (model, plain):
        nn.utils.parametrize.register_parametrization(m, "scale", nn.Softplus())
        twin = copy.deepcopy(m)
        assert type(twin) is type(m)
        assert torch.equal(twin(images()), m(images()))
    assert torch.equal(model(images()), plain(images()))


def test_a_parameter_may_go(calls: list[Any]) -> None:
    module = Block(scaled)
    module.scale = nn.Parameter(torch.ones(4, 1, 1))
    model, plain = pair(module)
    for m in (model, plain):
        m.scale = nn.Parameter(torch.full((4, 1, 1), 3.0, device=DEVICE))
    assert_same(model, plain, images())
    assert len(calls) == 1
    for m in (model, plain):
        m.scale = None
    assert_same(model, plain, images())
    assert len(calls) == 1


def test_a_pickle_keeps_what_was_chosen() -> None:
    model = fastconv.convert(Block(plain_block), exclude="bn1")
    assert fastconv.report(model).fused == [f"{BN2} + residual + relu"]
    assert fastconv.report(pickle.loads(pickle.dumps(model))).fused == [f"{BN2} + residual + relu"]


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        ({}, [f"{BN1} + relu", f"{BN2} + residual + relu"]),
        ({"fuse": False}, []),
        ({"include": "conv1"}, [f"{BN1} + relu"]),
        ({"exclude": "bn2"}, [f"{BN1} + relu"]),
        ({"exclude": nn.BatchNorm2d}, []),
        ({"exclude": "conv*"}, []),
    ],
    ids=str,
)
def test_what_is_chosen(arguments: dict[str, Any], fused: list[str]) -> None:
    model = fastconv.convert(Block(plain_block), **arguments)
    report = fastconv.report(model)
    assert report.fused == fused
    assert {reason for _, reason in report.unfused} <= {"not converted"}
    # fuse=False leaves what there is; another call adds to it.
    fastconv.convert(model, fuse=False)
    assert fastconv.report(model).fused == fused
    assert len(fastconv.report(fastconv.convert(model)).fused) == 2


def test_fx_sees_the_models_own_graph() -> None:
    model, plain = pair(nn.Sequential(Block(plain_block)))

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return not isinstance(m, nn.Sequential | Block)

    theirs, mine = (Tracer().trace(m).python_code("self").src for m in (plain, model))
    assert mine == theirs
    assert "0_relu" not in torch.fx.symbolic_trace(model[0]).graph.python_code("self").src
    assert "self.relu" in torch.fx.symbolic_trace(model[0]).graph.python_code("self").src


def test_a_traced_model_is_fused(calls: list[Any]) -> None:
    traced = torch.fx.symbolic_trace(Block(plain_block))
    model, plain = pair(traced)
    assert fastconv.report(model).fused == [f"{BN1} + relu", f"{BN2} + residual + relu"]
    assert_same(model, plain, images())
    assert len(calls) == 2
    assert torch.equal(copy.deepcopy(model).eval()(images()), plain.eval()(images()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_whole(training: bool, calls: list[Any]) -> None:
    torch._dynamo.reset()
    model, plain = pair(nn.Sequential(Block(plain_block), Block(twice), Block(added_to, f=Unit(nn.SiLU()))))
    plain.train(training)
    model.train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled, plain, images(), exact=False)
    assert len(calls) == 5 and calls[-1] == ("SiLU", "after")
    # A hook added later is seen.
    seen: list[int] = []
    model[0].bn1.register_forward_hook(lambda *_: seen.append(1))
    torch._dynamo.reset()
    compiled(images())
    assert seen
    torch._dynamo.reset()
