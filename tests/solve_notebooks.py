"""Fills the lab's own answers into the stubs of the notebooks: `python tests/solve_notebooks.py FOLDER`.

The stubs are the cells whose metadata names an exercise. FOLDER gets a copy of each notebook, solved, without outputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat
from notebook_format import NOTEBOOKS, ROOT

from labutils.exercises import solution_source


def solved(notebook: nbformat.NotebookNode) -> tuple[nbformat.NotebookNode, list[str]]:
    """A copy with every stub replaced by its solution, and the names of the exercises that were filled in."""
    notebook, names = nbformat.from_dict(notebook.copy()), []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            name = cell.metadata.get("exercise")
            if name is not None:
                cell.source = solution_source(name)
                names.append(name)
    return notebook, names


def main(argv: list[str] | None = None) -> int:
    """Writes the solved notebooks."""
    parser = argparse.ArgumentParser(description="Write copies of the notebooks with all exercises solved.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    if folder.resolve() == ROOT:
        parser.error("this would overwrite the notebooks themselves: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in NOTEBOOKS:
        notebook, filled = solved(nbformat.read(ROOT / name, as_version=4))
        nbformat.write(notebook, folder / name)
        print(f"{name}: {len(filled)} exercises solved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
