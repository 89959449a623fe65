"""The same bits: in another process, in another order, and with numerics="stable" whatever is tuned."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastconv
import fastconv.functional as F
from fastconv.autotune import Tuned, known, predict
from fastconv.autotune.gpus import H200
from fastconv.kernels import dispatch
from fastconv.kernels.dispatch import ADAPTER
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import DIRECTIONS
from fastconv.kernels.tiles import autotuned

# (images, channels, groups, filters, side, filter) that a family serves, each as small as its tiles allow.
PROBLEMS = {
    "depthwise": (2, 16, 16, 16, 5, 3),
    "grouped": (2, 16, 4, 16, 4, 3),
    "row_boxes": (16, 4, 1, 16, 8, 5),
    "rows": (2, 3, 1, 16, 6, 3),
    "gemm": (2, 64, 1, 64, 6, 1),
    "pixels": (16, 64, 1, 64, 2, 3),
    "spatial": (2, 64, 1, 64, 4, 3),
    "gather": (2, 16, 1, 16, 5, 3),
}
Results = dict[str, Tensor]


def convolution(family: str, direction: str) -> Results:
    n, c, groups, k, side, taps = PROBLEMS[family]
    before, one = (taps // 2,) * 2, (1, 1)
    x, w, dy = drawn(n, c, side, side), drawn(k, c // groups, taps, taps), drawn(n, k, side, side)
    # Whatever is summed sums up to nothing, so that results are what the order of their sums leaves.
    for t, axis in ((x, 1), (x, 0), (dy, 1 if direction == "dgrad" else 0)):
        cancel(t, axis, 1.0 if t is x or axis else -1.0)
    for axis in (0, 1):
        cancel(w, axis, -1.0)
    with dispatch.only_family(family):
        if direction == "fprop":
            return {"y": conv.conv_fprop(x, w, drawn(k), one, before * 2, one, groups)}
        if direction == "dgrad":
            return {"dx": conv.conv_dgrad(dy, w, None, (side, side), one, before, one, groups, True)}
        return {"dw": conv.conv_wgrad(x, dy, (taps, taps), one, before, one, groups, 1)}


def fused(training: bool) -> Results:
    """Each of batch norm's passes, and the sums over pixels."""
    leaves = [t.requires_grad_() for t in (drawn(2, 16, 5, 5), drawn(16, 16, 1, 1), drawn(16), drawn(16), drawn(16))]
    x, w, b, gamma, beta = leaves
    mean, var = torch.zeros(16), torch.ones(16)
    how: dict[str, Any] = {"training": training, "momentum": 0.1, "eps": 1e-5, "act": "silu"}
    z = F.conv2d_bn_act(x, w, b, gamma, beta, mean, var, **how)
    gradients = torch.autograd.grad(z, leaves, drawn(*z.shape))
    bias = torch.ops.fastconv.channel_sum(drawn(2, 16, 5, 5))
    return {"z": z.detach(), "mean": mean, "var": var, "bias": bias} | dict(zip("xwbge", gradients, strict=True))


def served() -> Results:
    """One operator a layer, in both directions."""
    vectors = [drawn(16).square() + 0.5 for _ in range(4)]
    how: dict[str, Any] = {"training": False, "momentum": 0.1, "eps": 1e-5, "act": "silu"}
    x, w = drawn(2, 16, 5, 5), drawn(16, 16, 3, 3)
    with torch.no_grad():
        convolutions = F.conv2d_bn_act, F.conv_transpose2d_bn_act
        return {each.__name__: each(x, w, drawn(16), *vectors, residual=x, padding=1, **how) for each in convolutions}


def twice() -> Results:
    """A max pool's indices, and the gradient of its gradient."""
    x = drawn(2, 16, 6, 6).requires_grad_()
    y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    dy = drawn(*y.shape).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx, dy, drawn(*dx.shape))
    return {"indices": indices, "ddy": ddy}


def pool(function: Callable[..., Tensor], *arguments: Any) -> Results:
    x = drawn(2, 16, 6, 6).requires_grad_()
    y = function(x, *arguments)
    (dx,) = torch.autograd.grad(y, x, drawn(*y.shape))
    return {"y": y.detach(), "dx": dx}


