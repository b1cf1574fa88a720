"""Checks that the notebooks are canonical, and mends what can be mended: `python tests/notebook_format.py
[--fix]`.

A committed notebook is read on a code host, compared line by line in reviews and executed by strangers. So it
holds what was computed and nothing of the machine that computed it, in one spelling. Each rule is a function
that takes a notebook as a dict and yields its violations; `RULES` lists them.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = (
    "01-Setup_and_Comparison.ipynb",
    "02-FlashAttention_Demo.ipynb",
    "03-Long_Sequence_Training.ipynb",
    "04-Performance_Analysis.ipynb",
)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
LONGEST_CELL = 40  # lines; 15 is what a cell should have
WIDGET = "application/vnd.jupyter.widget-view+json"
UNEXECUTED = "skip-execution"  # the tag that keeps nbclient from running a cell
WAITING = "awaiting-run"  # the tag of a cell that is newer than the run whose outputs the notebook shows
WAITING_NOTE = "wait for the next run on a GPU"  # what the first cell then says of such cells
CELL_METADATA = {"tags", "jupyter", "exercise"}  # what is written by hand; all other keys come from tools

# Folders of a machine, in an output. A leading word character or dot would make it a part of something else
# (a URL).
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(?:root|home|work|tmp|usr|opt|mnt|var|Users|private|content|workspace)/[\w.]"
    r"|site-packages|dist-packages|ipykernel_\d+|[A-Za-z]:\\\\?Users"
)
READABLE_ID = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
# As nbformat and JupyterLab make them: eight digits, or a whole UUID.
RANDOM_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){0,3}(?:-[0-9a-f]{12})?")

Notebook = dict[str, Any]


class Violation(NamedTuple):
    """One broken rule: which, in which cell (None: the file as a whole), and what to do."""

    rule: str
    cell: str | None
    message: str

    def __str__(self) -> str:
        return f"[{self.rule}] {'' if self.cell is None else self.cell + ': '}{self.message}"


def read(path: Path) -> Notebook:
    """The notebook as it stands in the file, its multi-line strings joined."""
    return joined(json.loads(path.read_text(encoding="utf-8")))


def joined(notebook: Notebook) -> Notebook:
    """A copy in which sources and outputs are strings, where the file may have lists of lines."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.get("cells", []):
        cell["source"] = _text(cell.get("source", ""))
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = _text(output["text"])
            for kind, value in output.get("data", {}).items():
                if not kind.endswith("json"):
                    output["data"][kind] = _text(value)
    return notebook


def canonical(notebook: Notebook) -> str:
    """The one spelling of a notebook: nbformat's order of keys and lists of lines, indent 1."""
    return nbformat.writes(nbformat.from_dict(joined(notebook))).rstrip("\n") + "\n"


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def _cells(notebook: Notebook, kind: str | None = None) -> Iterator[tuple[str, Notebook]]:
    """(name for messages, cell) of all cells, or of those of one kind."""
    for number, cell in enumerate(notebook.get("cells", []), start=1):
        if kind is None or cell.get("cell_type") == kind:
            yield f"cell {number} ({cell.get('id', 'no id')})", cell


def _tags(cell: Notebook) -> set[str]:
    return set(cell.get("metadata", {}).get("tags", []))


def _outputs(notebook: Notebook) -> Iterator[tuple[str, Notebook]]:
    for name, cell in _cells(notebook, "code"):
        for output in cell.get("outputs", []):
            yield name, output


def _shown(output: Notebook) -> Iterator[str]:
    """What a reader sees of an output as text; images are left out, their base64 may hold anything."""
    if "text" in output:
        yield output["text"]
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            yield value if isinstance(value, str) else json.dumps(value)


# ----------------------------------------------------------------------------------------------------------
# The rules
# ----------------------------------------------------------------------------------------------------------


def check_schema(notebook: Notebook) -> Iterator[Violation]:
    """Valid nbformat 4.5."""
    version = (notebook.get("nbformat"), notebook.get("nbformat_minor"))
    if version != (4, 5):
        yield Violation("schema", None, f"nbformat {version[0]}.{version[1]}: save it as 4.5")
    # Against the schema alone: `nbformat.validate` also mends ids, and warns of it, which is `check_ids`'
    # business.
    for error in nbformat.validator.iter_validate(nbformat.from_dict(notebook)):
        yield Violation("schema", None, f"not a valid notebook: {str(error).splitlines()[0]}")


