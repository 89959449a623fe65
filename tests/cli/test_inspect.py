"""What a kernel's binary is on a GPU that is not here, as a command: one line for bad usage, tables, JSON, a plot."""

import dataclasses
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from fastconv.autotune import Choice, Gpu
from fastconv.autotune.gpus import A100, B200, H200, RTX5090
from fastconv.cli import inspect_operator, interpreter, run
from fastconv.cli.errors import BadUsage
from fastconv.cli.inspect import draw
from fastconv.cli.inspect_operator import Considered, Fused, Inspected, _best, _passes
from fastconv.cli.inspect_operator import OperatorCall as Call
from fastconv.kernels import families
from fastconv.kernels.families.conv_gather import GATHER
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.traffic import OperatorPass
from tests.marks import compiling

interpreted = pytest.mark.skipif(not interpreting(), reason="what only the interpreter's process refuses")
CONV = "inspect conv2d --input 2x64x8x8 --weight 32x64x3x3"
# Rows of outputs that no two share: odd ones.
PIXELS = "inspect conv2d --input 64x64x9x9 --weight 64x64x3x3 --padding 1 --family pixels --gpu h200"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("inspect conv4d", "'conv4d' is not one of conv1d, conv2d"),
        ("inspect conv2d --weight 8x8x3x3", "conv2d needs --input"),
        ("inspect conv2d --input 2x8x8x8", "conv2d needs --weight"),
        ("inspect max_pool2d --input 2x8x8x8", "max_pool2d needs --kernel-size"),
        ("inspect adaptive_avg_pool2d --input 2x8x8x8 --kernel-size 2", "adaptive_avg_pool2d needs --output-size"),
        ("inspect max_pool2d --input 2x8x8x8 --kernel-size 2 --bn", "max_pool2d takes no --bn"),
        ("inspect conv2d --input 2x8x8 --weight 8x8x3x3 --kernel-size 2", "conv2d takes no --kernel-size"),
        ("inspect lp_pool2d --input 2x8x8x8 --kernel-size 2 --padding 1", "lp_pool2d takes no --padding"),
        ("inspect lp_pool2d --input 2x8x8x8 --kernel-size 2 --norm-type 0", "norm_type must not be zero"),
        ("inspect avg_pool2d --input 2x8x8x8 --kernel-size 2 --return-indices", "avg_pool2d takes no --return-indices"),
        ("inspect conv2d --input 2xCx8x8 --weight 8x8x3x3", "--input '2xCx8x8': numbers with an x"),
        ("inspect conv2d --input 2x8x8x8 --weight 8x3x3x3", "to have 3 channels, but got 8 channels"),
        ("inspect max_pool2d --input 2x8x8x8 --kernel-size 3 --padding 2", "pad should be at most half"),
        (f"{CONV} --gpu GTX", "--gpu 'GTX' is not one of A100"),
        (f"{CONV} --dtype int8", "--dtype 'int8'"),
        (f"{CONV} --precision ieee", "--precision is of float32's products, not of bfloat16's"),
        (f"{CONV} --precision fp8 --dtype float32", "--precision 'fp8' is not one of tf32, ieee"),
        (f"{CONV} --direction up", "--direction 'up' is not one of fprop, dgrad, wgrad"),
        (f"{CONV} --family cubic", "no family 'cubic' among"),
        (f"{CONV} --family rows --direction fprop", "no kernel serves fprop: rows: 64 input channels"),
        (f"{CONV} --config BLOCK_M=128", "add --direction, one of fprop, dgrad, wgrad"),
        (
            f"{CONV} --direction fprop --config BLOCK_X=64",
            "no parameter BLOCK_X in conv_spatial, which has SPLITS of 1, 2",
        ),
        (f"{CONV} --direction fprop --config BLOCK_M", "'BLOCK_M' is no parameter with a number"),
        (f"{CONV} --direction fprop --config BLOCK_M=48", "BLOCK_M=48: a tensor's side, which has to be a power of"),
        (f"{CONV} --direction fprop --config SPLITS=0", "SPLITS=0: not at least 1"),
        (f"{PIXELS} --direction fprop --config PAIRS=2,PIXELS=1", "the kernel takes no such tile for this problem"),
        (f"{PIXELS} --direction fprop --config PAIRS=3,PIXELS=2", "the kernel takes no such tile for this problem"),
        (
            f"{PIXELS} --direction wgrad --config COLUMNS=2,TAPS=2",
            "COLUMNS=2,num_warps=8,num_stages=4,SPLITS=12: the kernel takes no such tile",
        ),
        (
            f"{CONV} --family gather --direction fprop --config BLOCK_M=4096",
            "BLOCK_M=4096 does not fit a multiprocessor",
        ),
        (f"{CONV} --direction fprop --config BLOCK_M=64 --compare BLOCK_M=64 BLOCK_M=128", "exclude each other"),
        (
            "inspect max_pool2d --input 2x8x8x8 --kernel-size 2 --return-indices --direction indices --config LINES=1",
            "indices has no tile of its own",
        ),
        (f"{CONV} --act relu", "--act is fused behind batch norm: add --bn or --statistics"),
        (f"{CONV} --bn --act cubic", "activation 'cubic' has no fused form"),
        (f"{CONV} --bn --statistics", "--bn and --statistics exclude each other"),
        (f"{CONV} --plot space.txt", "not a file of .png, .svg, .pdf"),
        (f"{CONV} --plot nowhere/space.png", "no such folder"),
        (f"{CONV} --quick", "--quick is of the report without an operator"),
        ("inspect --sass", "--sass says something of an operator"),
        ("inspect --gpu GTX", "--gpu 'GTX' is not one of A100"),
    ],
)
def test_bad_usage_is_one_line_and_nothing_is_done(line: str, expected: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspect_operator, "compile_all", pytest.fail)
    assert run(line.split()) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n"), error.startswith("fastconv: ")) == ("", 1, True)
    assert expected in error
    assert not list(tmp_path.iterdir())


