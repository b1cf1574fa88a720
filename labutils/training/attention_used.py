"""Which attention a training step really runs: `attention_used` profiles one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch

from labutils.attention.backends import BACKENDS
from labutils.training.step import as_in_training, device_of, loss_of, resolved_autocast

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def attention_used(
    model: GPT2LMHeadModel,
    tokens: torch.Tensor,
    *,
    autocast_dtype: torch.dtype | Literal["auto"] | None = "auto",
    checkpointing: bool | Literal["offloaded"] = False,
    chunked_loss: int | None = None,
    end_of_text: int | None = None,
) -> dict[str, int]:
    """Which attention a training step of this model really runs: it profiles one step, forward and backward.

    The step changes nothing: gradients are deleted, weights and random generators stay the same.

    Args:
        model, autocast_dtype, checkpointing, chunked_loss, end_of_text: as for `train`.
        tokens: int64 (B, N), on any device.

    Returns:
        The number of calls of each attention that ran, by name: of the backends that name their operators in
        `attention.backends`, and of "naive" (a softmax outside of all the others). Recomputation counts.

    Raises:
        TypeError: the model is None.
        ValueError: an unknown option, or tokens that the model cannot take.
        RuntimeError: `torch.nn.attention.sdpa_kernel` allows no backend that can run the step.
    """
    from labutils.benchmark import torch_profiler

    device = device_of(model)
    on_gpu = device.type == "cuda"
    dtype = resolved_autocast(autocast_dtype, device)
    activity = torch.profiler.ProfilerActivity
    with (
        as_in_training(model, checkpointing),
        torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []),
        torch_profiler(activities=[activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]) as profiler,
    ):
        loss_of(model, tokens, dtype, chunked_loss, end_of_text).backward()
    return _attention_of(_calls(profiler.events()))


def _calls(events: Iterable[Any]) -> dict[str, int]:
    """How often a profile shows each operator and autograd function.

    Our operator runs inside our autograd function, or one of them runs without the other. An operator inside another of
    the same backend is left out, so each forward pass counts once.
    """
    backend_of = {operator: backend.name for backend in BACKENDS.values() for operator in backend.operators}
    calls: Counter[str] = Counter()
    for event in events:
        backend = backend_of.get(event.name)
        outer = event.cpu_parent if backend else None
        while outer is not None and backend_of.get(outer.name) != backend:
            outer = outer.cpu_parent
        if outer is None:
            calls[event.name] += 1
    return calls


def _attention_of(calls: dict[str, int]) -> dict[str, int]:
    """Calls of each attention, from the calls of each operator and autograd function that a profile shows."""
    used: dict[str, int] = {}
    for backend in BACKENDS.values():
        if count := sum(calls.get(operator, 0) for operator in backend.operators):
            used[backend.name] = count
    outside = calls.get("aten::_softmax", 0) - used.get("sdpa_math", 0)  # the math backend calls softmax itself
    if outside > 0:
        used["naive"] = outside
    return used