def check_metadata(notebook: Notebook) -> Iterator[Violation]:
    """Kernel `python3`, language Python, and no more: no versions, no widget states, no editor's settings."""
    if notebook.get("metadata") != METADATA:
        yield Violation("metadata", None, f"must be {json.dumps(METADATA)}: run --fix")


def check_cell_metadata(notebook: Notebook) -> Iterator[Violation]:
    """No execution times and no tool's private notes in a cell."""
    for name, cell in _cells(notebook):
        extra = sorted(set(cell.get("metadata", {})) - CELL_METADATA)
        if extra:
            yield Violation("cell-metadata", name, f"holds {', '.join(extra)}: run --fix")


def check_ids(notebook: Notebook) -> Iterator[Violation]:
    """Each cell has an id of its own that a person can read."""
    seen: set[str] = set()
    for name, cell in _cells(notebook):
        identifier = cell.get("id", "")
        if identifier in seen:
            yield Violation("ids", name, "another cell has this id: run --fix")
        elif not _readable(identifier):
            yield Violation("ids", name, "not a readable id (words in lower case, joined by hyphens): run --fix")
        seen.add(identifier)


def check_title(notebook: Notebook) -> Iterator[Violation]:
    """The first cell is Markdown and begins with the title."""
    first = next(iter(notebook.get("cells", [])), {})
    if first.get("cell_type") != "markdown" or not first.get("source", "").startswith("# "):
        yield Violation("title", None, "the first cell must be Markdown that begins with '# ' and the title")


def check_labutils_first(notebook: Notebook) -> Iterator[Violation]:
    """labutils is imported before anything else, since it decides how triton will run."""
    for name, cell in _cells(notebook, "code"):
        source = "\n".join(line for line in cell["source"].splitlines() if not line.lstrip().startswith(("%", "!")))
        try:
            imports = [s for s in ast.walk(ast.parse(source)) if isinstance(s, ast.Import | ast.ImportFrom)]
        except SyntaxError as error:
            yield Violation("labutils-first", name, f"not Python: {error}")
            return
        first = min(imports, key=lambda statement: statement.lineno, default=None)
        if first is None:
            module = "nothing"
        elif isinstance(first, ast.Import):
            module = first.names[0].name
        else:
            module = first.module or "."
        if module.split(".")[0] != "labutils":
            message = f"the first code cell must import labutils before anything else; it imports {module}"
            yield Violation("labutils-first", name, message)
        return
    yield Violation("labutils-first", None, "there is no code cell")


def check_executed(notebook: Notebook) -> Iterator[Violation]:
    """Executed in one run from top to bottom: the code cells are numbered 1, 2, ..., n.

    Cells that wait for their first run on a GPU stand between them without a number; `check_waiting` sees to
    these.
    """
    expected = 1
    for name, cell in _cells(notebook, "code"):
        if {UNEXECUTED, WAITING} & _tags(cell):
            continue
        if not cell["source"].strip():
            yield Violation("executed", name, "an empty code cell: delete it")
            continue
        count = cell.get("execution_count")
        if count != expected:
            state = "was not executed" if count is None else f"has number {count}"
            message = f"{state} where {expected} is due: execute the whole notebook from the top"
            yield Violation("executed", name, message)
            return  # every later cell would say the same
        results = {o.get("execution_count") for o in cell.get("outputs", []) if o["output_type"] == "execute_result"}
        if results - {count}:
            yield Violation("executed", name, "its result carries another number than the cell: execute it again")
        expected += 1


def check_waiting(notebook: Notebook) -> Iterator[Violation]:
    """A cell that waits for a run shows nothing, and the first cell tells the reader of it; nobody waits after
    a run."""
    waiting = [(name, cell) for name, cell in _cells(notebook, "code") if WAITING in _tags(cell)]
    for name, cell in waiting:
        if cell.get("execution_count") is not None or cell.get("outputs"):
            yield Violation("waiting", name, f"it was executed: run --fix, which takes the tag {WAITING} from it")
    told = WAITING_NOTE in " ".join(next(iter(notebook.get("cells", [])), {}).get("source", "").split())
    if waiting and not told:
        message = f"{len(waiting)} cells have no output yet: say in the first cell that they {WAITING_NOTE!r}"
        yield Violation("waiting", None, message)
    if told and not waiting:
        yield Violation("waiting", None, "no cell waits for a run any more: take the note out of the first cell")


