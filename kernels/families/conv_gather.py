"""Implicit-GEMM convolution by pointer gather on channels_last tensors: fprop, dgrad, and so transposed convolution.

``y[n, p, k] = sum over taps r, channels c of x[n, p * stride - padding + r * dilation, c] * w[k, r, c]``, on each axis.
As a GEMM: rows are output pixels, columns are output channels, the reduction runs over taps and channels. Bytes: x, w
and y once each; taps re-read x from L2.

dgrad is the same walk. Pixel ``h`` of the input meets tap ``r`` if the stride divides ``h + padding - r * dilation``.
Pixels of equal ``h % stride`` are a phase: they meet the same taps, every ``stride / gcd(dilation, stride)``-th one.
A phase is a stride-1 convolution of the output's gradient, so no zero is multiplied, and one launch runs all phases.
The idea: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", section 4.6.

All sizes are runtime arguments, so a new image or batch size compiles nothing. Channel counts and strides come divided
by VEC, which tells the compiler their alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.family import DENSE, Family, Layout, fp32_precision, rounds_in_registers, why_not_groups
from fastconv.kernels.families.splits import conv_finish_kernel, sum_splits_with_epilogue
from fastconv.kernels.jit.epilogue import PART_K, PLAIN, apply_epilogue
from fastconv.kernels.jit.rounding import to_tf32
from fastconv.kernels.jit.walk import in_elements, phase_walk
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import common_width, load_width, needs_int64, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates
from fastconv.kernels.tiles.shapes import (
    INTERPRETED_PRODUCT,
    TileSpace,
    cdiv,
    element_registers,
    is_dense,
    matrix_registers,
    matrix_share,
    matrix_tile,
)


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "W", "C", "O", "P", "Q", "K", "CG", "KG", "T", "R", "S", "splits",
        "x_stride_n", "x_stride_d", "x_stride_h", "x_stride_w", "y_stride_n", "y_stride_d", "y_stride_h", "y_stride_w",
        "stride_d", "stride_h", "stride_w", "padding_d", "padding_h", "padding_w",
        "dilation_d", "dilation_h", "dilation_w", "gcd_d", "gcd_h", "gcd_w", "inverse_d", "inverse_h", "inverse_w",
        "eps", "a", "b",
    ]
)  # fmt: skip
def conv_gather_kernel(
    x_ptr,  # [N, D, H, W, groups * C]: the input (fprop) or the output's gradient (dgrad)
    w_ptr,  # [channels of the output, T, R, S, input channels of a group], dense
    bias_ptr,  # [groups * K], like the next five: absent unless the epilogue uses them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual_ptr,  # like y
    y_ptr,  # [N, O, P, Q, groups * K]; if the reduction is split, [splits, ...] in fp32
    tile_count_ptr,  # [tiles of BLOCK_M pixels]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, groups * K]
    N, D, H, W,
    C,  # reduced channels of a tile's groups, in units of VEC_C
    O, P, Q,
    K,  # produced channels of a tile's groups, in units of VEC_K
    CG, KG,  # reduced and produced channels of one group, in units of VEC_G
    T, R, S,
    splits,  # of the reduction
    x_stride_n, x_stride_d, x_stride_h, x_stride_w,  # in units of VEC_C
    y_stride_n, y_stride_d, y_stride_h, y_stride_w,  # in units of VEC_K
    stride_d, stride_h, stride_w,
    padding_d, padding_h, padding_w,
    dilation_d, dilation_h, dilation_w,
    gcd_d, gcd_h, gcd_w,  # of dilation and stride
    inverse_d, inverse_h, inverse_w,  # of dilation / gcd modulo stride / gcd
    eps,  # of batch norm
    a, b,  # of the activation
    VEC_C: tl.constexpr, VEC_K: tl.constexpr, VEC_G: tl.constexpr,
    PACKED: tl.constexpr,  # several groups share a tile, whose weight has their blocks on its diagonal
    CACHE: tl.constexpr,  # modifier of x's loads
    RANK: tl.constexpr,  # 3, or 2 if the first axis has size one
    DGRAD: tl.constexpr,
    POINTWISE: tl.constexpr,  # one tap, never outside x
    SPLIT: tl.constexpr,
    FLAT: tl.constexpr,  # a step reduces BLOCK_C (tap, channel) pairs, not BLOCK_C channels of one tap
    WIDE: tl.constexpr,  # a tensor holds 2^31 elements or more
    PRECISION: tl.constexpr,  # of an fp32 product: "tf32" or "ieee"
    ROUND: tl.constexpr,  # fp32 to TF32, in registers
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,  # the residual is added after the activation
    PART_K: tl.constexpr,  # columns that the epilogue takes at once
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C *= VEC_C
    K *= VEC_K
    if PACKED:
        CG *= VEC_G
        KG *= VEC_G
    else:
        CG = C
        KG = K
    x_stride_n, x_stride_d, x_stride_h, x_stride_w = in_elements(
        x_stride_n, x_stride_d, x_stride_h, x_stride_w, VEC_C, WIDE
    )
    y_stride_n, y_stride_d, y_stride_h, y_stride_w = in_elements(
        y_stride_n, y_stride_d, y_stride_h, y_stride_w, VEC_K, WIDE
    )

    # Channel tiles are fastest, then groups: x comes from DRAM once, in whole pixels. Phases share their source pixels.
    pid = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    k_tiles = tl.cdiv(K, BLOCK_K)
    pid_k = pid % k_tiles
    group = pid // k_tiles % tl.num_programs(1)
    tile = pid // k_tiles // tl.num_programs(1)
    split = 0
    if SPLIT:
        split = tile % splits
        tile = tile // splits
    pid_m = tile
    phase_d, phase_h, phase_w = 0, 0, 0
    if DGRAD:
        phases_w = tl.minimum(stride_w, Q)
        phase_w = pid_m % phases_w
        pid_m = pid_m // phases_w
        phases_h = tl.minimum(stride_h, P)
        phase_h = pid_m % phases_h
        pid_m = pid_m // phases_h
        if RANK == 3:
            phases_d = tl.minimum(stride_d, O)
            phase_d = pid_m % phases_d
            pid_m = pid_m // phases_d
    first_h, step_h, count_h, base_h, move_h, hop_h, tap_h, skip_h, taps_h = phase_walk(
        phase_h, P, R, stride_h, padding_h, dilation_h, gcd_h, inverse_h, DGRAD
    )
    first_w, step_w, count_w, base_w, move_w, hop_w, tap_w, skip_w, taps_w = phase_walk(
        phase_w, Q, S, stride_w, padding_w, dilation_w, gcd_w, inverse_w, DGRAD
    )
    taps = taps_h * taps_w
    if RANK == 3:
        first_d, step_d, count_d, base_d, move_d, hop_d, tap_d, skip_d, taps_d = phase_walk(
            phase_d, O, T, stride_d, padding_d, dilation_d, gcd_d, inverse_d, DGRAD
        )
        taps = taps * taps_d

    # The tile's output pixels and the source pixel of each one's tap (0, 0, 0).
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q = m % count_w
    m = m // count_w
    p = m % count_h
    n = m // count_h
    x_h = base_h + p * move_h
    x_w = base_w + q * move_w
    x_row = x_h * x_stride_h + x_w * x_stride_w
    y_row = (first_h + p * step_h) * y_stride_h + (first_w + q * step_w) * y_stride_w
    if RANK == 3:
        o = n % count_d
        n = n // count_d
        x_d = base_d + o * move_d
        x_row += x_d * x_stride_d
        y_row += (first_d + o * step_d) * y_stride_d
    mask_m = n < N
    x_row += n * x_stride_n
    y_row += n * y_stride_n

    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C)
    mask_k = offs_k < K
    x_tile = x_ptr + group * C + x_row[:, None]
    # Nothing is read of the blocks beside the diagonal, where the reduced channels are another group's.
    if DGRAD:
        w_stride_c = T * R * S * KG
        w_stride_tap = KG
        w_row = group * C * w_stride_c + (offs_k % KG if PACKED else offs_k)
    else:
        w_stride_c = 1
        w_stride_tap = CG
        w_row = (group * K + offs_k) * (T * R * S * CG)

    if FLAT:
        acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        steps = tl.cdiv(taps * C, BLOCK_C)
        pair = offs_c
        if SPLIT:
            share = tl.cdiv(steps, splits)
            pair += split * share * BLOCK_C
            steps = tl.minimum(split * share + share, steps) - split * share
        # Without this guard ptxas waits for every wgmma, because the loop might not run.
        if steps > 0:
            for _ in range(steps):
                channel = pair % C
                j = pair // C
                s_j = j % taps_w
                j = j // taps_w
                r_j = j % taps_h
                delta = channel + r_j * hop_h * x_stride_h + s_j * hop_w * x_stride_w
                index = (tap_h + r_j * skip_h) * S + tap_w + s_j * skip_w
                mask_c = pair < taps * C
                mask = mask_m[:, None] & mask_c[None, :]
                h = x_h[:, None] + (r_j * hop_h)[None, :]
                w = x_w[:, None] + (s_j * hop_w)[None, :]
                mask = mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                if RANK == 3:
                    t_j = j // taps_h
                    delta += t_j * hop_d * x_stride_d
                    index += (tap_d + t_j * skip_d) * (R * S)
                    d = x_d[:, None] + (t_j * hop_d)[None, :]
                    mask = mask & (d >= 0) & (d < D)
                x_step = tl.load(x_tile + delta[None, :], mask=mask, other=0.0)
                w_offs = index * w_stride_tap + channel * w_stride_c
                w_step = tl.load(
                    w_ptr + w_offs[:, None] + w_row[None, :], mask=mask_c[:, None] & mask_k[None, :], other=0.0
                )
                pair += BLOCK_C
                acc = tl.dot(to_tf32(x_step, ROUND), to_tf32(w_step, ROUND), acc, input_precision=PRECISION)
    else:
        w_c = offs_c % CG if PACKED and not DGRAD else offs_c
        x_tile += offs_c[None, :]
        w_tile = w_ptr + (w_c * w_stride_c)[:, None] + w_row[None, :]
        mask_w = mask_k[None, :]
        if PACKED:
            mask_w = mask_w & ((offs_c // CG)[:, None] == (offs_k // KG)[None, :])
        acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        steps = taps * tl.cdiv(C, BLOCK_C)
        c, r, s, t = 0, 0, 0, 0
        if SPLIT:
            share = tl.cdiv(steps, splits)
            first = split * share
            steps = tl.minimum(first + share, steps) - first
            c_blocks = tl.cdiv(C, BLOCK_C)
            c = first % c_blocks * BLOCK_C
            if not POINTWISE:
                # A phase may have no tap.
                j = first // c_blocks
                s = j % tl.maximum(taps_w, 1)
                j = j // tl.maximum(taps_w, 1)
                r = j % tl.maximum(taps_h, 1)
                t = j // tl.maximum(taps_h, 1)
        # Without this guard ptxas waits for every wgmma, because the loop might not run.
        if steps > 0:
            for _ in range(steps):
                mask_row = mask_m
                delta = c
                index = 0
                if not POINTWISE:
                    h = x_h + r * hop_h
                    w = x_w + s * hop_w
                    mask_row = mask_row & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    delta += r * hop_h * x_stride_h + s * hop_w * x_stride_w
                    index = (tap_h + r * skip_h) * S + tap_w + s * skip_w
                    if RANK == 3:
                        d = x_d + t * hop_d
                        mask_row = mask_row & (d >= 0) & (d < D)
                        delta += t * hop_d * x_stride_d
                        index += (tap_d + t * skip_d) * (R * S)
                mask_c = c + offs_c < C
                x_step = tl.load(
                    x_tile + delta, mask=mask_row[:, None] & mask_c[None, :], other=0.0, cache_modifier=CACHE
                )
                w_step = tl.load(
                    w_tile + index * w_stride_tap + c * w_stride_c, mask=mask_c[:, None] & mask_w, other=0.0
                )
                # Carried counters: a division a step costs more than the step's other arithmetic.
                c += BLOCK_C
                if not POINTWISE:
                    carry = c >= C
                    c = tl.where(carry, 0, c)
                    s = tl.where(carry, s + 1, s)
                    carry = s >= taps_w
                    s = tl.where(carry, 0, s)
                    r = tl.where(carry, r + 1, r)
                    if RANK == 3:
                        carry = r >= taps_h
                        r = tl.where(carry, 0, r)
                        t = tl.where(carry, t + 1, t)
                acc = tl.dot(to_tf32(x_step, ROUND), to_tf32(w_step, ROUND), acc, input_precision=PRECISION)
        if PACKED:  # noqa: SIM102 (the outer `if` is the compiler's)
            # Infinity times a zero beside the diagonal is a NaN: a tile with a NaN is computed again without the zeros.
            if tl.max((acc != acc).to(tl.int32)) > 0:
                acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
                for i in range(taps * C):
                    c = i % C
                    j = i // C
                    s = j % taps_w
                    j = j // taps_w
                    r = j % taps_h
                    h = x_h + r * hop_h
                    w = x_w + s * hop_w
                    mask_row = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    delta = c + r * hop_h * x_stride_h + s * hop_w * x_stride_w
                    index = (tap_h + r * skip_h) * S + tap_w + s * skip_w
                    if RANK == 3:
                        t = j // taps_h
                        d = x_d + t * hop_d
                        mask_row = mask_row & (d >= 0) & (d < D)
                        delta += t * hop_d * x_stride_d
                        index += (tap_d + t * skip_d) * (R * S)
                    own = mask_k & (offs_k // KG == c // CG)
                    w_offs = index * w_stride_tap + (c if DGRAD else c % CG) * w_stride_c
                    x_one = tl.load(x_ptr + group * C + x_row + delta, mask=mask_row, other=0.0).to(tl.float32)
                    w_one = tl.load(w_ptr + w_offs + w_row, mask=own, other=0.0).to(tl.float32)
                    acc += tl.where(own[None, :], x_one[:, None] * w_one[None, :], 0.0)

    if tile_count_ptr is not None:
        tl.store(tile_count_ptr + tile, tl.sum(mask_m.to(tl.float32), axis=0))
    if SPLIT:
        y_ptr += tl.cast(split, tl.int64) * N * O * P * Q * tl.num_programs(1) * K
    apply_epilogue(
        acc, pid_k * BLOCK_K, mask_m, y_row, tile, group, K,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
        eps, a, b, ACT, RESIDUAL_AFTER, BLOCK_M, BLOCK_K, PART_K,
    )  # fmt: skip


def conv_gather(
    direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE, pack: int = 1
) -> Launches:
    """The launches of fprop (x -> y) or dgrad (dy -> dx).

    Operands: source, weight, bias, the epilogue's, the result, and each tile's count, means and squares. If
    ``config["SPLITS"]`` splits the reduction, the first launch takes source, weight and workspace, the second the
    workspace and the rest, and y is dense. ``pack`` groups share a tile, whose BLOCK_C covers their reduced channels.
    """
    rank3 = problem.as_rank3
    dgrad = direction == "dgrad"
    operands = layout.operands(direction, problem)
    ((_, x_channels, *x_size), x_strides), ((_, y_channels, *y_size), y_strides) = operands
    groups = problem.groups // pack
    c, k = x_channels // groups, y_channels // groups
    vec_c, vec_k = load_width(problem.dtype, c, *x_strides), load_width(problem.dtype, k, *y_strides)
    vec_g = common_width(problem.dtype, c // pack, k // pack) if pack > 1 else 1
    gcds, inverses = rank3.phases
    phases = tuple(map(min, rank3.stride, y_size)) if dgrad else (1, 1, 1)
    # Phases differ by at most one pixel along an axis; the largest sets the grid.
    pixels = problem.batch * prod(map(triton.cdiv, y_size, rank3.stride if dgrad else phases))
    element = pointer_type(problem.dtype)
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_C")}
    assert pack == 1 or tile["BLOCK_C"] >= c
    splits = config["SPLITS"]
    assert splits == 1 or pack == 1, "a packed tile with a NaN is computed again over its whole reduction"
    epilogue = PLAIN if splits > 1 else layout.epilogue
    tiles = triton.cdiv(pixels, tile["BLOCK_M"]) * prod(phases)
    product = Launch(
        kernel=conv_gather_kernel,
        grid=(tiles * triton.cdiv(k, tile["BLOCK_K"]) * splits, groups, 1),
        pointers=(
            *(element, element, element if layout.bias and splits == 1 else None, *epilogue.pointers),
            *(element if splits == 1 else "*fp32", *epilogue.statistics_pointers),
        ),
        scalars=(
            *(problem.batch, *x_size, c // vec_c, *y_size, k // vec_k, c // pack // vec_g, k // pack // vec_g),
            *(*rank3.filter_size, splits),
            *(stride // vec_c for stride in x_strides),
            *(stride // vec_k for stride in y_strides),
            *(*rank3.stride, *rank3.padding, *rank3.dilation, *gcds, *inverses, *epilogue.scalars),
        ),
        constants={
            "VEC_C": vec_c,
            "VEC_K": vec_k,
            "VEC_G": vec_g,
            "PACKED": pack > 1,
            "CACHE": x_cache_modifier(problem.taps, pack),
            "RANK": max(problem.rank, 2),
            "DGRAD": dgrad,
            "POINTWISE": problem.taps == 1 and not problem.padded(direction),
            "SPLIT": splits > 1,
            "FLAT": taps_share_step(problem.taps, c, pack),
            "WIDE": needs_int64(*operands),
            "PRECISION": fp32_precision(problem.dtype),
            "ROUND": rounds_in_registers(problem.dtype, gpu),
            **epilogue.constants,
            "PART_K": tile["BLOCK_K"] if epilogue == PLAIN else min(tile["BLOCK_K"], PART_K // min(pack, 2)),
            **tile,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tiles=tiles,
    )
    if splits == 1:
        return (product,)
    return product, sum_splits_with_epilogue(
        problem.batch * prod(y_size), y_channels, splits, problem.dtype, layout.bias, layout.epilogue
    )


def taps_share_step(taps: int, channels: int, pack: int) -> bool:
    """Whether one step covers several taps: with under 16 channels most of a tensor-core tile of one tap is zeros."""
    return taps > 1 and channels < 16 and pack == 1


def packed_groups(direction: str, problem: ConvProblem) -> int:
    """How many neighbouring groups share a tensor-core tile, most of which one group would leave empty; 1: none.

    The zeros beside the diagonal are multiplied too. README.md counts up to which width that stays under the bytes.
    """
    width = max(problem.in_channels, problem.out_channels) // problem.groups
    # wgrad's tiles have at least 64 rows, filled or not.
    limit = 64 if direction == "wgrad" else 32
    return max((d for d in range(2, limit // width + 1) if problem.groups % d == 0), default=1)


def x_cache_modifier(taps: int, pack: int) -> str:
    """The cache modifier of x's loads: ".ca" lets the taps of a packed tile, which has little arithmetic, share L1.

    16-byte copies to shared memory bypass L1 by default. Triton 3.9 asks for L1 itself, earlier versions do not.
    """
    return ".ca" if pack > 1 and taps > 1 else ""


GATHER = TileSpace(
    "conv_gather",
    {
        "SPLITS": (1,),
        "BLOCK_M": (128, 64),
        "BLOCK_K": (128, 64, 32, 256),
        "BLOCK_C": (64, 32),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
    },
    matrix_tile("BLOCK_M", "BLOCK_K", "BLOCK_C"),
    kernels=(conv_gather_kernel, conv_finish_kernel),
    interpreted=INTERPRETED_PRODUCT,
)


def _dense_tile(config: Config) -> str | None:
    if config["BLOCK_K"] <= 64 and config["BLOCK_C"] == 32:
        return "binaries that few layers would share, and that spill on one version of the compiler"
    if config["SPLITS"] > 1 and (config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"]) != (64, 64, 64):
        return "a split reduction of another tile than 64x64x64"
    return GATHER.valid(config)


# Programs share the reduction of a tile if tiles are too few for the GPU; only one small tile is split.
GATHER_SPLIT = replace(
    GATHER, name="conv_gather_split", ranges={**GATHER.ranges, "SPLITS": (1, 2, 4, 8, 16)}, valid=_dense_tile
)


def _packed_weight(problem: ConvProblem) -> float:
    """Registers for an element of the packed weight, which is read in runs of one group's channels."""
    run = common_width(problem.dtype, problem.in_channels // problem.groups, problem.out_channels // problem.groups)
    return 3 / run if run * problem.dtype.itemsize >= 4 else 4


def gather_candidates(
    direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout = DENSE, pack: int = 1
) -> Candidates:
    precision = fp32_precision(problem.dtype)
    groups = problem.groups // pack
    k, c = problem.out_channels // groups, problem.in_channels // groups
    pixels, phases = problem.output_pixels, 1
    if direction == "dgrad":
        k, c = c, k
        phases = prod(map(min, problem.stride, problem.input_size))
        pixels = cdiv(problem.input_pixels, phases)
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    # Each (tap, channel) pair has coordinates of its own.
    flat = taps_share_step(problem.taps, c, pack)
    source = (8 if problem.rank == 3 else 5) if flat else element_registers(problem, c)
    result = 6 if element_registers(problem, k) else 0
    weight: float = element_registers(problem, k) if direction == "dgrad" else source
    if pack > 1:
        source, weight = min(source, 4), _packed_weight(problem)
    by_element = source, weight, result

    def work(config: Config) -> Work:
        m, n, depth, warps = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"], config["num_warps"]
        splits = config["SPLITS"]
        steps = cdiv(problem.taps * c, depth) if flat else problem.taps * cdiv(c, depth)
        registers = matrix_registers(config, "BLOCK_M", "BLOCK_K", "BLOCK_C", by_element, share == 0, gpu)
        if flat and share == 0 and n > 32:
            registers += 256  # as Triton 3.9 compiles it
        if pack > 1:
            # What computing a NaN's tile again takes; its rows are shared between threads or held by each.
            registers = max(registers, 128 if m >= 32 * warps else 168)
        return Work(
            programs=cdiv(pixels, m) * phases * cdiv(k, n) * groups * splits,
            steps=max(1, cdiv(steps, phases * splits)),
            step_flops=2 * m * n * depth,
            step_elements=(m + n) * depth,
            step_bytes=(m + n) * depth * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + n) * depth * element,
            registers=registers,
            warps=warps,
            stages=config["num_stages"],
            matrix_share=share,
            extra_bytes=(2 * splits * 4 + element) * pixels * phases * k * groups if splits > 1 else 0,
        )

    width = {"BLOCK_K": k, "BLOCK_C": c} if pack > 1 else {}
    space = GATHER_SPLIT if is_dense(problem, share, pack) else GATHER
    return Candidates(space, (direction, problem, precision, pack), work, gpu, width)


def why_not_packed(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    """Why no groups of a convolution share a tile, or None."""
    if problem.groups == 1:
        return "one group"
    if problem.in_channels == problem.groups:
        return "one channel a group"
    if packed_groups(direction, problem) == 1:
        widths = problem.in_channels // problem.groups, problem.out_channels // problem.groups
        return f"{problem.groups} groups of {widths[0]} to {widths[1]} channels: no two share a tile"
    return why_not_groups(problem)


def packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A family's function with ``pack``, the number of groups that share a tile."""
    return lambda direction, problem, *rest: function(direction, problem, *rest, pack=packed_groups(direction, problem))


FAMILY = Family("gather", lambda direction, problem, *_: why_not_groups(problem), gather_candidates, conv_gather)
GROUPED = Family("grouped", why_not_packed, packed(gather_candidates), packed(conv_gather))
