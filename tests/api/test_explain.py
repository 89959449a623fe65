"""explain: what it names is what runs, PyTorch's share has its reasons, and the model is left as it was."""

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv
from fastconv import nn
from fastconv.autotune.gpus import A100, H200, INTERPRETER
from fastconv.explain import Moved, Run
from fastconv.kernels.dispatch import use_target
from fastconv.kernels.launch.launch import record
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels

# name -> (layer, input, forward's further arguments)
CALLS: dict[str, tuple[torch.nn.Module, tuple[int, ...], dict[str, Any]]] = {
    "1-d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9), {}),
    "uneven same": (nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 5, 6), {}),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 5, 6), {}),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 5, 6), {}),
    "uneven same circular": (nn.Conv2d(4, 6, (2, 4), padding="same", padding_mode="circular"), (2, 4, 5, 6), {}),
    "grouped, unbatched": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 6), {}),
    "3-d": (nn.Conv3d(4, 6, 2, stride=(1, 2, 1), dilation=2), (1, 4, 3, 5, 4), {}),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 3, 4), {}),
    "transposed, output_size": (nn.ConvTranspose2d(4, 6, 3, stride=3), (2, 4, 3, 4), {"output_size": (10, 14)}),
}


class Call(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.keywords = layer, keywords

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, **self.keywords)


def check_what_runs(model: torch.nn.Module, run: Run, *inputs: Tensor) -> None:
    """``run`` names the launches that a step of ``model`` on ``inputs`` makes, with their operands."""
    with record() as launches:
        z = model(*inputs)
        if z.requires_grad:
            z.backward(torch.ones_like(z))
    named = [launched for found in run.ours.passes for launched in found.launches]
    assert [(r.name, r.launch.grid, r.shapes, r.bytes) for r in named] == [
        (r.name, r.launch.grid, r.shapes, r.bytes) for r in launches
    ]


@pytest.mark.parametrize("name", CALLS)
def test_what_is_planned_is_what_runs(name: str) -> None:
    layer, shape, keywords = CALLS[name]
    model = Call(layer, keywords).to(DEVICE)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    (found,) = fastconv.explain(model, x).layers
    forward, backward = ("dgrad", "fprop") if layer.transposed else ("fprop", "dgrad")
    assert [plan.direction for plan in found.plans] == [forward, backward, "wgrad"]
    assert found.reason is None
    check_what_runs(model, found.runs[0], x)


def block(**options: Any) -> torch.nn.Module:
    return nn.ConvBNAct2d(3, 5, 3, padding=1, **options)


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """With constant statistics, of which only the convolution trains."""
    model.bn.requires_grad_(False)
    return model.eval()


def hooked(model: torch.nn.Module) -> torch.nn.Module:
    model.bn.register_forward_hook(lambda module, arguments, output: None)
    return model


def inference(model: torch.nn.Module) -> torch.nn.Module:
    return model.eval().requires_grad_(False)


