"""One step of training: the loss, the gradients and the update, with their optimizer, checkpointing and number format.

`labutils.training.loop` repeats the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from labutils.gpt2.loss import language_model_loss
from labutils.machine import runtime
from labutils.training.offload import OffloadedAdamW, offloaded_checkpoint

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def device_of(model: GPT2LMHeadModel | None) -> torch.device:
    """The device of the model.

    Raises:
        TypeError: the model is None. Notebooks set one to None to free its memory, and cells can be run in any order.
    """
    if model is None:
        raise TypeError("the model is None, which frees its memory: run the cell again that makes it, then this one")
    return model.device


def resolved_autocast(wanted: torch.dtype | Literal["auto"] | None, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on this device, for an `autocast_dtype` that may be "auto".

    Args:
        wanted: "auto" is the GPU's `runtime.dtype`, and no autocast on a CPU; None and float32 are no autocast.
        device: the model's device.

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
        model: the model whose parameters it updates.
        kind: "adamw" keeps its state beside the model; "offloaded" keeps its state, and does its work, on the CPU.
        lr: learning rate.
        weight_decay: of matrices; biases and LayerNorm gains have none.
        fused: True: one kernel for all parameters. False: one for each operation. None: True on a GPU, False on a CPU.
            "offloaded" ignores it.

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
    """Switches gradient checkpointing on or off: whether the backward pass recomputes each block.

    Source: Chen et al. 2016, arXiv 1604.06174.

    Args:
        model: a GPT-2 of `labutils.gpt2.models.gpt2`; it is changed.
        on: True keeps only the input of each block. "offloaded" keeps that input in the CPU's memory
            (`labutils.training.offload.offloaded_checkpoint`).

    Raises:
        ValueError: another value of `on`.
    """
    if on not in (True, False, "offloaded"):
        raise ValueError(f"checkpointing must be True, False or 'offloaded', got {on!r}")
    # transformers 5.23 says "activation" checkpointing where 5.17 says "gradient"; there the old name gives a warning.
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
    """The model in training mode, with or without checkpointing. Afterwards it is as before, and has no gradients.

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
    """`labutils.gpt2.loss.language_model_loss` under autocast to `dtype`; without autocast if `dtype` is None.

    Args:
        model, chunked_loss, end_of_text: as for `language_model_loss`, which raises its errors here.
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
    """Computes the gradients, clips them, makes one update with them, and deletes them.

    Args:
        model: the model that gave the loss.
        loss: scalar; `scaler` scales it.
        optimizer: makes the update. If the scaled gradients overflowed, the scaler skips the update.
        clip: largest norm of all gradients together.

    Returns:
        The norm of the gradients before clipping, a scalar that is still on the device.
    """
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
