"""Rewrites a function's source so that whatever it reaches for beside its own variables is a question to the caller.

A forward runs on stand-ins, and none of its side effects may happen. So its source is rewritten: attributes, calls,
items, ``is`` and in-place operators become calls of functions of the caller's, which answer or refuse, and names that
are no local variables are looked up in the globals that the caller gives. What is left is Python's own control flow on
local variables.
"""

from __future__ import annotations

import ast
import copy
import linecache
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

# Names that no program has; the caller puts a function under each.
ATTRIBUTE, ATTRIBUTES, ITEM, ITEMS = "@attribute", "@attributes", "@item", "@items"
CALL, NAME, SUPER, IS, IN_PLACE, TEXT, REMAINDER, SLICE, UNPACK, REFUSE = (
    *("@call", "@name", "@super", "@is", "@in_place", "@text", "@remainder", "@slice", "@unpack", "@refuse"),
)

# Statements and expressions that stay as they are, except their parts.
_STATEMENTS = (
    *(ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.If, ast.For, ast.While, ast.Pass),
    *(ast.Break, ast.Continue, ast.Assert, ast.Delete, ast.FunctionDef),
)
_EXPRESSIONS = (
    *(ast.Attribute, ast.Subscript, ast.Slice, ast.Call, ast.Compare, ast.Name, ast.Constant, ast.Starred),
    *(ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.IfExp, ast.NamedExpr, ast.Lambda, ast.JoinedStr, ast.FormattedValue),
    *(ast.Tuple, ast.List, ast.Dict, ast.Set, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
_REFUSED: dict[type[ast.AST], str] = {
    **dict.fromkeys((ast.With, ast.AsyncWith), "enters a context (no_grad, autocast or the like)"),
    ast.Try: "catches exceptions",
    **dict.fromkeys((ast.Import, ast.ImportFrom), "imports a module"),
    **dict.fromkeys((ast.Global, ast.Nonlocal), "sets variables of others"),
    ast.Raise: "raises",
}


class SourceUnknown(Exception):
    """Why a function's source cannot be had."""


@lru_cache(maxsize=16)
def _definitions(filename: str, text: str) -> tuple[list[CodeType], list[ast.FunctionDef | ast.Lambda]]:
    """All functions in a file: their code, and their syntax trees with the name of the class around each."""
    tree = ast.parse(text)

    def inside(code: CodeType) -> Iterator[CodeType]:
        for part in code.co_consts:
            if isinstance(part, CodeType):
                yield part
                yield from inside(part)

    def written(node: ast.AST, kind: str) -> Iterator[ast.FunctionDef | ast.Lambda]:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.FunctionDef | ast.Lambda):
                part._in_class = kind  # type: ignore[union-attr]
                yield part
            yield from written(part, part.name.lstrip("_") if isinstance(part, ast.ClassDef) else kind)

    compiled = list(inside(compile(tree, filename, "exec", dont_inherit=True)))
    return compiled, list(written(tree, ""))


def _definition(function: FunctionType) -> ast.FunctionDef | ast.Lambda:
    """The syntax tree of ``function``, whose source must compile to its code: the file may have changed since."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    try:
        compiled, nodes = _definitions(code.co_filename, "".join(lines))
    except SyntaxError:
        compiled, nodes = [], []
    if code not in compiled:
        changed = "is not that of its file any more" if lines else "is not to be had"
        raise SourceUnknown(f"runs {function.__qualname__}, whose source {changed}")
    found = [node for node in nodes if (_first_line(node), _name(node)) == (code.co_firstlineno, code.co_name)]
    found = [node for node in found if _holds(node, code)]
    if len({ast.dump(node) for node in found}) != 1:
        raise SourceUnknown(f"runs {function.__qualname__}, beside which stands another function")
    return found[0]


def _holds(node: ast.FunctionDef | ast.Lambda, code: CodeType) -> bool:
    """Whether ``code`` may be that of ``node``, by the columns that Python 3.11 and later keep."""
    if not isinstance(node, ast.Lambda) or not hasattr(code, "co_positions"):
        return True
    starts = [(line, column) for line, _, column, _ in code.co_positions() if line is not None and column is not None]
    body = node.body
    end = (body.end_lineno, body.end_col_offset)
    return (body.lineno, body.col_offset) <= max(starts, default=(0, 0)) < end


def _first_line(node: ast.FunctionDef | ast.Lambda) -> int:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return min(part.lineno for part in (node, *decorators))


def _name(node: ast.FunctionDef | ast.Lambda) -> str:
    return node.name if isinstance(node, ast.FunctionDef) else "<lambda>"


# As long as the functions exist.
_rewritten: WeakKeyDictionary[CodeType, CodeType] = WeakKeyDictionary()


def rewritten(function: FunctionType) -> CodeType:
    """The rewritten code of ``function``, its free variables globals. Raises SourceUnknown."""
    if function.__code__ not in _rewritten:
        node = copy.deepcopy(_definition(function))
        if any(isinstance(part, ast.Yield | ast.YieldFrom | ast.Await) for part in ast.walk(node)):
            raise SourceUnknown(f"runs {function.__qualname__}, a generator")
        arguments = node.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        rewriter = _Rewriter(names[0] if names else None, node._in_class)  # type: ignore[union-attr]
        body = node.body if isinstance(node, ast.FunctionDef) else [ast.Return(value=node.body)]
        (shell,) = ast.parse("def function(): pass").body
        assert isinstance(shell, ast.FunctionDef)
        shell.args = _bare(arguments)
        shell.body = [rewriter.visit(statement) for statement in body]
        tree = ast.fix_missing_locations(ast.Module(body=[shell], type_ignores=[]))
        module = compile(tree, function.__code__.co_filename, "exec", dont_inherit=True)
        (_rewritten[function.__code__],) = (part for part in module.co_consts if isinstance(part, CodeType))
    return _rewritten[function.__code__]


def _bare(arguments: ast.arguments) -> ast.arguments:
    """Without defaults and annotations."""
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    for part in ast.walk(arguments):
        if isinstance(part, ast.arg):
            part.annotation = None
    return arguments


def _ask(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(func=ast.Name(id=name, ctx=ast.Load()), args=list(args), keywords=[])


class _Rewriter(ast.NodeTransformer):
    """``first``: the function's first argument, for ``super()``; ``kind``: the name of the class, for private names."""

    def __init__(self, first: str | None, kind: str) -> None:
        self.first, self.kind = first, kind

    def _mangled(self, name: str) -> str:
        is_private = self.kind and name.startswith("__") and not name.endswith("__")
        return f"_{self.kind}{name}" if is_private else name

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS):
            why = _REFUSED.get(type(node), f"has a statement that is not known, {type(node).__name__}")
            return ast.copy_location(ast.Expr(_ask(REFUSE, ast.Constant(why))), node)
        if isinstance(node, ast.expr) and not isinstance(node, _EXPRESSIONS):
            return _ask(REFUSE, ast.Constant(f"has an expression that is not known, {type(node).__name__}"))
        return super().visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if self._mangled(node.id) != node.id and isinstance(node.ctx, ast.Load):
            return _ask(REFUSE, ast.Constant(f"reads {node.id}"))
        return _ask(NAME, node) if isinstance(node.ctx, ast.Load) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        value, name = self.visit(node.value), ast.Constant(self._mangled(node.attr))
        if isinstance(node.ctx, ast.Load):
            return _ask(ATTRIBUTE, value, name)
        return ast.Subscript(value=_ask(ATTRIBUTES, value), slice=name, ctx=node.ctx)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        value, index = self.visit(node.value), self.visit(node.slice)
        if isinstance(node.ctx, ast.Load):
            return _ask(ITEM, value, index)
        return ast.Subscript(value=_ask(ITEMS, value), slice=index, ctx=node.ctx)

    def visit_Slice(self, node: ast.Slice) -> ast.AST:
        ends = (ast.Constant(None) if end is None else self.visit(end) for end in (node.lower, node.upper, node.step))
        return _ask(SLICE, *ends)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            return _ask(SUPER, *([ast.Name(id=self.first, ctx=ast.Load())] if self.first else []))
        function = self.visit(node.func)
        args = [self.visit(arg) for arg in node.args]
        keywords = [ast.keyword(arg=keyword.arg, value=self.visit(keyword.value)) for keyword in node.keywords]
        return ast.Call(func=ast.Name(id=CALL, ctx=ast.Load()), args=[function, *args], keywords=keywords)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if not any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            return self.generic_visit(node)
        if len(node.ops) > 1:
            return _ask(REFUSE, ast.Constant("compares by identity in a chain"))
        answer = _ask(IS, self.visit(node.left), self.visit(node.comparators[0]))
        return answer if isinstance(node.ops[0], ast.Is) else ast.UnaryOp(op=ast.Not(), operand=answer)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        target, *others = node.targets
        names = target.elts if isinstance(target, ast.Tuple | ast.List) and not others else []
        if names and not any(isinstance(name, ast.Starred) for name in names):
            node.value = _ask(UNPACK, node.value, ast.Constant(len(names)))
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        # The target is evaluated twice, to be read and to be set.
        if any(isinstance(part, ast.Call | ast.NamedExpr) for part in ast.walk(node.target)):
            refused = ast.Expr(_ask(REFUSE, ast.Constant("changes in place what a call gives")))
            return ast.copy_location(refused, node)
        before = copy.deepcopy(node.target)
        before.ctx = ast.Load()
        name = ast.Constant(f"i{_OPERATORS.get(type(node.op), type(node.op).__name__.lower())}")
        value = _ask(IN_PLACE, name, self.visit(before), self.visit(node.value))
        return ast.copy_location(ast.Assign(targets=[self.visit(node.target)], value=value), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        assigned = ast.Assign(targets=[self.visit(node.target)], value=self.visit(node.value))
        return ast.copy_location(assigned, node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        # A string's % writes values as text.
        return _ask(REMAINDER, node.left, node.right) if isinstance(node.op, ast.Mod) else node

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.AST:
        self.generic_visit(node)
        node.value = _ask(TEXT, node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.decorator_list:
            refused = ast.Expr(_ask(REFUSE, ast.Constant(f"decorates a function of its own, {node.name}")))
            return ast.copy_location(refused, node)
        inner = _Rewriter(None, self.kind)
        defaults = [self.visit(value) for value in node.args.defaults]
        kw_defaults = [None if value is None else self.visit(value) for value in node.args.kw_defaults]
        node.args = _bare(node.args)
        node.args.defaults, node.args.kw_defaults, node.returns = defaults, kw_defaults, None
        node.body = [inner.visit(statement) for statement in node.body]
        return node


# As the operator module calls them.
_OPERATORS = {
    **{ast.Mult: "mul", ast.Div: "truediv", ast.Pow: "pow", ast.BitOr: "or", ast.BitXor: "xor", ast.BitAnd: "and"},
    **{ast.MatMult: "matmul", ast.LShift: "lshift", ast.RShift: "rshift"},
}
