"""What of a listing tells binaries apart, and what is said of two commits that differ."""

import pytest

from fastconv.benchmarks.tools.same_binaries import Binary, compared, read

LISTING = """
Fatbin elf code:
 Function conv_gemm_kernel:
  REG:{registers} STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDC R1, c[0x0][{argument}] ;     /* 0x00000a00ff017b82 */
                                                                    /* 0x000fe20000000800 */
        /*0010*/              @P0  CALL.REL.NOINC `({symbol}) ;     /* 0x0000000000008947 */
        /*0020*/                   {last} R2, R1, 0x10 ;            /* 0x0000000000007918 */
"""


def listing(registers: int = 40, argument: str = "0x28", symbol: str = "one", last: str = "IADD3") -> str:
    return LISTING.format(registers=registers, argument=argument, symbol=symbol, last=last)


def binary(**changes: object) -> Binary:
    return Binary(90, str(changes.pop("kernel", "conv_gemm_kernel")), *read(listing(**changes)))  # type: ignore[arg-type]


def test_names_and_places_of_arguments_do_not_count() -> None:
    assert binary().same == binary(argument="0x218", symbol="another", kernel="renamed").same
    assert compared([binary()], [binary(argument="0x30", kernel="renamed")]) == "1 binaries, all the same"


def test_numbers_of_registers_and_the_order_of_instructions_are_told_apart() -> None:
    before = binary()
    last, *others = reversed(before.instructions.splitlines())
    after = before._replace(instructions="\n".join([last, *reversed(others)]).replace("R1", "R7"))
    assert after.same != before.same
    text = compared([before], [after])
    assert text == "1 binaries, all the same, 1 but for the numbers of registers and the order of instructions"


@pytest.mark.parametrize("changes", [{"registers": 41}, {"last": "IMAD"}], ids=["registers", "instruction"])
def test_what_differs_is_shown(changes: dict[str, object]) -> None:
    text = compared([binary()], [binary(**changes)]).splitlines()
    assert text[0] == "sm_90 conv_gemm_kernel: 1 before, 1 after, that the other has not"
    assert len([line for line in text if line.startswith("    -")]) == 1
    assert text[-1] == "1 of 1 binaries before and 1 of 1 after differ"


def test_a_listing_without_registers_is_refused() -> None:
    with pytest.raises(ValueError, match="no line of registers"):
        read("Fatbin elf code:")
