"""What autograd is told: what happens between forward and backward, and gradients of gradients through whole models.

Converted models against torch.nn's in fp64; ours raise if those raise.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastconv
from fastconv.kernels.launch.launch import record
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])


class Net(nn.Module):
    """A stem, a residual block whose batch norm is called by itself too, and a block called twice."""

    def __init__(self, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.shared, self.shared_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_bn(self.stem(x)))
        x = self.act(self.bn(self.conv(x)) + x) + self.bn(x)
        for _ in range(2):
            x = self.act(self.shared_bn(self.shared(x)))
        return x.flatten(2).mean(2)


def pair(training: bool, act: Callable[[], nn.Module] = nn.ReLU) -> tuple[Any, Any, Tensor]:
    """A converted model, torch.nn's in fp64, an input."""
    torch.manual_seed(0)
    plain = Net(act)
    for bn in plain.modules():
        if isinstance(bn, nn.BatchNorm2d):
            for vector in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
                nn.init.uniform_(vector, 0.5, 1.5)
    ours = fastconv.convert(copy.deepcopy(plain).to(DEVICE))
    assert len(fastconv.report(ours).fused) == 3
    return ours.train(training), plain.double().train(training), torch.randn(3, 3, 6, 5)


def compare(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], rtol: float = 1e-3) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        reference = theirs[name]
        assert (value is None) == (reference is None), name
        if value is not None and reference is not None:
            # In training batch norm takes a bias's gradient away.
            atol = rtol / 10 * (0.01 + float(reference.detach().abs().max()))
            text = f"{name}: {{}}".format
            torch.testing.assert_close(value.double().cpu(), reference.double(), rtol=rtol, atol=atol, msg=text)


def compare_states(ours: nn.Module, theirs: nn.Module) -> None:
    """Gradients and buffers."""
    compare({n: p.grad for n, p in ours.named_parameters()}, {n: p.grad for n, p in theirs.named_parameters()})
    compare(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@each_mode
def test_a_batch_norm_on_its_own_and_in_two_fused_layers(training: bool) -> None:
    ours, theirs, x = pair(training)
    with record() as launches:
        ours(x.to(DEVICE)).square().sum().backward()
    theirs(x.double()).square().sum().backward()
    assert any(launch.name == "batch_norm_act_kernel" for launch in launches)
    compare_states(ours, theirs)


def train_once(model: Any, x: Tensor) -> None:
    model.train()
    model(x).sum()


def train_in_turn(model: Any, x: Tensor) -> None:
    """The batch norm called by itself is PyTorch's, and autograd does not see what it writes."""
    model[0].bn.train()(torch.randn(2, 4, 3, 3, device=DEVICE))


def load(model: Any, x: Tensor) -> None:
    model.load_state_dict({n: t + 1 for n, t in model.state_dict().items() if "running" in n}, strict=False)


def average(model: Any, x: Tensor) -> None:
    for buffer in model.buffers():
        buffer.copy_(buffer * 2)


def swap(model: Any, x: Tensor) -> None:
    for buffer in model.buffers():
        torch.utils.swap_tensors(buffer, buffer + 1)


@each_mode
@pytest.mark.parametrize("happens", [train_once, train_in_turn, load, average, swap])
def test_running_statistics_that_change_before_backward(happens: Any, training: bool) -> None:
    """Gradients are those of the forward. PyTorch's raise, or take the new statistics."""
    torch.manual_seed(0)
    first, second = fastconv.nn.ConvBNAct2d(3, 4, 3, act="silu"), fastconv.nn.ConvBNAct2d(4, 4, 1, act=None)
    layers = nn.Sequential(first, second).to(DEVICE).train(training)
    x = torch.randn(2, 3, 5, 5, device=DEVICE, requires_grad=True)
    leaves = [x, *layers.parameters()]
    values = []
    for change in (False, True):
        z = layers(x)
        if change:
            happens(layers, x)
        values.append(torch.autograd.grad(z.square().sum(), leaves))
    assert all(map(torch.equal, *values))


@each_mode
@pytest.mark.parametrize("which", ["x", "0.weight", "1.weight", "2.weight", "result"])
def test_what_must_not_change_before_backward(which: str, training: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 4, 1)).train(training)
    if which == "result":
        plain = nn.Sequential(*plain[:2], nn.ReLU()).requires_grad_(False)
        plain[0].bias.requires_grad_()
        plain.eval()
    for model in (plain, fastconv.convert(copy.deepcopy(plain).to(DEVICE))):
        x = torch.randn(2, 3, 4, 4, device=next(model.parameters()).device, requires_grad=which != "result")
        z = model(x)
        with torch.no_grad():
            {**dict(model.named_parameters()), "x": x, "result": z}[which].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


