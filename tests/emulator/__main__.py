"""``python -m tests.emulator --gpu H200 script.py ...``: a script whose CPU tensors emulated kernels serve."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys

from tests.emulator.driver import EMULATED


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.emulator", description=__doc__)
    parser.add_argument("--gpu", default="H200", choices=EMULATED)
    parser.add_argument("--early", action="store_true", help="asynchronous copies and products happen at once")
    parser.add_argument("--no-races", action="store_true", help="do not look for races in shared memory")
    parser.add_argument("--poison", action="store_true", help="fill new tensors with NaN")
    parser.add_argument("--counters", action="store_true", help="print what each launch did, a line of JSON each")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    words = [word for word in ("early", "no-races", "poison", "counters") if getattr(given, word.replace("-", "_"))]
    os.environ["FASTCONV_DEVICE"] = ",".join(["tests.emulator:" + given.gpu, *words])
    import fastconv.kernels.launch.device  # noqa: F401  # which makes the emulated GPU
    from tests import emulator

    sys.argv = [given.script, *given.arguments]
    try:
        runpy.run_path(given.script, run_name="__main__")
    finally:
        for launch in emulator.launches() if given.counters else ():
            row = {"kernel": launch.name, "grid": launch.grid, "threads": launch.threads, "shared": launch.shared}
            print(json.dumps(row | (launch.counters or {})))


if __name__ == "__main__":
    main()
