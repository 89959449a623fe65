"""What is fused, what is not, and why.

The fused call is replaced by PyTorch's own operators, so that every value here is compared bit for bit.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv.kernels import mend
from fusing import (
    BN1,
    BN2,
    Block,
    assert_same,
    by_type,
    images,
    in_training_only,
    lists,
    loop,
    no_activation,
    pair,
    plain_block,
    twice,
)

pytestmark = [] if mend.interpreting() else [pytest.mark.gpu]


def writes_its_input(m: Any, x: Any) -> Any:
    y = m.conv1(x)
    x = m.relu(x)
    return m.bn1(y) + x


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
    "no activation": (no_activation, {}, [BN1], OTHER, [(None, None)]),
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
        lists(),
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


def test_what_ends_a_fused_layer_is_named() -> None:
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
