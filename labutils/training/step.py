"""One step of training: the loss, the gradients and the update, and what they are made with.

The optimizer, the recomputation of blocks and the number format are chosen here; `labutils.training.loop` goes through
the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from labutils.gpt2.models import language_model_loss
from labutils.machine import runtime
from labutils.training.offload import OffloadedAdamW, offloaded_checkpoint

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def device_of(model: GPT2LMHeadModel | None) -> torch.device:
    """Where the model is.

    Raises:
        TypeError: the model is None. Notebooks set one to None to free its memory, and cells can be run in any order.
    """
    if model is None:
        raise TypeError("the model is None, which frees its memory: run the cell again that makes it, then this one")
    return model.device


def resolved_autocast(wanted: torch.dtype | Literal["auto"] | None, device: torch.device) -> torch.dtype | None:
    """What is asked for as `autocast_dtype`, on this device.

    Args:
        wanted: "auto" is the GPU's `runtime.dtype` and no autocast on a CPU; None and float32 are no autocast.
        device: where the model is.

    Returns:
        A 16-bit dtype, or None for no autocast.
    """
    if wanted == "auto":
        wanted = runtime.dtype if device.type == "cuda" else None
    return None if wanted == torch.float32 else wanted


def make_optimizer(
    model: GPT2LMHeadModel, kind: Literal["adamw", "offloaded"] = "adamw", *, lr: float, weight_decay: float = 0.1,
    fused: bool | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) as `labutils.training.train` uses it.

    Args:
        model: whose parameters are updated.
        kind: "adamw" with its state beside the model; "offloaded" with its state, and its work, on the CPU.
        lr: learning rate.
        weight_decay: of matrices; biases and LayerNorm gains have none.
        fused: one kernel for all parameters; None is that on a GPU, and one for each operation on a CPU. It has no
            part in "offloaded".

    Raises:
        ValueError: an unknown kind.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if kind == "adamw":
        fused = model.device.type == "cuda" if fused is None else fused
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
    if kind == "offloaded":
        return OffloadedAdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)  # fused: the CPU has such a kernel, too
    raise ValueError(f"optimizer must be 'adamw' or 'offloaded', got {kind!r}")


def set_checkpointing(model: GPT2LMHeadModel, on: bool | Literal["offloaded"]) -> None:
    """Switches the recomputation of blocks in the backward pass on or off (Chen et al. 2016, arXiv 1604.06174).

    Args:
        model: a GPT-2 of `labutils.gpt2.models.gpt2`, which is changed.
        on: True keeps the input of each block alone; "offloaded" keeps it in the CPU's memory
            (`labutils.training.offload.offloaded_checkpoint`).

    Raises:
        ValueError: `on` is something else.
    """
    if on not in (True, False, "offloaded"):
        raise ValueError(f"checkpointing must be True, False or 'offloaded', got {on!r}")
    # transformers 5.23 calls "activation" what 5.17 calls "gradient" checkpointing; the old name warns there.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        if on == "offloaded":
            for block in model.transformer.h:
                block._gradient_checkpointing_func = offloaded_checkpoint
    else:
        getattr(model, f"{name}_checkpointing_disable")()


@contextmanager
def as_in_training(model: GPT2LMHeadModel, checkpointing: bool | Literal["offloaded"]) -> Iterator[None]:
    """The model in training mode, with or without checkpointing; afterwards as it was, and without gradients.

    Args:
        model, checkpointing: as for `labutils.training.train`.

    Raises:
        ValueError: an unknown `checkpointing`.
    """
    was_training = model.training
    try:
        model.train()
        if checkpointing:
            set_checkpointing(model, checkpointing)
        yield
    finally:
        model.zero_grad(set_to_none=True)
        if checkpointing:
            set_checkpointing(model, False)
        model.train(was_training)


def loss_of(
    model: GPT2LMHeadModel, tokens: torch.Tensor, dtype: torch.dtype | None, chunked_loss: int | None,
    end_of_text: int | None,
) -> torch.Tensor:  # fmt: skip
    """`labutils.gpt2.models.language_model_loss`, under autocast to `dtype`, or without where that is None.

    Args:
        model, chunked_loss, end_of_text: as for `language_model_loss`, whose errors are raised here.
        tokens: int64 (B, N), on any device.

    Returns:
        float32 scalar, nats per token.
    """
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        return language_model_loss(model, tokens.to(model.device), chunked_loss=chunked_loss, end_of_text=end_of_text)


def backward_and_step(
    model: GPT2LMHeadModel, loss: torch.Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    clip: float,
) -> torch.Tensor:  # fmt: skip
    """Gradients, clipped, and one update with them; afterwards there are none.

    Args:
        model: whose gradients they are.
        loss: scalar; `scaler` scales it.
        optimizer: makes the update, and leaves it out where scaled gradients overflowed.
        clip: largest norm of all gradients together.

    Returns:
        Their norm before clipping, a scalar that is still on the device.
    """
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
