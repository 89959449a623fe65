"""Finding chains and rewriting forwards: what is fused, what is not and why, and that the model stays the same model.

The fused call is replaced by PyTorch's own operators, so that every value here is compared bit for bit.
"""

from __future__ import annotations

import copy
import io
import operator
import pickle
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
from fastconv import functional
from fastconv import nn as ours
from fastconv.kernels import mend

DEVICE = "cpu" if mend.interpreting() else "cuda"
pytestmark = [] if mend.interpreting() else [pytest.mark.gpu]


def composed(
    conv: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, ...],
    training: bool,
    momentum: float,
    eps: float,
    act: nn.Module | None,
    residual: Tensor | None,
    residual_after: bool,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    group: Any = None,
) -> Tensor:
    """functional.conv_norm_act from PyTorch's operators."""
    assert group is None
    mean, var, gamma, beta = norm
    y = conv(x, weight, bias, stride, padding, dilation, groups)
    z = F.batch_norm(y, mean, var, gamma, beta, training, momentum, eps)
    if residual is not None and not residual_after:
        z = z + residual
    if act is not None:
        z = act(z)
    return z if residual is None or not residual_after else z + residual


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The activations of the fused calls made, with the residual's place: None, "before" or "after"."""
    made: list[Any] = []

    def fused(*args: Any) -> Tensor:
        act, residual, after = args[8:11]
        made.append((act and type(act).__name__, residual if residual is None else "after" if after else "before"))
        return composed(*args)

    monkeypatch.setattr(functional, "conv_norm_act", fused)
    for rank in (1, 2, 3):
        monkeypatch.setattr(functional, f"conv{rank}d", getattr(F, f"conv{rank}d"))
        monkeypatch.setattr(functional, f"conv_transpose{rank}d", getattr(F, f"conv_transpose{rank}d"))
        monkeypatch.setitem(ours.fused._FUNCTIONS, getattr(ours, f"Conv{rank}d"), getattr(F, f"conv{rank}d"))
    return made


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
        {"up": nn.ConvTranspose2d(4, 4, 1)},
        [],
        {"bn1": "behind a ConvTranspose2d", **OTHER},
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


CONTROL_FLOW = "does what torch.fx cannot trace: .*control flow"
UNTRACEABLE = {
    "values": (lambda m, x: m.bn1(m.conv1(x)) if x.sum() > -1e9 else x, CONTROL_FLOW),
    "size": (lambda m, x: m.bn1(m.conv1(x)) if x.shape[0] > 0 else x, CONTROL_FLOW),
    "sets": (sets, "sets seen"),
    "appends": (appends, "sets log"),
    "random": (draws, "draws random numbers"),
    "torch's random": (draws_torch, "draws random numbers"),
    "constant": (lambda m, x: m.bn1(m.conv1(x)) + torch.ones(4, 1, 1, device=DEVICE), "makes tensors of its own"),
    "no_grad": (no_grad, "calls a part of it in a context of its own .*"),
    "autocast": (autocast, "calls a part of it in a context of its own .*"),
    "checkpoint": (checkpointed, ".*"),
    "grad mode": (lambda m, x: m.bn1(m.conv1(x)) * (1 + torch.is_grad_enabled()), "asks for the grad mode"),
    "type of an unknown": (
        lambda m, x: y[0] if isinstance(y := m.block(m.bn1(m.conv1(x))), tuple) else y,
        "asks what block is",
    ),
    "module of another": (lambda m, x: OUTSIDE.to(DEVICE)(m.bn1(m.conv1(x))), "does what torch.fx cannot trace: .*"),
}
OUTSIDE = nn.Conv2d(4, 4, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNTRACEABLE)
def test_untraceable(name: str, calls: list[Any]) -> None:
    body, reason = UNTRACEABLE[name]
    module = Block(body, block=Block(plain_block))
    module.log = []
    random.seed(3)
    before = set(vars(module)), random.getstate(), torch.get_rng_state()
    model = fastconv.convert(module)
    assert (set(vars(module)), module.log, random.getstate()) == (before[0], [], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert type(model) is Block
    unfused = dict(fastconv.report(model).unfused)
    assert re.fullmatch(reason, unfused["bn1"].removeprefix("Block.forward ")), unfused
    if name not in ("sets", "appends"):
        model, plain = pair(module)
        assert_same(model, plain, images())


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
    groups: list[Any] = []

    def fused(*args: Any) -> Tensor:
        groups.append(args[15])
        return composed(*args[:15])

    monkeypatch.setattr(functional, "conv_norm_act", fused)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2 if group == "the group" else 1)
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
        (lambda m: setattr(m, "bn1", nn.Identity()), 0),
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
        (lambda m: m.__setitem__(2, nn.SiLU()), 0),
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
    model, plain = pair(nn.Sequential(Block(plain_block), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
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
        file.seek(0)
        allowed = [nn.Sequential, nn.BatchNorm2d, nn.ReLU, Block, plain_block]
        with torch.serialization.safe_globals(allowed):
            twin = torch.load(file, weights_only=how == "weights_only")
    assert [type(m) for m in model.modules()] == types
    assert [type(m) for m in twin.modules()] == types
    assert_same(twin, plain, images())
    assert len(calls) == 3
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
    model, plain = pair(nn.Sequential(Block(plain_block), Block(twice)))
    plain.train(training)
    model.train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled, plain, images(), exact=False)
    assert len(calls) == 4
    # A hook added later is seen.
    seen: list[int] = []
    model[0].bn1.register_forward_hook(lambda *_: seen.append(1))
    torch._dynamo.reset()
    compiled(images())
    assert seen
    torch._dynamo.reset()