# name -> (model, how it is computed, passes)
TRAINED = ["fprop, statistics", "apply", "sums", "gradient", "wgrad"]
FORMS: dict[str, tuple[torch.nn.Module, str, list[str]]] = {
    "inference": (inference(block()), "one kernel", ["fprop"]),
    "training": (block(), "statistics from the convolution, one pass", TRAINED),
    "frozen": (frozen(block()), "frozen statistics, one kernel", ["fprop", "gradient", "wgrad"]),
    "frozen, weights train": (
        block().eval(),
        "frozen statistics, the convolution and one pass, since backward reads its result",
        ["fprop", "apply", "sums", "gradient", "wgrad"],
    ),
    "no statistics kept": (
        inference(block(norm=lambda k: torch.nn.BatchNorm2d(k, track_running_stats=False))),
        "statistics from the convolution, one pass",
        ["fprop, statistics", "apply"],
    ),
    "cumulative average": (
        block(norm=lambda k: torch.nn.BatchNorm2d(k, momentum=None)),
        "statistics from the convolution, one pass",
        TRAINED,
    ),
    "two numbers per activation": (block(act="relu6"), "statistics from the convolution, one pass", TRAINED),
    "hooked": (hooked(block()), "unfused, bn, act apart: a hook on its BatchNorm2d", ["fprop", "wgrad"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_how_a_fused_layer_is_computed(name: str) -> None:
    model, form, passes = FORMS[name]
    model.to(DEVICE)
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    explanation = fastconv.explain(model, x)
    (run,) = explanation.layers[0].runs
    assert run.form == form and f"  {form}: " in str(explanation)
    assert [found.name for found in run.ours.passes] == passes
    assert all(found.choice is not None and found.choice.source == "cost model" for found in run.ours.passes)
    assert explanation.fused == ([] if name == "hooked" else ["conv + bn + act"])
    assert explanation.unfused == ([("bn", "a hook on its BatchNorm2d")] if name == "hooked" else [])
    check_what_runs(model, run, x)


def test_a_fused_layer_in_each_of_its_calls() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)

        def forward(self, x: Tensor, added: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(x)) + added)

    class Thrice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.block(x, added) for added in (x, x[:, :, :1, :1], x)]

    (layer,) = fastconv.explain(Thrice().to(DEVICE), torch.randn(2, 4, 5, 5, device=DEVICE)).layers
    whole, part = layer.runs
    assert whole.form == "statistics from the convolution, one pass" and whole.times == 2
    assert part.form == f"{whole.form}; residual, ReLU apart: what is added has another shape or dtype"
    assert part.times == 1


def test_a_plain_model_is_explained_as_convert_would_make_it() -> None:
    def plain() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).to(DEVICE)

    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    model = plain()
    assert fastconv.explain(model, x).fused == ["0 + 1 + 2"]
    assert type(model) is torch.nn.Sequential and type(model[0]) is torch.nn.Conv2d
    assert fastconv.explain(fastconv.convert(plain()), x).fused == ["0 + 1 + 2"]
    assert fastconv.explain(fastconv.convert(plain(), fuse=False), x).unfused == [("1", "not converted")]


def test_autocast_around_a_batch_norm_in_fp32() -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        explanation = fastconv.explain(block().to(DEVICE), torch.randn(2, 3, 6, 6, device=DEVICE))
    form = "statistics from the convolution, one pass, batch norm in float32 around a convolution in bfloat16"
    assert [run.form for layer in explanation.layers for run in layer.runs] == [form]


def test_statistics_of_other_processes_are_not_waited_for() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class Unanswered:
        """A group whose other process is somewhere else."""

        def size(self) -> int:
            return 2

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise TypeError("a process group cannot be copied")

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(block(), Unanswered()).to(DEVICE)
        (layer,) = fastconv.explain(model, torch.randn(2, 3, 6, 6, device=DEVICE)).layers
    finally:
        torch.distributed.destroy_process_group()
    assert layer.runs[0].form == "statistics from the convolution, one pass, synchronised over 2 processes"
    assert [found.name for found in layer.runs[0].ours.passes] == TRAINED
    assert type(model.bn) is torch.nn.SyncBatchNorm


def test_hooks_are_called_once_and_checkpoints_are_seen_through() -> None:
    seen: list[str] = []
    model = torch.nn.Sequential(block(), torch.nn.Conv2d(5, 4, 1)).to(DEVICE)
    x = torch.randn(2, 3, 6, 6, device=DEVICE, requires_grad=True)
    plain = fastconv.explain(model, x).moved
    model[1].register_forward_hook(lambda *_: seen.append("conv"))
    model[0].conv.register_forward_pre_hook(lambda *_: seen.append("fused layer"))
    fastconv.explain(model, x)
    assert seen == ["fused layer", "conv"]

    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Sequential(block(), torch.nn.Conv2d(5, 4, 1)).to(DEVICE)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)

    assert fastconv.explain(Checkpointed(), x).moved == plain


