"""Ring attention, for a sequence that is spread over several GPUs: played on one machine, and its arithmetic.

Each of R ranks holds N/R tokens. Queries stay on their rank. Keys and values travel around the ring, one rank further
in each of R - 1 rounds. A rank merges its results for all parts by their log-sum-exp, as a kernel merges tiles.

Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889).
"""

from __future__ import annotations

import torch

from labutils.attention.reference import naive_attention


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of parts a and b together, from attention over each of them.

    Args:
        out_a, out_b: (B, N, H, D).
        lse_a, lse_b: (B, H, N), -inf for a query that sees no key of its part.

    Returns:
        out (B, N, H, D) and lse (B, H, N) over both parts; 0 and -inf for a query that sees no key of either.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(lse == -torch.inf, 0.0, lse)

    def weight(part: torch.Tensor) -> torch.Tensor:  # (B, H, N) -> (B, N, H, 1)
        return (part - safe).exp().transpose(1, 2)[..., None]

    return weight(lse_a) * out_a + weight(lse_b) * out_b, lse


def ring_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: int) -> tuple[torch.Tensor, list[int]]:
    """Causal attention as R ranks would compute it; here one rank after the other.

    Args:
        q, k, v: (B, N, H, D).
        ranks: R, divides N.

    Returns:
        out (B, N, H, D), and for each rank how many of its R pairs of parts it had to compute. The causal mask leaves
        the first ranks idle; real implementations therefore deal tokens out in stripes or a zigzag.

    Raises:
        ValueError: `ranks` does not divide N.
    """
    n = q.shape[1]
    if ranks < 1 or n % ranks:
        raise ValueError(f"ranks={ranks}: {n} tokens cannot be dealt out equally. Pass a divisor of {n}.")
    parts, work, outs = [t.chunk(ranks, dim=1) for t in (q, k, v)], [], []
    for rank in range(ranks):
        out, lse, pairs = None, None, 0
        for turn in range(ranks):
            source = (rank - turn) % ranks  # the rank whose keys arrive in this round
            if source > rank:
                continue  # causal: all these keys come after all these queries
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
    """How long the work and the message of one round of the ring take, in the forward pass of one layer.

    Args:
        n: tokens of the whole sequence.
        ranks: R.
        width: H · D.
        tflops: rate of the attention kernel in TFLOP/s.
        gigabytes_per_s: bandwidth of the link to the next rank in GB/s.
        bytes_per_number: of keys and values; 2 for 16 bits.

    Returns:
        work_s: seconds for an unmasked pair of parts, which is 4 · (N/R)² · width FLOPs.
        message_s: seconds to send K and V of a part, which is 2 · (N/R) · width numbers.
        hidden: whether the message is done no later than the work.
        tokens_to_hide: how many tokens a rank must hold for that: bytes · rate / (2 · bandwidth), for any width.
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
