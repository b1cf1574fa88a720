"""The registry of attention backends: how each backend is named, drawn and called, and what it can do.

A new backend is one `Backend` in `BACKENDS`. `check` then tries it, `bench` and `benchmark.sweep` measure it, figures
draw it, `analysis.recommend` weighs it and `training.attention_used` finds it in a profile: they all read the registry
when they are called.

    from labutils.attention import backends
    attention = backends.BACKENDS["sdpa_flash"].function      # f(q, k, v, *, causal=False, softmax_scale=None) -> out
    [b.name for b in backends.BACKENDS.values() if b.flash]   # which of them are FlashAttention?

This module does not import torch, so that the help of a command can list names. A backend imports what it needs when
its function is first asked for.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

from labutils.machine import chips

if TYPE_CHECKING:
    import torch

Attention = Callable[..., "torch.Tensor"]
"""f(q, k, v, *, causal, softmax_scale) -> out; q and out (B, N_q, H, D), k and v (B, N_k, H_kv, D)."""

FEATURES = ("window", "alibi", "softcap", "varlen", "paged", "dropout", "score_mod", "gqa", "bottom_right")
"""What a call may need beyond attention over sequences of one length, without a mask or with a causal one.

window: a sliding window. alibi: linear biases. softcap: capped scores. varlen: packed sequences of several lengths.
paged: a cache in pages. dropout: of attention weights. score_mod: any change of a score. gqa: query heads that share
heads of K and V. bottom_right: a causal mask with N_q != N_k that lets the last query see the last key.
"""


class Unsupported(RuntimeError):
    """The backend cannot do what was asked; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention: its names, its look, how to call it, what it can do, and where it shows.

    Attributes:
        name: in tables and on command lines. title: in reports. label: in legends.
        color, marker: in figures, as matplotlib takes them.
        load: imports what the backend needs, and returns its function. None: the entry is only drawn.
        load_to_try: the same for `attention.probing`, if the function refuses a call that the backend can do.
        call: how a user's program calls it, in one line.
        sdp_backend: its member of `torch.nn.attention.SDPBackend`, or "".
        package: the distribution that must be installed for it, or "".
        transformers: its name in transformers (`attn_implementation`), or "".

        flash: whether it is FlashAttention. Memory-efficient attention tiles too, but is another algorithm.
        fused: whether it is one kernel. Else it consists of PyTorch's ordinary operations.
        row_programs: whether each of its programs computes a block of rows, as `analysis.prediction` assumes.
        io_model: the model of `analysis.io_bytes` for its traffic. "naive" stores S and P, N x N numbers each.
        tried: whether `check` tries it. swept: whether `bench` measures it by default. Both need `load`.
        advised: whether `analysis.recommend` may recommend it.
        compiles: whether its first call runs torch.compile, which takes many seconds on a CPU.

        backward: whether gradients go through it.
        can: the `FEATURES` that it has. forward_only: those of them without a gradient.
        dtypes: of q, k and v on a GPU, by torch's names.
        largest_head_dim: the largest D; None: no limit. head_dim_note: what `analysis.recommend` says above it.
        head_dim_multiple: D must be a multiple of this number.
        lowest_capability: the oldest GPUs that it has kernels for; None: all GPUs that the lab runs on.
        on_cpu: how it runs without a GPU. "compiled"; "forward": compiled, without a backward pass; "interpreted": its
            kernel runs in Triton's interpreter; "": it does not run.
        lacks_on_cpu: the features in `can` that it lacks there.

        operators: the operators and autograd functions that a profile shows for it, one call for each forward pass.
    """

    name: str
    title: str
    label: str
    color: str
    marker: str
    load: Callable[[], Attention] | None = None
    load_to_try: Callable[[], Attention] | None = None
    call: str = ""
    sdp_backend: str = ""
    package: str = ""
    transformers: str = ""

    flash: bool = False
    fused: bool = True
    row_programs: bool = False
    io_model: Literal["naive", "v1", "v2"] = "v2"
    tried: bool = True
    swept: bool = True
    advised: bool = False
    compiles: bool = False

    backward: bool = True
    can: frozenset[str] = frozenset()
    forward_only: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    largest_head_dim: int | None = None
    head_dim_note: str = ""
    head_dim_multiple: int = 1
    lowest_capability: chips.Capability | None = None
    on_cpu: Literal["compiled", "forward", "interpreted", ""] = ""
    lacks_on_cpu: frozenset[str] = frozenset()

    operators: tuple[str, ...] = ()

    @cached_property
    def function(self) -> Attention:
        """The function, f(q, k, v, *, causal=False, softmax_scale=None) -> out on tensors (B, N, H, D).

        If the backend cannot do a call, the function raises an error that says why. No other backend steps in.

        Raises:
            Unsupported: this entry is only drawn.
        """
        if self.load is None:
            raise Unsupported(f"{self.name} is a name for figures: there is no function behind it.")
        return self.load()

    @cached_property
    def function_to_try(self) -> Attention:
        """The function that `attention.probing` calls: `function`, unless the entry has another one for it."""
        return self.function if self.load_to_try is None else self.load_to_try()


# ------------------------------------------------------------------------------------------------------------
# The functions: each loader imports once, so that a call imports nothing
# ------------------------------------------------------------------------------------------------------------


def _load_naive() -> Attention:
    from labutils.attention import reference

    def naive(q, k, v, *, causal=False, softmax_scale=None):
        return reference.naive_attention(q, k, v, causal=causal, softmax_scale=softmax_scale)

    return naive


def _load_sdpa(sdp_backend: str) -> Attention:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    allowed = getattr(SDPBackend, sdp_backend)

    def sdpa(q, k, v, *, causal=False, softmax_scale=None):
        if causal and q.shape[1] != k.shape[1]:
            raise Unsupported(
                "scaled_dot_product_attention(is_causal=True) aligns the mask to the top left, the others to the "
                "bottom right: compare at N_q = N_k."
            )
        # With one backend allowed, PyTorch runs that backend or raises; it does not choose another.
        with sdpa_kernel(allowed):
            out = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)),  # (B, N, H, D) -> (B, H, N, D), views
                is_causal=causal,
                scale=softmax_scale,
                enable_gqa=k.shape[2] != q.shape[2],
            )
        return out.transpose(1, 2)

    return sdpa


def _load_flash_attn() -> Attention:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        missing = error

        def refuse(q, k, v, *, causal=False, softmax_scale=None):
            raise Unsupported(f"the flash-attn package cannot be imported: {missing}") from missing

        return refuse

    def flash_attn(q, k, v, *, causal=False, softmax_scale=None):
        return flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)

    return flash_attn


def _load_triton_v1() -> Attention:
    from labutils.attention import interface

    def triton_v1(q, k, v, *, causal=False, softmax_scale=None):
        return interface.flash_attn_v1_func(q, k, v, softmax_scale=softmax_scale, causal=causal)

    return triton_v1


def _load_triton_v2() -> Attention:
    from labutils.attention import interface

    def triton_v2(q, k, v, *, causal=False, softmax_scale=None):
        return interface.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)

    return triton_v2


def _load_flex() -> Attention:
    import torch

    @cache
    def compiled(signature: tuple) -> Callable[..., torch.Tensor]:
        """FlexAttention, compiled for one signature (shapes, dtype, ...) and kept."""
        import torch._functorch.config as functorch_config
        from torch.nn.attention.flex_attention import flex_attention

        # A donated buffer is overwritten by the backward pass, which could then run only once: timing runs it many
        # times. The setting stays, since PyTorch reads it again when the backward pass runs.
        functorch_config.donated_buffer = False

        def call(q, k, v, block_mask, scale):
            return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])

        # torch.compile keeps its graphs with the code object, eight of them, and then refuses: a sweep has more
        # shapes than that, so each signature gets a code object of its own.
        call = types.FunctionType(call.__code__.replace(co_name="flex"), globals(), "flex", None, call.__closure__)
        return torch.compile(call, fullgraph=True, dynamic=False)

    @lru_cache(maxsize=8)
    def causal_mask(n_q: int, n_k: int, device: str):
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b, h, i, j):
            return j <= i + n_k - n_q

        return create_block_mask(visible, None, None, n_q, n_k, device=device)

    def flex(q, k, v, *, causal=False, softmax_scale=None):
        if q.device.type != "cuda":
            raise Unsupported("compiled FlexAttention is measured on a GPU: on a CPU it has no backward pass.")
        grad = torch.is_grad_enabled() and q.requires_grad
        mask = causal_mask(q.shape[1], k.shape[1], str(q.device)) if causal else None
        attention = compiled((q.shape, k.shape, q.stride(), q.dtype, str(q.device), causal, grad, softmax_scale))
        out = attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, softmax_scale)
        return out.transpose(1, 2)

    return flex


def _load_flex_to_try() -> Attention:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    def flex(q, k, v, *, causal=False, softmax_scale=None):
        if causal:
            raise Unsupported("the trial of FlexAttention has no mask.")
        out = torch.compile(flex_attention)(*(t.transpose(1, 2) for t in (q, k, v)), scale=softmax_scale)
        return out.transpose(1, 2)

    return flex


def _load_tiled_v1() -> Attention:
    import torch

    from labutils.attention import reference

    def tiled_v1(q, k, v, *, causal=False, softmax_scale=None):
        if torch.is_grad_enabled() and q.requires_grad:
            raise Unsupported(
                "the loop of v1 overwrites O, l and m in each step, which autograd cannot go back through"
            )
        return reference.tiled_attention_v1(q, k, v, causal=causal, softmax_scale=softmax_scale)

    return tiled_v1


def _load_tiled_v2() -> Attention:
    from labutils.attention import reference

    def tiled_v2(q, k, v, *, causal=False, softmax_scale=None):
        return reference.tiled_attention_v2(q, k, v, causal=causal, softmax_scale=softmax_scale)

    return tiled_v2


# ------------------------------------------------------------------------------------------------------------
# The registry
# ------------------------------------------------------------------------------------------------------------


def _sdpa(sdp_backend: str, **fields: Any) -> Backend:
    """A backend of PyTorch's scaled_dot_product_attention.

    Sources: PyTorch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp for GPUs, sdp_utils_cpp.cpp for the CPU.
    """
    return Backend(
        load=partial(_load_sdpa, sdp_backend),
        sdp_backend=sdp_backend,
        call=f"with torch.nn.attention.sdpa_kernel(SDPBackend.{sdp_backend}): scaled_dot_product_attention(...)",
        **fields,
    )


_16_BIT = ("float16", "bfloat16")
_FLASH_ATTN_FEATURES = frozenset({"window", "alibi", "softcap", "varlen", "paged", "dropout", "gqa", "bottom_right"})

# People with a colour vision deficiency can tell the colours of Okabe and Ito apart (jfly.uni-koeln.de/color). Eight of
# these colours are theirs; the others are greys and shades of them.
_ENTRIES = (
    Backend(
        name="naive", title="standard attention", label="naive", color="#000000", marker="o",
        load=_load_naive, transformers="eager",
        call="softmax(q @ k.T * scale) @ v, as in labutils.attention.reference.naive_attention",
        fused=False, io_model="naive", tried=False, advised=True, on_cpu="compiled",
        can=frozenset({"window", "alibi", "softcap", "dropout", "score_mod", "gqa", "bottom_right"}),
    ),
    _sdpa(
        "FLASH_ATTENTION",
        name="sdpa_flash", title="PyTorch SDPA, flash", label="SDPA flash", color="#0072B2", marker="D",
        flash=True, row_programs=True, advised=True,
        can=frozenset({"dropout", "gqa"}), dtypes=_16_BIT, largest_head_dim=256,
        lowest_capability=chips.AMPERE, on_cpu="compiled", lacks_on_cpu=frozenset({"dropout"}),
        operators=(
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
        ),
    ),
    _sdpa(
        "CUDNN_ATTENTION",
        name="sdpa_cudnn", title="PyTorch SDPA, cuDNN", label="SDPA cuDNN", color="#56B4E9", marker="v",
        flash=True, row_programs=True, advised=True,
        can=frozenset({"dropout", "gqa"}), dtypes=_16_BIT, largest_head_dim=128,
        head_dim_note="above D = 128 it depends on the version of cuDNN whether it runs", head_dim_multiple=8,
        lowest_capability=chips.AMPERE,
        operators=("aten::_scaled_dot_product_cudnn_attention",),
    ),
    _sdpa(
        "EFFICIENT_ATTENTION",
        name="sdpa_efficient", title="PyTorch SDPA, memory-efficient", label="SDPA memory-efficient",
        color="#F0E442", marker="^",
        row_programs=True, advised=True,
        can=frozenset({"dropout", "gqa"}),
        operators=("aten::_scaled_dot_product_efficient_attention",),
    ),
    _sdpa(
        "MATH",
        name="sdpa_math", title="PyTorch SDPA, math", label="SDPA math", color="#8C8C8C", marker="s",
        fused=False, io_model="naive",
        can=frozenset({"dropout", "gqa"}), on_cpu="compiled",
        operators=("aten::_scaled_dot_product_attention_math",),
    ),
    Backend(
        name="flash_attn", title="flash-attn package", label="flash-attn package", color="#009E73", marker="P",
        load=_load_flash_attn, call="flash_attn.flash_attn_func(...)", package="flash-attn",
        transformers="flash_attention_2",
        flash=True, row_programs=True, advised=True,
        can=_FLASH_ATTN_FEATURES, forward_only=frozenset({"paged"}), dtypes=_16_BIT, largest_head_dim=256,
        lowest_capability=chips.AMPERE,
        operators=("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),
    ),
    Backend(
        name="triton_v1", title="this lab's Triton v1", label="our Triton v1", color="#E69F00", marker="h",
        load=_load_triton_v1, call="labutils.attention.interface.flash_attn_v1_func(...)",
        transformers="labutils_v1",
        flash=True, io_model="v1",
        backward=False, can=frozenset({"gqa", "bottom_right"}), largest_head_dim=128,
        lowest_capability=chips.OLDEST, on_cpu="interpreted",
    ),
    Backend(
        name="triton_v2", title="this lab's Triton v2", label="our Triton v2", color="#D55E00", marker="*",
        load=_load_triton_v2, call="labutils.flash_attn_func(...)", transformers="labutils",
        flash=True, row_programs=True, advised=True,
        can=_FLASH_ATTN_FEATURES, forward_only=frozenset({"paged"}), largest_head_dim=256,
        lowest_capability=chips.OLDEST, on_cpu="interpreted",
        operators=("labutils::flash_attention", "_FlashAttention"),
    ),
    Backend(
        name="flex", title="FlexAttention", label="FlexAttention", color="#CC79A7", marker="X",
        load=_load_flex, load_to_try=_load_flex_to_try, call="torch.compile(flex_attention)(...)",
        flash=True, row_programs=True, advised=True, compiles=True,
        can=frozenset({"window", "alibi", "softcap", "varlen", "paged", "score_mod", "gqa", "bottom_right"}),
        largest_head_dim=256, lowest_capability=chips.OLDEST, on_cpu="forward",
    ),
    Backend(
        name="tiled_v1", title="v1 loops in PyTorch", label="v1 loops in PyTorch", color="#8A5F00", marker="<",
        load=_load_tiled_v1, call="labutils.attention.reference.tiled_attention_v1(...)",
        fused=False, io_model="v1", tried=False, swept=False,
        backward=False, can=frozenset({"gqa", "bottom_right"}), on_cpu="compiled",
    ),
    Backend(
        name="tiled_v2", title="v2 loops in PyTorch", label="v2 loops in PyTorch", color="#7A3300", marker=">",
        load=_load_tiled_v2, call="labutils.attention.reference.tiled_attention_v2(...)",
        fused=False, tried=False, swept=False,
        can=frozenset({"gqa", "bottom_right"}), on_cpu="compiled",
    ),
    # Only drawn: the kernels that notebook 02 writes, in lighter shades of ours, and transformers' names.
    Backend(
        name="notebook_v1", title="v1 of this notebook", label="v1 of this notebook", color="#FFD48A", marker="p",
        io_model="v1",
    ),
    Backend(
        name="notebook_v2", title="v2 of this notebook", label="v2 of this notebook", color="#F4A582", marker="d",
    ),
    Backend(name="eager", title="eager", label="eager", color="#000000", marker="o", fused=False, io_model="naive"),
    Backend(name="sdpa", title="SDPA", label="SDPA", color="#0072B2", marker="D", transformers="sdpa"),
)  # fmt: skip

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ENTRIES}
"""Every backend by name, in the order of reports and command lines."""


class Column(Mapping[str, Any]):
    """One attribute of all backends, name -> value, read from `BACKENDS` whenever it is asked for.

    Args:
        attribute: of `Backend`.
        having: another attribute; backends in which it is empty or None are left out.
    """

    def __init__(self, attribute: str, having: str = "name"):
        self._attribute, self._having = attribute, having

    def __getitem__(self, name: str) -> Any:
        backend = BACKENDS[name]
        if not getattr(backend, self._having):
            raise KeyError(name)
        return getattr(backend, self._attribute)

    def __contains__(self, name: object) -> bool:
        return name in BACKENDS and bool(getattr(BACKENDS[str(name)], self._having))

    def __iter__(self) -> Iterator[str]:
        return (name for name, backend in BACKENDS.items() if getattr(backend, self._having))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: {value!r}' for name, value in self.items())}}}"


IMPLEMENTATIONS: Mapping[str, Attention] = Column("function", having="load")
"""The function of each backend that has one, by name: f(q, k, v, *, causal=False, softmax_scale=None) -> out."""


def chosen(impls: Iterable[str] | Mapping[str, Attention]) -> dict[str, Attention]:
    """Functions by name, from names or from such a mapping.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    if isinstance(impls, Mapping):
        functions = dict(impls)
    else:
        names = [impls] if isinstance(impls, str) else list(impls)
        unknown = [name for name in names if name not in IMPLEMENTATIONS]
        if unknown:
            raise ValueError(f"unknown implementation {unknown}: choose from {', '.join(IMPLEMENTATIONS)}.")
        functions = {name: IMPLEMENTATIONS[name] for name in names}
    if not functions:
        raise ValueError("no implementation to measure: name at least one.")
    return functions


def name_in_tables(attention: str) -> str:
    """What tables call an attention of transformers: "naive" for "eager". A name that no backend has stays as it is."""
    named = (backend.name for backend in BACKENDS.values() if backend.transformers == attention)
    return next(named, attention)
