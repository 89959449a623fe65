"""What is fused, what is not, and why.

The fused call is replaced by PyTorch's own operators, so that every value here is compared bit for bit.
"""

import copy
import operator
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
from fastconv import nn as ours
from fusing import (
    BN1,
    BN2,
    DEVICE,
    Block,
    Unit,
    added_to,
    assert_same,
    by_type,
    images,
    in_training_only,
    lists,
    loop,
    no_activation,
    pair,
    plain_block,
    residual,
    sequence,
    twice,
)
from tests.marks import runs_kernels

pytestmark = runs_kernels


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


RELU, PLAIN, PLUS = ("ReLU", None), (None, None), (None, "after")
RELU_OF_SUM, SILU_OF_SUM = ("ReLU", "before"), ("SiLU", "before")
NOT_CALLED = "not called by the module that holds it"


class Found(NamedTuple):
    body: Any
    fused: list[str]
    calls: list[Any]  # of a step in training
    children: dict[str, Any] | None = None  # further ones
    in_eval: list[Any] | None = None  # other calls
    bn1: str | None = None  # why it is not fused
    bn2: str | None = NOT_CALLED

    def block(self) -> Block:
        return Block(self.body, **copy.deepcopy(self.children or {}))


FOUND = {
    "residual block": Found(plain_block, [f"{BN1} + relu", f"{BN2} + residual + relu"], [RELU, RELU_OF_SUM], bn2=None),
    "no activation": Found(no_activation, [BN1], [PLAIN]),
    "function": Found(lambda m, x: F.relu(m.bn1(m.conv1(x)), inplace=True), [f"{BN1} + relu"], [RELU]),
    "method": Found(lambda m, x: m.bn1(m.conv1(x)).relu_(), [f"{BN1} + relu"], [RELU]),
    "torch's function": Found(lambda m, x: torch.tanh(m.bn1(m.conv1(x))), [f"{BN1} + tanh"], [("Tanh", None)]),
    "function of two": Found(
        lambda m, x: F.leaky_relu(m.bn1(m.conv1(x)), 0.3), [f"{BN1} + leaky_relu"], [("LeakyReLU", None)]
    ),
    "prelu": Found(lambda m, x: m.act(m.bn1(m.conv1(x))), [f"{BN1} + act"], [("PReLU", None)], {"act": nn.PReLU(4)}),
    "no fused form": Found(lambda m, x: m.act(m.bn1(m.conv1(x))), [BN1], [PLAIN], {"act": nn.GLU(1)}),
    "after the activation": Found(
        lambda m, x: x + m.relu(m.bn1(m.conv1(x))), [f"{BN1} + relu + residual"], [("ReLU", "after")]
    ),
    "torch.add": Found(lambda m, x: torch.add(m.bn1(m.conv1(x)), x), [f"{BN1} + residual"], [PLUS]),
    "add_": Found(lambda m, x: m.bn1(m.conv1(x)).add_(x), [f"{BN1} + residual"], [PLUS]),
    "alpha": Found(lambda m, x: torch.add(m.bn1(m.conv1(x)), x, alpha=2), [BN1], [PLAIN]),
    "number": Found(lambda m, x: m.bn1(m.conv1(x)) + 3, [BN1], [PLAIN]),
    "itself": Found(lambda m, x: operator.add(*[m.bn1(m.conv1(x))] * 2), [BN1], [PLAIN]),
    "broadcast": Found(
        lambda m, x: m.relu(m.bn1(m.conv1(x)) + x.mean((2, 3), keepdim=True)), [f"{BN1} + residual + relu"], [PLAIN]
    ),
    "promoted": Found(lambda m, x: m.relu(m.bn1(m.conv1(x)) + x.double()), [f"{BN1} + residual + relu"], [PLAIN]),
    "meeting": Found(meet, [BN1, f"{BN2} + residual + relu"], [PLAIN, RELU_OF_SUM], bn2=None),
    "meeting, swapped": Found(meet_swapped, [f"{BN1} + residual + relu", BN2], [PLAIN, RELU_OF_SUM], bn2=None),
    "sum of the shortcut in place": Found(changed_in_place, [BN1], [PLAIN]),
    "twice": Found(twice, [f"{BN1} + silu"], [("SiLU", None), RELU]),
    "dropout": Found(
        lambda m, x: F.relu(m.drop(m.bn1(m.conv1(x)))), [f"{BN1} + relu"], [RELU], {"drop": nn.Dropout(0.0)}
    ),
    "identity": Found(
        lambda m, x: m.skip(m.relu(m.skip(m.bn1(m.skip(m.conv1(x)))))),
        [f"{BN1} + relu"],
        [RELU],
        {"skip": nn.Identity()},
    ),
    "mode": Found(
        lambda m, x: F.dropout(m.relu(m.bn1(m.conv1(x))), 0.5 if m.training else 0.0, m.training),
        [f"{BN1} + relu"],
        [RELU],
    ),
    "loop": Found(
        loop, ["convs.0 + norms.0 + gelu", "convs.1 + norms.1 + gelu"], [("GELU", None)] * 2, lists(), bn1=NOT_CALLED
    ),
    "asks the type": Found(by_type, [f"{BN1} + relu"], [RELU]),
    "two readers": Found(
        lambda m, x: m.bn1(y := m.conv1(x)) + y.sigmoid(), [], [], bn1="the result of conv1 also goes to sigmoid"
    ),
    "returned as well": Found(
        lambda m, x: torch.stack([m.bn1(y := m.conv1(x)), y]), [], [], bn1="the result of conv1 also goes to stack"
    ),
    "read behind the norm": Found(lambda m, x: F.relu(y := m.bn1(m.conv1(x))) * y, [BN1], [PLAIN]),
    "its size is read": Found(
        lambda m, x: m.bn1(y := m.conv1(x)).reshape(y.shape), [], [], bn1="the result of conv1 also goes to getattr"
    ),
    "activation in between": Found(
        lambda m, x: m.bn1(m.relu(m.conv1(x))), [], [], bn1="not behind a convolution but relu, a ReLU"
    ),
    "norm first": Found(lambda m, x: m.conv1(m.bn1(x)), [], [], bn1="not behind a convolution but the argument x"),
    "transposed": Found(
        lambda m, x: m.bn1(m.up(x)),
        ["up + bn1"],
        [PLAIN],
        {"up": nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)},
    ),
    "transposed to a size": Found(
        lambda m, x: m.bn1(m.up(x, x.shape)),
        [],
        [],
        {"up": nn.ConvTranspose2d(4, 4, 3, padding=1)},
        bn1="up is called with more than its input",
    ),
    "other in eval": Found(in_training_only, [], [], bn1="called otherwise in training than in eval"),
    "group norm": Found(lambda m, x: m.gn(m.conv1(x)), [], [], {"gn": nn.GroupNorm(2, 4)}, bn1=NOT_CALLED),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, calls: list[Any]) -> None:
    it = FOUND[name]
    model, plain = pair(it.block())
    report = fastconv.report(model)
    assert report.fused == it.fused
    assert dict(report.unfused) == {norm: why for norm, why in (("bn1", it.bn1), ("bn2", it.bn2)) if why}
    for training in (True, False):
        plain.train(training)
        calls.clear()
        assert_same(model, plain, images())
        assert calls == it.calls


