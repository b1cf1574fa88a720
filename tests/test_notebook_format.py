"""The notebooks obey the rules of tests/notebook_format.py, and each rule finds what it is there to find."""

import json

import nbformat
import notebook_format as rules
import pytest

PNG = {"image/png": "aVZCT1J3MEtHZ28=", "text/plain": "<Figure>"}
BAR = {
    rules.WIDGET: {"model_id": "1", "version_major": 2, "version_minor": 0},
    "text/plain": "  0%|    | 0/3",
}


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def display(data):
    return {"output_type": "display_data", "metadata": {}, "data": dict(data)}


def markdown(source, identifier, **metadata):
    return {"cell_type": "markdown", "id": identifier, "metadata": metadata, "source": source}


def code(source, identifier, count, *outputs, **metadata):
    return {
        "cell_type": "code",
        "id": identifier,
        "execution_count": count,
        "metadata": metadata,
        "outputs": list(outputs),
        "source": source,
    }


def notebook(*cells):
    """A notebook that breaks no rule, but for the cells given."""
    start = [
        markdown("# Attention\n\nText.", "attention"),
        code("from labutils import runtime\n\nimport torch", "imports", 1),
    ]
    return {"cells": [*start, *cells], "metadata": rules.METADATA, "nbformat": 4, "nbformat_minor": 5}


def broken_rules(nb):
    return {violation.rule for rule in rules.RULES for violation in rule(rules.joined(nb))}


# -- the lab's notebooks
# ---------------------------------------------------------------------------------------------


def test_exactly_the_four_notebooks_exist():
    assert sorted(path.name for path in rules.ROOT.glob("*.ipynb")) == sorted(rules.NOTEBOOKS)


@pytest.mark.parametrize("name", sorted(path.name for path in rules.ROOT.glob("*.ipynb")))
def test_notebook_obeys_every_rule(name):
    violations = rules.check_file(rules.ROOT / name)
    listed = "\n".join(map(str, violations))
    assert not violations, f"{name}, where `python tests/notebook_format.py --fix` mends much of it:\n{listed}"


# -- each rule on an example that breaks it
# --------------------------------------------------------------------------


def test_a_clean_notebook_breaks_no_rule():
    clean = notebook(
        code("print(1)", "print", 2, stream("1\n"), display(PNG)),
        code("torch.load(path)  # for you to run", "yours", None, tags=[rules.UNEXECUTED]),
        code(
            "1 + 1",
            "sum",
            3,
            {**display({"text/plain": "2"}), "output_type": "execute_result", "execution_count": 3},
        ),
    )
    assert broken_rules(clean) == set()


def test_cells_may_wait_for_a_run_where_the_reader_is_told():
    new = code("x = 1", "x", None, tags=[rules.WAITING])
    assert broken_rules(waiting(new, code("y = 1", "y", 2))) == set()


def older_format():
    return {**notebook(), "nbformat_minor": 4}


def field_that_nbformat_does_not_know():
    nb = notebook()
    nb["cells"][0]["author"] = "somebody"
    return nb


def kernel_of_somebody():
    other = {"kernelspec": {"display_name": "my-env", "language": "python", "name": "my-env"}}
    return {**notebook(), "metadata": other}


def widget_states():
    return {**notebook(), "metadata": {**rules.METADATA, "widgets": {}}}


def title_missing():
    nb = notebook()
    nb["cells"][0]["source"] = "## A section"
    return nb


def first_imports(source):
    nb = notebook()
    nb["cells"][1]["source"] = source
    return nb


def waiting(*cells):
    """A notebook whose first cell says that some cells have not been run yet."""
    nb = notebook(*cells)
    nb["cells"][0]["source"] += f"\n\nCells without an output {rules.WAITING_NOTE}."
    return nb


