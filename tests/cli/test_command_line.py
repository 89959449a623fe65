"""What every command shares: help, exit codes, one line for what cannot be done, and starting over without a GPU."""

import os
import subprocess
import sys

import pytest

import fastconv.cli
from fastconv.cli import interpreter, run
from tests.marks import interpreted

# A machine with a GPU refuses other things.


def test_help_lists_the_commands_without_torch() -> None:
    script = (
        "import sys; from fastconv.cli import run; code = run(['--help']); assert code == 0, code;"
        "heavy = {'torch', 'triton', 'matplotlib', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in fastconv.cli.COMMANDS)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], text=True, capture_output=True, timeout=60)


def test_version_needs_neither_torch_nor_typer() -> None:
    code = "import sys; sys.modules['typer'] = sys.modules['torch'] = None; from fastconv.cli import main; main()"
    done = python(code, "--version")
    assert (done.returncode, done.stdout) == (0, f"fastconv {fastconv.__version__}\n"), done.stderr


def test_a_wrong_environment_is_one_line_before_torch_is_imported(tmp_path) -> None:
    lock = {name: tmp_path / f"{name}.json" for name in ("missing", "text", "binary", "newer", "list", "cut")}
    lock["text"].write_text("tiles, please")
    lock["binary"].write_bytes(bytes(range(256)))
    lock["newer"].write_text('{"schema": 99}')
    lock["list"].write_text("[]")
    lock["cut"].write_text('{"schema": 1, "gpu": "NVIDIA H200", "problems": [{"problem"')
    expected = {
        "FASTCONV_STRICT=maybe": "FASTCONV_STRICT must be one of 1, true, yes, on, 0, false, no, off, but is 'maybe'",
        "FASTCONV_TUNE=always": "FASTCONV_TUNE must be one of cached, off, first, force, but is 'always'",
        "FASTCONV_PREFER=cudnn": "FASTCONV_PREFER must be one of fastest, triton, but is 'cudnn'",
        "FASTCONV_NUMERICS=exact": "FASTCONV_NUMERICS must be one of fast, stable, but is 'exact'",
        "FASTCONV_NUMERIC=stable": "the environment variable FASTCONV_NUMERIC means nothing; FASTCONV_NUMERICS does",
        f"FASTCONV_LOCK={lock['missing']}": f"FASTCONV_LOCK: No such file or directory: {lock['missing']}",
        f"FASTCONV_LOCK={tmp_path}": f"FASTCONV_LOCK: Is a directory: {tmp_path}",
        f"FASTCONV_LOCK={lock['text']}": f"FASTCONV_LOCK: {lock['text']}: no JSON: ",
        f"FASTCONV_LOCK={lock['binary']}": f"FASTCONV_LOCK: {lock['binary']}: no JSON: ",
        f"FASTCONV_LOCK={lock['newer']}": f"FASTCONV_LOCK: {lock['newer']}: schema 99",
        f"FASTCONV_LOCK={lock['list']}": f"FASTCONV_LOCK: {lock['list']}.schema: ",
        f"FASTCONV_LOCK={lock['cut']}": f"FASTCONV_LOCK: {lock['cut']}: no JSON: ",
    }
    code = """
import os, sys
sys.modules["torch"] = None
from fastconv.cli import COMMANDS, run
for each in sys.argv[1:]:
    name, value = each.split("=")
    os.environ[name] = value
    for command in COMMANDS:
        assert run([command, "--nothing"]) == 2
    del os.environ[name]
"""
    done = python(code, *expected)
    assert done.returncode == 0, done.stderr
    said = iter(done.stderr.splitlines())
    for variable, line in expected.items():
        for command in fastconv.cli.COMMANDS:
            # What was measured is looked after whatever a lock file is.
            looks = command != "cache" or "FASTCONV_LOCK" not in variable
            assert next(said).startswith(f"fastconv: {line if looks else 'No such option: --nothing'}")
    assert not list(said)


def test_without_triton_each_command_says_so_in_one_sentence() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["torch"] = None
from fastconv.cli import COMMANDS, run
assert all(run([command]) == 2 for command in COMMANDS)
"""
    done = python(code)
    sentence = "fastconv's kernels need Linux and Triton (pip install triton); macOS and Windows have neither"
    assert done.stderr.splitlines() == [f"fastconv: {sentence}"] * len(fastconv.cli.COMMANDS)
    assert done.returncode == 0


@interpreted
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nothing", "No such command"),
        ("bench --nothing", "No such option"),
        ("bench --batch 0", "--batch"),
        ("bench --batch many", "--batch"),
        ("check spare", "spare"),
        ("explain", "--model"),
        ("explain --model resnet18 --dtype int8", "float32, fp32, float16"),
        ("explain --model resnet18 --gpu GTX", "A100, H100, H200, B200"),
        ("bench --show missing.json", "No such file"),
        ("bench --ops dense", "GPU"),
        ("bench --layers resnet50", "GPU"),
        ("bench --blocks", "GPU"),
        ("bench --ops dense,cubic", "--ops 'cubic' is not one of all, dense, pool, depthwise, grouped, first-layer"),
        ("bench --ops dense --provider cudnn", "--provider 'cudnn' is not one of eager, fastconv, fastconv-nchw"),
        ("bench --ops dense --provider fastconv:cubic", "fastconv:gather"),
        ("bench --ops dense --provider eager", "none of fastconv's"),
        ("bench --provider fastconv", "--provider says who runs --ops"),
        ("bench --layers resnt50", "No such file or directory; those there are: alexnet,"),
        ("bench --layers resnet50 --model resnet18", "--layers and --model exclude each other"),
        ("bench --ops dense --size 8", "--size needs --model"),
        ("bench --ops dense --infer", "--train/--infer is about networks"),
        ("bench --blocks --ops dense", "--ops and --blocks exclude each other"),
        ("bench --blocks --layers unet", "--layers and --blocks exclude each other"),
        ("bench --blocks --model resnet18", "--model and --blocks exclude each other"),
        ("bench --seconds 5", "GPU"),
        ("bench --batch 3", "--model"),
        ("bench --infer", "--model"),
        ("bench --dtype int8", "bfloat16"),
        ("bench --model resnt18", "resnet18"),
        ("bench --model tests.cli.nowhere:network", "No module named 'tests.cli.nowhere'"),
        ("bench --model json:nothing", "'json' has no attribute 'nothing'"),
        ("explain --model tests.cli.tiny:netwrk", "has no attribute 'netwrk'; close names: network"),
        ("tune --model tests.cli.tiny:netwrk --budget 1m", "has no attribute 'netwrk'; close names: network"),
        ("tune --model resnt18", "close names: resnet18"),
        ("tune --layers resnt50", "No such file or directory; those there are: alexnet,"),
        ("bench --model json:dumps", "TypeError: dumps()"),
        ("bench --model :", "Empty module name"),
        ("explain --model tests.cli.tiny:large --size 4", "does not run on a batch of 1x3x4x4: RuntimeError"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(line: str, expected: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastconv: ")
    assert error.count("\n") == 1
    assert expected in error
    assert not list(tmp_path.iterdir())


@interpreted
def test_a_model_that_does_not_run_is_bad_usage(tmp_path, capsys) -> None:
    line = ["bench", "--model", "tests.cli.tiny:network", "--size", "1", "--batch", "1", "--out", str(tmp_path)]
    assert run(line) == 2
    error = capsys.readouterr().err
    assert "does not run on a batch of 1x3x1x1: ValueError: Expected more than 1 value per channel" in error
    assert error.count("\n") == 1


@interpreted
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--ops pool --ops grouped --size 5 --model tests.cli.tiny:large", "calls no pool and no grouped operator"),
        ("--ops grouped --layers resnet18", "resnet18 calls no grouped operator"),
        ("--ops dense --model resnt18", "resnet18"),
        ("--model resnt18", "resnet18"),
    ],
)
def test_what_is_missed_leaves_an_earlier_result_as_it_is(line: str, expected: str, tmp_path, capsys) -> None:
    (tmp_path / "bench.json").write_text("an earlier run's")
    assert run(["bench", "--dry-run", *line.split(), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.err.count("\n") == 1 and not said.out
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("bench.json", "an earlier run's")]


@interpreted
def test_a_layer_list_that_is_none_is_bad_usage(tmp_path, capsys) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"schema": "fastconv-layers/1", "network": "mine", "image": [3, 8, 8]}\n{"count": 1, "funktion": 2}\n'
    )
    assert run(["bench", "--dry-run", "--layers", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 2, field function: None is not one of" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@interpreted
def test_an_out_that_is_a_file_is_bad_usage(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    assert run(["bench", "--dry-run", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_without_typer_the_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(fastconv.cli, "find_spec", lambda name: None)
    assert run(["bench"]) == 2
    assert capsys.readouterr().err == "fastconv: the commands need typer and rich: pip install 'fastconv[cli]'\n"


class Restarted(Exception):
    """What stands for the process that ``execve`` ends."""


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    seen: list[tuple[list[str], dict[str, str]]] = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert path == sys.executable
        seen.append((arguments, environment))
        raise Restarted

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv(interpreter.SWITCH, raising=False)
    monkeypatch.setattr(interpreter, "gpu_present", lambda: False)
    return seen


@pytest.mark.parametrize("command", fastconv.cli.NUMERIC)
def test_without_a_gpu_the_console_entry_starts_over_interpreted(command: str, restarts: list, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastconv", command, "--quick"])
    with pytest.raises(Restarted):
        fastconv.cli.main()
    ((arguments, environment),) = restarts
    assert arguments == [sys.executable, *sys.orig_argv[1:]]
    assert environment == {**os.environ, interpreter.SWITCH: "1"}


@pytest.mark.parametrize("switch", ["0", "1"])
def test_whoever_set_the_switch_is_not_restarted(switch: str, restarts: list, monkeypatch) -> None:
    monkeypatch.setenv(interpreter.SWITCH, switch)
    interpreter.enter_interpreter()
    assert not restarts


def test_with_a_gpu_nothing_is_restarted(restarts: list, monkeypatch) -> None:
    monkeypatch.setattr(interpreter, "gpu_present", lambda: True)
    interpreter.enter_interpreter()
    assert not restarts


def test_help_is_not_restarted(restarts: list, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastconv", "bench", "--help"])
    with pytest.raises(SystemExit) as exit_code:
        fastconv.cli.main()
    assert exit_code.value.code == 0
    assert not restarts


def test_a_driver_counts_only_under_a_torch_built_for_it(monkeypatch) -> None:
    monkeypatch.setattr(interpreter, "_driver_devices", lambda: 2)
    for built, expected in ((False, False), (True, True)):
        monkeypatch.setattr(interpreter, "_torch_has_cuda", lambda built=built: built)
        assert interpreter.gpu_present() is expected


def test_torch_is_asked_for_cuda_without_being_imported() -> None:
    script = (
        "import sys; from fastconv.cli import interpreter; has = interpreter._torch_has_cuda();"
        "assert 'torch' not in sys.modules; import torch; assert has == (torch.version.cuda is not None)"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


@interpreted
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_explain_says_what_is_fused_and_what_moves(train: bool, capsys) -> None:
    line = "explain --model tests.cli.tiny:network --batch 2 --size 16 --gpu H200 --dtype float32"
    assert run([*line.split(), *["--train"] * train]) == 0
    lines = capsys.readouterr().out.splitlines()
    form = "statistics from the convolution, one pass" if train else "one kernel"
    assert lines[1] == "0 + 1 + 2  Conv2d  N2 C3 16x16 -> K8 3x3 stride 2 padding 1 float32"
    assert lines[2].startswith(f"  {form}: ")
    passes = [line.split()[0] for line in lines if line.startswith("  ") and " cost model " in line]
    assert passes == (
        ["fprop,", "apply", "sums", "gradient", "wgrad", "fprop", "dgrad", "wgrad", "bias", "forward", "backward"]
        if train
        else ["fprop", "fprop", "forward"]
    )
    assert lines[-3:-1] == [
        "planned for the NVIDIA H200",
        "2 of 2 convolution layers and 1 of 1 pools on fastconv's kernels, 1 of 1 batch norms fused into them",
    ]
    assert (" backward)" in lines[-1]) == train
