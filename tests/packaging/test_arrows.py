"""Imports point down: no module imports what lies above it, one that imports it, or another's private name."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# From top to bottom; rooms of one floor do not import one another. The package itself has no floor: it imports nothing
# before it is asked for a name, and its functions count as the modules of their names.
FLOORS = {
    "fastconv": (
        "__main__ / cli / tuning / benchmarks / warmup / explain / dry_run / convert / report / fuse / nn / "
        "functional / autograd / measuring / reference / settings activations arguments traffic / kernels / autotune"
    ),
    "fastconv.kernels": "ops compile / dispatch / families / jit / tiles / launch / problem",
}


class Arrow(NamedTuple):
    source: str
    line: int
    target: str
    name: str  # what the source takes of the target

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}: {self.target} {self.name}".rstrip()


@cache
def modules() -> dict[str, Path]:
    """Every module's file in the folder that holds it, not behind one of fastconv's links."""
    found = {}
    for folder in ("fastconv", "kernels", "autotune", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] != ("benchmarks", "tests"):
                found[".".join(["fastconv", *parts][folder == "fastconv" :]).removesuffix(".__init__")] = path
    return found


@cache
def arrows() -> list[Arrow]:
    found = [it for name, path in modules().items() for it in arrows_of(name, path) if it.target != name]
    assert len({it.source for it in found}) > 100, "imports are not found"
    return found


def arrows_of(source: str, path: Path) -> Iterator[Arrow]:
    """Every import, inside functions too, and every use of an attribute of an imported module."""
    imported: dict[str, str] = {}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    for node in nodes:
        if isinstance(node, ast.Import):
            for it in node.names:
                if it.name in modules():
                    imported[it.asname or "fastconv"] = it.name if it.asname else "fastconv"
                    yield Arrow(source, node.lineno, it.name, "")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source}, line {node.lineno}: a relative import"
            for it in node.names:
                whole = f"{node.module}.{it.name}"
                imported |= {it.asname or it.name: whole} if whole in modules() else {}
                yield from arrow(source, node.lineno, whole)
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            yield from arrow(source, node.lineno, ".".join([imported.get(first, ""), *rest]))


def arrow(source: str, line: int, whole: str) -> Iterator[Arrow]:
    module, _, name = whole.rpartition(".")
    if whole in modules():
        yield Arrow(source, line, whole, "")
    elif module in modules():
        yield Arrow(source, line, module, name)


def room(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])


def test_no_import_points_up() -> None:
    wrong = []
    for house, rooms in FLOORS.items():
        floors = {f"{house}.{room}": n for n, floor in enumerate(rooms.split("/")) for room in floor.split()}
        depth = house.count(".") + 2
        inside = [it for it in modules() if it.startswith(house)]
        wrong += [f"{it} has no floor" for it in inside if room(it, depth) not in (house, *floors)]
        for it in arrows():
            source, target = room(it.source, depth), room(it.target, depth)
            if source in floors and target in floors and source != target and floors[source] >= floors[target]:
                wrong.append(str(it))
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_one_another() -> None:
    graph: dict[str, set[str]] = {}
    for it in arrows():
        if "fastconv" not in (it.source, it.target):
            graph.setdefault(it.source, set()).add(it.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_no_private_name_is_anothers() -> None:
    wrong = [str(it) for it in arrows() if it.name.startswith("_") and not it.name.endswith("__")]
    assert not wrong, "\n".join(wrong)
