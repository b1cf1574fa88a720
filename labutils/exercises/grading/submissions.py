"""Reading returned notebooks without running them: files, cells, which notebook it is, remarks for the teacher."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from labutils.exercises.core import EXERCISES
from labutils.exercises.grading.grades import clean

LARGEST_NOTEBOOK = 50 * 2**20  # bytes
_OFFERED = ("check", "hint", "report", "solution")
_SUSPICIOUS = {"ctypes", "socket", "subprocess", "signal", "multiprocessing", "inspect", "gc"}


def find(folder: Path) -> list[Path]:
    """The notebooks below a folder, other than Jupyter's checkpoints and the files that macOS adds to archives.

    Raises:
        ValueError: the folder does not exist, or has no notebook.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the folder of the returned notebooks.")
    leftovers = {".ipynb_checkpoints", "__MACOSX"}
    found = sorted(
        path
        for path in folder.rglob("*.ipynb")
        if not leftovers & set(path.relative_to(folder).parts) and not path.name.startswith("._") and path.is_file()
    )
    if not found:
        raise ValueError(f"There is no .ipynb in {folder} or below.")
    return found


def read_cells(path: Path) -> list[tuple[int, str]]:
    """(number, source) of each code cell, other than cells with the tag `skip-execution`.

    Raises:
        ValueError: the file is not a notebook.
    """
    try:
        if path.stat().st_size > LARGEST_NOTEBOOK:
            raise ValueError(f"it has more than {LARGEST_NOTEBOOK // 2**20} MiB")
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
        if not text.strip():
            raise ValueError("it is empty")
        cells = json.loads(text)["cells"]
        result = []
        for number, cell in enumerate(cells, start=1):
            source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
            tags = cell.get("metadata", {}).get("tags", [])
            if cell["cell_type"] == "code" and "skip-execution" not in tags:
                result.append((number, source))
        return result
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except (OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not a notebook ({type(error).__name__})") from None
    except json.JSONDecodeError:
        raise ValueError("it is not JSON") from None


def which_notebook(cells: list[tuple[int, str]]) -> str:
    """ "01" to "04": the notebook of which these cells define or check most exercises, or "" if they have none."""
    text = "\n".join(source for _, source in cells)
    counts = dict.fromkeys(sorted({exercise.notebook for exercise in EXERCISES.values()}), 0)
    for name, exercise in EXERCISES.items():
        counts[exercise.notebook] += f"def {name}(" in text or f"check.{name}(" in text
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else ""


def remarks(cells: list[tuple[int, str]]) -> dict[str, str]:
    """Exercise -> what a teacher may want to look at, with "" for the whole notebook. It is a hint, not a proof."""
    found: dict[str, set[str]] = {}
    for _, source in cells:
        lines = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
        try:
            tree = ast.parse(lines)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module == "labutils.exercises":
                modules = [f"labutils.exercises.{a.name}" for a in node.names if a.name not in _OFFERED]
            for module in modules:
                if module.split(".")[0] in _SUSPICIOUS or module.startswith("labutils.exercises"):
                    found.setdefault("", set()).add(f"imports {module}")
            if isinstance(node, ast.FunctionDef) and node.name in EXERCISES:
                used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                used |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                for name in sorted(
                    used & {"reference", "exercises", "solutions", "solution", "scaled_dot_product_attention"}
                ):
                    found.setdefault(node.name, set()).add(f"uses {name}")
    return {name: clean("; ".join(sorted(texts))) for name, texts in found.items()}