@interpreted
@pytest.mark.parametrize("line", ["inspect", CONV])
def test_the_interpreter_is_refused_in_one_line(line: str, capsys) -> None:
    assert run(line.split()) == 2
    assert capsys.readouterr().err == "fastconv: TRITON_INTERPRET is set: kernels cannot be compiled in this process\n"


def test_the_console_entry_leaves_the_interpreter(monkeypatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, environment: seen.append(environment))
    monkeypatch.setenv(interpreter.SWITCH, "1")
    interpreter.leave_interpreter()
    assert len(seen) == 1 and interpreter.SWITCH not in seen[0]
    monkeypatch.delenv(interpreter.SWITCH)
    interpreter.leave_interpreter()
    assert len(seen) == 1


def conv(fused: Fused | None = None, gradients: bool = True) -> Call:
    arguments = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 1}
    shapes = (4, 64, 16, 16), (32, 64, 3, 3)
    return Call("conv2d", *shapes, arguments, torch.bfloat16, fused=fused, gradients=gradients)


def names(call: Call, direction: str | None = None) -> list[str]:
    return [found.name for found, _ in _passes(call, H200, None, direction, None)]


def test_passes_are_those_of_a_call() -> None:
    assert names(conv()) == ["fprop", "dgrad", "wgrad"]
    assert names(conv(gradients=False)) == ["fprop"]
    assert names(conv(Fused(False, "relu", True), False)) == ["fprop"]
    assert names(conv(Fused(True, "relu", True))) == [
        "fprop, statistics",
        "apply",
        "sums",
        "gradient",
        "dgrad",
        "wgrad",
    ]
    assert names(conv(Fused(True, None, False)), "fprop") == ["fprop, statistics"]
    pool = Call("max_pool2d", (2, 8, 8, 8), None, {"kernel_size": (3,), "stride": (2,), "padding": (1,)}, torch.float16)
    assert names(pool) == ["forward", "backward"]
    indexed = dataclasses.replace(pool, arguments={**pool.arguments, "return_indices": True})
    assert names(indexed) == ["forward", "indices", "backward"]
    assert [it is None for _, it in _passes(indexed, H200, None, None, None)] == [False, True, False]
    norm = Call("lp_pool1d", (2, 8, 9), None, {"norm_type": 3.0, "kernel_size": 2}, torch.bfloat16)
    # Its backward computes the norms again.
    assert names(norm) == ["forward", "forward", "backward"]
    bytes_moved = [tensors * 8 * 13 * 2 for tensors in (2, 2, 4)]
    for (found, it), moved in zip(_passes(norm, H200, None, None, None), bytes_moved, strict=True):
        assert it is not None and it.work(it.choice.config).dram_bytes == found.bytes == moved
    transposed = Call("conv_transpose1d", (2, 8, 9), (8, 4, 3), {"stride": (2,), "groups": 2}, torch.float32, bias=True)
    assert names(transposed) == ["dgrad", "fprop", "wgrad", "bias"]


