"""Rotary positions (RoPE) for GPT-2: queries and keys are rotated by their position.

`use_rope` gives a GPT-2 of `labutils.gpt2.models.gpt2` rotary positions (Su et al. 2021, arXiv 2104.09864) in place of
its learned table. A score then depends only on the distance between query and key, and no table limits the length. It
works with every attention implementation, because it changes the projection from which they all get q and k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

BASE = 10_000.0
"""The base of the frequencies in the paper, section 3.2.2."""


def rope_angles(positions: torch.Tensor, head_dim: int, base: float = BASE) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles p · base^(-2i/D), i < D/2.

    Args:
        positions: integers (..., N).
        head_dim: D, even.
        base: a larger base rotates the last dimensions more slowly, for longer contexts.

    Returns:
        (cos, sin), float32 (..., N, D/2). The angles are computed in float64: at position 100,000 float32 would know
        the fastest of them to 0.004 only.

    Raises:
        ValueError: an odd `head_dim`, or a base that is not above 1.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rotary positions turn pairs of dimensions: head_dim must be even, got {head_dim}")
    if not base > 1.0:
        raise ValueError(f"base must be greater than 1, got {base}: 10,000 is usual")
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * base ** (-2 * pair / head_dim)  # θ_pi = p · b^(-2i/D)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x rotated by its positions; dimension i is paired with i + D/2 (flash-attn's `interleaved=False`).

    Args:
        x: (..., N, H, D), any floating dtype. The rotation is computed in float32.
        cos, sin: of `rope_angles`, (..., N, D/2).

    Returns:
        (..., N, H, D), in x's dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.ndim < 3 or cos.shape != sin.shape or cos.shape[-2:] != (x.shape[-3], x.shape[-1] // 2):
        raise ValueError(
            f"x is (..., N, H, D) and cos and sin are (..., N, D/2); got {tuple(x.shape)}, {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., N, D/2) -> (..., N, 1, D/2), for all heads
    first, second = x.float().chunk(2, dim=-1)
    # x'_i = x_i cos θ - x_{i+D/2} sin θ,  x'_{i+D/2} = x_{i+D/2} cos θ + x_i sin θ
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_by_complex_numbers(x: torch.Tensor, positions: torch.Tensor, base: float = BASE) -> torch.Tensor:
    """The reference for `apply_rope`: one complex product, e^{iθ}(x_i + i·x_{i+D/2}), in float64.

    Args:
        x: (..., N, H, D).
        positions: integers (N,).
        base: as for `rope_angles`.

    Returns:
        float64 (..., N, H, D).
    """
    depth = x.shape[-1]
    number = torch.complex(*x.double().chunk(2, dim=-1))  # (..., N, H, D/2)
    frequency = base ** (-torch.arange(0, depth, 2, dtype=torch.float64, device=x.device) / depth)
    turn = torch.polar(torch.ones_like(frequency).expand(len(positions), -1), positions.double()[:, None] * frequency)
    turned = number * turn[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


class _NoTable(torch.nn.Module):
    """Takes the place of GPT-2's table of positions, and adds nothing."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position_ids.device)


def use_rope(model: GPT2LMHeadModel, base: float = BASE) -> GPT2LMHeadModel:
    """Gives a GPT-2 rotary positions in place of its learned table.

    The positions are the `position_ids` of the call, or 0 to N - 1 if the call has none.

    Args:
        model: a GPT-2 of `labutils.gpt2.models.gpt2`, on any device. It is changed.
        base: as for `rope_angles`.

    Returns:
        The same model.

    Raises:
        ValueError: the model has rotary positions already, an odd head dimension, or a base that is not above 1.
    """
    if getattr(model.config, "lab_rope_base", None) is not None:
        raise ValueError("this model has rotary positions already")
    heads = model.config.n_head
    rope_angles(torch.zeros(1), model.config.n_embd // heads, base)  # raises if the model cannot have them
    for block in model.transformer.h:
        place: dict[str, Any] = {}

        def note(module: Any, args: Any, kwargs: Any, place: dict[str, Any] = place) -> None:
            place["positions"] = kwargs.get("position_ids")

        def turn(module: Any, args: Any, qkv: Any, place: dict[str, Any] = place) -> Any:
            positions = place["positions"]
            if positions is None:
                positions = torch.arange(qkv.shape[1], device=qkv.device)[None]
            q, k, v = qkv.view(*qkv.shape[:2], 3, heads, -1).unbind(2)  # (B, N, 3·C) -> 3 × (B, N, H, D)
            cos, sin = rope_angles(positions, q.shape[-1], base)  # positions: (1, N) or (B, N)
            turned = (apply_rope(t, cos.expand(len(t), -1, -1), sin.expand(len(t), -1, -1)) for t in (q, k))
            return torch.cat([t.flatten(2) for t in (*turned, v)], dim=-1)

        block.attn.register_forward_pre_hook(note, with_kwargs=True)
        block.attn.c_attn.register_forward_hook(turn)
    model.transformer.wpe = _NoTable()
    model.config.lab_rope_base = base
    return model
