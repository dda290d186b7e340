"""What a kernel's source gives a call as its first argument, so that a report can name it."""

from __future__ import annotations

import ast
import linecache
import re
from itertools import islice
from typing import Any

import numpy as np

from cuda_kernels.emulator.errors import Site
from cuda_kernels.emulator.shared import STATIC_BASE

Call = tuple[Site, dict[str, Any]]
"""Where a function of a kernel calls another one, and its variables then."""


def first_argument(calls: list[Call]) -> str:
    """Write the first argument of the first call in the kernel's words; "" if they are not known.

    A parameter becomes what the caller gave for it, a variable that is no address its number.
    """
    expression = _argument(calls, 0) if calls else None
    return "" if expression is None else ast.unparse(expression)


def _argument(calls: list[Call], number: int) -> ast.expr | None:
    """Return an argument of the first call."""
    code, offset = calls[0][0]
    place = next(islice(code.co_positions(), offset // 2, None))
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    except SyntaxError:  # IPython's magic, or a file that has changed
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and place == (
            node.lineno, node.end_lineno, node.col_offset, node.end_col_offset
        ):  # fmt: skip
            given = node.args[: number + 1]
            if len(given) > number and not any(isinstance(one, ast.Starred) for one in given):
                return _InWords(calls).visit(given[number])
    return None


class _InWords(ast.NodeTransformer):
    def __init__(self, calls: list[Call]) -> None:
        ((code, _), self.variables), *self.callers = calls
        self.parameters = code.co_varnames[: code.co_argcount] if self.callers else ()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Leave a cast out."""
        cast = re.fullmatch(r"(\w+\.)*[iu]\d+", ast.unparse(node.func))
        return self.visit(node.args[0]) if cast else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Replace a variable."""
        value = self.variables.get(node.id)
        if isinstance(value, (int, np.integer)) and value < STATIC_BASE:
            return ast.Constant(int(value))
        if node.id in self.parameters:
            return _argument(self.callers, self.parameters.index(node.id)) or node
        return node