def test_bytes_of_a_layer_and_of_pytorchs() -> None:
    layer = nn.Conv2d(8, 8, 1, bias=False).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(2, 8, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    # Whose tiles split no sum, which would move partial ones.
    with use_target(INTERPRETER):
        explanation = fastconv.explain(layer, x)
    # x, w and y are met in each of the three directions, by PyTorch's operators as by ours.
    each = 4 * (2 * 256 + 64)
    assert explanation.moved == explanation.pytorch_moved == Moved(each, 2 * each)
    line = f"they move {3 * each / 1e6:.4f} MB ({each / 1e6:.4f} forward, {2 * each / 1e6:.4f} backward)"
    assert str(explanation).splitlines()[-1].startswith(line)
    with torch.inference_mode():
        assert fastconv.explain(layer, x).moved == Moved(each, 0)


POOLS: dict[str, tuple[torch.nn.Module, tuple[int, ...], list[str]]] = {
    "maximum": (nn.MaxPool2d(3, 2, 1), (2, 8, 9, 7), ["forward", "backward"]),
    "with indices": (nn.MaxPool2d(2, return_indices=True), (2, 8, 9, 7), ["forward", "indices", "backward"]),
    "average, 1-d": (nn.AvgPool1d(3), (2, 8, 9), ["forward", "backward"]),
    "global": (nn.AdaptiveAvgPool2d(1), (2, 8, 5, 6), ["forward", "backward"]),
    "adaptive, 3-d": (nn.AdaptiveMaxPool3d(2), (2, 3, 4, 3, 5), ["forward", "backward"]),
    "power": (nn.LPPool2d(2, 2), (2, 8, 6, 6), ["forward", "forward", "backward"]),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str) -> None:
    pool, shape, passes = POOLS[name]
    x = torch.rand(shape, device=DEVICE, requires_grad=True)
    explanation = fastconv.explain(pool, x)
    ((found,), layers) = explanation.pools, explanation.layers
    assert (found.kind, found.reason, layers) == (type(pool).__name__, None, ())
    (run,) = found.runs
    assert [each.name for each in run.ours.passes] == passes
    assert {plan.family for plan in found.plans} == {"pool"}
    assert "1 of 1 pools on fastconv's kernels" in str(explanation)
    with record() as launches:
        y = pool(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
    named = [launched for each in run.ours.passes for launched in each.launches]
    assert [(r.name, r.launch.grid, r.shapes) for r in named] == [(r.name, r.launch.grid, r.shapes) for r in launches]


def test_bytes_of_a_pool_and_of_pytorchs() -> None:
    pool = torch.nn.MaxPool2d(2)
    x = torch.randn(2, 8, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    (found,) = fastconv.explain(pool, x).pools
    (run,) = found.runs
    assert type(pool) is torch.nn.MaxPool2d
    # x is 256 floats and y 64; one byte a maximum is kept, PyTorch keeps eight.
    assert run.ours.forward.bytes == 4 * 320 + 64
    assert run.pytorch.moved == Moved(4 * 320 + 8 * 64, 4 * 320 + 8 * 64)
    with torch.inference_mode():
        assert fastconv.explain(pool, x).moved == Moved(4 * 320, 0)
    doubles = torch.zeros(2, 8, 4, 4, dtype=torch.float64, device=DEVICE)
    (left,) = fastconv.explain(pool, doubles).pools
    assert left.reason == "torch.float64 is not one of float32, float16, bfloat16"


def test_pools_beside_convolutions_and_the_families_of_these() -> None:
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 8, 3, groups=2)),
        torch.nn.AdaptiveAvgPool2d(1),
    ).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        explanation = fastconv.explain(model, torch.randn(2, 8, 12, 12, device=DEVICE))
    families = [{plan.family for plan in layer.plans} for layer in (*explanation.layers, *explanation.pools)]
    assert families == [{"depthwise"}, {"grouped"}, {"pool"}, {"pool"}]
    text = str(explanation)
    assert "2 of 2 convolution layers and 2 of 2 pools on fastconv's kernels" in text
    assert "1  MaxPool2d  max N2 C8 10x10 -> 5x5 2x2 stride 2 bfloat16" in text
    assert "depthwise: 4 input channels a group" in text
    counted = sum(run.ours.moved.total for layer in (*explanation.layers, *explanation.pools) for run in layer.runs)
    assert explanation.moved.total == counted


