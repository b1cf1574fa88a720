"""Which attention a training step really runs: `attention_used` profiles one step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

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
        The number of calls of each attention that ran, by name: "sdpa_flash", "sdpa_cudnn", "sdpa_efficient",
        "sdpa_math", "flash_attn", "triton_v2" and "naive" (a softmax outside of all the others). Recomputation counts.

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
    calls = {event.key: event.count for event in profiler.key_averages()}
    return _attention_of(calls)


# The operator, or the autograd function, that each attention is, by the name that the profiler records: the one that
# ran, not the one that was asked for.
_OPERATORS = {
    "aten::_scaled_dot_product_flash_attention": "sdpa_flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "sdpa_flash",
    "aten::_scaled_dot_product_cudnn_attention": "sdpa_cudnn",
    "aten::_scaled_dot_product_efficient_attention": "sdpa_efficient",
    "aten::_scaled_dot_product_attention_math": "sdpa_math",
    "flash_attn::_flash_attn_forward": "flash_attn",
    "flash_attn::_flash_attn_varlen_forward": "flash_attn",
    "labutils::flash_attention": "triton_v2",
    "_FlashAttention": "triton_v2",  # the autograd function of `kernels.prepared`, which is no operator
}


def _attention_of(calls: dict[str, int]) -> dict[str, int]:
    """Calls of each attention, from those of each operator."""
    used: dict[str, int] = {}
    for operator, name in _OPERATORS.items():
        if calls.get(operator):
            used[name] = used.get(name, 0) + calls[operator]
    outside = calls.get("aten::_softmax", 0) - used.get("sdpa_math", 0)  # that one is made of ordinary operations
    if outside > 0:
        used["naive"] = outside
    return used
