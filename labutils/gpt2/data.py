"""Long real texts that every installation carries, a tokenizer trained on them, and packing to long sequences.

Nothing is downloaded. `python_reference` reads the language reference that `help("for")` shows, `python_sources` the
standard library's own files, and `python_sessions` the dialogues with the interpreter in the documentation of numpy and
pandas. All are the same on every run with the same versions.
"""

from __future__ import annotations

import doctest
import importlib.util
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""The entry of a tokenizer that ends a document, as GPT-2's is written."""

# Folders below the standard library that hold no library code, and pydoc_data: that is `python_reference`'s,
# and a text must not be in both.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}

# A paragraph of the reference this long (in characters) is text; a shorter one ("Example:") may well recur.
_PARAGRAPH = 80
# What is left of a topic after removing repeated paragraphs is a document only if it is longer than this.
_SHORTEST_TOPIC = 500


@dataclass(frozen=True)
class PackStats:
    """What `pack` made of a list of documents.

    Attributes:
        documents: how many documents went in.
        characters: their length in characters, all together.
        tokens: their length in tokens, one end-of-text token per document included.
        sequences: how many sequences came out.
        seqlen: tokens in each of them.
        dropped_tokens: length of the tail that did not fill a last sequence (always < seqlen).
    """

    documents: int
    characters: int
    tokens: int
    sequences: int
    seqlen: int
    dropped_tokens: int

    @property
    def characters_per_token(self) -> float:
        """Mean characters that one token stands for, end-of-text tokens left out of the count."""
        return self.characters / max(self.tokens - self.documents, 1)

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.characters:,} characters, {self.tokens:,} tokens "
            f"({self.characters_per_token:.2f} characters a token): {self.sequences:,} sequences of "
            f"{self.seqlen:,}; the last {self.dropped_tokens:,} tokens did not fill one and are left out"
        )


def python_reference() -> list[str]:
    """The Python language reference, one document per topic, ordered by the topic's name.

    The topics come from `pydoc_data.topics`, 465,000 characters on Python 3.11, more or fewer on others. Some of them
    quote others ("compound" holds most of "if", "for" and "while"), so a paragraph of 80 characters or more is kept
    only in the longest topic that has it: a split by document leaks nothing. 375,000 characters remain.
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

    Tests, installed packages and empty files are left out, and of equal files all but the first.

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

    Docstrings show sessions: what is typed after ">>>", and what Python replies. The sessions of one source file,
    in the order in which they stand, are one document; later turns use the names of earlier ones. numpy and pandas
    have more than half a million characters of them. Their prose and code are left out, so that nothing here is in
    `python_sources` as well.

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
            except ValueError:  # a prompt that is not one, in a string about prompts
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
    """What the interpreter answered: doctest reads on to the next empty line, which may lie behind the docstring."""
    end = min((at for at in (want.find('"""'), want.find("'''")) if at >= 0), default=None)
    if end is None:
        return want
    answer = want[:end].rstrip()
    return answer + "\n" if answer else ""


