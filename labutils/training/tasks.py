"""Four small tasks that only a long context solves: documents with a question at the end, and the share answered right.

The documents are real text with a few words put in: a statement somewhere, and a question at the end. These words have
their own entries at the end of the vocabulary and do not occur in the text. So only the statement gives the answer. A
model that has not seen it can only guess one of `VALUES` values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from labutils.machine import runtime

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPT2LMHeadModel

VALUES = 32
"""Number of possible answers: a guess is right once in so many."""


@dataclass(frozen=True)
class Task:
    """The statements that a task puts into a text, and its question.

    Attributes:
        name: the task's name in tables and figures.
        about: the question in words.
        statements: number of values that are put into the text.
        answers: number of values that the question asks for, in their order; if fewer than the statements, the last.
        top: whether the statement stands at the top of its document, after an end-of-text token.
    """

    name: str
    about: str
    statements: int = 1
    answers: int = 1
    top: bool = False


TASKS: tuple[Task, ...] = (
    Task("fact", "a fact is stated once; what was it?"),
    Task("dialogue", "a state is set four times in the course of a dialogue; what is it at the end?", statements=4),
    Task("code", "a name is defined in the first line of a file; what is its value in the last?", top=True),
    Task("summary", "four key sentences stand in a document; list them in their order", statements=4, answers=4),
)
NEW_WORDS = VALUES + 2 * len(TASKS)
"""Entries that the tasks add to the text's vocabulary: the values, and for each task a word that introduces a statement
and a word that asks."""


@dataclass(frozen=True)
class Examples:
    """Documents of a task.

    Attributes:
        tokens: int64 (B, N); the last `answers` tokens of each row are the answers.
        answers: number of answers.
        distance: int64 (B,), tokens from the value that is asked for to its answer. If several are asked for, the first
            one counts.
    """

    tokens: torch.Tensor
    answers: int
    distance: torch.Tensor


def shortest(task: Task) -> int:
    """The shortest document, N, that has room for the task."""
    return 2 * task.statements + task.answers + 2


def make(
    task: Task, stream: torch.Tensor, vocab_size: int, length: int, batch: int, *, generator: torch.Generator,
    distance: int | None = None, end_of_text: int = 0,
) -> Examples:  # fmt: skip
    """Documents of a task, in random slices of a text.

    Args:
        task: of `TASKS`.
        stream: int64 (tokens,), the text.
        vocab_size: entries of the text's vocabulary; the tasks' own words come after them.
        length: N.
        batch: B.
        generator: on the CPU.
        distance: tokens from the value that is asked for to its answer, as in `Examples`. Statements stand in slots of
            two tokens, so every other distance becomes one more. None draws the places at random.
        end_of_text: the token before the statement of a task with `top`.

    Raises:
        ValueError: a task that is not in `TASKS`, a document or a text that is too short, or a distance that does not
            fit into the document.
    """
    known = [one.name for one in TASKS]
    if task.name not in known:
        raise ValueError(f"the task {task.name!r} has no words of its own in the vocabulary: take one of {known}")
    if length < shortest(task):
        raise ValueError(f"the task {task.name!r} needs documents of {shortest(task)} tokens or more, got {length}")
    if len(stream) < length:
        raise ValueError(f"the text has {len(stream):,} tokens, fewer than a document of {length:,}")
    begin = torch.randint(len(stream) - length + 1, (batch,), generator=generator)
    tokens = stream[begin[:, None] + torch.arange(length)]
    # The text ends before the question. A statement takes two tokens: slot s is the tokens 2 s + 1 and 2 s + 2.
    slots = (length - 1 - task.answers - 1) // 2
    draw = functools.partial(_draw, batch, generator)
    if distance is None:
        chosen = draw(slots, task.statements)
    else:  # the first statement that is asked for has a fixed slot; those before and after it are random
        before, after = task.statements - task.answers, task.answers - 1
        slot = (length - task.answers - distance - 2) // 2  # its value is `distance` before the answer, or one more
        if not before <= slot <= slots - task.answers:
            raise ValueError(
                f"distance {distance} does not fit into {length} tokens of the task {task.name!r}: ask for another, or "
                "for longer documents"
            )
        placed = torch.full((batch, 1), slot)
        chosen = torch.cat([draw(slot, before), placed, slot + 1 + draw(slots - slot - 1, after)], dim=1)
    place = 2 * chosen + 1  # of the word that introduces the statement
    values = vocab_size + torch.randint(VALUES, (batch, task.statements), generator=generator)
    introduces = vocab_size + VALUES + 2 * known.index(task.name)
    tokens.scatter_(1, place, introduces)
    tokens.scatter_(1, place + 1, values)
    if task.top:
        tokens.scatter_(1, place - 1, end_of_text)
    tokens[:, -task.answers - 1] = introduces + 1  # the question
    tokens[:, -task.answers :] = values[:, -task.answers :]
    first = place[:, task.statements - task.answers] + 1
    return Examples(tokens, task.answers, length - task.answers - first)


def _draw(batch: int, generator: torch.Generator, slots: int, count: int) -> torch.Tensor:
    """int64 (batch, count): in each row so many of the slots, ascending."""
    if not count:
        return torch.empty(batch, 0, dtype=torch.int64)
    rows = [torch.randperm(slots, generator=generator)[:count] for _ in range(batch)]
    return torch.stack(rows).sort(dim=1).values  # one sort for all rows: many small ones take as long as a step


def answer_logits(model: GPT2LMHeadModel, tokens: torch.Tensor, answers: int) -> torch.Tensor:
    """Logits for the last `answers` tokens; for no other position are logits computed.

    Args:
        model: a GPT-2.
        tokens: int64 (B, N), on the model's device.
        answers: number of tokens to predict.

    Returns:
        float32 (B, answers, V).
    """
    on_gpu = model.device.type == "cuda"
    with torch.autocast(model.device.type, dtype=runtime.dtype, enabled=on_gpu):
        hidden = model.transformer(tokens[:, :-1], use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, -answers:]).float()


@torch.no_grad()
def accuracy(
    model: GPT2LMHeadModel, task: Task, stream: torch.Tensor, vocab_size: int, length: int, *,
    distances: Sequence[int], context: int | None = None, examples: int = 64, batch: int = 8, seed: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """The share of right answers by the distance of the statement.

    Args:
        model: it is left unchanged.
        task, stream, vocab_size, length: as for `make`; the stream is held-out text.
        distances: the distances, in tokens, as for `make`.
        context: number of tokens before the last that the model sees; None: the whole document.
        examples: documents for each distance, two or more for an error.
        batch: number of documents that the model reads at a time.
        seed: seed of the documents.

    Returns:
        A row for each distance, with the columns task, distance, context (tokens), accuracy (share), error (its
        standard error, over documents), guess (1 / VALUES), examples.

    Raises:
        ValueError: as `make`.
    """
    import pandas as pd

    was_training = model.training
    model.eval()
    rows = []
    try:
        for distance in distances:
            generator = torch.Generator().manual_seed(seed)
            right = []
            for start in range(0, examples, batch):
                count = min(batch, examples - start)
                made = make(task, stream, vocab_size, length, count, generator=generator, distance=distance)
                tokens = made.tokens if context is None else made.tokens[:, -(context + 1) :]
                tokens = tokens.to(model.device)
                guessed = answer_logits(model, tokens, made.answers).argmax(dim=-1)
                right.append((guessed == tokens[:, -made.answers :]).double().mean(dim=1).cpu())
            shares = torch.cat(right)
            rows.append({
                "task": task.name, "distance": distance, "context": length - 1 if context is None else context,
                "accuracy": shares.mean().item(), "error": shares.std().item() / len(shares) ** 0.5,
                "guess": 1 / VALUES, "examples": len(shares),
            })  # fmt: skip
    finally:
        model.train(was_training)
    return pd.DataFrame(rows)