# 1x1, few outputs, few images, many, first layer, channels that no copy begins at, depthwise; windows of shares, of
# whole images, that do not overlap.
FIRST = (16, 3, 64, 64), (32, 3, 7, 7)
CONVOLUTIONS = (
    ((64, 64, 28, 28), (128, 64, 1, 1), {}),
    ((1, 512, 7, 7), (512, 512, 3, 3), {"padding": "same"}),
    ((2, 32, 16, 16, 16), (32, 32, 3, 3, 3), {"padding": 1}),
    ((64, 64, 14, 14), (64, 64, 3, 3), {"padding": 1}),
    (*FIRST, {"stride": 2}),
    ((16, 63, 14, 14), (64, 63, 3, 3), {}),
    ((16, 64, 14, 14), (64, 1, 3, 3), {"groups": 64}),
)
POOLS = (
    ("adaptive_max_pool2d", (2, 64, 56, 56), {"output_size": 3, "return_indices": True}),
    ("adaptive_max_pool2d", (2, 64, 112, 112), {"output_size": 1}),
    ("avg_pool3d", (2, 64, 8, 8, 8), {"kernel_size": 2, "count_include_pad": False}),
)


def of_calls() -> Iterator[Call]:
    """Calls that take every kernel between them."""
    for x, w, arguments in CONVOLUTIONS:
        everything = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **arguments}
        for fused in (None, Fused(True, "prelu", True)):
            yield Call(f"conv{len(x) - 2}d", x, w, everything, torch.bfloat16, True, fused)
    for operator, x, arguments in POOLS:
        yield Call(operator, x, None, arguments, torch.bfloat16)


@pytest.mark.parametrize("gpu", [A100, H200, B200, RTX5090], ids=lambda gpu: gpu.name)
def test_every_kernel_is_of_some_call(gpu: Gpu) -> None:
    passes = [passed for call in of_calls() for passed, _ in _passes(call, gpu, None, None, None)]
    if gpu.bulk:
        first = Call("conv2d", *FIRST, {"stride": 2}, torch.bfloat16)  # either of two families, by the predicted times
        for family in ("rows", "row_boxes"):
            passes += [passed for passed, _ in _passes(first, gpu, family, "fprop", None)]
    found = {record.name for passed in passes for record in passed.launches}
    modules = [import_module(f"{families.__name__}.{it.name}") for it in pkgutil.iter_modules(families.__path__)]
    everything = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    bulk = ("pixels", "pixels_wgrad", "gemm", "gemm_wgrad", "spatial", "row_boxes")
    assert everything - found == (set() if gpu.bulk else {f"conv_{name}_kernel" for name in bulk})


def considered() -> tuple[OperatorPass, Considered]:
    ((found, it),) = _passes(conv(), H200, "gather", "dgrad", {"BLOCK_K": 32, "num_warps": 4})
    assert it is not None
    return found, it


def test_a_config_is_completed_by_the_best_that_is_predicted() -> None:
    found, it = considered()
    assert found.choice is it.choice and it.choice.source == "the command line"
    assert (it.choice.config["BLOCK_K"], it.choice.config["num_warps"]) == (32, 4)
    constants = found.launches[0].launch.constants
    assert {constants[name] for name in ("BLOCK_K",)} == {32} and constants["BLOCK_M"] == it.choice.config["BLOCK_M"]
    same = [(s, c) for c, s, why in it.each_config(H200) if s and c["BLOCK_K"] == 32 and c["num_warps"] == 4]
    assert it.choice.seconds == min(s for s, _ in same)


def test_every_combination_says_what_is_predicted_or_why_not() -> None:
    _, it = considered()
    configs = list(it.each_config(A100))
    combinations = 1
    for values in it.space.ranges.values():
        combinations *= len(values)
    assert len(configs) == combinations
    assert all((seconds is None) == (why is not None) for _, seconds, why in configs)
    assert {why for _, _, why in configs if why} >= {"copies in flight for another step size"}


def test_values_outside_the_space_are_tried_where_they_fit() -> None:
    _, it = considered()
    choice = _best(it.space, it.work, H200, {"num_stages": 2})
    assert isinstance(choice, Choice) and choice.config["num_stages"] == 2
    with pytest.raises(BadUsage, match="does not fit a multiprocessor of the NVIDIA A100"):
        _best(GATHER, it.work, A100, {"num_stages": 1024})


