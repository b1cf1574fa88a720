"""Tasks in miniature that only a long context solves: generators, a metric, and a course that teaches them.

The documents are real text with a few words put in: a statement somewhere, a question at the end. The words are the
task's own entries at the end of the vocabulary and do not occur in the text, so that nothing but the statement gives
the answer; who has not seen it can only guess one value of `VALUES`.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm import tqdm

from labutils.gpt2 import models, rope
from labutils.machine import runtime

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPT2LMHeadModel

VALUES = 32
"""Answers that are possible: guessing is right once in so many."""

_WARMUP = 20  # steps of linear warm-up in each stage


@dataclass(frozen=True)
class Task:
    """What is put into a text, and what is asked of it.

    Attributes:
        name: by which tables and figures know it.
        about: what is asked.
        statements: how many values are put into the text.
        answers: how many are asked for, at the end, in their order; where it is fewer, the last ones.
        top: the statement stands at the top of its document, after an end-of-text token.
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
"""Entries that the tasks need beyond the text's own vocabulary: the values, and for each task what introduces a
statement and what asks."""


@dataclass(frozen=True)
class Examples:
    """Documents of a task.

    Attributes:
        tokens: int64 (B, N); the last `answers` of each row are the answers.
        answers: how many.
        distance: int64 (B,), tokens from the value that is asked for (the first, where several are) to its answer.
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
        vocab_size: entries of the text's vocabulary; the task's own words follow them.
        length: N.
        batch: B.
        generator: on the CPU.
        distance: from the value that is asked for (the first, where several are) to its answer, in tokens; every other
            one gives one more, since statements stand in slots of two. None draws the places at random.
        end_of_text: what stands before the statement of a task at the top of its document.

    Raises:
        ValueError: a task that is none of `TASKS`, a document or a text too short, or a distance that does not fit
            into the document.
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
    else:  # the first that is asked for is placed; what comes before and after it is random
        before, after = task.statements - task.answers, task.answers - 1
        slot = (length - task.answers - distance - 2) // 2  # its value is `distance` before the answer, or one more
        if not before <= slot <= slots - task.answers:
            raise ValueError(
                f"distance {distance} does not fit into {length} tokens of the task {task.name!r}: ask for another, or "
                "for longer documents"
            )
        placed = torch.full((batch, 1), slot)
        chosen = torch.cat([draw(slot, before), placed, slot + 1 + draw(slots - slot - 1, after)], dim=1)
    place = 2 * chosen + 1  # of what introduces the statement
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
    return torch.stack(rows).sort(dim=1).values  # one sort for all: many small ones take as long as a step


def _answer_logits(model: GPT2LMHeadModel, tokens: torch.Tensor, answers: int) -> torch.Tensor:
    """(B, answers, V) float32: the logits for the last tokens; those of no other position are computed."""
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
        model: it is left as it was.
        task, stream, vocab_size, length: as for `make`; the stream is held-out text.
        distances: the distances, in tokens, as for `make`.
        context: the model is shown so many tokens before the last alone; None: the whole document.
        examples: documents for each distance, two or more for an error.
        batch: of so many at a time.
        seed: of the documents.

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
                guessed = _answer_logits(model, tokens, made.answers).argmax(dim=-1)
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


@dataclass(frozen=True)
class Stage:
    """A part of a course: documents of one length.

    Attributes:
        length: N.
        batch: B.
        steps: optimizer steps.
        lr: learning rate, reached over the first steps of the stage.
    """

    length: int
    batch: int
    steps: int
    lr: float


@dataclass
class Course:
    """Teaches a small GPT-2 with rotary positions the tasks, in documents that grow from stage to stage.

    Long documents alone teach nothing: among thousands of tokens the gradient by attention to the one that matters is
    lost in that by the others. In short documents it is found within some hundred steps, and keeping it while the
    document doubles takes few more. The loss counts the answers alone: nothing else in the text helps, and there are
    no logits for it.

    Attributes:
        model: of `small_model`.
        stages: the lengths, in order.
        stream: int64 (tokens,), the text.
        vocab_size: of the text.
        tasks: each batch is of one of them, drawn at random.
        seed: of the documents.
        done: steps that are done.
        seconds: that `run` has taken so far.
        rows: step, length, loss (nats per answer), accuracy (share) of each logged step.
        snapshots: copies of the weights, on the CPU, by length, made at the end of each stage.
    """

    model: GPT2LMHeadModel
    stages: Sequence[Stage]
    stream: torch.Tensor
    vocab_size: int
    tasks: Sequence[Task] = TASKS
    seed: int = 0
    done: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)
    snapshots: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.stages[0].lr, betas=(0.9, 0.95), weight_decay=0.01
        )
        self._scaler = torch.amp.GradScaler(
            self.model.device.type, enabled=self.model.device.type == "cuda" and runtime.dtype == torch.float16
        )
        self._finished = 0  # stages whose weights are in `snapshots`

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def run(self, *, progress: bool = True, log_every: int = 10) -> Course:
        """Goes through the stages. Where it is interrupted, the next call goes on; after the end it does nothing.

        Args:
            progress: show a progress bar.
            log_every: steps per row; the last step of a stage always has one.

        Returns:
            The course itself.
        """
        began = time.perf_counter()
        plan = list(itertools.chain.from_iterable([(s, i) for i in range(s.steps)] for s in self.stages))
        bar = tqdm(
            total=len(plan), initial=self.done, file=sys.stdout, disable=not progress, unit="step", mininterval=0.5
        )
        self.model.train()
        try:
            self._keep_finished_stages()
            for stage, i in plan[self.done :]:
                loss, right = self._step(stage, i)
                self.done += 1
                bar.update()
                if self.done % log_every == 0 or i == stage.steps - 1:
                    row = {"step": self.done, "length": stage.length, "loss": loss.item(), "accuracy": right.item()}
                    self.rows.append(row)
                    bar.set_postfix_str(f"N = {stage.length:,}: loss {row['loss']:.2f}, {row['accuracy']:.0%} right")
                self._keep_finished_stages()
        except KeyboardInterrupt:
            self._forget_half_a_step()
            print(f"\nInterrupted after {self.done} of {len(plan)} steps: run this cell again to go on.")
        finally:
            bar.close()
            self.seconds += time.perf_counter() - began
        return self

    def model_of(self, length: int) -> GPT2LMHeadModel:
        """A copy of the model as it was at the end of the stage with documents of this length.

        Raises:
            KeyError: no such stage has been finished.
        """
        import copy

        if length not in self.snapshots:
            raise KeyError(
                f"no stage of {length} tokens has been finished; there are {list(self.snapshots)}: run() first"
            )
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.snapshots[length])
        return model

    def _keep_finished_stages(self) -> None:
        """A snapshot at the end of a stage; where an interrupt came before it, the next `run` makes it first."""
        ends = list(itertools.accumulate(stage.steps for stage in self.stages))
        while self._finished < len(ends) and self.done >= ends[self._finished]:
            state = self.model.state_dict()
            snapshot = {name: value.detach().cpu().clone() for name, value in state.items()}
            self.snapshots[self.stages[self._finished].length] = snapshot
            self._finished += 1

    def _forget_half_a_step(self) -> None:
        """What an interrupt leaves within a step: gradients, and a scaler that has unscaled them already."""
        self._optimizer.zero_grad(set_to_none=True)
        scaler = torch.amp.GradScaler(self.model.device.type, enabled=self._scaler.is_enabled())
        scaler.load_state_dict(self._scaler.state_dict())
        self._scaler = scaler

    def _step(self, stage: Stage, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Step i of a stage: the loss, and the share of right answers."""
        # The documents depend on the step alone, so that a course that was interrupted goes on as it would have.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.done)
        task = self.tasks[int(torch.randint(len(self.tasks), (), generator=generator))]
        made = make(task, self.stream, self.vocab_size, stage.length, stage.batch, generator=generator)
        tokens = made.tokens.to(self.model.device)
        for group in self._optimizer.param_groups:
            group["lr"] = stage.lr * min(1.0, (i + 1) / _WARMUP)
        logits = _answer_logits(self.model, tokens, made.answers)
        wanted = tokens[:, -made.answers :]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), (logits.argmax(dim=-1) == wanted).float().mean()


def small_model(vocab_size: int, *, attention: str, layers: int, heads: int, width: int) -> GPT2LMHeadModel:
    """A small GPT-2 with rotary positions, whose vocabulary has the tasks' words; on `runtime.device`.

    Args:
        vocab_size: entries of the text's vocabulary; `NEW_WORDS` are added.
        attention: as for `labutils.gpt2.models.gpt2`.
        layers, heads, width: of the model; width / heads, the head dimension D, must be even.

    Raises:
        ValueError: an odd head dimension, or an attention that transformers does not know.
    """
    model = models.gpt2(
        "tiny", n_positions=16, vocab_size=vocab_size + NEW_WORDS, attention=attention,
        n_layer=layers, n_head=heads, n_embd=width, lab_size=f"{layers} layers, width {width}",
    )  # fmt: skip
    return rope.use_rope(model).to(runtime.device)
