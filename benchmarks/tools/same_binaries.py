"""Whether two commits compile to the same binaries: ``make same-binaries BASE=<commit>``.

A refactoring of kernels or of the launch path must not change them. Each commit is checked out beside this one. There
``fastconv.warmup`` compiles what five networks launch in inference and in training, into a Triton cache of the commit,
and every binary is disassembled. Two are the same if their instructions, registers, stack and shared memory are;
names, line numbers and places of arguments may differ. A commit's binaries are kept under ``out/binaries``. Ten to
twenty minutes a commit on two cores.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ("resnet50", "vgg16", "efficientnet_b0", "mobilenet_v2", "convnext_tiny")
BATCHES = (32, 256)
DTYPES = ("bfloat16", "float32")
GPUS = ("A100", "H200", "B200")
LINES = 12  # of a difference that are shown


class Binary(NamedTuple):
    """``resources``: registers, stack and shared memory, as cuobjdump prints them."""

    arch: int
    kernel: str
    resources: str
    instructions: str

    @property
    def same(self) -> tuple[int, str, str]:
        """What two binaries that are the same have in common."""
        return self.arch, self.resources, self.instructions

    @property
    def alike(self) -> tuple[int, str, str, tuple[str, ...]]:
        """What is the same whenever a kernel is compiled: ptxas numbers registers of sm_100 and orders instructions
        differently from one run to the next."""
        masked = sorted(re.sub(r"\b(U?[RP])\d+", r"\1", line) for line in self.instructions.splitlines())
        return self.arch, self.kernel, self.resources, tuple(masked)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit before")
    parser.add_argument("--head", default="HEAD", help="the commit after (default: HEAD)")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="torchvision's names")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--gpus", nargs="+", default=GPUS)
    options = parser.parse_args(arguments)
    what = {"networks": options.networks, "batches": options.batches, "gpus": options.gpus}
    before, after = (binaries_of(_git("rev-parse", commit), what) for commit in (options.base, options.head))
    print(text := compared(before, after))
    return int("differ" in text)


def binaries_of(commit: str, what: dict[str, Any]) -> list[Binary]:
    """What the networks launch at ``commit``, compiled, or kept from before."""
    import triton

    name = "-".join((commit[:12], triton.__version__, *what["networks"], *map(str, what["batches"]), *what["gpus"]))
    kept = ROOT / "out" / "binaries" / f"{name}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as place:
            tree, cache = Path(place, "tree"), Path(place, "cache")
            _git("worktree", "add", "--detach", str(tree), commit)
            try:
                environment = {**os.environ, "PYTHONPATH": str(tree), "TRITON_CACHE_DIR": str(cache)}
                environment |= {"FASTCONV_CACHE_DIR": place, "FASTCONV_TUNE": "off"}
                environment.pop("TRITON_INTERPRET", None)
                command = [sys.executable, str(Path(__file__).resolve()), "--compile", json.dumps(what)]
                print(f"{commit[:12]}:", flush=True)
                subprocess.run(command, cwd=tree, env=environment, check=True)
                found = disassembled(sorted(cache.glob("*/*.cubin")))
            finally:
                _git("worktree", "remove", "--force", str(tree))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return [Binary(*each) for each in json.loads(kept.read_text())]


def compile_all(networks: Iterable[str], batches: Iterable[int], gpus: Sequence[str]) -> None:
    """Compile what the networks launch, with the fastconv that is imported here, into Triton's cache."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # a CPU build of PyTorch lacks its operators
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    import fastconv

    for network in networks:
        with torch.device("meta"):
            empty = torchvision.models.get_model(network, weights=None)
        for dtype in DTYPES:
            model = empty.to_empty(device="cpu").to(getattr(torch, dtype))
            fastconv.convert(model, memory_format=torch.channels_last)
            for batch in batches:
                x = torch.empty((batch, 3, 224, 224), dtype=getattr(torch, dtype))
                x = x.contiguous(memory_format=torch.channels_last)
                for train in (False, True):
                    made = [fastconv.warmup(model, x, train=train, gpu=gpu) for gpu in gpus]
                    how = f"{network} {dtype} batch {batch} {'training' if train else 'inference'}"
                    counts = ", ".join(f"{gpu} {it.kernels}" for gpu, it in zip(gpus, made, strict=True))
                    print(f"  {how}: {counts} ({sum(it.compiled for it in made)} new)", flush=True)


def disassembled(cubins: Sequence[Path]) -> list[Binary]:
    from triton import knobs

    def one(cubin: Path) -> Binary:
        metadata = json.loads(cubin.with_suffix(".json").read_text())
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return Binary(metadata["target"]["arch"], metadata["name"], *read(listing))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sorted(set(pool.map(one, cubins)))


def read(listing: str) -> tuple[str, str]:
    """(resources, instructions) of cuobjdump's listing, without encodings, names and the places of arguments."""
    resources = re.search(r"REG:\d+ STACK:\d+ SHARED:\d+", listing)
    if resources is None:
        raise ValueError("cuobjdump's listing has no line of registers")
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+([^;]+);", listing, re.MULTILINE)
    text = "\n".join(" ".join(line.split()) for line in found)
    text = re.sub(r"c\[0x[0-9a-f]+\]\[(\w+\+)?0x[0-9a-f]+\]", r"c[][\1]", text)
    return resources.group(), re.sub(r"`\([^)]*\)", "`()", text)


def compared(before: Sequence[Binary], after: Sequence[Binary]) -> str:
    """What differs, kernel by kernel, and a last line."""
    ours = {each.same for each in before}, {each.same for each in after}
    gone_all = [each for each in before if each.same not in ours[1]]
    new_all = [each for each in after if each.same not in ours[0]]
    alike = {each.alike for each in gone_all} & {each.alike for each in new_all}
    gone, new = (_by_kernel(each for each in these if each.alike not in alike) for these in (gone_all, new_all))
    lines: list[str] = []
    for key in sorted({*gone, *new}):
        arch, kernel = key
        lines.append(f"sm_{arch} {kernel}: {len(gone[key])} before, {len(new[key])} after, that the other has not")
        if gone[key] and new[key]:
            lines += _difference(gone[key][0], new[key][0])
    permuted = sum(each.alike in alike for each in gone_all)
    note = f", {permuted} but for the numbers of registers and the order of instructions" if permuted else ""
    if not lines:
        return f"{len(ours[0])} binaries, all the same{note}"
    count = sum(map(len, gone.values())), sum(map(len, new.values()))
    return "\n".join(
        (*lines, f"{count[0]} of {len(ours[0])} binaries before and {count[1]} of {len(ours[1])} after differ")
    )


def _by_kernel(binaries: Iterable[Binary]) -> defaultdict[tuple[int, str], list[Binary]]:
    found: defaultdict[tuple[int, str], list[Binary]] = defaultdict(list)
    for each in binaries:
        found[each.arch, each.kernel].append(each)
    return found


def _difference(before: Binary, after: Binary) -> list[str]:
    """The first lines that differ."""
    old, new = ([each.resources, *each.instructions.splitlines()] for each in (before, after))
    changed = [line for line in difflib.unified_diff(old, new, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")]
    more = [f"    and {len(changed) - LINES} more lines"] if len(changed) > LINES else []
    return [f"    {line}" for line in changed[:LINES]] + more


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_all(**json.loads(sys.argv[2]))
    else:
        sys.exit(main())
