"""Triton kernels and their launchers: tensors in, tensors out, no autograd. Import as ``fastconv.kernels``.

The map, from top to bottom; each folder imports only what stands below it:

    ops/       operators on tensors: check, plan, allocate, launch      compile/  kernels compiled before their launch
    dispatch   which family serves a call: one ordered list for each direction
    families/  one file a family: its code, launches, tiles, and why it does not serve (drawings: families/README.md)
    jit/       device code that families share
    tiles/     search spaces, and the way to ``fastconv.autotune``
    launch/    one launch, tensor descriptors, Triton's interpreter
    problem/   what a call is, and how its tensors lie

The vocabulary:

    N D H W C  images, depth, height, width, channels of the operand that a kernel gathers from (C: reduced)
    O P Q K    depth, height, width, channels of what it produces
    T R S      taps of a filter, or of a window
    fprop, dgrad, wgrad        a convolution's directions; a transposed convolution is a dgrad
    direction of a pool        "forward", "backward"
    tile       what one program computes; its sides are the BLOCK_* of a config
    config     a tile with its warps and stages; a space is the configs that a family may be launched with
    step       one turn of the loop over a reduction
    split      a share of a reduction that a program of its own sums; partial sums are fp32
    phase      pixels whose index has one remainder by the stride: they meet the same taps
    run        neighbours in memory; a row of a filter meets one
    box        what one bulk copy moves
    pack       neighbouring groups of a convolution in one tile
    VEC        elements of one 16-byte access

CONTRIBUTING.md says how to add an operator, a family, a search space or an activation.
"""

from importlib.util import find_spec

if __name__ != "fastconv.kernels":
    raise ImportError(f"import 'fastconv.kernels', not {__name__!r}: the folder is part of the fastconv package")
# They are sought and not imported, because some of what lies here needs neither.
if find_spec("triton") is None or find_spec("fcntl") is None:
    raise ImportError("fastconv's kernels need Linux and Triton (pip install triton); macOS and Windows have neither")
