"""What the winners of a max pool point at: elements of another tensor, or PyTorch's indices.

``y[p] = x[p * stride - padding + tap[p] * dilation]``, on each axis: the gradient's gradient; without x the number of
this pixel. Bytes: the index and y once each, an element of x for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastconv.autotune import Config
from fastconv.kernels.jit.walk import in_elements
from fastconv.kernels.jit.windows import line_of, place, pool_blocks, window_bounds
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.layout import INDEX_TYPES, Strides, dense_strides, load_width, needs_int64, pointer_type
from fastconv.kernels.problem.pool import PoolProblem


@triton.jit(
    do_not_specialize=[
        *("M", "C", "D", "H", "W", "O", "P", "Q", "x_n", "x_d", "x_h", "x_w", "taps_h", "taps_w"),
        *("stride_d", "stride_h", "stride_w", "pad_d", "pad_h", "pad_w", "dilation_d", "dilation_h", "dilation_w"),
    ]
)
def pool_gather_kernel(
    index_ptr,  # [N, O, P, Q, C]: the winner's tap
    x_ptr,  # [N, D, H, W, C] by its strides; absent: y is the winner's number in D x H x W
    y_ptr,  # like index
    M,  # rows
    C,  # in units of VEC
    D, H, W, O, P, Q,
    x_n, x_d, x_h, x_w,  # in units of VEC
    taps_h, taps_w, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
    ADAPTIVE: tl.constexpr, PLANES: tl.constexpr, RANK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C *= VEC
    x_n, x_d, x_h, x_w = in_elements(x_n, x_d, x_h, x_w, VEC, WIDE)
    mask, n, o, p, q, c = place(M, C, O, P, Q, PLANES, RANK, 1, BLOCK_M, BLOCK_C)
    line = line_of(n, o, p, O, P, RANK)
    if WIDE:
        line = line.to(tl.int64)
    out = (line * Q + q) * C + c
    tap = tl.load(index_ptr + out, mask=mask, other=0).to(tl.int32)
    r = tap // taps_w
    w = window_bounds(q, W, Q, stride_w, pad_w, ADAPTIVE)[0] + tap % taps_w * dilation_w
    h = window_bounds(p, H, P, stride_h, pad_h, ADAPTIVE)[0] + r % taps_h * dilation_h
    d, inside = 0, mask & (h < H) & (w < W)
    if RANK == 3:
        d = window_bounds(o, D, O, stride_d, pad_d, ADAPTIVE)[0] + r // taps_h * dilation_d
        inside = inside & (d < D)
    if x_ptr is None:
        y = (d * H + h).to(tl.int64) * W + w
    else:
        y = tl.load(x_ptr + n * x_n + d * x_d + h * x_h + w * x_w + c, mask=inside, other=0.0)
    tl.store(y_ptr + out, y, mask=mask)


def pool_gather(problem: PoolProblem, config: Config, channels_last: bool, strides: Strides | None) -> Launch:
    """index, x -> y; if ``strides`` of x are None: index, None -> PyTorch's index, in int64."""
    view = problem.as_rank3 if channels_last else problem.as_rank3.planes
    assert problem.index is not None
    numbers = strides is None
    steps = strides or (0, 0, 0, 0)
    vec = load_width(problem.dtype, view.channels, *steps)
    programs, rows, blocks = pool_blocks(view, view.output_size, channels_last, {"BLOCK": config["BLOCK"]})
    element = pointer_type(problem.dtype)
    return Launch(
        kernel=pool_gather_kernel,
        grid=(programs, 1, 1),
        pointers=(INDEX_TYPES[problem.index], None if numbers else element, "*i64" if numbers else element),
        scalars=(
            *(rows, view.channels // vec, *view.input_size, *view.output_size),
            *(stride // vec for stride in steps),
            *(*view.window[1:], *view.stride, *view.padding, *view.dilation),
        ),
        constants={
            "ADAPTIVE": problem.adaptive,
            "PLANES": not channels_last,
            "RANK": max(2, problem.rank),
            "VEC": vec,
            "WIDE": needs_int64((view.input_shape, steps), (view.output_shape, dense_strides(view.output_shape))),
            **blocks,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
