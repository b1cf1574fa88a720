"""A curriculum for the tasks of `labutils.training.tasks`: a small GPT-2 learns them in documents that grow.

Starting with long documents teaches nothing. Among thousands of tokens the gradient through the token that matters
drowns in the gradients through all others. In short documents the model finds that token within some hundred steps.
Each time the documents grow, it needs only a few more.
"""

from __future__ import annotations

import copy
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
from labutils.training.step import backward_and_step
from labutils.training.tasks import NEW_WORDS, TASKS, Task, answer_logits, make

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

_WARMUP = 20  # steps of linear warm-up in each stage


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

    The loss counts only the answers. Nothing else in the text helps, and logits exist only for the answers.

    Attributes:
        model: of `small_model`.
        stages: the lengths, in order.
        stream: int64 (tokens,), the text.
        vocab_size: entries of the text's vocabulary.
        tasks: each batch has one of them, drawn at random.
        seed: seed of the documents.
        done: number of finished steps.
        seconds: time that `run` has taken so far.
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
        self._finished = 0  # number of stages whose weights are in `snapshots`

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def run(self, *, progress: bool = True, log_every: int = 10) -> Course:
        """Goes through the stages. After an interrupt the next call continues; after the end it does nothing.

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
        if length not in self.snapshots:
            raise KeyError(
                f"no stage of {length} tokens has been finished; there are {list(self.snapshots)}: run() first"
            )
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.snapshots[length])
        return model

    def _keep_finished_stages(self) -> None:
        """Makes a snapshot at the end of a stage. If an interrupt came first, the next `run` makes it."""
        ends = list(itertools.accumulate(stage.steps for stage in self.stages))
        while self._finished < len(ends) and self.done >= ends[self._finished]:
            state = self.model.state_dict()
            snapshot = {name: value.detach().cpu().clone() for name, value in state.items()}
            self.snapshots[self.stages[self._finished].length] = snapshot
            self._finished += 1

    def _forget_half_a_step(self) -> None:
        """Removes the remains of an interrupted step: gradients, and a scaler that may have unscaled them already."""
        self._optimizer.zero_grad(set_to_none=True)
        scaler = torch.amp.GradScaler(self.model.device.type, enabled=self._scaler.is_enabled())
        scaler.load_state_dict(self._scaler.state_dict())
        self._scaler = scaler

    def _step(self, stage: Stage, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Step i of a stage: the loss, and the share of right answers."""
        # The documents depend only on the step, so an interrupted course continues as if nothing had happened.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.done)
        task = self.tasks[int(torch.randint(len(self.tasks), (), generator=generator))]
        made = make(task, self.stream, self.vocab_size, stage.length, stage.batch, generator=generator)
        tokens = made.tokens.to(self.model.device)
        for group in self._optimizer.param_groups:
            group["lr"] = stage.lr * min(1.0, (i + 1) / _WARMUP)
        logits = answer_logits(self.model, tokens, made.answers)
        wanted = tokens[:, -made.answers :]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        backward_and_step(self.model, loss, self._optimizer, self._scaler, clip=1.0)
        return loss.detach(), (logits.argmax(dim=-1) == wanted).float().mean()


def small_model(vocab_size: int, *, attention: str, layers: int, heads: int, width: int) -> GPT2LMHeadModel:
    """A small GPT-2 with rotary positions, whose vocabulary includes the tasks' words; on `runtime.device`.

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
