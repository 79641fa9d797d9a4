"""Source code with some values known: branches that are never taken are left out."""

import ast
import operator
from collections.abc import Mapping
from typing import Any

# of the objects that a method gets, the names that hold a known value
OWNERS = frozenset({"self", "group", "groups", "block"})
COMPARED: dict[type, Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


def folded(function: ast.FunctionDef, known: Mapping[str, Any]) -> str | None:
    """Return a function with `self.name` and `group.name` replaced by known values, or None if nothing changes."""
    before = ast.unparse(function)
    made = ast.fix_missing_locations(_Fold(known).visit(ast.parse(before)))
    after = ast.unparse(made)
    return None if after == before else after


class _Fold(ast.NodeTransformer):
    def __init__(self, known: Mapping[str, Any]) -> None:
        self._known = known

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if owner in OWNERS and node.attr in self._known and isinstance(node.ctx, ast.Load):
            return ast.Constant(self._known[node.attr])
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.left, ast.Constant) and isinstance(node.comparators[0], ast.Constant):
            compare = COMPARED.get(type(node.ops[0]))
            if compare is not None:
                return ast.Constant(bool(compare(node.left.value, node.comparators[0].value)))
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        constant = isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant)
        return ast.Constant(not node.operand.value) if constant else node  # type: ignore[attr-defined]

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        left = []
        for value in node.values:
            if isinstance(value, ast.Constant) and bool(value.value) is not decides and value is not node.values[-1]:
                continue  # the next one decides
            left.append(value)
            if isinstance(value, ast.Constant) and bool(value.value) is decides:
                break
        if len(left) > 1 and isinstance(left[-1], ast.Constant) and bool(left[-1].value) is not decides:
            left = left[:-1] if all(isinstance(value, ast.Compare) for value in left[:-1]) else left
        return left[0] if len(left) == 1 else ast.BoolOp(node.op, left)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if not isinstance(node.test, ast.Constant):
            return node
        return (node.body if node.test.value else node.orelse) or ast.Pass()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.body = [member for member in node.body if not isinstance(member, ast.Pass)] or [ast.Pass()]
        return node

    def visit_Expr(self, node: ast.Expr) -> Any:
        self.generic_visit(node)
        call = node.value
        checks = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.startswith("_check")
        return None if checks else node  # what the stack was built with has been checked