BROKEN = {
    "older nbformat": ("schema", older_format()),
    "unknown field": ("schema", field_that_nbformat_does_not_know()),
    "another kernel": ("metadata", kernel_of_somebody()),
    "widget states": ("metadata", widget_states()),
    "execution times": (
        "cell-metadata",
        notebook(code("x = 1", "x", 2, execution={"iopub.status.busy": "…"})),
    ),
    "random id": ("ids", notebook(markdown("Text.", "3fa9c1d2"))),
    "uuid": ("ids", notebook(markdown("Text.", "b1946ac9-2492-4d23-a8a6-1f0f2b7a9c11"))),
    "id with capitals": ("ids", notebook(markdown("Text.", "Softmax_Cell"))),
    "id used twice": ("ids", notebook(markdown("Text.", "same"), markdown("More.", "same"))),
    "no title": ("title", title_missing()),
    "torch first": ("labutils-first", first_imports("import torch\nimport labutils")),
    "triton first, in a block": (
        "labutils-first",
        first_imports("try:\n    import triton\nfinally:\n    import labutils"),
    ),
    "labutils later": ("labutils-first", first_imports("x = 1")),
    "name that only begins alike": ("labutils-first", first_imports("import labutils_old")),
    "not executed": ("executed", notebook(code("x = 1", "x", None))),
    "executed out of order": ("executed", notebook(code("x = 1", "x", 3), code("y = 1", "y", 2))),
    "executed twice": ("executed", notebook(code("x = 1", "x", 7))),
    "empty cell": ("executed", notebook(code("", "nothing", None))),
    "newer than the run, and nobody is told": (
        "waiting",
        notebook(code("x = 1", "x", None, tags=[rules.WAITING])),
    ),
    "said to be newer than the run, and executed": (
        "waiting",
        waiting(code("x = 1", "x", 2, tags=[rules.WAITING]), code("y = 1", "y", None, tags=[rules.WAITING])),
    ),
    "the reader is told of cells that are not there": ("waiting", waiting(code("x = 1", "x", 2))),
    "numbered as if it had waited": (
        "executed",
        waiting(code("x = 1", "x", None, tags=[rules.WAITING]), code("y = 1", "y", 3)),
    ),
    "result of another run": (
        "executed",
        notebook(code("1", "x", 2, {**display({}), "output_type": "execute_result", "execution_count": 9})),
    ),
    "exception": (
        "errors",
        notebook(
            code(
                "1/0",
                "x",
                2,
                {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "", "traceback": []},
            )
        ),
    ),
    "warning from site-packages": (
        "paths",
        notebook(code("f()", "x", 2, stream("/x/lib/python3/site-packages/a.py:3: UserWarning: no\n", "stderr"))),
    ),
    "warning from a cell": (
        "paths",
        notebook(code("f()", "x", 2, stream("/tmp/ipykernel_77/1.py:3: Warning\n", "stderr"))),
    ),
    "printed path": ("paths", notebook(code("f()", "x", 2, stream("saved to '/home/ann/results.csv'\n")))),
    "path in a result": (
        "paths",
        notebook(code("p", "x", 2, display({"text/plain": "PosixPath('/root/lab')"}))),
    ),
    "path in a figure of text": (
        "paths",
        notebook(code("p", "x", 2, display({"image/svg+xml": "<a>/work/x</a>"}))),
    ),
    "Windows path": ("paths", notebook(code("p", "x", 2, stream("C:\\Users\\ann\\lab\n")))),
    "progress bar": ("progress", notebook(code("f()", "x", 2, stream("10%\r100%\n", "stderr")))),
    "cursor movement": ("progress", notebook(code("f()", "x", 2, stream("a\n\x1b[Ab\n")))),
    "stream in pieces": ("progress", notebook(code("f()", "x", 2, stream("a\n"), stream("b\n")))),
    "only a widget": ("widgets", notebook(code("f()", "x", 2, display(BAR)))),
    "a widget and a figure": ("widgets", notebook(code("f()", "x", 2, display(BAR), display(PNG)))),
    "long cell": ("length", notebook(code("x = 1\n" * 41, "x", 2))),
}


@pytest.mark.parametrize(("rule", "nb"), BROKEN.values(), ids=BROKEN)
def test_rule_finds_what_breaks_it(rule, nb):
    assert broken_rules(nb) == {rule}


def test_every_rule_has_an_example_that_breaks_it():
    names = {rule.__name__.removeprefix("check_").replace("_", "-") for rule in rules.RULES}
    assert {rule for rule, _ in BROKEN.values()} == names


def test_a_violation_names_rule_cell_and_remedy():
    (violation,) = rules.check_ids(notebook(markdown("Text.", "3fa9c1d2")))
    assert str(violation).startswith("[ids] cell 3 (3fa9c1d2): ")
    assert "--fix" in str(violation)


@pytest.mark.parametrize(
    "harmless",
    [
        "see https://host.org/home/page",
        "3/tmp/2",
        "a/b/home/c",
        "HBM/SRAM",
        "N²/M bytes, /s",
        "labutils/work/x",
    ],
)
def test_what_only_looks_like_a_path_is_left_alone(harmless):
    assert broken_rules(notebook(code("f()", "x", 2, stream(harmless + "\n")))) == set()


@pytest.mark.parametrize("base64", ["iVBOR/tmp/abc", "iVBOR /root/abc"])
def test_an_image_may_hold_any_letters(base64):
    assert broken_rules(notebook(code("f()", "x", 2, display({"image/png": base64})))) == set()


# -- the spelling of the file
# ----------------------------------------------------------------------------------------


