"""Random convolutions with epilogues and statistics: by our kernels, and by PyTorch in fp64."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.ops import conv
from tests.marks import DEVICE

# (a, b) of the activations that have parameters.
PARAMETERS = {"hardtanh": (-0.5, 1.5), "leaky_relu": (0.1, 0.0), "elu": (1.2, 0.0), "softplus": (1.0, 20.0)}


@dataclass(frozen=True)
class FusedLayer:
    """A convolution, or a transposed one, with batch norm's vectors, PReLU's slope and a residual; all on the CPU."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    norm: tuple[Tensor, Tensor, Tensor, Tensor]
    slope: Tensor
    residual: Tensor
    exact: Tensor  # convolution and bias in fp64
    arguments: tuple[Any, ...]

    def expected(self, act: str, after: bool = False, norm: bool = True, residual: bool = True) -> Tensor:
        """The fused layer by PyTorch in fp64."""
        z, added = self.exact, self.residual.double() if residual else torch.zeros(())
        if norm:
            mean, var, gamma, beta = (t.double() for t in self.norm)
            z = torch.batch_norm(z, gamma, beta, mean, var, False, 0.0, 1e-5, False)
        a, b = PARAMETERS.get(act, (0.0, 0.0))
        first = self.slope.double() if act == "prelu" else a
        torch_act = ACTIVATIONS[act].torch
        return torch_act(z, first, b) + added if after else torch_act(z + added, first, b)

    def computed(self, act: str, after: bool = False, norm: bool = True, residual: bool = True) -> Tensor:
        """The fused layer by our kernels."""
        return conv.conv_act(
            *map(_on_device, (self.x, self.weight, self.bias)),
            tuple(map(_on_device, self.norm)) if norm else (None,) * 4,
            _on_device(self.slope) if act == "prelu" else None,
            _on_device(self.residual) if residual else None,
            *(*self.arguments, 1e-5, act, *PARAMETERS.get(act, (0.0, 0.0)), after),
        ).cpu()

    def check_statistics(self, result: tuple[float, float], moments: tuple[float, float] | None = None) -> None:
        """The convolution and its pixels' moments, within these (relative, absolute) errors, one if they are equal."""
        y, mean, var = conv.conv_statistics(*map(_on_device, (self.x, self.weight, self.bias)), *self.arguments)
        true_var, true_mean = torch.var_mean(self.exact, (0, 2, 3), correction=0)
        for value, reference in ((y, self.exact), (mean, true_mean), (var, true_var)):
            rtol, atol = result if value is y else moments or result
            torch.testing.assert_close(value.cpu().double(), reference, rtol=rtol, atol=atol)


def _on_device(t: Tensor) -> Tensor:
    return t.to(DEVICE).contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)


def fused_layer(
    shape: tuple[int, ...],
    k: int,
    filter: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    transposed: bool = False,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    extra: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> FusedLayer:
    """x of ``shape`` to ``k`` channels; ``extra``: a transposed convolution's output_padding."""
    generator = torch.Generator().manual_seed(0)
    c = shape[1] // groups
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = (torch.randn(k, c, *filter, generator=generator) / math.sqrt(c * math.prod(filter))).to(dtype)
    if transposed:
        weight = weight.transpose(0, 1).contiguous()
    bias, mean, gamma, beta, slope = (torch.randn(k, generator=generator) for _ in range(5))
    bias, var = (3 * bias).to(dtype), torch.rand(k, generator=generator) + 0.5
    operands = x.double(), weight.double(), bias.double(), stride, padding
    exact = torch.conv_transpose2d(*operands, extra) if transposed else torch.conv2d(*operands, (1, 1), groups)
    residual = torch.randn(exact.shape, generator=generator).to(dtype)
    sides = padding if transposed else padding * 2
    arguments = tuple(exact.shape[2:]) if transposed else None, stride, sides, (1, 1), groups
    return FusedLayer(x, weight, bias, (mean, var, gamma, beta), slope, residual, exact, arguments)