CASES: dict[str, tuple[Any, ...]] = {
    **{
        f"{family.name} {direction}": (convolution, family.name, direction)
        for direction in DIRECTIONS
        for family in dispatch.FAMILIES[direction]
    },
    **{f"batch norm, training={training}": (fused, training) for training in (False, True)},
    "inference": (served,),
    "max": (pool, F.max_pool2d, 3, 2, 1),
    "max twice": (twice,),
    "average": (pool, F.avg_pool2d, 3, 2, 1),
    "global": (pool, F.adaptive_avg_pool2d, 1),
    "lp": (pool, F.lp_pool2d, 3.0, 2),
}


def drawn(*shape: int) -> Tensor:
    """Numbers whose sums depend on their order."""
    draw = torch.Generator().manual_seed(sum(shape))
    t = torch.randn(shape, generator=draw, dtype=torch.float32).bfloat16()
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def cancel(t: Tensor, axis: int, sign: float) -> None:
    """Make the second half the first in another order, or its opposite."""
    half = t.shape[axis] // 2
    if half:
        t.narrow(axis, half, half).copy_(sign * t.narrow(axis, 0, half).roll(1, axis))


def digests(names: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        compute, *arguments = CASES[name]
        with record() as records:
            results = compute(*arguments)
        assert records, name
        for result, value in results.items():
            data = value.flatten().clone().view(torch.uint8).numpy().tobytes()
            found[f"{name} {result}"] = hashlib.sha256(data).hexdigest()
    return found


def asked() -> Iterator[tuple[Any, ...]]:
    """(space, features, work, choice) of all that the cases ask, without computing anything."""
    found: dict[Any, tuple[Any, ...]] = {}

    def consider(space: Any, features: Any, work: Any, gpu: Any, choice: Any) -> Any:
        found[space.name, features] = space, features, work, choice
        return choice

    with FakeTensorMode(allow_non_fake_inputs=True), autotuned.considering(consider):
        for compute, *arguments in CASES.values():
            compute(*arguments)
    yield from found.values()


def tune_otherwise() -> int:
    """Let tables have for each problem another tile than its default; how many there are."""
    others: dict[Any, Any] = {}
    for space, features, work, choice in asked():
        fitting = [it for it in space if predict(work(it), H200) and it != choice.config]
        if not fitting:
            continue
        # A split reduction, if there is one.
        other = max(fitting, key=lambda it: min(it.get("SPLITS", 1), 4))
        problem = ADAPTER.problem(space.name, features)
        others[problem] = other
        gpu, about = (H200.name, H200.multiprocessors), (0.01, 16, "2025-01-31T12:00:00", "0.1.0")
        entry = Tuned(problem, *gpu, ADAPTER.version(space.name), other, 1e-9, choice.config, 1e-3, (), None, *about)
        known.learn(entry)
    taken = [choice.config == others.get(ADAPTER.problem(space.name, it)) for space, it, _, choice in asked()]
    return sum(taken)


def main(mode: str) -> None:
    with dispatch.use_target(H200), fastconv.settings(numerics="stable" if mode == "tuned" else "fast"):
        taken = 0
        if mode == "tuned":
            with fastconv.settings(numerics="fast"):
                taken = tune_otherwise()
        names = list(CASES)
        found = digests(names[::-1] if mode == "tuned" else names)
    print(json.dumps({"taken": taken, "digests": found}))


@pytest.mark.slow
@pytest.mark.skipif(not interpreter.interpreting(), reason="plans for another GPU: needs TRITON_INTERPRET=1")
def test_every_operator_gives_the_same_bits_in_any_process_and_whatever_is_tuned(tmp_path) -> None:
    children = {}
    for number, mode in enumerate(("plain", "tuned")):
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "FASTCONV_CACHE_DIR": str(tmp_path / mode)}
        command = [sys.executable, __file__, mode]
        children[mode] = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    found = {mode: json.loads(child.communicate(timeout=300)[0].splitlines()[-1]) for mode, child in children.items()}
    plain = found["plain"]["digests"]
    assert len(plain) >= len(CASES) and len(set(plain.values())) > len(plain) // 2
    assert found["tuned"]["taken"] >= 15, "the tables are not asked"
    assert not [name for name, digest in plain.items() if found["tuned"]["digests"][name] != digest]


if __name__ == "__main__":
    main(sys.argv[1])