def test_canonical_json_is_accepted_and_no_other(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text(rules.canonical(notebook()), encoding="utf-8")
    assert rules.check_file(path) == []
    for other in (
        path.read_text(encoding="utf-8").rstrip("\n"),
        json.dumps(notebook(), indent=2) + "\n",
        json.dumps(notebook(), indent=1, sort_keys=True) + "\n",  # sources as strings, not as lists of lines
    ):
        path.write_text(other, encoding="utf-8")
        assert [violation.rule for violation in rules.check_file(path)] == ["json"]


def test_a_file_that_is_not_json_is_a_violation(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text("<<<<<<< HEAD\n")
    assert [violation.rule for violation in rules.check_file(path)] == ["json"]


def test_canonical_is_what_nbformat_writes(tmp_path):
    path = tmp_path / "a.ipynb"
    nb = notebook(code("print('é')\nx", "x", 2, stream("é\nb\n"), display(PNG)))
    nbformat.write(nbformat.from_dict(nb), path)
    assert rules.canonical(nb) == path.read_text(encoding="utf-8")


# -- the fixer
# -------------------------------------------------------------------------------------------------------

MENDED = [
    name
    for name in BROKEN
    if BROKEN[name][0] in ("metadata", "cell-metadata", "ids", "progress") or name == "a widget and a figure"
]


@pytest.mark.parametrize("name", MENDED)
def test_fix_mends(name):
    assert broken_rules(rules.fix(BROKEN[name][1])) == set()


@pytest.mark.parametrize(
    "name", ["not executed", "exception", "printed path", "only a widget", "long cell", "no title"]
)
def test_fix_leaves_what_needs_a_person(name):
    rule, nb = BROKEN[name]
    assert broken_rules(rules.fix(nb)) == {rule}


def test_fix_takes_the_tag_from_a_cell_that_was_run():
    nb = waiting(
        code("x = 1", "x", 2, tags=[rules.WAITING]),
        code("y = 1", "y", 3, tags=["exercise", rules.WAITING]),
        code("z = 1", "z", None, tags=[rules.WAITING]),
    )
    mended = rules.fix(nb)
    assert [cell["metadata"] for cell in mended["cells"][2:]] == [
        {},
        {"tags": ["exercise"]},
        {"tags": [rules.WAITING]},
    ]
    assert broken_rules(mended) == set()


@pytest.mark.parametrize("name", BROKEN)
def test_fix_is_done_after_one_run(name):
    once = rules.fix(BROKEN[name][1])
    assert rules.fix(once) == once


def test_fix_keeps_sources_outputs_and_readable_ids():
    nb = notebook(code("x = 1\ny", "kept-id", 2, stream("1\n"), display(PNG)), markdown("## Two\ntext", "two"))
    assert rules.fix(nb) == rules.joined(nb)


def test_fix_names_cells_after_their_section():
    nb = notebook(
        markdown("## 2. The online softmax", "00000000"),
        code("x = 1", "11111111", 2),
        code("y = 1", "kept", 3),
        markdown("Nothing but digits: `# 3`", "22222222"),
    )
    assert [cell["id"] for cell in rules.fix(nb)["cells"]] == [
        "attention",
        "imports",
        "the-online-softmax",
        "the-online-softmax-2",
        "kept",
        "the-online-softmax-3",
    ]


def test_fix_joins_a_stream_and_drops_an_empty_one():
    nb = notebook(code("f()", "x", 2, stream("a"), stream("b\n"), stream("50%\r    \r", "stderr")))
    assert rules.fix(nb)["cells"][-1]["outputs"] == [stream("ab\n")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n  text  \n", "plain\n  text  \n"),
        ("  0%|  | 0/2\r 50%|# | 1/2\r100%|##| 2/2\n", "100%|##| 2/2\n"),
        (
            "loading...\rdone\n",
            "doneing...\n",
        ),  # a shorter line leaves the rest of the longer one, as in a terminal
        ("loading...\r\x1b[Kdone\n", "done\n"),
        ("outer 0\n\x1b[Aouter 1\n", "outer 1\n"),
        ("o 0\n\rinner 0\rinner 9\x1b[A\ro 1\n", "o 1\ninner 9\n"),
        ("1\b2\n", "2\n"),
        ("\x1b[31mred\x1b[0m\n", "red\n"),
        ("bar\r   \r", ""),
        ("first\r\nsecond\r\n", "first\nsecond\n"),
    ],
)
def test_screen_shows_what_a_terminal_shows_at_the_end(text, shown):
    assert rules.screen(text) == shown
    assert rules.screen(shown) == shown


# -- the command
# -----------------------------------------------------------------------------------------------------


def test_command_reports_mends_and_reports_again(tmp_path, capsys):
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(BROKEN["random id"][1]))
    assert rules.main([str(path)]) == 1
    assert "a.ipynb: [ids] cell 3 (3fa9c1d2)" in capsys.readouterr().out
    assert rules.main(["--fix", str(path)]) == 0
    assert capsys.readouterr().out == "a.ipynb: mended\n"
    assert rules.main([str(path)]) == 0
    assert capsys.readouterr().out == ""


def test_command_fails_on_a_missing_notebook(tmp_path, capsys):
    assert rules.main([str(tmp_path / "a.ipynb")]) == 1
    assert "no such file" in capsys.readouterr().out