def test_what_ends_a_fused_layer_is_named() -> None:
    it = FOUND["no fused form"]
    report = fastconv.report(fastconv.convert(it.block()))
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


# Fused layers that continue in the module that calls the one they end


class Depth(nn.Module):
    """As torchvision's, which is let pass by its name."""

    __module__, __qualname__ = "torchvision.ops.stochastic_depth", "StochasticDepth"

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p if self.training and self.p else x


Depth.__name__ = "StochasticDepth"


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


CROSSING = {
    "sequence": Found(
        added_to, ["f.0 + 1 + 2", "f.3 + 4 + residual"], [RELU, PLUS], {"f": sequence(*sequence(), nn.ReLU())}
    ),
    "nested sequences": Found(
        act_of_sum,
        ["f.0.0 + 1 + 2", "f.1.0.0 + 1 + residual + relu"],
        [RELU, RELU_OF_SUM],
        {"f": nn.Sequential(nn.Sequential(*sequence(), nn.ReLU(True)), nn.Sequential(sequence()))},
    ),
    "forward of its own": Found(act_of_sum, ["f.conv + bn + residual + relu"], [RELU_OF_SUM], {"f": Unit()}),
    "after an activation": Found(
        added_to, ["f.conv + bn + act + residual"], [("SiLU", "after")], {"f": Unit(nn.SiLU())}
    ),
    "a second activation": Found(
        act_of_sum, ["f.conv + bn + act + residual"], [("SiLU", "after")], {"f": Unit(nn.SiLU())}
    ),
    "layer of ours": Found(
        act_of_sum,
        ["f.conv + bn + residual + relu"],
        [RELU_OF_SUM],
        {"f": ours.ConvBNAct2d(4, 4, 3, padding=1, act=None)},
    ),
    "activation alone": Found(lambda m, x: F.gelu(m.f(x)), ["f.0 + 1 + gelu"], [("GELU", None)], {"f": sequence()}),
    "a sum of its own": Found(added_to, ["f.f.0 + 1 + residual"], [PLUS], {"f": Block(added_to, f=sequence())}),
    "writes its input first": Found(added_to, ["f.1 + 2 + residual"], [PLUS], {"f": sequence(nn.ReLU(True))}),
    "norm outside": Found(
        norm_of_child,
        ["f.0 + 1 + 2", "f.3.0 + bn1 + relu"],
        [RELU, RELU],
        {"f": nn.Sequential(*sequence(), nn.ReLU(), sequence(bn=False))},
    ),
    "identity as shortcut": Found(
        sum_of_both, ["f.conv + bn + residual + silu"], [SILU_OF_SUM], {"f": Unit(), "g": nn.Identity()}
    ),
    "both fused layers": Found(
        both_children,
        ["f.0 + 1 + residual + silu", "g.0 + 1"],
        [PLAIN, SILU_OF_SUM],
        {"f": sequence(), "g": sequence()},
    ),
    "both fused layers, one unknown": Found(
        both_children, ["f.conv + bn", "g.conv + bn"], [PLAIN] * 2, {"f": Unit(), "g": Unit()}
    ),
    "sum of both": Found(
        sum_of_both, ["f.conv + bn", "g.conv + bn + residual + silu"], [PLAIN, SILU_OF_SUM], {"f": Unit(), "g": Unit()}
    ),
    "stochastic depth": Found(through, ["f.0 + 1"], [PLAIN], {"f": sequence(), "g": Depth(0.5)}, in_eval=[PLUS]),
    "stochastic depth of 0": Found(through, ["f.0 + 1 + residual"], [PLUS], {"f": sequence(), "g": Depth(0.0)}),
    "dropout": Found(
        through, ["f.1 + 2"], [PLAIN], {"f": sequence(nn.Dropout2d()), "g": nn.Dropout2d()}, in_eval=[PLUS]
    ),
    "read twice": Found(lambda m, x: (y := m.f(x)) * y, ["f.0 + 1"], [PLAIN], {"f": sequence()}),
    "by name": Found(lambda m, x: m.relu(input=m.bn1(input=m.conv1(input=x))), [f"{BN1} + relu"], [RELU]),
}


