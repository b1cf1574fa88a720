"""Answers to the exercises of notebook 03."""

import torch


def logits_length(gib, vocab):
    """The largest N whose logits, three times in float32, fit into `gib` GiB."""
    return gib * 2**30 // (3 * 4 * vocab)


def overtaking_length(layers, heads, vocab):
    """The smallest N at which the scores of standard attention take more bytes than the logits."""
    # 6 · layers · heads · N² > 12 · N · vocab, that is N > 2 · vocab / (layers · heads)
    return 2 * vocab // (layers * heads) + 1


def document_mask(cu_seqlens, n):
    """cu_seqlens (documents + 1,) -> boolean (n, n), True where query i may see key j."""
    token = torch.arange(n, device=cu_seqlens.device)
    document = torch.bucketize(token, cu_seqlens[1:], right=True)
    return (document[:, None] == document[None, :]) & (token[None, :] <= token[:, None])


def rope(x, positions, base):
    """x (N, H, D), positions (N,) -> x rotated; dimension i is paired with i + D/2."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device) / half)  # base^(-2i/D)
    angle = positions[:, None, None] * frequency  # (N, 1, D/2)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def read_oom(message):
    """PyTorch's message -> (GiB that were missing, "fragments" or "too much")."""
    import re

    def gib(pattern):
        number, unit = re.search(pattern.replace("SIZE", r"([\d.]+) (MiB|GiB)"), message).groups()
        return float(number) / (1024 if unit == "MiB" else 1)

    asked, free = gib("Tried to allocate SIZE"), gib("SIZE is free")
    reserve = gib("SIZE is reserved by PyTorch but unallocated")
    return asked - free, "fragments" if asked <= free + reserve else "too much"


def chunked_loss(hidden, weight, targets, chunk):
    """hidden (N, C), weight (V, C), targets (N,) -> loss (), d_hidden (N, C), d_weight (V, C)."""
    n = len(hidden)
    loss, d_hidden, d_weight = 0.0, torch.empty_like(hidden), torch.zeros_like(weight)
    for i in range(0, n, chunk):
        h, t = hidden[i : i + chunk], targets[i : i + chunk]
        logits = h @ weight.T  # (chunk, V)
        lse = logits.logsumexp(dim=-1)
        loss = loss + (lse - logits.gather(1, t[:, None])[:, 0]).sum()
        g = (logits - lse[:, None]).exp()  # softmax
        g[torch.arange(len(h), device=g.device), t] -= 1
        g /= n
        d_hidden[i : i + chunk] = g @ weight
        d_weight += g.T @ h
    return loss / n, d_hidden, d_weight
