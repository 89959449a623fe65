"""What the cost model knows of each GPU: published figures with their source, else the device is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

EMULATED = " emulated"  # what an emulator's name ends with


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are peaks without sparsity; the cost model discounts them."""

    name: str
    arch: int  # compute capability, 90 for 9.0; 0 for Triton's interpreter
    multiprocessors: int
    shared_memory: int  # bytes that one program may use
    l2_bytes: int
    bandwidth: float  # DRAM, bytes a second
    l2_bandwidth: float  # bytes a second; an estimate until measured
    matrix_rate: float  # fp16 and bf16 FLOP a second; tf32 runs at half of it
    vector_rate: float  # fp32 FLOP a second outside the tensor cores
    source: str
    threads: int = 2048  # a multiprocessor

    @property
    def interpreted(self) -> bool:
        return self.arch == 0

    @property
    def emulated(self) -> bool:
        """Whether it is an emulator of a GPU, whose times mean nothing."""
        return self.name.endswith(EMULATED)

    @property
    def wgmma(self) -> bool:
        return 90 <= self.arch < 100

    @property
    def tcgen05(self) -> bool:
        return 100 <= self.arch < 120

    @property
    def bulk(self) -> bool:
        """Whether its tensor cores read from shared memory what bulk tensor copies bring. Those of compute capability
        12.0, which has the copies too, read registers."""
        return self.wgmma or self.tcgen05


A100 = Gpu(
    name="NVIDIA A100",
    arch=80,
    multiprocessors=108,
    shared_memory=163 << 10,
    l2_bytes=40 << 20,
    bandwidth=2.04e12,
    l2_bandwidth=4.0e12,
    matrix_rate=312e12,
    vector_rate=19.5e12,
    source="NVIDIA A100 Tensor Core GPU datasheet (80 GB SXM); CUDA C++ Programming Guide, compute capabilities",
)
H100 = Gpu(
    name="NVIDIA H100",
    arch=90,
    multiprocessors=132,
    shared_memory=227 << 10,
    l2_bytes=50 << 20,
    bandwidth=3.35e12,
    l2_bandwidth=5.5e12,
    matrix_rate=989e12,
    vector_rate=67e12,
    source="NVIDIA H100 Tensor Core GPU datasheet (SXM5); CUDA C++ Programming Guide, compute capabilities",
)
H200 = replace(H100, name="NVIDIA H200", bandwidth=4.8e12, source="NVIDIA H200 Tensor Core GPU datasheet (SXM)")
B200 = Gpu(
    name="NVIDIA B200",
    arch=100,
    multiprocessors=148,
    shared_memory=227 << 10,
    l2_bytes=126 << 20,
    bandwidth=8.0e12,
    l2_bandwidth=10e12,
    matrix_rate=2250e12,
    vector_rate=75e12,
    source="NVIDIA DGX B200 datasheet; CUDA C++ Programming Guide, compute capabilities",
)
# The L2 bandwidth of the GPUs below is not published: estimated as 20 bytes a clock and multiprocessor, about A100's.
L4 = Gpu(
    name="NVIDIA L4",
    arch=89,
    multiprocessors=58,
    shared_memory=99 << 10,
    l2_bytes=48 << 20,
    bandwidth=0.3e12,
    l2_bandwidth=2.4e12,
    matrix_rate=121e12,
    vector_rate=30.3e12,
    source="NVIDIA L4 Tensor Core GPU datasheet; NVIDIA Ada GPU Architecture whitepaper; CUDA C++ Programming Guide",
    threads=1536,
)
L40S = Gpu(
    name="NVIDIA L40S",
    arch=89,
    multiprocessors=142,
    shared_memory=99 << 10,
    l2_bytes=96 << 20,
    bandwidth=0.864e12,
    l2_bandwidth=7.2e12,
    matrix_rate=362e12,
    vector_rate=91.6e12,
    source="NVIDIA L40S datasheet; NVIDIA Ada GPU Architecture whitepaper; CUDA C++ Programming Guide",
    threads=1536,
)
# GeForce runs fp16 and bf16 products with fp32 sums at half the rate of those with fp16 sums.
RTX3090 = Gpu(
    name="NVIDIA GeForce RTX 3090",
    arch=86,
    multiprocessors=82,
    shared_memory=99 << 10,
    l2_bytes=6 << 20,
    bandwidth=0.936e12,
    l2_bandwidth=2.8e12,
    matrix_rate=71e12,
    vector_rate=35.6e12,
    source="NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix; CUDA C++ Programming Guide",
    threads=1536,
)
RTX4090 = Gpu(
    name="NVIDIA GeForce RTX 4090",
    arch=89,
    multiprocessors=128,
    shared_memory=99 << 10,
    l2_bytes=72 << 20,
    bandwidth=1.008e12,
    l2_bandwidth=6.4e12,
    matrix_rate=165.2e12,
    vector_rate=82.6e12,
    source="NVIDIA Ada GPU Architecture whitepaper, appendix; CUDA C++ Programming Guide",
    threads=1536,
)
RTX5090 = Gpu(
    name="NVIDIA GeForce RTX 5090",
    arch=120,
    multiprocessors=170,
    shared_memory=99 << 10,
    l2_bytes=96 << 20,
    bandwidth=1.792e12,
    l2_bandwidth=8.2e12,
    matrix_rate=209.5e12,
    vector_rate=104.8e12,
    source="NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix; CUDA C++ Programming Guide",
    threads=1536,
)
# The interpreter takes Python's time, so its rates mean nothing. A program may be as large as a tensor in Triton.
INTERPRETER = Gpu(
    name="Triton interpreter",
    arch=0,
    multiprocessors=1,
    shared_memory=1 << 40,
    l2_bytes=1 << 40,
    bandwidth=1.0,
    l2_bandwidth=1.0,
    matrix_rate=1.0,
    vector_rate=1.0,
    source="this process",
)
KNOWN = (A100, H100, H200, B200, L4, L40S, RTX3090, RTX4090, RTX5090)


