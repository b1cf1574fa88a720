"""One small, odd-shaped launch of every kernel, for tools that watch a whole program: see CONTRIBUTING.md.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/small_cases.py
"""

import torch

from labutils import runtime
from labutils.attention import interface

DTYPE = torch.float32 if runtime.interpreted else torch.float16


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=runtime.device, dtype=DTYPE)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, device=runtime.device, dtype=torch.int32)


def dense(head_dim: int, **features) -> list[torch.Tensor]:
    q = randn(2, 75, 4, head_dim).requires_grad_()
    k, v = (randn(2, 133, 2, head_dim).requires_grad_() for _ in range(2))
    out = interface.flash_attn_func(q, k, v, **features)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


def v1(head_dim: int) -> list[torch.Tensor]:
    return [interface.flash_attn_v1_func(*(randn(2, 75, 4, head_dim) for _ in range(3)), causal=True)]


def packed(head_dim: int) -> list[torch.Tensor]:
    q = randn(75, 4, head_dim).requires_grad_()
    k, v = (randn(133, 2, head_dim).requires_grad_() for _ in range(2))
    lengths = integers(0, 17, 17, 70), integers(0, 100, 120, 130)  # a few rows behind the last sequence
    out = interface.flash_attn_varlen_func(q, k, v, *lengths, 53, 100, causal=True)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


def packed_and_paged(head_dim: int) -> list[torch.Tensor]:
    pages = [randn(9, 20, 2, head_dim) for _ in range(2)]
    table = integers(8, 0, 3, 5, 1, 2).view(2, 3)
    lengths = integers(0, 30, 75), integers(0, 55, 100)
    return [interface.flash_attn_varlen_func(randn(75, 4, head_dim), *pages, *lengths, 45, 55, block_table=table)]


def cache(head_dim: int, splits: int) -> list[torch.Tensor]:
    caches = [randn(3, 150, 2, head_dim) for _ in range(2)]
    new = [randn(2, 3, 2, head_dim) for _ in range(2)]
    cos, sin = torch.randn(2, 160, head_dim // 4, device=runtime.device)
    out = interface.flash_attn_with_kvcache(
        randn(2, 3, 8, head_dim), *caches, *new, cos, sin, integers(147, 20), integers(2, 0), integers(0, 7),
        causal=True, num_splits=splits,
    )  # fmt: skip
    return [out, *caches]


def paged_cache(head_dim: int, splits: int) -> list[torch.Tensor]:
    caches = [randn(9, 20, 2, head_dim) for _ in range(2)]
    table = integers(8, 0, 3, 5, 1, 2).view(2, 3)
    new = [randn(2, 1, 2, head_dim) for _ in range(2)]
    out = interface.flash_attn_with_kvcache(
        randn(2, 1, 8, head_dim), *caches, *new, cache_seqlens=integers(59, 7), block_table=table, num_splits=splits
    )
    return [out, *caches]


def padded_cache(head_dim: int) -> list[torch.Tensor]:
    caches = [randn(9, 20, 2, head_dim) for _ in range(2)]
    table = integers(-1, -1, -1, 5, 1, 2).view(2, 3)
    new = [randn(2, 1, 2, head_dim) for _ in range(2)]
    out = interface.flash_attn_with_kvcache(
        randn(2, 1, 8, head_dim), *caches, *new, cache_seqlens=integers(-1, 7), block_table=table
    )
    return [out, *caches]


def cases(head_dim: int) -> dict[str, list[torch.Tensor]]:
    slopes = torch.rand(4, device=runtime.device)
    return {
        "v1": v1(head_dim),
        "full": dense(head_dim),
        "causal": dense(head_dim, causal=True),
        "all features": dense(
            head_dim, causal=True, window_size=(40, 0), softcap=5.0, alibi_slopes=slopes, dropout_p=0.2
        ),
        "packed": packed(head_dim),
        "packed and paged": packed_and_paged(head_dim),
        "cache": cache(head_dim, splits=1),
        "cache, split": cache(head_dim, splits=3),
        "paged cache": paged_cache(head_dim, splits=2),
        "padded cache": padded_cache(head_dim),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    for head_dim in (64, 128) if not runtime.interpreted else (16,):
        for name, results in cases(head_dim).items():
            assert all(t.isfinite().all() for t in results), name
            print(f"D = {head_dim}: {name}", flush=True)