@pytest.mark.parametrize("name", CROSSING)
def test_crossing(name: str, calls: list[Any]) -> None:
    it = CROSSING[name]
    model, plain = pair(it.block())
    assert sorted(fastconv.report(model).fused) == it.fused
    for training, expected in ((True, it.calls), (False, it.in_eval or it.calls)):
        plain.train(training)
        calls.clear()
        assert_same(model, plain, images())
        assert calls == expected
    twins = [copy.deepcopy(model)]
    if it.body.__name__ != "<lambda>" and not isinstance((it.children or {}).get("g"), Depth):
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        calls.clear()
        assert_same(twin, plain, images())
        assert calls == (it.in_eval or it.calls)
    assert {type(m).__dict__.get("_fastconv_names") for m in fastconv.revert(model).modules()} == {None}


ADDED, APART = [PLAIN, RELU_OF_SUM], [PLAIN] * 2


@pytest.mark.parametrize("where", ["f", "f.1"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_on_what_a_fused_layer_crosses(kind: str, where: str, calls: list[Any]) -> None:
    model, plain = residual()
    seen: list[Any] = []

    def note(module: nn.Module, *values: Any) -> None:
        seen.append([v.detach().clone() for v in values if isinstance(v, Tensor)])

    handles = [getattr(m.get_submodule(where), f"register_{kind}")(note) for m in (model, plain)]
    report = fastconv.report(model)
    assert report.fused == ["f.0.0 + 1", "f.1.0 + 1"]
    assert report.norms[-1].reason == "a hook on its Sequential"
    assert_same(model, plain, images())
    assert calls == APART and len(seen) == 2
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)
    for handle in handles:
        handle.remove()
    calls.clear()
    assert_same(model, plain, images())
    assert calls == ADDED


def test_other_calls_of_what_a_fused_layer_crosses_are_seen(calls: list[Any]) -> None:
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
        (lambda m: m.f.append(nn.Sigmoid()), APART),
        (lambda m: m.f[1].append(nn.Sigmoid()), APART[:1]),
        (lambda m: m.f[1].append(nn.ReLU(inplace=True)), APART[:1]),
        (lambda m: m.f.pop(1), APART[:1]),
        (lambda m: m.f.__setitem__(1, nn.Identity()), APART[:1]),
        (lambda m: m.f[1].__setitem__(1, nn.Sigmoid()), APART[:1]),
        (lambda m: m.f[1].add_module("0", nn.Identity()), APART[:1]),
        (lambda m: m.__setattr__("f", sequence().to(DEVICE)), []),
        (lambda m: m.__setattr__("relu", nn.SiLU()), [PLAIN, SILU_OF_SUM]),
        (lambda m: m.add_module("relu", nn.SiLU()), [PLAIN, SILU_OF_SUM]),
        (lambda m: m.add_module("relu", nn.Softsign()), [PLAIN, PLUS]),
        (lambda m: m.f[1][1].register_forward_hook(lambda *_: None), APART[:1]),
        (lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m), ADDED),
    ],
)
def test_changes_of_what_a_fused_layer_crosses(change: Any, expected: list[Any], calls: list[Any]) -> None:
    model, plain = residual()
    for m in (model, plain):
        torch.manual_seed(4)
        change(m)
    assert_same(model, plain, images())
    assert calls == expected


