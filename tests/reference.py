"""What the tests of every operator share: exact integers, references in fp64, bounds from dtype and reduction depth."""

import math

import torch
from torch import Tensor

# Largest integer up to which every integer is representable; of fp32 in a TF32 product.
EXACT = {torch.float32: 2**11, torch.float16: 2**11, torch.bfloat16: 2**8}


def integers(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> Tensor:
    """Integers in [-limit, limit] in random order, distinct while the limit allows, as fp64."""
    numel = math.prod(shape)
    return (torch.randperm(numel, generator=generator) % (2 * limit + 1) - limit).reshape(shape).double()


def exact_limit(dtype: torch.dtype, depth: int) -> int:
    """The largest magnitude of two integer operands whose sum of ``depth`` products no fp32 addition rounds, and that
    stays in the range of ``dtype``."""
    largest = 2**24 if dtype is not torch.float16 else 60000
    return max(1, min(EXACT[dtype], math.isqrt(largest // depth)))


def assert_equal(value: Tensor, reference: Tensor, what: str) -> None:
    """Equal bit for bit to the reference rounded to the value's dtype."""
    rounded = reference.to(value.dtype)
    if not torch.equal(value.cpu(), rounded):
        assert value.shape == reference.shape, f"{what}: shape {list(value.shape)}, expected {list(reference.shape)}"
        wrong = (value.cpu() != rounded).nonzero()
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}: {len(wrong)} of {value.numel()} elements differ, first at {at}: "
            f"{value[at].item()!r}, expected {rounded[at].item()!r}"
        )


def assert_close(value: Tensor, reference: Tensor, magnitude: Tensor, depth: int, what: str, eps: float = 0.0) -> None:
    """Within one rounding to the value's dtype and the fp32 roundings of a sum of ``depth`` products.

    ``magnitude`` is the same sum over absolute values: what rounding errors are proportional to. ``eps``: the relative
    error of one product, above fp32's if operands are rounded first (TF32).
    """
    assert value.shape == reference.shape, f"{what}: shape {list(value.shape)}, expected {list(reference.shape)}"
    fp32 = torch.finfo(torch.float32).eps
    bound = torch.finfo(value.dtype).eps * reference.abs() + (fp32 * math.sqrt(depth) * 2 + eps) * magnitude
    bound += torch.finfo(value.dtype).tiny
    error = (value.detach().cpu().double() - reference).abs()
    # Written so that a NaN fails.
    if not bool((error <= bound).all()):
        excess = torch.where(error <= bound, torch.zeros_like(error), torch.nan_to_num(error / bound, nan=math.inf))
        at = tuple(torch.unravel_index(excess.argmax(), excess.shape))
        at = tuple(int(i) for i in at)
        raise AssertionError(
            f"{what}: max error {error.max():.3e}, RMS {error.square().mean().sqrt():.3e}; worst at {at}: "
            f"{value[at].item()!r}, expected {reference[at].item()!r} within {bound[at].item():.3e}"
        )
