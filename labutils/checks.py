"""What the functions of `labutils.interface` ask of their arguments, and what they say where it is not met.

Each check raises ValueError (a value or shape), TypeError (a type or dtype) or NotImplementedError (what our kernels
cannot do), with a message that names the argument and what to do.
"""

from __future__ import annotations

import math

import torch

from labutils import runtime

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256


def tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, packed: bool = False, largest: int = LARGEST_HEAD_DIM
):
    """q, k and v fit together, and the kernels and this GPU have their dtype."""
    layout = "(total, H, D)" if packed else "(B, N, H, D)"
    dimensions = 3 if packed else 4
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}: pass a torch.Tensor of shape {layout}.")
        if t.dim() != dimensions:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}: pass {dimensions} dimensions, {layout}: "
                + ("all sequences one after the other," if packed else "batch, sequence,")
                + " heads, head dimension."
            )
    if k.shape != v.shape:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: both must be {layout}, with the heads of k and v."
        )
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]}, k and v have {k.shape[0]}: they must agree.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head dimension {q.shape[-1]}, k and v have {k.shape[-1]}: they must agree.")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(
            f"q has {q.shape[-2]} heads, k and v have {k.shape[-2]}: the heads of k and v must divide those of q. "
            f"Shapes are {layout}; if yours are (B, H, N, D), as in scaled_dot_product_attention, transpose(1, 2)."
        )
    if not 1 <= q.shape[-1] <= largest:
        raise ValueError(
            f"head dimension {q.shape[-1]} is not supported: 1 to {largest} are. Split the heads, or use "
            "torch.nn.functional.scaled_dot_product_attention."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: convert them to one.")
    if q.dtype not in DTYPES:
        raise TypeError(f"dtype {q.dtype} is not supported: use torch.float16, torch.bfloat16 or torch.float32.")
    _device(q, k, v)


def _device(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: move them to one device.")
    if runtime.interpreted and q.device.type != "cpu":
        raise ValueError(
            f"q is on {q.device}, but kernels run in Triton's interpreter in this process: move the tensors to the "
            "CPU, or unset LABUTILS_DEVICE and TRITON_INTERPRET and restart."
        )
    if not runtime.interpreted and q.device.type != "cuda":
        raise ValueError(
            f"q is on {q.device}: move the tensors to the GPU (runtime.device), or set LABUTILS_DEVICE=cpu and "
            "restart to run in Triton's interpreter."
        )
    if q.dtype == torch.bfloat16 and q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        raise TypeError(
            f"{torch.cuda.get_device_name(q.device)} has no bfloat16 arithmetic (compute capability below 8.0): use "
            "torch.float16."
        )


def scale(softmax_scale: float | None, head_dim: int) -> float:
    """The factor on the scores: D ** -0.5 for None."""
    if softmax_scale is None:
        return head_dim**-0.5
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ValueError(f"softmax_scale={softmax_scale}: pass a positive, finite number, or None for D ** -0.5.")
    return float(softmax_scale)


def window(window_size: tuple[int, int], causal: bool) -> tuple[int | None, int | None]:
    """(left, right) as the kernels take it: None for no bound; causal bounds the right by 0."""
    try:
        left, right = (int(side) for side in window_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"window_size={window_size!r}: pass two integers (left, right), -1 for no bound.") from error
    if left < -1 or right < -1:
        raise ValueError(f"window_size={window_size}: each side is -1 (no bound), 0 or more.")
    if causal:
        right = 0
    return (None if left == -1 else left), (None if right == -1 else right)


def cap(softcap: float) -> float | None:
    """softcap as the kernels take it: None for 0, which turns it off."""
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap={softcap}: pass a positive, finite number, or 0.0 to turn it off.")
    return float(softcap) or None


def dropout(dropout_p: float) -> float:
    """A probability in [0, 1)."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: pass a probability in [0, 1); 1 would drop everything.")
    return float(dropout_p)


def slopes(alibi_slopes: torch.Tensor | None, batch: int, heads: int, device: torch.device) -> torch.Tensor | None:
    """ALiBi's slopes: float32 (H,) or (B, H) on the device of q."""
    if alibi_slopes is None:
        return None
    if not isinstance(alibi_slopes, torch.Tensor) or alibi_slopes.dtype != torch.float32:
        kind = alibi_slopes.dtype if isinstance(alibi_slopes, torch.Tensor) else type(alibi_slopes).__name__
        raise TypeError(f"alibi_slopes is {kind}: pass a float32 tensor (H,) or (B, H).")
    if alibi_slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes has shape {tuple(alibi_slopes.shape)}: pass ({heads},), one slope a head, or "
            f"({batch}, {heads}), one a sequence and head."
        )
    if alibi_slopes.device != device:
        raise ValueError(f"alibi_slopes is on {alibi_slopes.device}, q on {device}: move it to the device of q.")
    if alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes requires a gradient, and there is none by it: detach() it.")
    return alibi_slopes.contiguous()


def sequences(
    name: str, cu_seqlens: torch.Tensor, max_seqlen: int, total: int, batch: int | None, device: torch.device
) -> torch.Tensor:
    """Where packed sequences begin: int32 (B + 1,), from 0 in steps of at most `max_seqlen` up to `total`.

    Its values are looked at, which waits for the GPU; not so while a CUDA graph is captured, which cannot wait.
    """
    which = name.removeprefix("cu_seqlens")
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32:
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name} is {kind}: pass an int32 tensor (B + 1,), the cumulated lengths, beginning with 0.")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)}: pass (B + 1,), the cumulated lengths from 0 on.")
    if batch is not None and len(cu_seqlens) != batch + 1:
        raise ValueError(
            f"cu_seqlens_q speaks of {batch} sequences and {name} of {len(cu_seqlens) - 1}: they must agree."
        )
    if cu_seqlens.device != device:
        raise ValueError(f"{name} is on {cu_seqlens.device}, q on {device}: move it to the device of q.")
    if isinstance(max_seqlen, torch.Tensor) or int(max_seqlen) != max_seqlen or max_seqlen < 0:
        raise TypeError(f"max_seqlen{which}={max_seqlen!r}: pass a Python integer, 0 or more.")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return cu_seqlens.contiguous()
    bounds = cu_seqlens.tolist()
    lengths = [after - before for before, after in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"{name} must begin with 0 and never decrease; it begins {bounds[:6]}.")
    if bounds[-1] != total:
        raise ValueError(f"{name} ends with {bounds[-1]}, but the packed tensor has {total} rows: they must agree.")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"max_seqlen{which}={max_seqlen}, but the longest sequence of {name} has {max(lengths)}: pass that."
        )
    return cu_seqlens.contiguous()