def check_errors(notebook: Notebook) -> Iterator[Violation]:
    """No output is an exception that escaped."""
    for name, output in _outputs(notebook):
        if output["output_type"] == "error":
            message = f"it failed with {output.get('ename')}: catch what is meant to fail, and print it"
            yield Violation("errors", name, message)


def check_paths(notebook: Notebook) -> Iterator[Violation]:
    """No output shows a folder of the machine that made it, neither printed nor in a warning."""
    for name, output in _outputs(notebook):
        for text in _shown(output):
            found = MACHINE_PATH.search(text)
            if found:
                line = next(line for line in text.splitlines() if MACHINE_PATH.search(line))
                what = "a warning with" if output.get("name") == "stderr" else "an output shows"
                yield Violation("paths", name, f"{what} a path of some machine: {line.strip()[:100]!r}")
                break


def check_progress(notebook: Notebook) -> Iterator[Violation]:
    """Printed text is what a terminal shows at the end: no carriage returns, no control codes, one piece."""
    for name, cell in _cells(notebook, "code"):
        previous = None
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                if output["text"] != screen(output["text"]):
                    yield Violation("progress", name, "progress output with control characters: run --fix")
                if output["name"] == previous:
                    yield Violation("progress", name, f"{output['name']} in several pieces: run --fix")
                previous = output["name"]
            else:
                previous = None


def check_widgets(notebook: Notebook) -> Iterator[Violation]:
    """No widget is committed: without its kernel it is dead, and a code host shows nothing of it."""
    for name, cell in _cells(notebook, "code"):
        outputs = cell.get("outputs", [])
        if any(WIDGET in output.get("data", {}) for output in outputs):
            if _visible_without_widgets(outputs):
                yield Violation("widgets", name, "a widget's view is dead in a file: run --fix")
            else:
                message = "a widget is all it shows: show a figure or print a text beside it"
                yield Violation("widgets", name, message)


def check_length(notebook: Notebook) -> Iterator[Violation]:
    """A code cell fits on a screen."""
    for name, cell in _cells(notebook, "code"):
        lines = len(cell["source"].splitlines())
        if lines > LONGEST_CELL:
            yield Violation("length", name, f"{lines} lines, {LONGEST_CELL} at most: split it or move it to labutils")


RULES: tuple[Callable[[Notebook], Iterator[Violation]], ...] = (
    check_schema,
    check_metadata,
    check_cell_metadata,
    check_ids,
    check_title,
    check_labutils_first,
    check_executed,
    check_waiting,
    check_errors,
    check_paths,
    check_progress,
    check_widgets,
    check_length,
)


def check_file(path: Path) -> list[Violation]:
    """All violations in one file, its spelling included."""
    raw = path.read_text(encoding="utf-8")
    try:
        notebook = joined(json.loads(raw))
    except json.JSONDecodeError as error:
        return [Violation("json", None, f"not JSON: {error}")]
    found = [violation for rule in RULES for violation in rule(notebook)]
    if raw != canonical(notebook):
        found.append(Violation("json", None, "not in canonical JSON: run --fix"))
    return found


# ----------------------------------------------------------------------------------------------------------
# The fixer
# ----------------------------------------------------------------------------------------------------------


def fix(notebook: Notebook) -> Notebook:
    """A copy, mended where that needs no judgement. Numbering, errors, paths and length are left alone."""
    notebook = joined(notebook)
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    notebook["metadata"] = copy.deepcopy(METADATA)
    _fix_ids(notebook)
    for cell in notebook["cells"]:
        cell["metadata"] = {key: v for key, v in cell.get("metadata", {}).items() if key in CELL_METADATA}
        cell["source"] = cell["source"].rstrip("\n")
        if cell["cell_type"] == "code":
            cell["outputs"] = _fix_outputs(cell.get("outputs", []))
            if cell.get("execution_count") is not None and WAITING in _tags(cell):
                cell["metadata"]["tags"].remove(WAITING)
                if not cell["metadata"]["tags"]:
                    del cell["metadata"]["tags"]
    return notebook


def _fix_ids(notebook: Notebook) -> None:
    """Gives cells without a readable id of their own one made of the section's heading and a number."""
    wanted = [cell.get("id", "") for cell in notebook["cells"]]
    taken = {identifier for identifier in wanted if _readable(identifier)}
    kept: set[str] = set()
    section = "start"
    for cell, identifier in zip(notebook["cells"], wanted, strict=True):
        heading = re.match(r"#{1,6}\s+(.+)", cell["source"]) if cell["cell_type"] == "markdown" else None
        if heading:
            section = _slug(heading[1])
        if _readable(identifier) and identifier not in kept:
            kept.add(identifier)
            continue
        number, new = 1, section
        while new in taken:
            number += 1
            new = f"{section}-{number}"
        cell["id"] = new
        taken.add(new)


