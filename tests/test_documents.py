"""What the Markdown pages and the text of the notebooks point at is there: links, names, files, commands."""

import importlib
import re
import shlex
import urllib.parse
from pathlib import Path

import pytest
from notebook_format import NOTEBOOKS, ROOT, read

from labutils.__main__ import COMMANDS
from labutils.attention import reference

PAGES = ("README.md", "CONTRIBUTING.md", "tools/README.md", "labutils/attention/kernels/TUNING.md", *NOTEBOOKS)
PACKAGE = ROOT / "labutils"


def modules() -> dict[str, list[str]]:
    """The last name of each module and package of labutils, and the whole names that end in it."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found.setdefault(parts[-1], []).append(".".join(parts))
    return found


MODULES = modules()
TOOLS = {path.stem for path in (ROOT / "tools").glob("*.py")}


def text_of(page: str) -> str:
    """A page's Markdown; of a notebook, all Markdown cells."""
    path = ROOT / page
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell["source"] for cell in read(path)["cells"] if cell["cell_type"] == "markdown")


def prose_of(page: str) -> str:
    """The same without blocks of code."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)


def code_spans(page: str) -> list[str]:
    """What stands between single backticks, on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]


def missing_links(text: str, folder: Path) -> list[str]:
    """Targets of relative links and images in Markdown that are not in `folder`, headings included."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, heading = urllib.parse.unquote(target).partition("#")
        path = folder / name if name else folder
        if heading or not name or not path.exists() or not path.resolve().is_relative_to(ROOT):
            wrong.append(target)  # no page links to a heading; whoever begins must look for it here
    return wrong


def leads_somewhere(start: str, names: list[str]) -> bool:
    """Whether the names, one after the other, lead from a module to an attribute or to a module below it."""
    try:
        thing = importlib.import_module(start)
        for name in names:
            path = f"{getattr(thing, '__name__', '')}.{name}"
            thing = getattr(thing, name) if hasattr(thing, name) else importlib.import_module(path)
    except ImportError:
        return False
    return True


def unknown_names(spans: list[str]) -> list[str]:
    """Spans that name nothing in labutils.

    A whole name, such as `labutils.gpt2.models.gpt2`, begins with "labutils". A short one, such as `models.gpt2` or
    `reference.judge(...)`, begins with the last name of a module: it is right if any module of that name has the rest.
    """
    wrong = []
    for span in spans:
        found = re.match(r"\w+(?:\.\w+)+", span)
        if not found or re.search(r"[/\s-]|\.(csv|json|py|md|yaml|ipynb)\b", span.split("(")[0]):
            continue
        first, *rest = found[0].split(".")
        starts = ["labutils"] if first == "labutils" else MODULES.get(first, [])
        if starts and not any(leads_somewhere(start, rest) for start in starts):
            wrong.append(span)
    return wrong


def missing_files(spans: list[str]) -> list[str]:
    """Spans that look like files of the repository, by their whole path or below a folder that the page is about."""
    folders = (
        "labutils/attention",
        "labutils/attention/kernels",
        "labutils/attention/tuning",
        "labutils/results/nvidia_h200",
        "tests",
        "tools",
    )
    about = (ROOT, *(ROOT / folder for folder in folders))
    names = [span for span in spans if re.fullmatch(r"[\w./-]+\.(py|md|csv|json|txt|yaml|ipynb|png)", span)]
    names = [name for name in names if "NN" not in name]
    return [name for name in names if not any((folder / name).exists() for folder in about)]


def commands_in(page: str) -> list[list[str]]:
    """Commands in blocks of shell and in spans, as lists of words: `python -m labutils bench`, `python tools/study.py`.

    A span may begin with the name of a command of labutils. A list begins with that name, or with a script of tools.
    """
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of(page), re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in [*lines, *code_spans(page)]:
        called = re.search(r"python (?:-m labutils (\w.*)|(tools/\w+\.py.*))", line)
        if called or (" " in line and line.split()[0] in COMMANDS):
            found.append(shlex.split((called[1] or called[2]) if called else line, comments=True))
    return found


def parser_of(command: str):
    """The parser of a command of labutils, or of a script of tools."""
    name = command.removeprefix("tools/").removesuffix(".py")
    if command in COMMANDS:
        return importlib.import_module(f"labutils.commands.{command}").parser()
    assert name in TOOLS, f"there is no command {command}"
    return importlib.import_module(name).parser()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert not missing_links(text_of(page), (ROOT / page).parent)


@pytest.mark.parametrize("page", PAGES)
def test_names_and_files_are_there(page):
    spans = code_spans(page)
    assert not unknown_names(spans)
    assert not missing_files(spans)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page, capsys):
    for command, *words in commands_in(page):
        if command == "lab":
            continue  # it hands its arguments on
        try:
            parser_of(command).parse_args(words)
        except SystemExit:
            said = capsys.readouterr().err
            # A sentence may name a command without all that it must be given.
            assert "the following arguments are required" in said and "--" not in shlex.join(words), said


def test_what_is_not_there_is_noticed():
    assert missing_links("[a](gone.ipynb) [b](README.md) [c](https://example.org/x)", ROOT) == ["gone.ipynb"]
    assert missing_files(["models.csv", "gone.csv", "tests/conftest.py", "tools/gone.txt"]) == [
        "gone.csv",
        "tools/gone.txt",
    ]
    assert ["check"] in commands_in("README.md") and len(commands_in("CONTRIBUTING.md")) > 8
    assert ["tools/figure.py"] in commands_in("README.md")
    for wrong in ("nap", "tools/nap.py"):
        with pytest.raises(AssertionError, match="there is no command"):
            parser_of(wrong)


@pytest.mark.parametrize(
    "there",
    [
        "labutils.gpt2.models.gpt2",
        "labutils.flash_attn_func",  # handed on by the package itself
        "labutils.training.train(...,",
        "training.try_step(...)",  # a room
        "models.gpt2",  # a module in a room; plotting has a module of this name, too
        "reference.judge(a, b)",
        "flash_v2_backward._dq_kernel",  # two rooms down
        "torch.softmax",  # of something else
        "models.csv",
        "x.y",
        "labutils",
    ],
)
def test_names_that_are_there(there):
    assert not unknown_names([there])


@pytest.mark.parametrize(
    "gone",
    [
        "labutils.gone",
        "labutils.models.gpt2",  # where it was before the rooms
        "labutils.gpt2.gone",
        "labutils.gpt2.models.gone",
        "labutils.gone(...)",
        "training.gone",
        "models.gone(...)",
        "reference.judge.gone",
        "flash_v2_backward.gone",
        "fast_path.gone",
    ],
)
def test_names_that_are_not_there(gone):
    assert unknown_names([gone]) == [gone]


def test_the_readme_s_own_program_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", text_of("README.md"), re.S | re.M)
    (program,) = (block for block in blocks if "flash_attn_func" in block)
    names: dict = {}
    exec(program, names)
    assert reference.check_attention(names["out"], names["q"], names["k"], names["v"], causal=True)
    for tensor in (names["q"], names["k"], names["v"]):
        assert tensor.grad.abs().sum() > 0