def test_a_batch_norm_that_is_excluded_ends_no_fused_layer() -> None:
    model = fastconv.convert(Block(added_to, f=sequence()), exclude="f.1")
    assert fastconv.report(model).fused == [] and type(model) is Block
    assert fastconv.report(fastconv.convert(model)).fused == ["f.0 + 1 + residual"]


def test_a_call_of_its_own_is_not_crossed(calls: list[Any]) -> None:
    class Twice(nn.Sequential):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    model, plain = pair(Block(added_to, f=Twice(*sequence())))
    assert_same(model, plain, images())
    assert calls == [PLAIN]


def test_hooks_see_what_is_called_by_name(calls: list[Any]) -> None:
    model, plain = pair(Block(CROSSING["by name"].body))
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
    model, plain = pair(Block(no_activation))
    for m in (model, plain):
        m.add_module("conv1", nn.Identity())
    assert_same(model, plain, images())
    assert not calls


def test_a_function_is_not_the_module_of_its_name(calls: list[Any], monkeypatch) -> None:
    """Who replaces or hooks nn.ReLU does not mean F.relu."""
    model, plain = pair(Block(lambda m, x: F.relu(m.bn1(m.conv1(x))) * F.relu(m.conv2(x))))
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x * 0)
    assert_same(model, plain, images())
    assert calls == [RELU]
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: names.append(type(m).__name__))
    with handle:
        model(images())
    assert names == ["Conv2d", "BatchNorm2d", "Conv2d", "Block"]


def test_functions_that_are_overridden_are_called(calls: list[Any]) -> None:
    names: list[str] = []

    class Seeing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model, plain = residual()
    with Seeing():
        assert_same(model, plain, images())
    assert not calls and names.count("batch_norm") == 4
    with torch.device(DEVICE):
        assert_same(model, plain, images())
    assert calls == ADDED
