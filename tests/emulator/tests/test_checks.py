"""Each check of memory, threads and asynchrony: a few hand-written instructions that break its rule, and keep it.

The rules are NVIDIA's: README.md names the section of each.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tests import emulator
from tests.emulator.tests import kernels
from tests.emulator.tests.helpers import faults, run, tensor_map, without


class Check(NamedTuple):
    broken: str
    fault: str
    kept: str
    threads: int = 32
    always: bool = True  # False: only asynchrony that is late meets it


WRITE = "st.shared.v4.b32 [%own], {0, 0, 0, 0};"
COPY = "cp.async.ca.shared.global [%own], [%x0], 16;"

CHECKS = {
    "load before an allocation": Check(
        "ld.global.b32 %r1, [%x0+-4];",
        "a load of 4 bytes outside.* 4 bytes before 512 bytes",
        "ld.global.b32 %r1, [%x0];",
    ),
    "load behind an allocation": Check(
        "ld.global.b32 %r1, [%x0+512];",
        "a load of 4 bytes outside.* 0 bytes behind the end of 512 bytes",
        "ld.global.b32 %r1, [%x0+508];",
    ),
    "store behind an allocation": Check(
        "st.global.b32 [%x0+512], 0;", "a store of 4 bytes outside", "st.global.b32 [%x0+508], 0;"
    ),
    "atomic behind an allocation": Check(
        "atom.global.add.s32 %r1, [%x0+512], 1;",
        "an atomic of 4 bytes outside",
        "atom.global.add.s32 %r1, [%x0+508], 1;",
    ),
    "cp.async behind an allocation": Check(
        f"{COPY.replace('%x0', '%x0+512')} cp.async.wait_all;",
        "cp.async of 16 bytes outside",
        f"{COPY.replace('%x0', '%x0+496')} cp.async.wait_all;",
    ),
    "misaligned load": Check(
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%x0+8];",
        "which is no multiple of 16",
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%x0+16];",
    ),
    "behind shared memory": Check(
        "st.shared.b32 [%shared+4096], 0;", "at offset 4096 of 4096", "st.shared.b32 [%shared+4092], 0;"
    ),
    "misaligned in shared memory": Check(
        "st.shared.v2.b32 [%own+4], {0, 0};", "which is no multiple of 8", "st.shared.v2.b32 [%own+8], {0, 0};"
    ),
    "read of what nothing wrote": Check(
        "ld.shared.b32 %r1, [%own];", "a read of bytes that nothing wrote", f"{WRITE} ld.shared.b32 %r1, [%own];"
    ),
    "race: read after another warp's write": Check(
        f"{WRITE} ld.shared.b32 %r1, [%other];",
        "a warp reads what another wrote since the last barrier",
        f"{WRITE} bar.sync 0; ld.shared.b32 %r1, [%other];",
        threads=64,
    ),
    "race: write after another warp's read": Check(
        f"{WRITE} bar.sync 0; ld.shared.b32 %r1, [%other]; {WRITE}",
        "a warp overwrites what another read since the last barrier",
        f"{WRITE} bar.sync 0; ld.shared.b32 %r1, [%other]; bar.sync 0; {WRITE}",
        threads=64,
    ),
    "race: cp.async after another warp's read": Check(
        f"{WRITE} bar.sync 0; ld.shared.b32 %r1, [%other]; {COPY} cp.async.wait_all;",
        "a warp overwrites what another read since the last barrier",
        f"{WRITE} bar.sync 0; ld.shared.b32 %r1, [%other]; bar.sync 0; {COPY} cp.async.wait_all;",
        threads=64,
    ),
    "read under cp.async": Check(
        f"{COPY} cp.async.commit_group; ld.shared.b32 %r1, [%own];",
        "a read of what a copy that nothing waited for still writes",
        f"{COPY} cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r1, [%own];",
        always=False,
    ),
    "wait for too few groups": Check(
        f"{COPY} cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r1, [%own];",
        "a read of what a copy that nothing waited for still writes",
        f"{COPY} cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r1, [%own];",
        always=False,
    ),
    "write under cp.async": Check(
        f"{COPY} {WRITE}",
        "a write where a copy that nothing waited for still writes",
        f"{COPY} cp.async.wait_all; {WRITE}",
        always=False,
    ),
    "shuffle of half a warp": Check(
        "@%lower shfl.sync.idx.b32 %r1, %r1, 0, 31, -1;",
        "an operation of whole warps reached by a part of one",
        "shfl.sync.idx.b32 %r1, %thread, 0, 31, -1;",
    ),
    "ldmatrix of half a warp": Check(
        f"{WRITE} @%lower ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%own];",
        "an operation of whole warps reached by a part of one",
        f"{WRITE} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%own];",
    ),
    "barrier that some threads miss": Check(
        "@%lower bra $END; bar.sync 0; $END:", "deadlock", "@%lower bra $END; $END: bar.sync 0;"
    ),
    "endless loop": Check("$AGAIN: bra $AGAIN;", "an endless loop", "bra $ON; $ON:"),
    "trap": Check("@%first trap;", "trap", "setp.ne.u32 %p1, %thread, %thread; @%p1 trap;"),
    "register before its write": Check(
        "add.s32 %r1, %r2, 1; mov.b32 %r2, 0;",
        "%r2 is read and was not written before",
        "mov.b32 %r2, 0; add.s32 %r1, %r2, 1;",
    ),
}

INIT = "@%first mbarrier.init.shared::cta.b64 [%shared+2048], 1; bar.sync 0;"
ARRIVE = "@%first mbarrier.arrive.shared::cta.b64 _, [%shared+2048];"
EXPECT = "@%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [%shared+2048], 512;"
LOAD = (
    "@%first cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
    " [%shared], [%x1, {0, 0}], [%shared+2048];"
)
AWAIT = "$WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%shared+2048], 0; @!%p1 bra $WAIT;"
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"
STORE = (
    "@%first cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%x1, {0, 0}], [%shared];"
    " @%first cp.async.bulk.commit_group;"
)
STORED = "cp.async.bulk.wait_group.read 0;"
# One operand of 64 rows by 16 of K, without swizzle: the next 8 rows 256 bytes on, the next 8 of K 128.
OPERAND = "shr.u32 %r1, %shared, 4; cvt.u64.u32 %d1, %r1; or.b64 %d1, %d1, 0x1000080000; setp.ne.b32 %p1, 0, 0;"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %d1, %d1, %p1, 1, 1, 0, 0;"
COMMIT = "wgmma.commit_group.sync.aligned;"
PRODUCED = "wgmma.wait_group.sync.aligned 0;"
READY = f"{OPERAND} {WRITE} {FENCE}"

HOPPER_CHECKS = {
    "arrival at no mbarrier": Check(ARRIVE, "mbarrier at offset 2048 is not initialised", INIT + ARRIVE),
    "mbarrier initialised twice": Check(
        INIT + INIT,
        "is initialised twice",
        INIT + "@%first mbarrier.inval.shared::cta.b64 [%shared+2048];" + INIT,
    ),
    "mbarrier initialised by every thread": Check(
        "mbarrier.init.shared::cta.b64 [%shared+2048], 1;", "an mbarrier's operation by more than one thread", INIT
    ),
    "misaligned mbarrier": Check(
        "@%first mbarrier.init.shared::cta.b64 [%shared+2052], 1;", "mbarrier at offset 2052", INIT
    ),
    "more arrivals than an mbarrier counts": Check(
        INIT + EXPECT + ARRIVE, "more arrivals than it counts", INIT + EXPECT + LOAD + AWAIT + ARRIVE
    ),
    "more bytes than an mbarrier expects": Check(
        INIT + EXPECT.replace("512", "256") + LOAD + AWAIT, "more bytes than it expects", INIT + EXPECT + LOAD + AWAIT
    ),
    "fewer bytes than an mbarrier expects": Check(
        INIT + EXPECT.replace("512", "1024") + LOAD + AWAIT, "deadlock", INIT + EXPECT + LOAD + AWAIT
    ),
    "wait for no arrival": Check(INIT + AWAIT, "deadlock", INIT + ARRIVE + AWAIT),
    "mbarrier invalidated under a copy": Check(
        INIT + EXPECT + LOAD + "@%first mbarrier.inval.shared::cta.b64 [%shared+2048];",
        "is invalidated while a copy is under way",
        INIT + EXPECT + LOAD + AWAIT + "@%first mbarrier.inval.shared::cta.b64 [%shared+2048];",
        always=False,
    ),
    "read under a bulk copy": Check(
        INIT + EXPECT + LOAD + "ld.shared.b32 %r1, [%own];",
        "a read of what a copy that nothing waited for still writes",
        INIT + EXPECT + LOAD + AWAIT + "ld.shared.b32 %r1, [%own];",
        always=False,
    ),
    "end under a bulk copy": Check(
        INIT + EXPECT + LOAD,
        "the kernel ends while a bulk copy in is under way",
        INIT + EXPECT + LOAD + AWAIT,
        always=False,
    ),
    "race: bulk copy after another warp's read": Check(
        f"{WRITE} {INIT} ld.shared.b32 %r1, [%other]; {EXPECT} {LOAD} {AWAIT}",
        "a bulk copy overwrites what a warp used since the last barrier",
        f"{WRITE} {INIT} ld.shared.b32 %r1, [%other]; bar.sync 0; {EXPECT} {LOAD} {AWAIT}",
        threads=64,
    ),
    "bulk copy to a misaligned place": Check(
        INIT + EXPECT + LOAD.replace("[%shared]", "[%shared+16]") + AWAIT,
        "a bulk copy's shared memory at .* no multiple of 128",
        INIT + EXPECT + LOAD.replace("[%shared]", "[%shared+128]") + AWAIT,
    ),
    "bulk copy behind shared memory": Check(
        INIT + EXPECT + LOAD.replace("[%shared]", "[%shared+3968]") + AWAIT,
        "a bulk copy beyond shared memory",
        INIT + EXPECT + LOAD.replace("[%shared]", "[%shared+3584]") + AWAIT,
    ),
    "bulk copy of another rank": Check(
        INIT + EXPECT + LOAD.replace("2d", "3d").replace("{0, 0}", "{0, 0, 0}"),
        "a copy of 3 axes by a map of 2",
        INIT + EXPECT + LOAD + AWAIT,
    ),
    "bulk copy by no map": Check(
        INIT + EXPECT + LOAD.replace("%x1", "%x0"), "no tensor map at", INIT + EXPECT + LOAD + AWAIT
    ),
    "bulk store of what nothing wrote": Check(
        STORE + STORED, "a bulk copy reads bytes that nothing wrote", WRITE + FENCE + STORE + STORED
    ),
    "bulk store without a fence": Check(
        WRITE + "bar.sync 0;" + STORE + STORED,
        "a bulk copy reads what no fence.proxy.async follows",
        WRITE + FENCE + STORE + STORED,
    ),
    "race: bulk store after another warp's write": Check(
        WRITE + "fence.proxy.async.shared::cta;" + STORE.replace("%shared", "%shared+512") + STORED,
        "a bulk copy reads what another warp wrote since the last barrier",
        WRITE + FENCE + STORE.replace("%shared", "%shared+512") + STORED,
        threads=64,
    ),
    "write under a bulk store": Check(
        WRITE + FENCE + STORE + WRITE + STORED,
        "overwritten while a bulk copy that nothing waited for reads it",
        WRITE + FENCE + STORE + STORED + "bar.sync 0;" + WRITE,
        always=False,
    ),
    "end under a bulk store": Check(
        WRITE + FENCE + STORE,
        "the kernel ends while a bulk copy out still reads shared memory",
        WRITE + FENCE + STORE + STORED,
        always=False,
    ),
    "wgmma without a fence": Check(
        f"{OPERAND} {WRITE} bar.sync 0; {PRODUCT} {COMMIT} {PRODUCED}",
        "wgmma reads what no fence.proxy.async follows",
        f"{READY} {PRODUCT} {COMMIT} {PRODUCED}",
        threads=128,
    ),
    "race: wgmma after another warp's write": Check(
        f"{OPERAND} {WRITE} fence.proxy.async.shared::cta; {PRODUCT} {COMMIT} {PRODUCED}",
        "wgmma reads shared memory that was written since the last barrier",
        f"{READY} {PRODUCT} {COMMIT} {PRODUCED}",
        threads=128,
    ),
    "wgmma of what nothing wrote": Check(
        f"{OPERAND} {PRODUCT} {COMMIT} {PRODUCED}",
        "wgmma reads bytes that nothing wrote",
        f"{READY} {PRODUCT} {COMMIT} {PRODUCED}",
        threads=128,
    ),
    "register that wgmma still writes": Check(
        f"{READY} {PRODUCT} {COMMIT} add.rn.f32 %f5, %f1, %f1; {PRODUCED}",
        "a register that a product still writes is read",
        f"{READY} {PRODUCT} {COMMIT} {PRODUCED} add.rn.f32 %f5, %f1, %f1;",
        threads=128,
    ),
    "wait before the group is committed": Check(
        f"{READY} {PRODUCT} {PRODUCED} {COMMIT}",
        "the kernel ends with wgmma under way",
        f"{READY} {PRODUCT} {COMMIT} {PRODUCED}",
        threads=128,
    ),
    "write under wgmma": Check(
        f"{READY} {PRODUCT} {COMMIT} {WRITE} {PRODUCED}",
        "overwritten while a wgmma that nothing waited for reads it",
        f"{READY} {PRODUCT} {COMMIT} {PRODUCED} {WRITE}",
        threads=128,
    ),
    "reserved bits of wgmma's descriptor": Check(
        f"{READY} or.b64 %d1, %d1, 0x8000; {PRODUCT} {COMMIT} {PRODUCED}",
        "reserved bits of the descriptor",
        f"{READY} {PRODUCT} {COMMIT} {PRODUCED}",
        threads=128,
    ),
    "wgmma behind shared memory": Check(
        f"{READY} add.s64 %d1, %d1, 0x90; {PRODUCT} {COMMIT} {PRODUCED}",
        "at offset .* of 4096",
        f"{READY} {PRODUCT} {COMMIT} {PRODUCED}",
        threads=128,
    ),
    "wgmma of two warps": Check(
        f"{READY} {PRODUCT}",
        "no multiple of 128 threads",
        f"{WRITE}",
        threads=64,
    ),
}


def check(it: Check, body: str) -> None:
    x = torch.zeros(128)
    maps = (tensor_map(x.view(16, 8), [8, 16]),) if emulator.current().gpu.arch >= 90 else ()
    with emulator.options(steps=1000):
        run(body, x, *maps, threads=it.threads)


@pytest.mark.parametrize("name", CHECKS)
def test_a_broken_rule_is_a_fault(name: str, asynchrony: str) -> None:
    it = CHECKS[name]
    check(it, it.kept)
    if it.always or asynchrony == "late":
        with faults(it.fault):
            check(it, it.broken)
    else:
        check(it, it.broken)


@pytest.mark.parametrize("name", HOPPER_CHECKS)
def test_a_broken_rule_of_hopper_is_a_fault(name: str, asynchrony: str, hopper: None) -> None:
    it = HOPPER_CHECKS[name]
    check(it, it.kept)
    if it.always or asynchrony == "late":
        with faults(it.fault):
            check(it, it.broken)
    else:
        check(it, it.broken)


@pytest.mark.parametrize("swizzle", [1, 2, 3])
def test_a_swizzled_box_begins_where_its_pattern_does(hopper, swizzle: int) -> None:
    x = torch.zeros(16, 4 << swizzle)
    copied = tensor_map(x, [4 << swizzle, 1], swizzle=swizzle)
    body = INIT + EXPECT.replace("512", str(16 << swizzle)) + LOAD + AWAIT
    run(body, x, copied)
    with faults("no multiple of the pattern's length"):
        run(body.replace("[%shared],", "[%shared+128],"), x, copied)


def test_races_are_looked_for_unless_told_otherwise() -> None:
    it = CHECKS["race: read after another warp's write"]
    with emulator.options(races=False):
        check(it, it.broken)


def test_a_cta_has_the_threads_it_was_compiled_for() -> None:
    x = torch.zeros(128)
    binary = kernels.add[(1,)](x, x, x, 128, BLOCK=128, num_warps=4)
    edit = without(r"\.reqntid 128", by=".reqntid 64")
    with emulator.patched_ptx(edit), faults("128 threads a CTA, compiled for 64"):
        binary.run(1, 1, 1, 0, binary.function, binary.packed_metadata, None, None, None, x, x, x, 128, 128)


def test_a_fault_names_its_place() -> None:
    x = torch.zeros(128)
    with faults(
        r"handwritten: a load of 4 bytes outside.*\n"
        r"  at PTX line \d+ \(\?\): ld\.global\.b32 %r1, \[%d0\]\n"
        r"  thread 5 of CTA \(2, 1, 0\) of grid \(4, 2, 1\), 32 threads"
    ):
        run(
            """
            mov.b64 %d0, %x0;
            mov.u32 %r1, %ctaid.x;
            mov.u32 %r2, %ctaid.y;
            mad.lo.s32 %r1, %r2, 4, %r1;
            setp.eq.u32 %p1, %r1, 6;
            setp.eq.and.u32 %p1, %thread, 5, %p1;
            @%p1 add.s64 %d0, %x0, 4096;
            ld.global.b32 %r1, [%d0];
            """,
            x,
            grid=(4, 2, 1),
        )
