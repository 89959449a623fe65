"""A model stays the same model when its forwards are rewritten, whatever happens to it later.

The fused call is replaced by PyTorch's own operators, so that every value here is compared bit for bit.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
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
    images,
    in_training_only,
    lists,
    loop,
    no_activation,
    pair,
    plain_block,
    sequence,
    twice,
)
from tests.marks import runs_kernels

pytestmark = runs_kernels


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
    model, plain = pair(Block(no_activation))
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


def test_a_report_of_models_converted_around_a_patch(monkeypatch) -> None:
    first = fastconv.convert(Block(added_behind, f=sequence()))
    with monkeypatch.context() as patch:
        forward = nn.Sequential.forward
        patch.setattr(nn.Sequential, "forward", lambda self, x: forward(self, x) * 2)
        second = fastconv.convert(Block(added_behind, f=sequence()))
        assert [fastconv.report(model).fused for model in (first, second)] == [[BN1]] * 2
    assert fastconv.report(first).fused == [BN1, "f.0 + 1 + residual"]


def test_children_of_a_list(calls: list[Any]) -> None:
    model, plain = pair(Block(loop, **lists()))
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
