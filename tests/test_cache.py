"""Decoding with a cache of keys and values: what a call computes, what it writes, and what it refuses.

Whatever no query may see is NaN: rows beyond a sequence's length and before its left padding, rows and pages of nobody.
"""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labutils import runtime
from labutils.attention import fast_path, interface
from labutils.attention.kernels import flash_decode, launch
from labutils.attention.kernels.options import Cache, Options
from labutils.attention.reference import check_attention, exact_attention

DEVICE = runtime.device
META = torch.device("meta")
NAN = float("nan")
ALL = "all dimensions"  # for `rotary`


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    """Several tiles even for short sequences, so that splits, pages and masks end within and between tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_INTERPRETER_BLOCK", 16)
        yield


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make(
    lengths=(37, 20, 0, 5), *, n_q=1, n_new=0, heads=2, heads_kv=1, head_dim=16, dtype=torch.float32, capacity=48,
    page=None, spare_pages=2, leftpad=None, batch_idx=None, batch_cache=None, rotary=None, slopes=None, garbage=NAN,
    seed=0, **options,
):  # fmt: skip
    """Arguments of one call, by name. `page` makes a cache of shuffled pages; `rotary` is the rotary dimension."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=g).to(DEVICE, dtype)  # noqa: E731
    batch = len(lengths)
    shape = (batch_cache or batch, capacity, heads_kv, head_dim)
    block_table = None
    if page:
        blocks = -(-capacity // page)
        shape = (batch * blocks + spare_pages, page, heads_kv, head_dim)
        block_table = torch.randperm(shape[0], generator=g)[spare_pages:].reshape(batch, blocks).to(DEVICE, torch.int32)
    call = dict(
        q=random(batch, n_q, heads, head_dim),
        k_cache=torch.full(shape, garbage, dtype=dtype, device=DEVICE),
        v_cache=torch.full(shape, garbage, dtype=dtype, device=DEVICE),
        k=random(batch, n_new, heads_kv, head_dim) if n_new else None,
        v=random(batch, n_new, heads_kv, head_dim) if n_new else None,
        cache_seqlens=ints(*lengths),
        cache_batch_idx=None if batch_idx is None else ints(*batch_idx),
        cache_leftpad=None if leftpad is None else ints(*leftpad),
        block_table=block_table,
        **options,
    )
    if rotary:
        # The angles of Su et al. (arXiv 2104.09864), for every position that a query or a new key can have.
        r = head_dim // 2 * 2 if rotary is ALL else rotary
        rows = (-(-capacity // page) * page if page else capacity) + n_q  # flash-attn wants one for each place
        angles = torch.arange(rows)[:, None] * 10_000 ** -(torch.arange(0, r, 2) / r)
        call |= dict(rotary_cos=angles.cos().to(DEVICE, dtype), rotary_sin=angles.sin().to(DEVICE, dtype))
    if slopes:
        shape = {"a head": (heads,), "a sequence and head": (batch, heads)}[slopes]
        call["alibi_slopes"] = (torch.rand(shape, generator=g) * 0.3).to(DEVICE)
    for b, length in enumerate(lengths):
        keys = torch.arange(0 if leftpad is None else leftpad[b], length, device=DEVICE)
        for cache in ("k_cache", "v_cache"):
            call[cache][places(call, b, keys)] = random(len(keys), heads_kv, head_dim)
    return call


# ---------------------------------------------------------------------------------------------------------------------
# The oracle: one sequence at a time, one gather each
# ---------------------------------------------------------------------------------------------------------------------


def places(call, b, keys):
    """Where the caches hold the `keys` (an index tensor) of sequence b: indices into their first two dimensions."""
    if call["block_table"] is not None:
        page = call["k_cache"].shape[1]
        return call["block_table"][b].long()[keys // page], keys % page
    row = b if call["cache_batch_idx"] is None else int(call["cache_batch_idx"][b])
    return torch.full_like(keys, row), keys


def lengths_of(call, b):
    """(length before the call, keys that are appended, left padding) of sequence b."""
    length = call["cache_seqlens"]
    if length is None:
        length = call["k_cache"].shape[1] * (1 if call["block_table"] is None else call["block_table"].shape[1])
    elif not isinstance(length, int):
        length = int(length[b])
    n_new = 0 if call["k"] is None else call["k"].shape[1]
    return length, n_new, 0 if call["cache_leftpad"] is None else int(call["cache_leftpad"][b])


def rotated(x, positions, call):
    """x (N, H, D) with row i turned at positions[i], in float64; and how far from that float32 arithmetic may be."""
    x = x.double()
    turned, error = x.clone(), torch.zeros_like(x)
    if call.get("rotary_cos") is None:
        return turned, error
    cos, sin = (call[name].double()[positions, None] for name in ("rotary_cos", "rotary_sin"))
    r = 2 * cos.shape[-1]
    first, second = slice(0, r // 2), slice(r // 2, r)
    if call.get("rotary_interleaved", True):
        first, second = slice(0, r, 2), slice(1, r, 2)
    x1, x2 = x[..., first], x[..., second]
    turned[..., first] = x1 * cos - x2 * sin
    turned[..., second] = x1 * sin + x2 * cos
    error[..., first] = 2**-22 * ((x1 * cos).abs() + (x2 * sin).abs())
    error[..., second] = 2**-22 * ((x1 * sin).abs() + (x2 * cos).abs())
    return turned, error


def appended(call):
    """The caches with the new keys and values: (k_cache, its lower bound, its upper bound, v_cache).

    The bounds differ where float32's rounding of a rotation decides between two neighbours.
    """
    k_caches = [call["k_cache"].clone() for _ in range(3)]
    v_cache = call["v_cache"].clone()
    for b in range(len(call["q"])):
        length, n_new, _ = lengths_of(call, b)
        if n_new:
            keys = torch.arange(length, length + n_new, device=DEVICE)
            turned, error = rotated(call["k"][b], keys, call)
            for k_cache, rows in zip(k_caches, (turned, turned - error, turned + error), strict=True):
                k_cache[places(call, b, keys)] = rows.to(k_cache.dtype)
            v_cache[places(call, b, keys)] = call["v"][b]
    return *k_caches, v_cache


def attended(call):
    """For each sequence what its queries see, and how: [(q, k, v, options of naive_attention)], batches of one."""
    k_cache, _, _, v_cache = appended(call)
    ordered = call.get("causal", False) or call.get("window_size", (-1, -1)) != (-1, -1)
    sequences = []
    for b, q in enumerate(call["q"]):
        length, n_new, leftpad = lengths_of(call, b)
        positions = torch.arange(len(q), device=DEVICE) * ordered + length  # without a mask all queries have one place
        q = rotated(q, positions, call)[0].to(q.dtype)
        where = places(call, b, torch.arange(leftpad, length + n_new, device=DEVICE))
        options = {n: call[n] for n in ("causal", "window_size", "softcap", "softmax_scale") if n in call}
        if call.get("alibi_slopes") is not None:
            options["alibi_slopes"] = call["alibi_slopes"].expand(len(call["q"]), -1)[b]
        sequences.append((q[None], k_cache[where][None], v_cache[where][None], options))
    return sequences


def bits(t):
    """NaN is equal to itself here."""
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def check_caches(k_cache, v_cache, before):
    """The caches after a call are what they were before it, with the new rows written."""
    _, low, high, expected_v = appended(before)
    assert torch.equal(bits(v_cache), bits(expected_v)), "v_cache is not as it should be"
    right = (bits(k_cache) == bits(low)) | ((low <= k_cache) & (k_cache <= high))
    assert right.all(), f"k_cache is wrong in {(~right).sum()} places, first at {(~right).nonzero()[0].tolist()}"


def check(call):
    """One call: its result by the 2 x rule, sequence by sequence, and the caches. Returns (out, lse)."""
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    out, lse = interface.flash_attn_with_kvcache(**call, return_softmax_lse=True)
    batch, n_q, heads, _ = call["q"].shape
    assert out.shape == call["q"].shape and out.dtype == call["q"].dtype
    assert lse.shape == (batch, heads, n_q) and lse.dtype == torch.float32
    for b, (q, k, v, options) in enumerate(attended(before)):
        check_attention(out[b : b + 1], q, k, v, lse=lse[b : b + 1], **options).raise_if_failed()
    check_caches(call["k_cache"], call["v_cache"], before)
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and name not in ("k_cache", "v_cache"):
            assert torch.equal(call[name], value), f"{name} was written to"
    return out, lse


# ---------------------------------------------------------------------------------------------------------------------
# What a call computes
# ---------------------------------------------------------------------------------------------------------------------

CASES = {
    "one query": {},
    "causal": dict(n_q=3, causal=True),
    "more queries than keys": dict(n_q=7, causal=True, heads=1),
    "a long prompt": dict(n_q=20, n_new=20, lengths=(8, 0), causal=True, heads=7),
    "as many heads of keys": dict(heads=2, heads_kv=2),
    "four heads to one of keys": dict(heads=8, heads_kv=2, n_q=2, causal=True),
    "one head of keys": dict(heads=5, heads_kv=1),
    "odd head dimension": dict(head_dim=23, n_new=1),
    "appended": dict(n_new=1),
    "appended, causal": dict(n_q=5, n_new=5, causal=True),
    "more appended than asked": dict(n_q=2, n_new=6, causal=True),
    "fewer appended than asked": dict(n_q=4, n_new=1, causal=True),
    "appended out of sight": dict(n_q=1, n_new=9, window_size=(2, 0)),
    "rotary": dict(n_new=1, rotary=ALL),
    "rotary by halves": dict(n_new=1, rotary=ALL, rotary_interleaved=False),
    "rotary, causal": dict(n_q=3, n_new=3, rotary=ALL, causal=True),
    "rotary, causal, by halves": dict(n_q=3, n_new=3, rotary=ALL, causal=True, rotary_interleaved=False),
    "rotary in a window": dict(n_q=3, n_new=3, rotary=ALL, window_size=(9, 1)),
    "rotary without a mask": dict(n_q=3, n_new=3, rotary=ALL),
    "rotary of a part": dict(n_q=2, n_new=2, rotary=6, causal=True),
    "rotary of a part, by halves": dict(n_q=2, n_new=2, rotary=6, causal=True, rotary_interleaved=False),
    "cache_batch_idx": dict(batch_idx=(4, 0, 5, 2), batch_cache=7, n_new=2),
    "leftpad": dict(n_q=2, leftpad=(3, 20, 0, 1), causal=True),
    "leftpad in a window": dict(n_q=2, n_new=2, leftpad=(30, 9, 0, 4), window_size=(6, 0)),
    "leftpad, rotary and cache_batch_idx": dict(
        n_q=2, n_new=2, leftpad=(3, 19, 0, 1), rotary=ALL, causal=True, batch_idx=(2, 3, 1, 0)
    ),
    "pages of 16": dict(page=16),
    "pages of 20, appended across a border": dict(page=20, n_q=3, n_new=3, lengths=(38, 20, 0, 19), causal=True),
    "pages of 5, rotary": dict(page=5, n_q=3, n_new=3, rotary=ALL, causal=True, heads=4, heads_kv=2),
    "pages of 1": dict(page=1, lengths=(9, 2, 0), capacity=12, n_new=2),
    "pages of 256": dict(page=256, n_new=1),
    "window": dict(n_q=4, window_size=(6, 2)),
    "window to the left": dict(n_q=4, window_size=(11, -1)),
    "window to the right": dict(n_q=4, window_size=(-1, 2)),
    "window on pages": dict(n_q=4, window_size=(6, 0), page=16),
    "softcap": dict(softcap=1.5, n_q=2),
    "ALiBi": dict(slopes="a head", n_q=3),
    "ALiBi of each sequence": dict(slopes="a sequence and head", n_q=3, n_new=3, causal=True, leftpad=(3, 7, 0, 2)),
    "softmax_scale": dict(softmax_scale=0.7),
    "all at once": dict(
        n_q=3, n_new=3, heads=6, heads_kv=2, page=20, rotary=8, rotary_interleaved=False, slopes="a head", softcap=2.0,
        causal=True, window_size=(25, -1), softmax_scale=0.3, num_splits=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_call(case):
    check(make(**CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    ["one query", "rotary, causal", "rotary of a part, by halves", "pages of 5, rotary", "all at once"],
)
def test_call_in_half_precision(case, dtype):
    check(make(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7])
@pytest.mark.parametrize("case", ["four heads to one of keys", "pages of 20, appended across a border"])
def test_any_number_of_splits(case, num_splits):
    check(make(**CASES[case], num_splits=num_splits))


def test_more_splits_than_keys():
    check(make((40, 3), num_splits=20, heads=1))


def test_uneven_splits_of_many_tiles():
    check(make((300, 131), capacity=310, n_q=2, n_new=2, causal=True, num_splits=4, dtype=torch.float16))


def test_splits_that_a_window_leaves_without_keys():
    check(make((120, 31), capacity=120, n_q=2, window_size=(20, 0), num_splits=4))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_call(data):
    """In float32: of a handful of half-precision outputs the textbook formula's may be nearer by chance."""
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=2), label="lengths")
    n_new = draw(st.integers(0, 4), label="n_new")
    heads_kv = draw(st.integers(1, 2), label="heads_kv")
    head_dim = draw(st.integers(2, 20), label="head_dim")
    options = dict(
        n_q=draw(st.integers(1, 4), label="n_q"),
        heads=heads_kv * draw(st.integers(1, 2), label="group"),
        capacity=max(1, max(lengths) + n_new + draw(st.integers(0, 9), label="room")),
        causal=draw(st.booleans(), label="causal"),
        window_size=draw(st.sampled_from([(-1, -1), (-1, -1), (4, 1), (13, -1), (-1, 0)]), label="window"),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5]), label="softcap"),
        slopes=draw(st.sampled_from([None, None, "a head", "a sequence and head"]), label="slopes"),
        num_splits=draw(st.integers(0, 3), label="num_splits"),
        seed=draw(st.integers(0, 1000), label="seed"),
    )
    if draw(st.booleans(), label="paged"):
        options |= dict(page=draw(st.integers(1, 33), label="page"))
    else:
        options["leftpad"] = draw(st.none() | st.tuples(*(st.integers(0, n) for n in lengths)), label="leftpad")
        rows = draw(st.none() | st.permutations(range(len(lengths) + 2)), label="rows")
        if rows is not None:
            options |= dict(batch_idx=rows[: len(lengths)], batch_cache=len(rows))
    if n_new and draw(st.booleans(), label="rotate"):
        options["rotary"] = 2 * draw(st.integers(1, head_dim // 2), label="pairs")
        options["rotary_interleaved"] = draw(st.booleans(), label="interleaved")
    check(make(lengths, n_new=n_new, heads_kv=heads_kv, head_dim=head_dim, **options))


def test_lengths_as_one_integer():
    call = make((20, 20, 20), n_new=2, batch_idx=(3, 0, 1), batch_cache=4)
    check(call | dict(cache_seqlens=20))


@pytest.mark.parametrize("page", [None, 8])
def test_without_lengths_the_cache_is_full(page):
    call = make((24, 24), capacity=24, page=page)
    check(call | dict(cache_seqlens=None))


def test_sequences_may_share_a_row_of_the_cache():
    call = make((30, 0), capacity=30, n_q=2, causal=True)
    check(call | dict(cache_batch_idx=ints(0, 0), cache_seqlens=ints(30, 12)))


def test_sequences_may_share_pages():
    call = make((30, 30), capacity=32, page=8, n_q=2, causal=True)
    call["block_table"][1, :2] = call["block_table"][0, :2]
    check(call)


def test_what_one_sequence_appends_another_must_not_see():
    """Blocks of 8 rows: full ones may be shared, and the rows of a block that neither of two sequences writes."""
    call = make((19, 18), capacity=32, page=8, n_new=2)
    call["block_table"][1, :2] = call["block_table"][0, :2]
    check(call)
    for lengths, places in (((19, 18), (2, 2)), ((19, 21), (2, 2)), ((7, 24), (1, 2)), ((22, 0), (2, 0))):
        call = make(lengths, capacity=32, page=8, n_new=2)
        first, second = places
        call["block_table"][1, second] = block = call["block_table"][0, first].item()
        before = call["k_cache"].clone()
        with pytest.raises(ValueError, match=f"block {block}, to which k is appended"):
            interface.flash_attn_with_kvcache(**call)
        assert torch.equal(bits(call["k_cache"]), bits(before))
    call = make((0,), capacity=16, page=8, n_new=16)
    call["block_table"][0, 1] = call["block_table"][0, 0]
    with pytest.raises(ValueError, match=r"block_table\[0\] sees these rows as well"):
        interface.flash_attn_with_kvcache(**call)


def test_entries_of_the_table_beyond_the_keys_may_be_anything():
    call = make(page=8, n_new=1)  # the longest sequence has 38 keys, in 5 of 6 blocks
    for b, length in enumerate(call["cache_seqlens"].tolist()):
        call["block_table"][b, length // 8 + 1 :] = -1 if b % 2 else 10**9
    check(call)


def test_lse_only_where_it_is_asked_for():
    call = make()
    out, lse = check(call)
    assert torch.equal(interface.flash_attn_with_kvcache(**call), out)
    assert (out[2] == 0).all() and lse[2].isneginf().all()  # the sequence without keys


LAYOUTS = {
    "heads before rows": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "rows before sequences": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "keys beside values": lambda t: torch.stack([torch.full_like(t, NAN), t], dim=2)[:, :, 1],
    "the middle of longer rows": lambda t: torch.nn.functional.pad(t, (3, 5), value=NAN)[..., 3:-5],
}


@pytest.mark.parametrize(("layout", "page"), [*((layout, None) for layout in LAYOUTS), ("heads before rows", 16)])
def test_caches_and_inputs_of_any_layout(layout, page):
    call = make((37, 5), n_q=3, n_new=3, heads=4, heads_kv=2, causal=True, rotary=ALL, page=page)
    for name in ("k_cache", "v_cache"):
        call[name] = LAYOUTS[layout](call[name])
    for name in ("q", "k", "v"):
        call[name] = LAYOUTS["the middle of longer rows"](call[name])
    assert not call["k_cache"].is_contiguous() and not call["k"].is_contiguous()
    check(call)


def test_nothing_beside_the_caches_is_written():
    """A cache that is a part of a larger tensor: its neighbours keep what they hold."""
    call = make(n_q=2, n_new=2, causal=True)
    around = {}
    for name in ("k_cache", "v_cache"):
        around[name] = torch.nn.functional.pad(call[name], (3, 5, 1, 1, 2, 2), value=7.0)
        call[name] = around[name][:, 2:-2, 1:-1, 3:-5]
    check(call)
    for name, t in around.items():
        t[:, 2:-2, 1:-1, 3:-5] = 7.0
        assert (t == 7.0).all(), name


# ---------------------------------------------------------------------------------------------------------------------
# Step by step
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "dtype"), [(None, torch.float32), (6, torch.float16)])
def test_a_prompt_and_steps_after_it_are_one_causal_sequence(page, dtype):
    chunks = (7, 1, 1, 4, 1, 1)
    n = sum(chunks)
    whole = make(
        (0, 0), n_q=n, n_new=n, heads=4, heads_kv=2, capacity=20, page=page, rotary=ALL, causal=True, dtype=dtype
    )
    step, outs = dict(whole), []
    for chunk in chunks:
        start = sum(out.shape[1] for out in outs)
        step |= {name: whole[name][:, start : start + chunk] for name in ("q", "k", "v")}
        outs.append(interface.flash_attn_with_kvcache(**step))
        step["cache_seqlens"] += chunk
    turn = lambda t: torch.stack([rotated(x, torch.arange(n, device=DEVICE), whole)[0].to(dtype) for x in t])  # noqa: E731
    q, k, v = turn(whole["q"]), turn(whole["k"]), whole["v"]
    for out in (torch.cat(outs, dim=1), interface.flash_attn_func(q, k, v, causal=True)):
        check_attention(out, q, k, v, causal=True).raise_if_failed()


def test_there_is_no_backward_and_it_says_so():
    call = make(n_new=1)
    call["q"].requires_grad_()
    out = interface.flash_attn_with_kvcache(**call)
    with pytest.raises(RuntimeError, match="backward through labutils.flash_attention_with_cache"):
        out.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

# By name: the error, what it says, how `make` is called besides WRONG_BASE, and what is changed afterwards.
WRONG_BASE = dict(lengths=(7, 3), n_q=2, n_new=2, capacity=12, heads=4, heads_kv=2)
NO_NEW = dict(n_new=0)
PAGED = dict(page=4)
ROTARY = dict(rotary=8)
WRONG_INPUTS = {
    "cache a list": (TypeError, "k_cache is a list", {}, dict(k_cache=lambda t: t.tolist())),
    "cache of three dimensions": (ValueError, r"v_cache has shape .*pass 4", {}, dict(v_cache=lambda t: t[0])),
    "caches differ": (ValueError, "k_cache has shape .* and v_cache", {}, dict(v_cache=lambda t: t[:, :9])),
    "cache of another dtype": (
        TypeError, "q, k_cache and v_cache .*convert", {},
        dict(k_cache=lambda t: t.half(), v_cache=lambda t: t.half()),
    ),
    "cache of another head dimension": (
        ValueError, "k_cache and v_cache have 8", {}, dict(k_cache=lambda t: t[..., :8], v_cache=lambda t: t[..., :8])
    ),
    "heads of the cache do not divide": (
        ValueError, "k_cache and v_cache have 3.* must divide", {},
        dict(k_cache=lambda t: t[:, :, [0, 0, 0]], v_cache=lambda t: t[:, :, [0, 0, 0]]),
    ),
    "cache elsewhere": (ValueError, "k_cache on meta.*move", {}, dict(k_cache=lambda t: t.to(META))),
    "cache with too few rows": (
        ValueError, "batch size 2, the cache 1 rows.*cache_batch_idx", {},
        dict(k_cache=lambda t: t[:1], v_cache=lambda t: t[:1]),
    ),
    "k alone": (ValueError, "k and v .*both or neither", {}, dict(v=lambda t: None)),
    "v alone": (ValueError, "k and v .*both or neither", {}, dict(k=lambda t: None)),
    "k and v differ": (ValueError, "k has shape .* and v", {}, dict(v=lambda t: t[:, :1])),
    "k of another batch size": (
        ValueError, "k and v have 1: they must agree", {}, dict(k=lambda t: t[:1], v=lambda t: t[:1])
    ),
    "k of other heads": (
        ValueError, "k and v have 1 heads, the cache has 2", {}, dict(k=lambda t: t[:, :, :1], v=lambda t: t[:, :, :1])
    ),
    "k of another head dimension": (
        ValueError, "k and v have 8", {}, dict(k=lambda t: t[..., :8], v=lambda t: t[..., :8])
    ),
    "k of another dtype": (TypeError, "q, k and v .*convert", {}, dict(k=lambda t: t.half(), v=lambda t: t.half())),
    "k elsewhere": (ValueError, "k on meta.*move", {}, dict(k=lambda t: t.to(META))),
    "expanded cache": (
        ValueError, "v_cache is expanded.*clone", {}, dict(v_cache=lambda t: t[:1].expand(2, -1, -1, -1))
    ),
    "k without lengths": (ValueError, "cache_seqlens is None.*pass how many", {}, dict(cache_seqlens=lambda t: None)),
    "lengths int64": (TypeError, "cache_seqlens is torch.int64.*int32", {}, dict(cache_seqlens=lambda t: t.long())),
    "lengths a list": (TypeError, "cache_seqlens is a list", {}, dict(cache_seqlens=lambda t: t.tolist())),
    "lengths a float": (TypeError, "cache_seqlens is a float.*integer", {}, dict(cache_seqlens=lambda t: 7.0)),
    "lengths a truth value": (TypeError, "cache_seqlens is a bool", {}, dict(cache_seqlens=lambda t: True)),
    "lengths of two dimensions": (ValueError, "cache_seqlens has shape", {}, dict(cache_seqlens=lambda t: t[None])),
    "lengths without a dimension": (ValueError, "cache_seqlens has shape", {}, dict(cache_seqlens=lambda t: t[0])),
    "too many lengths": (
        ValueError, "cache_seqlens has 3 entries for 2", {}, dict(cache_seqlens=lambda t: t[[0, 1, 1]])
    ),
    "lengths elsewhere": (ValueError, "cache_seqlens is on meta.*move", {}, dict(cache_seqlens=lambda t: t.to(META))),
    "length negative": (ValueError, "cache_seqlens=.*0 or more", {}, dict(cache_seqlens=lambda t: t - 5)),
    "integer length negative": (ValueError, "cache_seqlens=.*0 or more", {}, dict(cache_seqlens=lambda t: -1)),
    "no room to append": (
        ValueError, "12 keys.*cache_seqlens holds 11 and k appends 2.*larger", {}, dict(cache_seqlens=lambda t: t + 4)
    ),
    "no room to append, one integer": (
        ValueError, "cache_seqlens holds 11 and k appends 2", {}, dict(cache_seqlens=lambda t: 11)
    ),
    "longer than the cache": (
        ValueError, "12 keys.*cache_seqlens holds 13", NO_NEW, dict(cache_seqlens=lambda t: t + 6)
    ),
    "rows int64": (TypeError, "cache_batch_idx is torch.int64", {}, dict(cache_batch_idx=lambda _: ints(0, 1).long())),
    "rows of two dimensions": (
        ValueError, "cache_batch_idx has shape", {}, dict(cache_batch_idx=lambda _: ints([0, 1]))
    ),
    "too few rows named": (ValueError, "cache_batch_idx has 1 entries", {}, dict(cache_batch_idx=lambda _: ints(0))),
    "rows elsewhere": (
        ValueError, "cache_batch_idx is on meta", {}, dict(cache_batch_idx=lambda _: ints(0, 1).to(META))
    ),
    "a row beyond the cache": (ValueError, "cache_batch_idx=.*0 to 1", {}, dict(cache_batch_idx=lambda _: ints(0, 2))),
    "a row below 0": (ValueError, "cache_batch_idx=.*0 to 1", {}, dict(cache_batch_idx=lambda _: ints(0, -1))),
    "a row to append to twice": (ValueError, "cache_batch_idx=.*twice", {}, dict(cache_batch_idx=lambda _: ints(1, 1))),
    "padding int64": (TypeError, "cache_leftpad is torch.int64", {}, dict(cache_leftpad=lambda _: ints(0, 1).long())),
    "padding for another batch": (ValueError, "cache_leftpad has 3", {}, dict(cache_leftpad=lambda _: ints(0, 0, 0))),
    "padding elsewhere": (
        ValueError, "cache_leftpad is on meta", {}, dict(cache_leftpad=lambda _: ints(0, 1).to(META))
    ),
    "padding beyond the length": (
        ValueError, r"cache_leftpad\[1\]=4, but cache_seqlens\[1\]=3", {}, dict(cache_leftpad=lambda _: ints(0, 4))
    ),
    "padding negative": (ValueError, r"cache_leftpad\[0\]=-1", {}, dict(cache_leftpad=lambda _: ints(-1, 0))),
    "table a list": (TypeError, "block_table is list", PAGED, dict(block_table=lambda t: t.tolist())),
    "table int64": (TypeError, "block_table is torch.int64", PAGED, dict(block_table=lambda t: t.long())),
    "table of one dimension": (ValueError, "block_table has shape", PAGED, dict(block_table=lambda t: t[0])),
    "table without a dimension": (ValueError, "block_table has shape", PAGED, dict(block_table=lambda t: t[0, 0])),
    "table for another batch": (ValueError, "block_table has 1 rows", PAGED, dict(block_table=lambda t: t[:1])),
    "table elsewhere": (ValueError, "block_table is on meta", PAGED, dict(block_table=lambda t: t.to(META))),
    "table and rows": (
        ValueError, "cache_batch_idx .*paged.*leave it out", PAGED, dict(cache_batch_idx=lambda _: ints(0, 1))
    ),
    "table and padding": (
        ValueError, "cache_leftpad .*paged.*leave it out", PAGED, dict(cache_leftpad=lambda _: ints(0, 1))
    ),
    "too few blocks": (  # F19: the error is flash-attn's
        RuntimeError, "block_table has 2 blocks of 4 rows.*room for 8 keys.*holds 7 and k appends 2", PAGED,
        dict(block_table=lambda t: t[:, :2]),
    ),
    "a block beyond the cache": (
        ValueError, r"block_table\[1\].*0 to 7", PAGED, dict(block_table=lambda t: t + ints([0], [8]))
    ),
    "a block below 0": (ValueError, r"block_table\[0\].*0 to 7", PAGED, dict(block_table=lambda t: t - ints([8], [0]))),
    "rotary without k": (ValueError, "rotary_cos .*without k", dict(NO_NEW, rotary=8), {}),
    "cos alone": (ValueError, "rotary_cos and rotary_sin.*both", ROTARY, dict(rotary_sin=lambda t: None)),
    "sin alone": (ValueError, "rotary_cos and rotary_sin.*both", ROTARY, dict(rotary_cos=lambda t: None)),
    "cos and sin differ": (ValueError, "rotary_sin has shape", ROTARY, dict(rotary_sin=lambda t: t[:, :3])),
    "cos of one dimension": (ValueError, "rotary_cos has shape", ROTARY, dict(rotary_cos=lambda t: t[0])),
    "cos of integers": (TypeError, "rotary_cos is torch.int32", ROTARY, dict(rotary_cos=lambda t: t.int())),
    "cos elsewhere": (ValueError, "rotary_cos is on meta", ROTARY, dict(rotary_cos=lambda t: t.to(META))),
    "rotary dimension too large": (
        ValueError, "rotary_cos has shape .*head dimension 16", ROTARY,
        dict(rotary_cos=lambda t: t.repeat(1, 3), rotary_sin=lambda t: t.repeat(1, 3)),
    ),
    "rotary dimension zero": (
        ValueError, "rotary_cos has shape", ROTARY, dict(rotary_cos=lambda t: t[:, :0], rotary_sin=lambda t: t[:, :0])
    ),
    "too few positions for the keys": (
        ValueError, "rotary_cos and rotary_sin have 8 positions.*8 is needed.*longer", ROTARY,
        dict(rotary_cos=lambda t: t[:8], rotary_sin=lambda t: t[:8]),
    ),
    "too few positions for the queries": (
        ValueError, "rotary_cos and rotary_sin have 11 positions.*11 is needed", dict(ROTARY, n_q=5, causal=True),
        dict(rotary_cos=lambda t: t[:11], rotary_sin=lambda t: t[:11]),
    ),
    "splits negative": (ValueError, "num_splits=-1", dict(num_splits=-1), {}),
    "more splits than there may be": (ValueError, "num_splits=129.*128", dict(num_splits=129), {}),
    "splits a float": (ValueError, "num_splits=2.5.*integer", dict(num_splits=2.5), {}),
    "scale beyond float32": (ValueError, "softmax_scale=1e\\+39", dict(softmax_scale=1e39), {}),
    "causal a word": (TypeError, "causal is a str", dict(causal="no"), {}),
    "interleaved a word": (TypeError, "rotary_interleaved is a str", dict(rotary_interleaved="no"), {}),
    "window a number": (ValueError, "window_size=8", dict(window_size=8), {}),
    "softcap negative": (ValueError, "softcap=-1", dict(softcap=-1.0), {}),
    "slopes of another batch": (
        ValueError, r"alibi_slopes has shape \(3, 4\)", {},
        dict(alibi_slopes=lambda _: torch.ones(3, 4, device=DEVICE)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_input_is_named(case):
    error, message, options, changes = WRONG_INPUTS[case]
    call = make(**WRONG_BASE | options)
    caches = [(call[name], call[name].clone()) for name in ("k_cache", "v_cache")]
    call |= {name: change(call.get(name)) for name, change in changes.items()}
    with pytest.raises(error, match=message):
        interface.flash_attn_with_kvcache(**call)
    for now, before in caches:
        assert torch.equal(bits(now), bits(before)), "refused, but not before the cache was written to"


@pytest.fixture
def on_fast_path(monkeypatch):
    """The fast path, which otherwise only a GPU takes. In the interpreter it finds known calls, but replays nothing."""
    monkeypatch.setattr(fast_path, "applies", lambda *tensors: True)
    monkeypatch.setattr(fast_path, "_known", {})


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_input_is_named_on_the_fast_path(case, on_fast_path):
    test_wrong_input_is_named(case)


WRONG_DECODING = {
    "scale beyond float32": (ValueError, "softmax_scale=1e\\+39", dict(softmax_scale=1e39)),
    "causal a word": (TypeError, "causal is a str", dict(causal="no")),
    "scale a list": (TypeError, "softmax_scale is a list", dict(softmax_scale=[0.5])),
    "window a number": (ValueError, "window_size=8", dict(window_size=8)),
    "softcap negative": (ValueError, "softcap=-1", dict(softcap=-1.0)),
    "splits negative": (ValueError, "num_splits=-1", dict(num_splits=-1)),
    "splits true": (ValueError, "num_splits=True", dict(num_splits=True)),
    "length negative": (ValueError, "cache_seqlens=.-1.*0 or more", dict(cache_seqlens=-1)),
    "length beyond the cache": (ValueError, "room for 48 keys.*holds 49", dict(cache_seqlens=49)),
    "length true": (TypeError, "cache_seqlens is a bool", dict(cache_seqlens=True)),
    "a cache of three dimensions": (ValueError, "k_cache has shape", dict(k_cache=torch.zeros(2, 48, 16))),
    "v of another length": (ValueError, "k_cache has shape.*v_cache", dict(v_cache=torch.zeros(2, 47, 1, 16))),
    "one row too few": (
        ValueError, "batch size 2, the cache 1 rows",
        dict(k_cache=torch.zeros(1, 48, 1, 16), v_cache=torch.zeros(1, 48, 1, 16)),
    ),
    "another dtype": (TypeError, "dtypes", dict(k_cache=torch.zeros(2, 48, 1, 16).half())),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_DECODING)
def test_wrong_decoding_is_named_whatever_was_seen_before(case, on_fast_path):
    error, message, changes = WRONG_DECODING[case]
    call = make((9, 5), garbage=0.0) | dict(cache_seqlens=9)
    changes = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in changes.items()}
    for num_splits in (0, 1):
        interface.flash_attn_with_kvcache(**call, num_splits=num_splits)
    assert len(fast_path._known) == 2
    for _ in range(2):
        with pytest.raises(error, match=message):
            interface.flash_attn_with_kvcache(**call | changes)


def test_a_growing_cache_is_one_kind_of_call(on_fast_path):
    for n in (1, 2, 15, 16, 17, 40, 48):
        call = make((n, n), heads=4, heads_kv=2, causal=True)
        check(call | dict(cache_seqlens=n))
    assert len(fast_path._known) == 1
    check(call | dict(cache_seqlens=20, softcap=2.0))
    assert len(fast_path._known) == 2


@pytest.mark.parametrize("options", [{}, PAGED, ROTARY, NO_NEW])
def test_what_the_wrong_inputs_are_made_from_is_right(options):
    check(make(**WRONG_BASE | options))


def test_arguments_are_those_of_flash_attn():
    """Names, order and defaults of flash_attn 2.8."""
    parameters = inspect.signature(interface.flash_attn_with_kvcache).parameters
    assert [name if p.default is p.empty else (name, p.default) for name, p in parameters.items()] == [
        "q", "k_cache", "v_cache", ("k", None), ("v", None), ("rotary_cos", None), ("rotary_sin", None),
        ("cache_seqlens", None), ("cache_batch_idx", None), ("cache_leftpad", None), ("block_table", None),
        ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0),
        ("rotary_interleaved", True), ("alibi_slopes", None), ("num_splits", 0), ("return_softmax_lse", False),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------

LONGER = dict(lengths=(1000, 339, 0, 128), capacity=1200)


def longer(options):
    """A case of this file for sequences some 17 times as long."""
    options = dict(options) | LONGER
    if "window_size" in options:
        options["window_size"] = tuple(w if w < 0 else 17 * w for w in options["window_size"])
    if "leftpad" in options:
        options["leftpad"] = tuple(min(17 * p, n) for p, n in zip(options["leftpad"], LONGER["lengths"], strict=True))
    return options


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, torch.float16),
        (64, torch.float32),
        (59, torch.bfloat16),
        (128, torch.bfloat16),
        (128, torch.float16),
        (256, torch.float16),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_call_on_a_gpu(case, head_dim, dtype):
    check(make(**longer(CASES[case]) | dict(head_dim=head_dim, dtype=dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [0, 1, 5, 128])
@pytest.mark.parametrize("n_q", [1, 16])
@pytest.mark.parametrize("page", [None, 16])
def test_a_long_cache(page, n_q, num_splits):
    check(
        make(
            (131_000, 70_001, 3), capacity=131_072, n_q=n_q, n_new=n_q, heads=8, heads_kv=1, head_dim=128, page=page,
            dtype=torch.bfloat16, causal=True, rotary=ALL, num_splits=num_splits,
        )
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("n_q", [1, 300])
@pytest.mark.parametrize("page", [None, 16])
def test_same_bits_in_100_runs(page, n_q):
    call = make(
        (3000, 777, 64), capacity=3300, n_q=n_q, n_new=n_q, heads=8, heads_kv=2, head_dim=128, page=page,
        dtype=torch.float16, causal=True, rotary=ALL,
    )  # fmt: skip
    pristine = {name: call[name].clone() for name in ("k_cache", "v_cache")}
    first = check(call)
    written = {name: call[name].clone() for name in pristine}
    for _ in range(100):
        for name, t in pristine.items():
            call[name].copy_(t)  # so that every run appends to a cache without the new keys
        again = interface.flash_attn_with_kvcache(**call, return_softmax_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(bits(call[name]), bits(t)) for name, t in written.items())


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [0, 1, 5])
@pytest.mark.parametrize(("n_q", "head_dim"), [(1, 64), (1, 59), (3, 40), (2, 128)])
@pytest.mark.parametrize("anew", [False, True], ids=["one cache", "a cache for each token"])
def test_the_bits_do_not_depend_on_what_was_seen_before(anew, n_q, head_dim, num_splits, monkeypatch):
    """A growing cache, at addresses of any alignment, beside the same call from scratch."""
    monkeypatch.setattr(fast_path, "_known", {})
    heads, heads_kv, most = 8, 2, 1300
    memory = torch.randn(2, 2 * heads_kv * most * head_dim + 8, device=DEVICE).half()
    for i, n in enumerate([*range(3, 20), 127, 128, 129, 500, 1024, *range(1200, 1216), 1300, 7]):
        off = (0, 0, 0, 1, 4)[i % 5]
        rows = n if anew else most
        k, v = (part[off : off + 2 * heads_kv * rows * head_dim] for part in memory)
        k, v = (t.view(2, heads_kv, rows, head_dim).transpose(1, 2) for t in (k, v))
        q = torch.randn(2, n_q, heads, head_dim, device=DEVICE).half()
        call = dict(cache_seqlens=n, causal=True, num_splits=num_splits, return_softmax_lse=True)
        ours = interface.flash_attn_with_kvcache(q, k, v, **call)
        options = Options(head_dim**-0.5, window_right=0)
        scratch = flash_decode.decode(q, k, v, Cache(None, n), options, splits=num_splits)
        for a, b in zip(ours, scratch, strict=True):
            assert torch.equal(a, b), f"{n} keys, {off} elements behind an aligned address"
    assert any(known.replays for known in fast_path._known.values())


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("page", [None, 16])
def test_a_captured_step_follows_the_lengths(page, num_splits):
    """A CUDA graph of one step, replayed while the lengths, which it reads from the GPU, advance."""
    eager = make(
        (100, 37), capacity=256, n_new=1, heads=8, heads_kv=2, head_dim=64, dtype=torch.float16, page=page, rotary=ALL,
        causal=True, num_splits=num_splits,
    )  # fmt: skip
    captured = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in eager.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles; what it appends the first replay replaces
        interface.flash_attn_with_kvcache(**captured, return_softmax_lse=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = interface.flash_attn_with_kvcache(**captured, return_softmax_lse=True)
    for _ in range(40):
        for name in ("q", "k", "v"):
            captured[name].copy_(eager[name].normal_())
        expected_out, expected_lse = check(eager)
        graph.replay()
        assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
        for name in ("k_cache", "v_cache"):
            assert torch.equal(bits(captured[name]), bits(eager[name]))
        for call in (eager, captured):
            call["cache_seqlens"] += 1


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["pages", "sequences", "rows"])
def test_caches_of_more_than_two_to_the_31_elements(layout):
    """The keys that are looked at, and those that are written, lie beyond the 2**31st element."""
    if runtime.memory_gib < 64:
        pytest.skip("needs a GPU with 64 GiB, for the caches and the copies that they are compared with")
    sizes = dict(n_q=2, n_new=2, heads=16, heads_kv=8, head_dim=128, dtype=torch.float16, causal=True)
    if layout == "pages":
        call = make((600, 1000), capacity=1024, page=256, **sizes)
        before = 2**31 // call["k_cache"][0].numel()
        for name in ("k_cache", "v_cache"):
            call[name] = torch.cat([torch.full_like(call[name][:1], NAN).expand(before, -1, -1, -1), call[name]])
        call["block_table"] += before
    elif layout == "sequences":
        call = make((600, 1000), capacity=2**16, batch_idx=(33, 32), batch_cache=34, **sizes)
    else:
        n = 2**21 + 2000
        call = make((n - 100,), capacity=n, leftpad=(n - 1100,), **sizes)
    b = len(call["q"]) - 1
    cache, row = (int(index) for index in places(call, b, torch.tensor(lengths_of(call, b)[2], device=DEVICE)))
    assert call["k_cache"].stride(0) * cache + call["k_cache"].stride(1) * row >= 2**31
    check(call)


# What flash_attn can do as well. It takes pages of multiples of 256 rows and rotary dimensions of multiples of 16 only,
# and where a window hides keys that are appended, it does not write all of them.
BESIDE_FLASH_ATTN = {
    "one query": {},
    "a few queries": dict(n_q=5),
    "causal": dict(n_q=5, causal=True),
    "as many heads of keys": dict(heads_kv=8),
    "one head of keys": dict(heads_kv=1, n_q=2, causal=True),
    "appended": dict(n_new=1),
    "appended, causal": dict(n_q=7, n_new=7, causal=True),
    "a long prompt": dict(n_q=150, n_new=150, causal=True),
    "rotary": dict(n_new=1, rotary=ALL),
    "rotary by halves": dict(n_new=1, rotary=ALL, rotary_interleaved=False),
    "rotary, causal": dict(n_q=7, n_new=7, rotary=ALL, causal=True),
    "rotary of a part": dict(n_q=7, n_new=7, rotary=32, causal=True),
    "rotary of a part, by halves": dict(n_q=7, n_new=7, rotary=32, causal=True, rotary_interleaved=False),
    "rotary without a mask": dict(n_q=7, n_new=7, rotary=ALL),
    "rotary in a window": dict(n_q=7, n_new=7, rotary=ALL, window_size=(100, 3)),
    "cache_batch_idx": dict(batch_idx=(4, 0, 5, 2), batch_cache=7, n_new=2),
    "leftpad": dict(n_q=7, causal=True, leftpad=(51, 338, 0, 17)),
    "leftpad, rotary and cache_batch_idx": dict(
        n_q=7, n_new=7, causal=True, rotary=ALL, leftpad=(51, 338, 0, 17), batch_idx=(2, 3, 1, 0)
    ),
    "pages of 256": dict(page=256),
    "pages of 512, appended": dict(page=512, n_q=30, n_new=30, causal=True, rotary=ALL),
    "window": dict(n_q=7, window_size=(90, 20)),
    "window to the left": dict(n_q=7, window_size=(90, -1)),
    "causal window": dict(n_q=7, window_size=(90, 0), causal=True, page=256),
    "softcap": dict(n_q=2, softcap=15.0),
    "ALiBi": dict(n_q=7, slopes="a head"),
    "ALiBi of each sequence, causal": dict(n_q=7, n_new=7, slopes="a sequence and head", causal=True),
    "softmax_scale": dict(softmax_scale=0.3),
    "one split": dict(num_splits=1),
    "five splits": dict(num_splits=5, n_q=3, n_new=3, causal=True),
}


def errors(out, lse, call):
    """The largest errors of out and, of queries that see a key, of lse, against exact attention in float64."""
    of_out, of_lse = [0.0], [0.0]
    for b, (q, k, v, options) in enumerate(attended(call)):
        exact, exact_lse = exact_attention(q, k, v, return_lse=True, **options)
        seen = exact_lse[0].isfinite()
        of_out.append((out[b] - exact[0]).abs().max().item())
        of_lse.append((lse[b] - exact_lse[0])[seen].abs().amax().item() if seen.any() else 0.0)
    return max(of_out), max(of_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", BESIDE_FLASH_ATTN)
def test_flash_attn_itself_is_not_much_nearer(case, head_dim, dtype):
    """Argument for argument against the flash_attn package: our errors are at most 1.5 times its own."""
    theirs = pytest.importorskip("flash_attn", reason="compares with the flash_attn package, which is not installed")
    sizes = dict(heads=8, heads_kv=2, head_dim=head_dim, dtype=dtype, garbage=3.0) | LONGER
    ours, other = (make(**sizes | BESIDE_FLASH_ATTN[case]) for _ in range(2))
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in ours.items()}
    results = []
    for function, call in ((interface, ours), (theirs, other)):
        results.append(errors(*function.flash_attn_with_kvcache(**call, return_softmax_lse=True), before))
        check_caches(call["k_cache"], call["v_cache"], before)
    (our_out, our_lse), (their_out, their_lse) = results
    assert our_out <= 1.5 * their_out + 1e-5, results
    if case != "ALiBi of each sequence, causal":  # there their lse lacks a term that is the same for a whole row
        assert our_lse <= 1.5 * their_lse + 1e-5, results


@pytest.mark.gpu
def test_arguments_are_those_of_the_flash_attn_here():
    theirs = pytest.importorskip("flash_attn", reason="compares with the flash_attn package, which is not installed")
    functions = (interface.flash_attn_with_kvcache, theirs.flash_attn_with_kvcache)
    ours, other = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in functions)
    assert ours == other


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_appending_without_gradients(mode):
    with mode():
        call = make((9, 5), n_q=1, n_new=1, heads=4, heads_kv=2)
        out, lse = interface.flash_attn_with_kvcache(**call, return_softmax_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    assert torch.equal(call["k_cache"][0, 9], call["k"][0, 0])


def test_a_gradient_that_needs_the_cache_as_it_was_is_refused():
    call = make((9, 5), n_q=1, n_new=1, garbage=0.0)
    weight = torch.ones((), device=DEVICE, requires_grad=True)
    loss = (weight * call["k_cache"]).sum()
    interface.flash_attn_with_kvcache(**call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_one_tensor_for_both_caches():
    """To read is right, to append to is not: v would replace k."""
    call = make((9, 5))
    check(call | dict(v_cache=call["k_cache"]))
    call = make((9, 5), n_new=1)
    with pytest.raises(ValueError, match="k_cache and v_cache are one tensor"):
        interface.flash_attn_with_kvcache(**call | dict(v_cache=call["k_cache"]))


def rows(count):
    return torch.zeros(count, 12, 2, 16, device=DEVICE)


SHARED_MEMORY = {
    "one storage": ("k_cache and v_cache share", lambda c: dict(v_cache=c["k_cache"].view(2, 12, 2, 16))),
    "rows over rows": (
        "v_cache has shape .* and strides .*share their memory.*clone",
        lambda c: dict(v_cache=rows(2).as_strided((2, 12, 2, 16), (128, 32, 16, 1))),
    ),
    "k in its cache": ("k shares memory with k_cache", lambda c: dict(k=c["k_cache"][:, 3:5])),
    "v in the other cache": ("v shares memory with k_cache", lambda c: dict(v=c["k_cache"][:, :2])),
    "q in a cache": ("q shares memory with v_cache", lambda c: dict(q=c["v_cache"].view(2, 6, 4, 16)[:, :2])),
}
SHARED_MEMORY["a row"] = (
    "k_cache and v_cache share",
    lambda c: (lambda both: dict(k_cache=both[:2], v_cache=both[1:]))(rows(3)),
)


@pytest.mark.parametrize("case", SHARED_MEMORY)
def test_what_is_written_to_shares_no_memory(case):
    """F6: keys and values overwrote each other, or what was still to be read."""
    message, change = SHARED_MEMORY[case]
    call = make(**WRONG_BASE)
    call |= change(call)
    with pytest.raises(ValueError, match=message):
        interface.flash_attn_with_kvcache(**call)


@pytest.mark.parametrize("caches", ["arguments", "made inside"])
def test_what_is_written_to_shares_no_memory_in_a_compiled_function(caches):
    """F6: a compiler traces the checks of the interface, and has no addresses."""

    def step(q, k_cache, v_cache, k, v):
        v_cache = k_cache.view(k_cache.shape) if caches == "made inside" else v_cache
        return interface.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3)

    call = make(**WRONG_BASE)
    arguments = [call[name] for name in ("q", "k_cache", "k_cache", "k", "v")]
    arguments[2] = arguments[1].view(2, 12, 2, 16)
    with pytest.raises(ValueError, match="k_cache and v_cache share memory"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)


INTERLACED = {
    "heads of k and v side by side": lambda: torch.zeros(2, 12, 2, 2, 16, device=DEVICE).unbind(2),
    "heads in turn": lambda: (lambda both: (both[:, :, ::2], both[:, :, 1::2]))(
        torch.zeros(2, 12, 4, 16, device=DEVICE)
    ),
    "numbers in turn": lambda: torch.zeros(2, 12, 2, 16, 2, device=DEVICE).unbind(-1),
    "one behind the other": lambda: torch.zeros(2, 2, 12, 2, 16, device=DEVICE).unbind(0),
    "rows side by side": lambda: torch.zeros(2, 12, 2, 2, 16, device=DEVICE).transpose(1, 2).unbind(1),
}


@pytest.mark.parametrize("layout", INTERLACED)
def test_caches_in_one_storage_that_do_not_meet(layout):
    call = make(**WRONG_BASE, garbage=0.0)
    apart = dict(call, k_cache=rows(2), v_cache=rows(2))
    together = dict(zip(("k_cache", "v_cache"), INTERLACED[layout](), strict=True))
    expected = interface.flash_attn_with_kvcache(**apart)
    assert torch.equal(interface.flash_attn_with_kvcache(**call | together), expected)
    for name, written in together.items():
        assert torch.equal(written, apart[name]) and written.any()


def test_a_table_with_too_few_columns_for_packed_sequences():
    """F19: RuntimeError as in flash-attn, which names `block_table`."""
    call = make((9, 5), page=4, capacity=12)
    starts, table = ints(0, 9, 14), call["block_table"][:, :2]
    q = torch.randn(2, 2, 16, device=DEVICE)
    with pytest.raises(RuntimeError, match="block_table has 2 blocks of 4 rows a sequence, but sequence 0 has 9 keys"):
        interface.flash_attn_varlen_func(
            q, call["k_cache"], call["v_cache"], ints(0, 1, 2), starts, 1, 9, block_table=table
        )


def test_a_table_with_too_few_columns_for_one_length_of_all():
    """F19."""
    call = make((7, 7), page=4, capacity=12) | dict(cache_seqlens=13)
    with pytest.raises(RuntimeError, match="block_table has 3 blocks.*room for 12 keys.*holds 13.*more columns"):
        interface.flash_attn_with_kvcache(**call)


def test_lengths_and_splits_as_numpy_s_integers():
    call = make((20, 20))
    expected = interface.flash_attn_with_kvcache(**call | dict(cache_seqlens=20), num_splits=2)
    given = dict(cache_seqlens=np.int64(20), num_splits=np.int32(2))
    assert torch.equal(interface.flash_attn_with_kvcache(**call | given), expected)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("direct", [False, True], ids=["operator", "no dispatcher"])
def test_another_default_device(page, direct, monkeypatch):
    """F15: a table and appended keys under `torch.set_default_device("meta")`."""
    if direct:
        monkeypatch.setattr(fast_path, "applies", lambda *tensors: True)
    call = make((9, 5), n_new=1, page=page, capacity=16, rotary=8, garbage=0.0)
    expected = interface.flash_attn_with_kvcache(**{name: copied(value) for name, value in call.items()})
    with torch.device("meta"):
        assert torch.equal(interface.flash_attn_with_kvcache(**call), expected)


def copied(value):
    return value.clone() if torch.is_tensor(value) else value
