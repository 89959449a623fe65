"""Takes lines out of a failing case for as long as it fails."""

from collections.abc import Callable, Iterator

from tests.fuzz.models import Case


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The smallest found: fewest operations first, then fewest lines of source, until nothing more can go."""
    while (smaller := next(filter(fails, _smaller(case)), None)) is not None:
        case = smaller
    return case


def _smaller(case: Case) -> Iterator[Case]:
    for size in (4, 2, 1):
        for start in range(0, len(case.operations), size):
            yield Case(case.source, case.operations[:start] + case.operations[start + size :])
    lines = case.source.splitlines()
    for start, line in enumerate(lines):
        if line.strip():
            end = _end_of_block(lines, start)
            yield Case(_text(lines[:start] + lines[end:]), case.operations)
    for start in range(len(lines)):
        end = _end_of_block(lines, start)
        if end > start + 1 and lines[start].strip():
            # Only what it governs.
            yield Case(
                _text([*lines[:start], *(line[4:] for line in lines[start + 1 : end]), *lines[end:]]), case.operations
            )


def _end_of_block(lines: list[str], start: int) -> int:
    indent = _indent(lines[start])
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
        end += 1
    return end


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