class Net(torch.nn.Module):
    """Batch norm in training, a layer called with two sizes, one never called, one that stays PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.norm = torch.nn.BatchNorm2d(8)
        self.twice = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.never = torch.nn.Conv2d(8, 8, 1)
        self.theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.dropout(self.norm(self.stem(x)))
        return self.theirs(self.twice(self.twice(x)[..., ::2, ::2]))


class Asks(Net):
    """Needs the values of what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum().item() > 0 else -y


@pytest.mark.parametrize("model", [Net(), Asks()], ids=["without data", "on a copy"])
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_layers_of_a_model(model: torch.nn.Module, converted: bool, set_fp32_precision) -> None:
    set_fp32_precision("tf32")  # which rows serve
    model = copy.deepcopy(model).to(DEVICE)
    if converted:
        fastconv.convert(model)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    explanation = fastconv.explain(model, torch.randn(2, 3, 9, 9).to(DEVICE))
    stem, twice, never, theirs = explanation.layers
    assert [plan.direction for plan in stem.plans] == ["fprop", "wgrad"]
    assert stem.plans[0].problem.describe() == "N2 C3 9x9 -> K8 3x3 stride 2 float32"
    assert [plan.problem.input_size for plan in twice.plans] == [(4, 4)] * 3 + [(2, 2)] * 3
    assert [plan.direction for plan in twice.plans] == ["fprop", "dgrad", "wgrad"] * 2
    assert {plan.family for plan in stem.plans} == {"rows"}
    assert {plan.family for plan in twice.plans} == {"gather"}
    assert (never.plans, never.reason) == ((), None)
    assert (theirs.plans, theirs.reason) == ((), "parametrised: weight")
    assert explanation.left == [("theirs", "parametrised: weight")]
    # And the model is what it was.
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    torch.set_rng_state(random)
    assert type(model.stem) is (nn.Conv2d if converted else torch.nn.Conv2d)


def test_random_numbers_are_not_used_up() -> None:
    x = torch.randn(2, 3, 9, 9, device=DEVICE)
    before = torch.get_rng_state()
    for model in (Net(), Asks()):
        model.to(DEVICE)
        before = torch.get_rng_state()
        fastconv.explain(model, x)
        assert torch.equal(torch.get_rng_state(), before)


def test_only_needed_gradients() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)).to(DEVICE)
    x = torch.randn(1, 3, 7, 7, device=DEVICE)

    def directions() -> list[list[str]]:
        return [[plan.direction for plan in layer.plans] for layer in fastconv.explain(model, x).layers]

    assert directions() == [["fprop", "wgrad"], ["fprop", "dgrad", "wgrad"]]
    model[1].weight.requires_grad_(False)
    assert directions() == [["fprop", "wgrad"], ["fprop", "dgrad"]]
    model.requires_grad_(False)
    assert directions() == [["fprop"], ["fprop"]]
    model.requires_grad_(True)
    with torch.no_grad():
        assert directions() == [["fprop"], ["fprop"]]


