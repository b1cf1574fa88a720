"""From documents to batches of token sequences: a trained tokenizer, packing, borders of documents, batches.

`train_tokenizer` and `pack` turn documents into sequences of equal length. `document_borders` finds the documents in
packed sequences again. `long_documents` keeps only documents that fill a sequence on their own. `batches` draws random
batches without end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""The entry of a tokenizer that ends a document, written as in GPT-2."""


def train_tokenizer(texts: Sequence[str], vocab_size: int = 4096) -> Tokenizer:
    """Trains a byte-level BPE tokenizer on `texts`, the kind that GPT-2 has (Radford et al. 2019, section 2.2).

    It can encode any text, because all 256 bytes are in the vocabulary, and decoding gives the text back exactly.
    The end-of-text token has id 0; the same characters inside a text are encoded as ordinary text.

    Args:
        texts: training texts, from which it learns the merges; no held-out ones.
        vocab_size: number of entries wanted, at least 257. A short text may offer fewer, so give a model
            `tokenizer.get_vocab_size()`.

    Returns:
        The tokenizer, for `pack`.

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


@dataclass(frozen=True)
class PackStats:
    """Counts from `pack`: documents in, sequences out, tokens dropped.

    Attributes:
        documents: number of documents.
        characters: their total length in characters.
        tokens: their total length in tokens, with one end-of-text token for each document.
        sequences: number of sequences.
        seqlen: tokens in each sequence.
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
        """Mean number of characters in a token; end-of-text tokens do not count."""
        return self.characters / max(self.tokens - self.documents, 1)

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.characters:,} characters, {self.tokens:,} tokens "
            f"({self.characters_per_token:.2f} characters a token): {self.sequences:,} sequences of "
            f"{self.seqlen:,}; the last {self.dropped_tokens:,} tokens did not fill one and are left out"
        )


def pack(documents: Sequence[str], tokenizer: Tokenizer, seqlen: int) -> tuple[torch.Tensor, PackStats]:
    """Joins the documents, each followed by an end-of-text token, and cuts the stream into sequences of equal length.

    Nothing is padded, and only the tail that does not fill a sequence is dropped. A sequence may hold the end of one
    document and the start of the next. Attention sees across that border unless it gets `document_borders`.

    Args:
        documents: texts, kept in this order.
        tokenizer: from `train_tokenizer`, or any `tokenizers.Tokenizer` that has the entry "<|endoftext|>".
        seqlen: tokens per sequence, N.

    Returns:
        (sequences, stats): int64 of shape (sequences, N), and the counts.

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


def long_documents(texts: Iterable[str], tokenizer: Any, length: int) -> torch.Tensor:
    """The first `length` tokens of each document that is at least that long.

    Loss by position needs one document from its beginning in each row. In packed sequences position 4,000 of a row may
    be the first line of a file.

    Args:
        texts: the documents.
        tokenizer: from `train_tokenizer`, or any `tokenizers.Tokenizer`.
        length: in tokens.

    Returns:
        int64 (S, length), a row for each of the S documents that are long enough.

    Raises:
        ValueError: no document is that long.
    """
    encoded = (encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False))
    rows = [ids[:length] for ids in encoded if len(ids) >= length]
    if not rows:
        raise ValueError(f"no document has {length:,} tokens: ask for fewer, or pass longer documents")
    return torch.tensor(rows, dtype=torch.int64)


def document_borders(tokens: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Where the documents in packed sequences begin and end, in the form that `flash_attn_varlen_func` takes.

    Args:
        tokens: int64 (B, N), rows of `pack`. Each row begins a new document: attention never crosses rows.
        end_of_text: the token that ends a document, and belongs to it.

    Returns:
        cu_seqlens: int32 (documents + 1,) over the B * N tokens in one line, from 0 to B * N.

    Raises:
        ValueError: the tokens are not (B, N), or there are none.
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
    """The endless iterator of `batches`, which describes the arguments. A checkpoint can save and restore its place."""

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
        """The place in the sequences, for `load_state_dict` of an iterator over the same sequences.

        Returns:
            The random generator's state, the sequences still to come in this pass, and the number of all sequences.
        """
        return {"generator": self._generator.get_state(), "waiting": list(self._waiting), "of": len(self._sequences)}

    def load_state_dict(self, state: dict) -> None:
        """Goes to the place of a `state_dict`, and continues with the same batches.

        Raises:
            ValueError: the `state_dict` comes from another number of sequences.
        """
        if state["of"] != len(self._sequences):
            raise ValueError(f"the place is one among {state['of']} sequences, but here are {len(self._sequences)}")
        self._generator.set_state(state["generator"])
        self._waiting = list(state["waiting"])


def batches(sequences: torch.Tensor, batch_size: int = 1, *, seed: int = 0, cut: int | None = None) -> Batches:
    """Endless random batches: each pass takes every sequence once, in a new random order.

    Args:
        sequences: int64 (S, N), from `pack`.
        batch_size: B. A batch may span two passes, so that no sequence is left out.
        seed: seed of the order; the same seed gives the same batches.
        cut: N', a divisor of N: each batch has the same tokens in shorter sequences. None leaves them whole.

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
