"""Small models to fuse, one step of each, and what a step gives."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
from plainly import activation
from tests.marks import DEVICE


def how(args: tuple[Any, ...]) -> tuple[str | None, str | None]:
    """A fused call's activation, with the residual's place: None, "before" or "after"."""
    residual, after = args[9:11]
    return activation(args), None if residual is None else "after" if after else "before"


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


def twice(m: Any, x: Any) -> Any:
    return m.relu(m.bn1(m.conv1(F.silu(m.bn1(m.conv1(x))))))


def no_activation(m: Any, x: Any) -> Any:
    return m.bn1(m.conv1(x))


def lists() -> dict[str, Any]:
    return {
        "convs": nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2)),
        "norms": nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2)),
    }


def loop(m: Any, x: Any) -> Any:
    for conv, norm in zip(m.convs, m.norms, strict=True):
        x = F.gelu(norm(conv(x)), approximate="tanh")
    return x


def by_type(m: Any, x: Any) -> Any:
    if isinstance(x, Tensor):
        x = [x]
    return m.relu(m.bn1(m.conv1(torch.cat(x, 1))))


BN1, BN2 = "conv1 + bn1", "conv2 + bn2"


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


class Unit(nn.Module):
    """Convolution, batch norm, activation: with a forward of its own."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def sequence(*before: nn.Module, bn: bool = True) -> nn.Sequential:
    return nn.Sequential(*before, nn.Conv2d(4, 4, 3, padding=1), *([nn.BatchNorm2d(4)] if bn else []))


def added_to(m: Any, x: Any) -> Any:
    return x + m.f(x)


def residual() -> tuple[Any, Any]:
    """A block that adds its input to what a Sequential gives, which ends in another."""
    return pair(Block(lambda m, x: m.relu(m.f(x) + x), f=nn.Sequential(sequence(), sequence()), relu=nn.ReLU()))