def test_autocast() -> None:
    model, x = torch.nn.Conv2d(3, 4, 3).to(DEVICE), torch.randn(1, 3, 7, 7, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        (layer,) = fastconv.explain(model, x).layers
    assert {plan.problem.dtype for plan in layer.plans} == {torch.bfloat16}


@pytest.mark.parametrize("gpu", [A100, H200], ids=lambda gpu: gpu.name)
def test_table_for_a_gpu(gpu) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 128, 3, padding=1), torch.nn.ReLU())
    with use_target(gpu):
        explanation = fastconv.explain(model.bfloat16().to(DEVICE), torch.randn(32, 64, 56, 56).bfloat16().to(DEVICE))
    assert explanation.gpu == gpu.name
    lines = str(explanation).splitlines()
    assert lines[0].split()[:5] == ["pass", "family", "kernel", "tile", "tile"]
    assert lines[1] == "0  Conv2d  N32 C64 56x56 -> K128 3x3 padding 1 bfloat16"
    assert " MB (" in lines[2] and "PyTorch's own operators" in lines[2]
    family = "pixels" if gpu.bulk else "gather"
    assert lines[3].split()[:2] == ["fprop", family] and f" conv_{family}" in lines[3] and " cost model " in lines[3]
    assert " us, bound by " in lines[3]
    assert "depthwise: 64 input channels a group; grouped: one group; row_boxes: " in lines[3]
    assert "; rows: 64 input channels; gemm: " in lines[3]
    wgrad = next(line for line in lines if line.split()[0] == "wgrad")
    assert (" conv_pixels_wgrad" if gpu.bulk else " conv_wgrad") in wgrad
    assert lines[-3:-1] == [f"planned for the {gpu.name}", "1 of 1 convolution layers on fastconv's kernels"]
    assert lines[-1].startswith("they move ")


def test_what_no_kernel_takes_has_its_reason() -> None:
    x = torch.randn(1, 3, 7, 7, device=DEVICE, dtype=torch.float64)
    explanation = fastconv.explain(nn.Conv2d(3, 4, 3, device=DEVICE, dtype=torch.float64), x)
    assert explanation.left == [("", "torch.float64 is not one of float32, float16, bfloat16")]
    assert "torch.float64 is not one of" in str(explanation) and explanation.gpu is None
    groups = 65537  # a prime: no two groups share a tile
    layer = nn.Conv1d(2 * groups, 2 * groups, 1, groups=groups, bias=False, device=DEVICE)
    with fastconv.settings(strict=True):
        explanation = fastconv.explain(layer, torch.randn(1, 2 * groups, 1, device=DEVICE, requires_grad=True))
    (reason,) = [reason for _, reason in explanation.left]
    assert "65537 groups are more than a grid's second axis holds" in reason


def test_a_cpu_without_the_interpreter_is_pytorchs() -> None:
    command = (
        "import torch, fastconv\n"
        "explanation = fastconv.explain(fastconv.convert(torch.nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 5, 5))\n"
        "print(explanation.left)"
    )
    other = "TRITON_INTERPRET", "FASTCONV_DEVICE"
    environment = {name: value for name, value in os.environ.items() if name not in other}
    out = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out == "[('', 'its device is cpu (and TRITON_INTERPRET is not set)')]\n"


def test_a_compiled_model_and_a_lazy_one() -> None:
    x = torch.randn(1, 3, 7, 7, device=DEVICE)
    compiled = torch.compile(torch.nn.Conv2d(3, 4, 3).to(DEVICE), backend="eager")
    assert [len(layer.plans) for layer in fastconv.explain(compiled, x).layers] == [2]
    lazy = torch.nn.Sequential(torch.nn.LazyConv2d(4, 3).to(DEVICE))
    assert [len(layer.plans) for layer in fastconv.explain(lazy, x).layers] == [2]
    assert type(lazy[0]) is torch.nn.LazyConv2d and lazy[0].has_uninitialized_params()


def test_nothing_to_explain() -> None:
    explanation = fastconv.explain(torch.nn.Linear(3, 4), torch.randn(1, 3))
    assert str(explanation) == "nothing to convert: the model has no convolution layers and no pools"


def test_the_models_own_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        fastconv.explain(torch.nn.Conv2d(3, 4, 3), torch.randn(1, 2, 5, 5))