def split(documents: Sequence[str], held_out: float = 0.1, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split into train and held-out by document: no document is on both sides.

    Args:
        documents: at least two texts, no two of them equal.
        held_out: the share of all characters to hold out, 0 < held_out < 1. Documents are drawn in random order until
            they reach it, so the share is met up to one document's length; a document that alone is more than twice the
            share is drawn only if nothing else is left.
        seed: of the draw; the same seed gives the same split.

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
    for index in order[:-1]:  # one document at least stays for training
        chosen.add(index)
        characters += len(documents[index])
        if characters >= wanted:
            break
    train = [text for index, text in enumerate(documents) if index not in chosen]
    return train, [documents[index] for index in sorted(chosen)]


def train_tokenizer(texts: Sequence[str], vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE on `texts`, as GPT-2's tokenizer was (Radford et al. 2019, section 2.2).

    Any text can be encoded, since all 256 bytes are in the vocabulary, and decoding gives it back exactly.
    The end-of-text token has id 0; the same characters inside a text are encoded as ordinary text.

    Args:
        texts: what to learn the merges from (train texts, not held-out ones).
        vocab_size: number of entries wanted, at least 257. A short text may offer fewer: the size to give a model is
            `tokenizer.get_vocab_size()`.

    Returns:
        The tokenizer; its `encode_batch` is what `pack` calls.

    Raises:
        ValueError: no text, or `vocab_size` below 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 256 + 1  # the bytes and end-of-text
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (256 bytes and end-of-text), got {vocab_size}")
    if not any(texts):
        raise ValueError("there is no text to train a tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" written in a document is text
    return tokenizer


def pack(documents: Sequence[str], tokenizer: Tokenizer, seqlen: int) -> tuple[torch.Tensor, PackStats]:
    """Join the documents, each followed by an end-of-text token, and cut the stream into equal sequences.

    Nothing is padded, and nothing dropped but the tail that does not fill a sequence. A sequence may hold the end of
    one document and the start of the next; attention sees across that border unless `document_borders` keeps it from
    doing so.

    Args:
        documents: texts, kept in this order.
        tokenizer: from `train_tokenizer`, or any `tokenizers.Tokenizer` that has the entry "<|endoftext|>".
        seqlen: tokens per sequence, N.

    Returns:
        (sequences, stats): int64 of shape (sequences, N), and what was counted and dropped.

    Raises:
        ValueError: `seqlen` < 2, a tokenizer without end-of-text, or less text than one sequence.
    """
    if seqlen < 2:
        raise ValueError(f"seqlen must be at least 2 (a token and the one it predicts), got {seqlen}")
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    if end_of_text is None:
        raise ValueError(f'the tokenizer has no entry "{END_OF_TEXT}", which marks where a document ends')
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        stream += encoding.ids
        stream.append(end_of_text)
    count = len(stream) // seqlen
    if count == 0:
        raise ValueError(
            f"{len(documents)} documents give {len(stream):,} tokens, fewer than one sequence of {seqlen:,}: "
            "pass more text or a smaller seqlen"
        )
    stats = PackStats(
        documents=len(documents),
        characters=sum(map(len, documents)),
        tokens=len(stream),
        sequences=count,
        seqlen=seqlen,
        dropped_tokens=len(stream) - count * seqlen,
    )
    return torch.tensor(stream[: count * seqlen], dtype=torch.int64).view(count, seqlen), stats


def document_borders(tokens: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Where the documents in packed sequences begin and end, as `flash_attn_varlen_func` takes it.

    Args:
        tokens: int64 (B, N), rows of `pack`. A row begins a document of its own: attention never crosses rows.
        end_of_text: the token that ends a document, and belongs to it.

    Returns:
        cu_seqlens: int32 (documents + 1,) over the B * N tokens in one line, from 0 to B * N.

    Raises:
        ValueError: not (B, N), or no token.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be (B, N), at least one of them; got {tuple(tokens.shape)}")
    last = tokens == end_of_text
    last[:, -1] = True
    ends = last.flatten().nonzero()[:, 0] + 1
    return torch.nn.functional.pad(ends, (1, 0)).int()


def document_positions(tokens: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Positions that begin at 0 in each document: int64 (B, N). Arguments and errors as `document_borders`."""
    borders = document_borders(tokens, end_of_text).long()
    begins = borders[:-1].repeat_interleave(borders.diff())
    return (torch.arange(tokens.numel(), device=tokens.device) - begins).view(tokens.shape)


class Batches(Iterator[torch.Tensor]):
    """What `batches` returns, which has the arguments: an endless iterator that knows its place, for checkpoints."""

    def __init__(self, sequences: torch.Tensor, batch_size: int, seed: int, cut: int | None = None):
        self._sequences, self._batch_size = sequences, batch_size
        self._cut = sequences.shape[1] if cut is None else cut
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def __next__(self) -> torch.Tensor:
        while len(self._waiting) < self._batch_size:
            self._waiting += torch.randperm(len(self._sequences), generator=self._generator).tolist()
        taken, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
        return self._sequences[taken].view(-1, self._cut)

    def state_dict(self) -> dict:
        """The place: after `load_state_dict` an iterator over the same sequences goes on with the same batches.

        Returns:
            The random generator's state, the sequences that wait for their turn in this pass, and how many there are.
        """
        return {"generator": self._generator.get_state(), "waiting": list(self._waiting), "of": len(self._sequences)}

    def load_state_dict(self, state: dict) -> None:
        """Goes to the place of a `state_dict`.

        Raises:
            ValueError: it is one of another number of sequences.
        """
        if state["of"] != len(self._sequences):
            raise ValueError(f"the place is one among {state['of']} sequences, and here are {len(self._sequences)}")
        self._generator.set_state(state["generator"])
        self._waiting = list(state["waiting"])


def batches(sequences: torch.Tensor, batch_size: int = 1, *, seed: int = 0, cut: int | None = None) -> Batches:
    """Endless random batches: every sequence once per pass, in a new random order each pass.

    Args:
        sequences: int64 (S, N), from `pack`.
        batch_size: B. A batch may span two passes, so that no sequence is left out.
        seed: of the order; the same seed gives the same batches.
        cut: N', which divides N: each batch has the same tokens in shorter sequences. None leaves them whole.

    Returns:
        An iterator whose batches are int64 (B, N), or (B · N / N', N'), on the device of `sequences`.

    Raises:
        ValueError: no sequences, `batch_size` < 1, or a `cut` that does not divide N.
    """
    if sequences.ndim != 2 or len(sequences) == 0:
        raise ValueError(f"sequences must be (S, N) with S >= 1, got shape {tuple(sequences.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if cut is not None and (cut < 1 or sequences.shape[1] % cut):
        raise ValueError(f"sequences of {sequences.shape[1]} tokens cannot be cut into pieces of {cut}")
    return Batches(sequences, batch_size, seed, cut)
