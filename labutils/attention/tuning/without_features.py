"""The kernels of v2 as they would be without their features, made from their own source: what do the features cost?

A feature that is switched off is None when a kernel is compiled, and should leave nothing behind. To see whether that
is so, `plain_kernels` takes the features out of the source: their parameters, the branches on them, and what passes
them on. What is left is attention with or without the causal mask, which is a constant then and no window.
"""

from __future__ import annotations

import ast
import atexit
import functools
import importlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from labutils.attention.kernels import flash_v2, flash_v2_backward

FEATURES = frozenset(
    [
        "cu_seqlens_ptr",
        "cu_seqlens_q_ptr",
        "cu_seqlens_k_ptr",
        "slopes_ptr",
        "stride_sb",
        "slope",
        "seed_ptr",
        "dropout_p",
        "softcap",
        "window_left",
        "table_ptr",
        "stride_tb",
        "stride_page",
        "stride_kp",
        "stride_vp",
        "dlse_ptr",
    ]
)
"""Parameters and variables of the kernels that are there for a feature alone; all are None where it is off."""

CONSTANT = "window_right"  # 0 for the causal mask, None for none; with windows a number that is known at run time
_UNSCALED = "derivative"  # of the scores, by softcap: 1 without it
_MODULES = ("scores", "tiles", "flash_v2", "flash_v2_backward")
_PACKAGE = "labutils_plain_kernels"


class _Without(ast.NodeTransformer):
    """Takes the features out of functions, given which positions of each function's arguments are theirs."""

    def __init__(self, positions: dict[str, list[int]]):
        self.positions = positions

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        arguments = node.args
        defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
        kept = [(a, default) for a, default in zip(arguments.args, defaults) if a.arg not in FEATURES]
        for a, _ in kept:
            if a.arg == CONSTANT:
                a.annotation = ast.parse("tl.constexpr", mode="eval").body
        arguments.args = [a for a, _ in kept]
        arguments.defaults = [default for _, default in kept if default is not None]
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        theirs = self.positions.get(node.func.id, []) if isinstance(node.func, ast.Name) else []
        node.args = [argument for place, argument in enumerate(node.args) if place not in theirs]
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(None) if node.id in FEATURES and isinstance(node.ctx, ast.Load) else node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        [target] = node.targets
        return None if isinstance(target, ast.Name) and target.id in FEATURES else self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        unscaled = isinstance(node.right, ast.Name) and node.right.id == _UNSCALED
        return node.left if unscaled and isinstance(node.op, ast.Mult) else node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if _is_none(node.left) and _is_none(node.comparators[0]):
            return ast.Constant(isinstance(node.ops[0], ast.Is))
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)  # the value that settles the whole
        values = [v for v in node.values if not (isinstance(v, ast.Constant) and v.value is (not decides))]
        if not values or any(isinstance(v, ast.Constant) and v.value is decides for v in values):
            return ast.Constant(decides if values else not decides)
        return values[0] if len(values) == 1 else ast.BoolOp(node.op, values)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        node.body = node.body or [ast.Pass()]
        return node


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_kernel(node: ast.stmt) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


def sources() -> dict[str, str]:
    """The source of each module without its features, by the module's name: compiled functions and constants alone."""
    folder = Path(__file__).resolve().parents[1] / "kernels"
    trees = {name: ast.parse((folder / f"{name}.py").read_text(encoding="utf-8")) for name in _MODULES}
    positions = {
        node.name: [place for place, a in enumerate(node.args.args) if a.arg in FEATURES]
        for tree in trees.values()
        for node in tree.body
        if _is_kernel(node)
    }
    found = {}
    for name, tree in trees.items():
        kept: list[ast.stmt] = []
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module == "labutils.attention.kernels.flash_v2":
                continue  # of which no function runs inside of a kernel
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)):
                kept.append(node)
            elif _is_kernel(node):
                kept.append(_Without(positions).visit(node))
        text = ast.unparse(ast.fix_missing_locations(ast.Module(kept, [])))
        for other in _MODULES:
            text = text.replace(f"labutils.attention.kernels.{other} ", f"{_PACKAGE}.{other} ")
        found[name] = text + "\n"
    return found


@functools.cache
def _modules() -> dict[str, ModuleType]:
    """The same, imported; Triton wants kernels to have a file, which goes when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=_PACKAGE))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / _PACKAGE).mkdir()
    for name, text in sources().items():
        (folder / _PACKAGE / f"{name}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        return {name: importlib.import_module(f"{_PACKAGE}.{name}") for name in _MODULES}
    finally:
        sys.path.remove(str(folder))


class _InPlaceOf:
    """Takes a kernel's arguments and launches the other one with those that it has."""

    def __init__(self, kernel: Any, plain: Any):
        self.plain, self.arg_names = plain, kernel.arg_names

    def __getitem__(self, grid: Any) -> Callable:
        def start(*args: Any, **constants: Any) -> Any:
            named = dict(zip(self.arg_names, args, strict=False))
            on = [name for name, value in named.items() if name not in self.plain.arg_names and value is not None]
            if on:
                raise ValueError(f"{', '.join(on)}: a kernel without features was asked for one.")
            kept = [value for name, value in named.items() if name in self.plain.arg_names]
            return self.plain[grid](*kept, **constants)

        return start


_KERNELS = ((flash_v2, "_forward_kernel"), (flash_v2_backward, "_dq_kernel"), (flash_v2_backward, "_dkdv_kernel"))


@contextmanager
def plain_kernels() -> Iterator[None]:
    """In the block, `flash_v2.forward` and `flash_v2_backward.backward` launch kernels without features.

    They raise ValueError where a feature is asked for. What they launched before, and `prepared` has kept, stays.
    """
    modules, before = _modules(), [getattr(module, name) for module, name in _KERNELS]
    for (module, name), kernel in zip(_KERNELS, before):
        plain = getattr(modules[module.__name__.rpartition(".")[2]], name)
        setattr(module, name, _InPlaceOf(kernel, plain))
    try:
        yield
    finally:
        for (module, name), kernel in zip(_KERNELS, before):
            setattr(module, name, kernel)
