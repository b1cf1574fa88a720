"""Long real texts that every Python installation carries, and their split into training and held-out texts.

Nothing is downloaded. `python_reference` reads the language reference that `help("for")` shows. `python_sources` reads
the standard library's own files. `python_sessions` reads the dialogues with the interpreter in the documentation of
numpy and pandas. The same versions give the same texts on every run.
"""

from __future__ import annotations

import doctest
import importlib.util
import os
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

import torch

# Folders below the standard library without library code; and pydoc_data, which `python_reference` reads, so that no
# text is in both.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}

# A paragraph of the reference this long (in characters) is text; a shorter one ("Example:") may well recur.
_PARAGRAPH = 80
# A topic is a document only if this many characters are left after repeated paragraphs are removed.
_SHORTEST_TOPIC = 500


def python_reference() -> list[str]:
    """The Python language reference, one document per topic, ordered by the topic's name.

    The topics come from `pydoc_data.topics`: 465,000 characters on Python 3.11, more or fewer on others. Some topics
    quote others ("compound" holds most of "if", "for" and "while"). So a paragraph of 80 characters or more is kept
    only in the longest topic that has it, and a split by document leaks nothing. 375,000 characters remain.
    `"\\n\\n".join(python_reference())` is the whole as one long document.

    Returns:
        Texts of 500 characters or more.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):  # the longest first
        fresh = []
        for paragraph in topics[name].strip().split("\n\n"):
            if len(paragraph.strip()) >= _PARAGRAPH:
                if paragraph.strip() in seen:
                    continue
                seen.add(paragraph.strip())
            fresh.append(paragraph)
        text = "\n\n".join(fresh)
        if len(text) >= _SHORTEST_TOPIC:
            kept[name] = text
    return [kept[name] for name in sorted(kept)]


def python_sources(*, min_characters: int = 1, max_total: int | None = None) -> list[str]:
    """The standard library's source files, each one document, ordered by their path.

    Tests, installed packages and empty files are left out. Of equal files only the first is kept.

    Args:
        min_characters: only files at least this long, in characters (long documents are what long contexts are for).
        max_total: stop before the first file with which the texts would exceed this many characters together; None
            takes all (about 11 million characters).

    Returns:
        The texts, no two of them equal.

    Raises:
        FileNotFoundError: no file is within the limits, or this Python has no readable sources (a zipped or stripped
            one).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]

    documents: dict[str, None] = {}  # a dict keeps the order and drops equal texts
    total = 0
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        with tokenize.open(path) as file:  # obeys the file's own "coding:" line
            text = file.read()
        if len(text) < max(min_characters, 1) or text in documents:
            continue
        if max_total is not None and total + len(text) > max_total:
            break
        documents[text] = None
        total += len(text)
    if not documents:
        raise FileNotFoundError(
            f"no source file of the standard library fits (min_characters={min_characters}, "
            f"max_total={max_total}; {len(paths)} .py files found): relax the limits, or use "
            "python_reference() or texts of your own"
        )
    return list(documents)


def python_sessions(packages: Sequence[str] = ("numpy", "pandas"), *, min_characters: int = 1) -> list[str]:
    """Dialogues between a person and the interpreter, from the documentation of installed packages.

    Docstrings show sessions: the input after ">>>", and Python's reply. The sessions of one source file, in their
    order, are one document; later turns use the names of earlier ones. numpy and pandas have more than half a million
    characters of sessions. Prose and code around them are left out, so nothing here is also in `python_sources`.

    Args:
        packages: names of installed packages.
        min_characters: only documents at least this long, in characters.

    Returns:
        A text for each file that shows a session, no two of them equal, package by package, ordered by path.

    Raises:
        FileNotFoundError: a package is not installed, or none of them shows a session that long.
    """
    parser = doctest.DocTestParser()
    documents: dict[str, None] = {}
    for package in packages:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise FileNotFoundError(f"the package {package!r} is not installed: name others, or install it")
        root = Path(found.origin).parent
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            if _SKIPPED_FOLDERS & set(path.relative_to(root).parts):
                continue
            with tokenize.open(path) as file:
                text = file.read()
            try:
                examples = parser.get_examples(text) if ">>> " in text else []
            except ValueError:  # a string about prompts, with a ">>>" that doctest cannot parse
                continue
            turns = (
                f">>> {example.source.rstrip().replace(chr(10), chr(10) + '... ')}\n{_reply(example.want)}"
                for example in examples
            )
            session = "".join(turns)
            if len(session) >= max(min_characters, 1):
                documents[session] = None
    if not documents:
        raise FileNotFoundError(
            f"no session of {min_characters} characters in {', '.join(packages)}: lower min_characters, or name others"
        )
    return list(documents)


def _reply(want: str) -> str:
    """The interpreter's reply. doctest reads to the next empty line, and so may read past the end of the docstring."""
    end = min((at for at in (want.find('"""'), want.find("'''")) if at >= 0), default=None)
    if end is None:
        return want
    answer = want[:end].rstrip()
    return answer + "\n" if answer else ""


def split(documents: Sequence[str], held_out: float = 0.1, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Splits documents into training and held-out texts: no document is on both sides.

    Args:
        documents: at least two texts, no two of them equal.
        held_out: the share of all characters to hold out, 0 < held_out < 1. Documents are drawn in random order until
            they reach this share, so the result may exceed it by one document. A document that is itself more than
            twice the share is drawn only if nothing else is left.
        seed: seed of the draw; the same seed gives the same split.

    Returns:
        (train, held_out), each in the order of `documents`, each non-empty.

    Raises:
        ValueError: fewer than two documents, equal documents, or `held_out` out of range.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out is a share between 0 and 1, exclusive; got {held_out}")
    if len(documents) < 2:
        raise ValueError(f"a split by document needs at least two documents, got {len(documents)}")
    if len(set(documents)) < len(documents):
        raise ValueError(
            "some documents are equal, so held-out text would be seen in training: drop the copies first, "
            "for instance with list(dict.fromkeys(documents))"
        )
    wanted = held_out * sum(map(len, documents))
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda index: len(documents[index]) > 2 * wanted)  # stable: the huge ones go last
    chosen: set[int] = set()
    characters = 0
    for index in order[:-1]:  # at least one document stays for training
        chosen.add(index)
        characters += len(documents[index])
        if characters >= wanted:
            break
    train = [text for index, text in enumerate(documents) if index not in chosen]
    return train, [documents[index] for index in sorted(chosen)]