def known_gpus() -> tuple[Gpu, ...]:
    return KNOWN


def gpu_named(name: str, multiprocessors: int | None = None) -> Gpu | None:
    """The known GPU that a device name like ``NVIDIA H100 80GB HBM3`` begins with, or None.

    It keeps the device's own name: measurements of one product serve no other. A device with other ``multiprocessors``
    is another product, or a part of one.
    """
    for gpu in KNOWN:
        if re.fullmatch(re.escape(gpu.name) + "([ -].*)?", name) and multiprocessors in (None, gpu.multiprocessors):
            return gpu if gpu.name == name else replace(gpu, name=name)
    return None


def gpu_called(name: str) -> Gpu:
    """The known GPU that a user calls ``h200``, or the first of an architecture, ``sm_90``; or a product by the whole
    name of its devices, ``NVIDIA A100-SXM4-80GB``.

    Raises ValueError with the names there are.
    """

    def plain(text: str) -> str:
        return text.lower().replace("nvidia", "").replace("geforce", "").replace(" ", "")

    for gpu in KNOWN:
        if plain(name) in (plain(gpu.name), f"sm_{gpu.arch}"):
            return gpu
    product = gpu_named(name)
    if product is not None:
        return product
    architectures = sorted({gpu.arch for gpu in KNOWN})
    names = [*(gpu.name.removeprefix("NVIDIA ") for gpu in KNOWN), *(f"sm_{arch}" for arch in architectures)]
    raise ValueError(f"gpu {name!r} is not one of {', '.join(names)}")


def describe(
    name: str, arch: int, multiprocessors: int, shared_memory: int, l2_bytes: int, bandwidth: float | None
) -> Gpu:
    """A GPU that is not known, from its own properties and the known GPU nearest in architecture."""
    like = min(KNOWN, key=lambda gpu: (abs(gpu.arch - arch), gpu.arch))
    share = multiprocessors / like.multiprocessors
    return replace(
        like,
        name=name,
        arch=arch,
        multiprocessors=multiprocessors,
        shared_memory=shared_memory,
        l2_bytes=l2_bytes,
        bandwidth=bandwidth or like.bandwidth * share,
        l2_bandwidth=like.l2_bandwidth * share,
        matrix_rate=like.matrix_rate * share,
        vector_rate=like.vector_rate * share,
        source=f"device properties; rates scaled from the {like.name} by multiprocessors",
    )
