"""Attention over several GPUs: the ring, played on one machine, and its arithmetic.

Each of R ranks holds N/R tokens. Its queries stay; keys and values travel around the ring, one neighbour further in
each of R - 1 rounds (Liu, Zaharia and Abbeel 2023, Ring Attention, arXiv 2310.01889). A rank merges what it gets for
each part as tiles are merged within a kernel: by their log-sum-exp.
"""

from __future__ import annotations

import torch

from labutils.attention.reference import naive_attention


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of a and b together, from attention over each.

    Args:
        out_a, out_b: (B, N, H, D).
        lse_a, lse_b: (B, H, N), -inf for a query that sees no key of its part.

    Returns:
        out (B, N, H, D) and lse (B, H, N) of both parts; 0 and -inf for a query that sees no key of either.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(lse == -torch.inf, 0.0, lse)

    def weight(part: torch.Tensor) -> torch.Tensor:  # (B, H, N) -> (B, N, H, 1)
        return (part - safe).exp().transpose(1, 2)[..., None]

    return weight(lse_a) * out_a + weight(lse_b) * out_b, lse


def ring_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: int) -> tuple[torch.Tensor, list[int]]:
    """Causal attention as R ranks would compute it, one after the other here.

    Args:
        q, k, v: (B, N, H, D).
        ranks: R, divides N.

    Returns:
        out (B, N, H, D), and how many of the R x R pairs of parts each rank had to compute: causal masks leave the
        first ranks idle, which is why real implementations deal tokens out in stripes or zigzag.

    Raises:
        ValueError: `ranks` does not divide N.
    """
    n = q.shape[1]
    if ranks < 1 or n % ranks:
        raise ValueError(f"{n} tokens cannot be dealt out equally to {ranks} ranks")
    parts, work, outs = [t.chunk(ranks, dim=1) for t in (q, k, v)], [], []
    for rank in range(ranks):
        out, lse, pairs = None, None, 0
        for turn in range(ranks):
            source = (rank - turn) % ranks  # whose keys have arrived after so many rounds
            if source > rank:
                continue  # all of them are later than all of these queries
            one, one_lse = naive_attention(
                parts[0][rank], parts[1][source], parts[2][source], causal=source == rank, return_lse=True
            )
            out, lse = (one, one_lse) if out is None else merge(out, lse, one, one_lse)
            pairs += 1
        outs.append(out)
        work.append(pairs)
    return torch.cat(outs, dim=1), work


def ring_seconds(
    n: int, ranks: int, *, width: int, tflops: float, gigabytes_per_s: float, bytes_per_number: int = 2
) -> dict[str, float]:
    """One round of the ring in one layer, forward: how long the work takes and how long the message.

    Args:
        n: tokens of the whole sequence.
        ranks: R.
        width: H · D.
        tflops: of the attention kernel, in TFLOP/s.
        gigabytes_per_s: of the link to the neighbour, in GB/s.
        bytes_per_number: of keys and values; 2 for 16 bits.

    Returns:
        work_s: 4 · (N/R)² · width FLOPs of an unmasked pair of parts; message_s: K and V of a part, 2 · (N/R) · width
        numbers; hidden: whether the message is done before the work is; tokens_to_hide: the tokens a rank must hold
        for that, bytes · rate / (2 · bandwidth), whatever the width.
    """
    held = n / ranks
    work = 4 * held**2 * width / (tflops * 1e12)
    message = 2 * held * width * bytes_per_number / (gigabytes_per_s * 1e9)
    return {
        "work_s": work,
        "message_s": message,
        "hidden": message <= work,
        "tokens_to_hide": bytes_per_number * tflops * 1e12 / (2 * gigabytes_per_s * 1e9),
    }