@pytest.mark.parametrize(
    ("family", "direction", "config"),
    [
        ("pixels", "wgrad", {"TAPS": 3, "SPLITS": 3}),
        ("pixels", "wgrad", {"TAPS": 2, "COLUMNS": 1, "SPLITS": 1}),
        ("pixels", "fprop", {"PAIRS": 0}),
        ("pixels", "fprop", {"PAIRS": 3, "PIXELS": 1}),
        ("gather", "dgrad", {"SPLITS": 3}),
        ("depthwise", "fprop", {"OUTPUTS": 5}),
        ("depthwise", "wgrad", {"ROWS": 3, "OUTPUTS": 3}),
    ],
)
def test_counts_are_whatever_a_kernel_takes(family: str, direction: str, config: dict[str, int]) -> None:
    channels, groups = (1, 64) if family == "depthwise" else (64, 1)
    arguments = {"stride": 1, "padding": 1, "dilation": 1, "groups": groups}
    call = Call("conv2d", (64, 64, 14, 14), (64, channels, 3, 3), arguments, torch.bfloat16)
    ((found, it),) = _passes(call, H200, family, direction, config)
    assert it is not None and config.items() <= it.choice.config.items()
    launch = found.launches[0].launch
    assert all(launch.constants[name] == config[name] for name in launch.constants.keys() & config.keys())
    assert len(found.launches) == 1 + (it.choice.config.get("SPLITS", 1) > 1)


def test_float32_is_inspected_at_either_precision() -> None:
    call = dataclasses.replace(conv(gradients=False), dtype=torch.float32)
    for precision in ("tf32", "ieee"):
        ((found, _),) = _passes(dataclasses.replace(call, precision=precision), A100, None, None, None)
        assert found.launches[0].launch.constants["PRECISION"] == precision


def test_a_plot_names_every_tile_and_marks_those_compared(tmp_path) -> None:
    call = Call("conv2d", (64, 64, 9, 9), (64, 64, 3, 3), {"padding": 1}, torch.bfloat16)
    found = [
        [Inspected(passed, it, (), H200, "tf32") for passed, it in _passes(call, H200, "pixels", "fprop", config)]
        for config in ({"PAIRS": 0}, {"BLOCK_K": 32})
    ]
    draw(found, ("A", "B"), tmp_path / "space.svg")
    words = re.findall("<!-- (.*) -->", (tmp_path / "space.svg").read_text())
    (_, it), *_ = _passes(call, H200, "pixels", "fprop", None)
    assert it is not None
    sides = [
        [config[name] for name in ("BLOCK_N", "BLOCK_C", "PIXELS", "PAIRS")] for config, *_ in it.each_config(H200)
    ]
    tiles = [word for word in words if re.match(r"N\d+ K64 C\d+", word)]
    assert len(tiles) == len(set(tiles)) == len(set(map(tuple, sides)))
    assert {"A", "B", "roofline", "N64 K64 C32 PAIRS3"} <= set(words) and any("K32" in word for word in words)


@pytest.mark.compile
@compiling
def test_json_has_what_the_tables_show(tmp_path, capsys) -> None:
    line = (
        "inspect conv2d --input 64x64x28x28 --weight 64x64x3x3 --padding 1 --direction fprop --gpu h200 "
        "--family gather --bn --act relu"
    )
    compare = ["--compare", "BLOCK_M=128,BLOCK_K=64", "BLOCK_M=64,num_stages=2"]
    assert run([*line.split(), *compare, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["passes"]
    assert (first["pass"], first["family"], first["target"]) == ("fprop", "gather", "NVIDIA H200")
    assert first["config"]["BLOCK_M"] == 128 and first["outside_space"] is None
    assert second["config"]["num_stages"] == 2 and second["outside_space"] == "num_stages outside its values"
    assert first["flops"] == 2 * 64 * 28 * 28 * 64 * 64 * 9
    assert 0 < first["roofline"]["seconds"] < first["predicted"]["seconds"]
    assert first["predicted"]["bound"] in ("matrix", "L2", "DRAM", "latency")
    (launch,) = first["launches"]
    assert (launch["tensor_cores"], launch["spills"], launch["wgmma_waits"]) == ("wgmma", 0, [1])
    assert sum(launch["mix"].values()) > launch["step_instructions"] == sum(launch["step_mix"].values())
    assert "sass" not in launch
    plot = tmp_path / "space.svg"
    assert run([*line.split(), *compare, "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    for words in ("A conv_gather", "B conv_gather", "registers a thread", "copies in flight", "roofline", "predicted"):
        assert words in shown
    assert "roofline" in plot.read_text() and "copies in flight for another step size" in plot.read_text()
    assert run([*line.split(), "--config", "BLOCK_M=128,BLOCK_K=64", "--sass", "--ttgir"]) == 0
    listing = capsys.readouterr().out
    assert "// conv_gather_kernel, fprop, NVIDIA H200, sass" in listing and "HGMMA" in listing
    assert "ttg.async_wait" in listing and "registers a thread" not in listing


@pytest.mark.compile
def test_the_report_is_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastconv", "inspect", "--json", "--quick", "--gpu", "sm_80"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["kernels"]
    assert {row["target"] for row in rows} == {"NVIDIA A100"}
    assert {row["direction"] for row in rows} == {"fprop", "dgrad", "wgrad", "bias gradient"}
