"""Makes the kernels of v2 without their features, from their own source: what does a feature cost that is off?

A feature that is switched off is None when a kernel is compiled, and should cost nothing. To check that,
`plain_kernels` takes the features out of the source: their parameters, the branches on them, and the arguments that
pass them on. The rest is attention with or without the causal mask. The mask is then a constant, not a window.
"""

from __future__ import annotations

import ast
import atexit
import functools
import importlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from labutils.attention import kernels
from labutils.attention.kernels import flash_v2, flash_v2_backward
from labutils.attention.tuning import compiled

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
        "TOTAL",
        "TOTAL_Q",
        "TOTAL_K",
        "table_ptr",
        "stride_tb",
        "BLOCKS",
        "stride_kp",
        "stride_vp",
        "dlse_ptr",
    ]
)
"""Parameters and variables of the kernels that only a feature needs. They are None if the feature is off."""

CONSTANT = "window_right"  # 0 for the causal mask, None for no mask; with windows a number known only at run time
_UNSCALED = "derivative"  # of the scores, by softcap: 1 without softcap
_MODULES = ("scores", "tiles", "flash_v2", "flash_v2_backward")
_PACKAGE = "labutils_plain_kernels"


class _Without(ast.NodeTransformer):
    """Takes the features out of functions.

    Args:
        positions: for each function the positions of its arguments that belong to features.
    """

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
        decides = isinstance(node.op, ast.Or)  # the value that decides the whole expression
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
    """The source of each module without its features, by the module's name: only compiled functions and constants."""
    folder = Path(kernels.__file__).parent
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
                continue  # no function of it runs inside a kernel
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
    """The modules made of `sources`. Triton wants kernels to have a file, so these lie in a folder until exit."""
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
    """Takes the arguments of a kernel, and launches the plain kernel with those that it has."""

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

    They raise ValueError if a feature is asked for. Calls that `fast_path` kept from before launch the usual kernels.
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


def plain_resources(requests: Iterable[compiled.Request]) -> list[list[compiled.Resources]]:
    """What the kernels take of a GPU without their features, by `compiled.resources_of` with binaries.

    Args:
        requests: of the programs "forward" and "backward", without features.

    Raises:
        ValueError: a request is of another program, or asks for a feature.
    """
    requests = list(requests)
    if any(request.features or request.program not in ("forward", "backward") for request in requests):
        raise ValueError("plain kernels have no features, and only those of forward and backward can be made.")
    setup = f"sys.path.append({str(Path(__file__).resolve().parent)!r})\nimport without_features"
    # A name for the context manager, which would end the block as soon as it is collected
    setup += "\nplain = without_features.plain_kernels()\nplain.__enter__()"
    return compiled.resources_of(requests, binaries=True, setup=setup)