def _readable(identifier: str) -> bool:
    named = READABLE_ID.fullmatch(identifier) and len(identifier) <= 64
    return bool(named) and not RANDOM_ID.fullmatch(identifier)


def _slug(heading: str, longest: int = 40) -> str:
    words = re.findall(r"[a-z0-9]+", heading.lower())
    while words and not words[0][0].isalpha():
        words.pop(0)  # "2. Tiling" -> "tiling"
    slug = "-".join(words)
    if len(slug) > longest:
        slug = slug[:longest].rsplit("-", 1)[0]
    return slug or "section"


def _fix_outputs(outputs: list[Notebook]) -> list[Notebook]:
    """Streams joined and rendered, widget views dropped where something visible stands beside them."""
    if _visible_without_widgets(outputs):
        outputs = [output for output in outputs if not _only_widget(output)]
    fixed: list[Notebook] = []
    for output in outputs:
        if _visible(output):
            output.get("data", {}).pop(WIDGET, None)
        if output["output_type"] == "stream" and fixed and fixed[-1].get("name") == output["name"]:
            fixed[-1]["text"] += output["text"]
        else:
            fixed.append(output)
    for output in fixed:
        if output["output_type"] == "stream":
            output["text"] = screen(output["text"])
    return [output for output in fixed if output["output_type"] != "stream" or output["text"]]


def _visible(output: Notebook) -> bool:
    """Whether a code host shows something for this output; a widget's own text/plain does not count."""
    data = output.get("data", {})
    if output["output_type"] == "stream":
        return bool(screen(output["text"]).strip())
    return bool({"image/png", "image/svg+xml", "image/jpeg", "text/html", "text/markdown"} & data.keys())


def _only_widget(output: Notebook) -> bool:
    return WIDGET in output.get("data", {}) and not _visible(output)


def _visible_without_widgets(outputs: list[Notebook]) -> bool:
    return any(_visible(o) or ("text/plain" in o.get("data", {}) and WIDGET not in o["data"]) for o in outputs)


def screen(text: str) -> str:
    """What a terminal shows after all of `text`: carriage returns, backspaces and cursor movements carried
    out.

    tqdm draws each state of a bar over the one before, and a bar inside a bar by moving the cursor up. Text
    without control characters comes back as it was.
    """
    if not re.search(r"[\r\b\x1b]", text):
        return text
    lines: list[list[str]] = [[]]
    row = column = 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b.|[\s\S]", text):
        if token == "\n":
            row, column = row + 1, 0
        elif token == "\r":
            column = 0
        elif token == "\b":
            column = max(0, column - 1)
        elif token[0] == "\x1b":
            steps = int(token[2:-1] or 1) if token[2:-1].isdigit() or len(token) == 3 else 1
            if token.endswith("A"):
                row = max(0, row - steps)
            elif token.endswith("B"):
                row += steps
            elif token.endswith("K") and row < len(lines):
                del lines[row][column:]
        else:
            while len(lines) <= row:
                lines.append([])
            line = lines[row]
            line.extend(" " * (column + 1 - len(line)))
            line[column] = token
            column += 1
        while len(lines) <= row:
            lines.append([])
    shown = "\n".join("".join(line).rstrip() for line in lines)
    return shown.rstrip("\n") + "\n" if shown.strip() else ""


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Checks the notebooks, mends them first with --fix; exit status 1 where a rule is still broken."""
    parser = argparse.ArgumentParser(description="Check that notebooks are canonical, and mend them.")
    parser.add_argument("--fix", action="store_true", help="mend what needs no judgement, in place")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: the four notebooks of the lab")
    arguments = parser.parse_args(argv)
    paths = arguments.notebooks or [ROOT / name for name in NOTEBOOKS]
    broken = 0
    for path in paths:
        if not path.is_file():
            print(f"{path.name}: there is no such file")
            broken += 1
            continue
        if arguments.fix:
            before = path.read_text(encoding="utf-8")
            after = canonical(fix(json.loads(before)))
            if after != before:
                path.write_text(after, encoding="utf-8")
                print(f"{path.name}: mended")
        violations = check_file(path)
        broken += len(violations)
        for violation in violations:
            print(f"{path.name}: {violation}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
