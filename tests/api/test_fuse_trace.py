"""What a forward may do and still be fused, and what is compared at each call.

The fused call is replaced by PyTorch's own operators, so that every value here is compared bit for bit.
"""

import builtins
import copy
import importlib.util
import linecache
import math
import operator
import random
import re
from collections.abc import Callable
from enum import Enum
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
from fusing import BN1, DEVICE, Block, Unit, assert_same, images, pair, plain_block, sequence, step
from tests.marks import runs_kernels

pytestmark = runs_kernels


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
def test_untraceable(name: str, calls: list[Any], capsys) -> None:
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
    "default": (lambda m: with_default(m), lambda m, patch: patch.setattr(with_default, "__defaults__", (False,))),
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
def test_what_a_forward_decides_by(name: str, training: bool, calls: list[Any], monkeypatch) -> None:
    how, change = DECIDED[name]
    model, plain = pair(Deciding(how))
    plain.train(training)
    assert_same(model, plain, images())
    assert calls == [("ReLU", None)]
    # A class or a global changes for both at once.
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


def test_wrappers_of_wrappers(calls: list[Any], monkeypatch) -> None:
    """Each wraps what it finds on the class of the converted model, so other models of that class have it too."""
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
    """A convolution is called at its batch norm's place, and what lies between the two begins to write its input."""

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
    """The first fused layer continues behind a second call of its batch norm."""
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


def test_a_source_that_has_changed_is_not_believed(tmp_path) -> None:
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
