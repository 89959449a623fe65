"""Tensors that lie in memory as no dense one does, of a tensor's values or of some of them."""

from collections.abc import Callable

import torch
from torch import Tensor


def _poison(t: Tensor, *shape: int) -> Tensor:
    """Memory that none of the operand's values would be read from."""
    return torch.full(shape, torch.nan if t.is_floating_point() else 5, dtype=t.dtype, device=t.device)


def dense(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else dense(t)


def strided(t: Tensor) -> Tensor:
    return _poison(t, *(2 * size for size in t.shape))[(slice(1, None, 2),) * t.dim()].copy_(t)


def offset(t: Tensor) -> Tensor:
    """Behind one element, with the axes turned round."""
    return _poison(t, t.numel() + 1)[1:].view(*reversed(t.shape)).permute(*reversed(range(t.dim()))).copy_(t)


def with_room(t: Tensor) -> Tensor:
    """Channels_last with an unused element behind each channel; a column of a matrix."""
    return _poison(t, t.shape[0], *t.shape[2:], *t.shape[1:2], 2)[..., 0].movedim(-1, min(1, t.dim() - 1)).copy_(t)


def padded_pixels(t: Tensor) -> Tensor:
    """Channels_last, behind each pixel one channel that is none."""
    if t.dim() < 2:
        return strided(t)
    return _poison(t, t.shape[0], *t.shape[2:], t.shape[1] + 1)[..., :-1].movedim(-1, 1).copy_(t)


def expanded(t: Tensor) -> Tensor:
    """Along the first axis."""
    return t[:1].expand(t.shape)


def one_value(t: Tensor) -> Tensor:
    return t.flatten()[:1].view((1,) * t.dim()).expand(t.shape) if t.numel() else t


def overlapping(t: Tensor) -> Tensor:
    return t.flatten().as_strided(t.shape, (1,) * t.dim()) if t.numel() else t


KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    it.__name__: it for it in (dense, channels_last, strided, offset, with_room, padded_pixels)
}
REPEATING: dict[str, Callable[[Tensor], Tensor]] = {it.__name__: it for it in (expanded, one_value, overlapping)}
VIEWS = KEEPING | REPEATING
