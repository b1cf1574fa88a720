"""Answers to the exercises of notebook 04."""

import math


def attention_intensity(seqlen, head_dim, itemsize):
    """FLOPs per byte of one head, with only Q, K, V and O moved, once each."""
    flops = 4 * seqlen * seqlen * head_dim
    moved = 4 * seqlen * head_dim * itemsize
    return flops / moved  # = seqlen / itemsize


def v2_bytes(seqlen, head_dim, block_m, itemsize):
    """Bytes that FlashAttention-2 loads and stores for one head, without a mask."""
    tensor = seqlen * head_dim * itemsize  # Q, K, V or O
    passes = math.ceil(seqlen / block_m)
    return 2 * tensor + 2 * passes * tensor + 4 * seqlen


def roofline_time(flops, moved, tflops, gb_per_s):
    """FLOPs, bytes and two ceilings -> (least time in ms, "arithmetic" or "memory")."""
    arithmetic, memory = 1e3 * flops / (tflops * 1e12), 1e3 * moved / (gb_per_s * 1e9)
    return max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory"


def attention_share(rows, factor):
    """Rows of a profile -> (share of attention, speed-up if attention were `factor` times as fast)."""
    total = sum(row["self_ms"] for row in rows)
    share = sum(row["self_ms"] for row in rows if "attention" in row["op"]) / total
    return share, 1 / (1 - share + share / factor)


def choose_blocks(seqlen, heads, head_dim, itemsize, shared_bytes, stages, processors):
    """(block_m, block_n), each 16, 32, 64 or 128."""
    sizes = (16, 32, 64, 128)
    pairs = [(m, n) for m in sizes for n in sizes]
    fits = [(m, n) for m, n in pairs if (m + 2 * stages * n) * head_dim * itemsize <= shared_bytes]
    filling = [(m, n) for m, n in fits if heads * math.ceil(seqlen / m) >= processors]
    # fewest passes over K and V, then the largest block_n, then the smallest block_m
    return min(filling or fits, key=lambda pair: (math.ceil(seqlen / pair[0]), -pair[1], pair[0]))