@each_mode
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool, training: bool) -> None:
    """Running statistics follow the batch twice, as PyTorch's do."""
    ours, theirs, x = pair(training)
    for model, operand in ((ours, x.to(DEVICE)), (theirs, x.double())):
        layers = nn.Sequential(model.stem, model.stem_bn, model.act)
        if model is ours:
            layers = fastconv.convert(fastconv.revert(layers))
        checkpoint(layers, operand.requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    compare_states(ours, theirs)
    assert ours.stem_bn.num_batches_tracked == 2 * training


@each_mode
def test_saved_tensors_elsewhere_and_two_backwards(training: bool) -> None:
    ours, theirs, x = pair(training)
    with torch.autograd.graph.save_on_cpu():
        loss = ours(x.to(DEVICE)).square().sum()
    expected = theirs(x.double()).square().sum()
    for one in (loss, expected):
        one.backward(retain_graph=True)
        one.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            one.backward()
    compare_states(ours, theirs)


class Silent(torch.autograd.Function):
    """Has no gradient to give, which is not one of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        return None


@each_mode
def test_no_gradient_at_all(training: bool) -> None:
    ours, theirs, x = pair(training)
    for model, operand in ((ours, x.to(DEVICE)), (theirs, x.double())):
        Silent.apply(model(operand.requires_grad_())).sum().backward()
    compare_states(ours, theirs)


FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "convolutions": lambda name: "bn" not in name,
    "affine": lambda name: "bn" in name,
    "all but a bias": lambda name: name != "stem_bn.bias",
}


def freeze(models: tuple[nn.Module, ...], frozen: str) -> None:
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not FROZEN[frozen](name))


@each_mode
@pytest.mark.parametrize(
    ("frozen", "act"),
    [*((frozen, nn.SiLU) for frozen in FROZEN), ("nothing", nn.ReLU), ("convolutions", nn.PReLU)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_gradient_penalty(frozen: str, act: Any, training: bool) -> None:
    """WGAN-GP's, beside the first-order loss that shares its graph."""
    ours, theirs, x = pair(training, act)
    freeze((ours, theirs), frozen)
    inputs = {}
    for model, operand in ((ours, x.to(DEVICE)), (theirs, x.double())):
        leaf = inputs[model] = operand.detach().requires_grad_()
        score = model(leaf)
        (gradient,) = torch.autograd.grad(score.sum(), leaf, create_graph=True)
        (score.square().sum() + (gradient.flatten(1).norm(dim=1) - 1).square().mean()).backward()
    compare_states(ours, theirs)
    compare({"x": inputs[ours].grad}, {"x": inputs[theirs].grad})


@each_mode
@pytest.mark.parametrize("frozen", ["nothing", "convolutions"])
def test_an_inner_step_that_is_differentiated(frozen: str, training: bool) -> None:
    """MAML's: the gradient of the loss after a step, by what the step began from."""
    ours, theirs, x = pair(training, nn.SiLU)
    freeze((ours, theirs), frozen)
    for model, operand in ((ours, x.to(DEVICE)), (theirs, x.double())):
        leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
        step = torch.autograd.grad(model(operand).square().sum(), list(leaves.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(leaves.items(), step, strict=True)}
        torch.func.functional_call(model, fast, (operand.flip(0) / 2,)).square().sum().backward()
    compare_states(ours, theirs)


class Composed(nn.BatchNorm2d):
    """Batch norm of differentiable parts: PyTorch's third gradient forgets that the statistics depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        mean, scale, shift = (t.view(-1, 1, 1) for t in (mean, self.weight * torch.rsqrt(var + self.eps), self.bias))
        return (x - mean) * scale + shift


def test_the_third_order() -> None:
    ours, theirs, x = pair(True, nn.Tanh)
    for bn in theirs.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.__class__ = Composed
    found: list[dict[str, Tensor | None]] = []
    for model, operand in ((ours, x.to(DEVICE)), (theirs, x.double())):
        value, leaf = model(operand.requires_grad_()).square().sum(), model.conv.weight
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = gradient.square().sum()
        found.append({"third": gradient.detach()})
    compare(*found)


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.LPPool2d(3, 2), nn.AdaptiveAvgPool2d(2)], ids=str
)
def test_a_pools_result_may_change_before_backward(pool: nn.Module) -> None:
    x = torch.rand(2, 3, 4, 5)
    ours = fastconv.convert(nn.Sequential(copy.deepcopy(pool)))
    gradients = []
    for model, operand in ((ours, x.to(DEVICE)), (pool, x.double())):
        leaf = operand.requires_grad_()
        z = model(leaf)
        z *= 2
        (first,) = torch.autograd.grad(z.square().sum(), leaf, create_graph=True)
        gradients.append({"first": first, "second": torch.autograd.grad(first.square().sum(), leaf)[0]})
    compare(*gradients)
