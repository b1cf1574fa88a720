"""What flash-attn's interface can do besides: windows, softcap, ALiBi, dropout, packed sequences and packed tensors.

Small cases run everywhere. On a GPU the grid of flash-attn's own tests follows, through the public functions.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labutils import runtime
from labutils.attention import interface
from labutils.attention.kernels import flash_v2, flash_v2_backward
from labutils.attention.kernels.launch_config import LaunchConfig
from labutils.attention.kernels.options import Options
from labutils.attention.reference import check_attention, check_gradients, judge, naive_attention

DEVICE = runtime.device
SLOPES = "slopes"  # stands for a tensor of the right shape


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    """Other processes run tests on the same GPU, and PyTorch keeps what it has once allocated."""
    yield
    torch.cuda.empty_cache()


def make(n_q, n_k, *, heads=2, heads_kv=1, head_dim=16, dtype=torch.float32, batch=1, seed=0, spread=1.0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    q = torch.randn(batch, n_q, heads, head_dim, generator=g, device=DEVICE) * spread
    k, v = torch.randn(2, batch, n_k, heads_kv, head_dim, generator=g, device=DEVICE)
    return tuple(t.to(dtype) for t in (q, k, v))


def slopes(batch, heads):
    return (torch.rand(batch, heads, generator=torch.Generator().manual_seed(2)) * 0.3).to(DEVICE)


def kept(attend, batch, heads, n_q, n_k, dtype=torch.float32):
    """Which weights dropout keeps in a call of `attend(q, k, v)`, (B, H, N_q, N_k).

    With scores of zero all weights are equal, and with rows of the unit matrix for V a column of the output is one of
    them: 0 where it was dropped. What is kept depends on seed, head, row and column alone, so this holds for any other
    q, k and v of these sizes. As many keys are read off in one call as the largest head dimension has columns.
    """
    columns = 256
    q = torch.zeros(batch, n_q, heads, columns, dtype=dtype, device=DEVICE)
    k = torch.zeros(batch, n_k, 1, columns, dtype=dtype, device=DEVICE)
    unit = torch.eye(n_k, -(-n_k // columns) * columns, dtype=dtype, device=DEVICE)
    outs = [attend(q, k, v[None, :, None].expand(batch, -1, -1, -1)) for v in unit.split(columns, dim=1)]
    return (torch.cat(outs, dim=-1)[..., :n_k] != 0).transpose(1, 2)  # (B, N_q, H, N_k) -> (B, H, N_q, N_k)


def seeded(function, *args, **kwargs):
    """A call that draws what every other call through here draws."""
    torch.manual_seed(77)
    return function(*args, **kwargs)


def with_dropout(dropout_p):
    return lambda q, k, v: seeded(interface.flash_attn_func, q, k, v, dropout_p=dropout_p)


def check(q, k, v, blocks=None, **features):
    """Forward and backward of the kernels, in tiles of `blocks`, by the rule."""
    if features.get("alibi_slopes") is SLOPES:
        features["alibi_slopes"] = slopes(q.shape[0], q.shape[2])
    left, right = features.get("window_size", (-1, -1))
    window = (None if left < 0 else left, 0 if features.get("causal") else None if right < 0 else right)
    options = Options(q.shape[-1] ** -0.5, *window, features.get("softcap") or None, features.get("alibi_slopes"))
    config = LaunchConfig(*blocks) if blocks else None
    out, lse = flash_v2.forward(q, k, v, options, config)
    check_attention(out, q, k, v, lse=lse, **features).raise_if_failed()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    configs = dict.fromkeys(("dkdv", "dq"), config) if config else None
    gradients = flash_v2_backward.backward(dout, q, k, v, out, lse, options, configs)
    for verdict in check_gradients(gradients, dout, q, k, v, **features):
        verdict.raise_if_failed()


FEATURES = {
    "window": dict(window_size=(5, 3)),
    "window to the left": dict(window_size=(7, -1)),
    "window to the right": dict(window_size=(-1, 4)),
    "window of one": dict(window_size=(0, 0)),
    "causal window": dict(causal=True, window_size=(9, 4)),
    "softcap": dict(softcap=1.5),
    "causal softcap": dict(softcap=1.5, causal=True),
    "ALiBi": dict(alibi_slopes=SLOPES),
    "all": dict(alibi_slopes=SLOPES, softcap=2.0, causal=True, window_size=(20, -1)),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("n_q", "n_k"), [(33, 57), (57, 33)])
def test_feature(feature, n_q, n_k):
    check(*make(n_q, n_k), blocks=(32, 16), **FEATURES[feature])


@pytest.mark.parametrize("softcap", [50.0, 1e3, 1e6, 1e30])
def test_softcaps_so_large_that_they_change_little(softcap):
    check(*make(33, 40), softcap=softcap)


@pytest.mark.parametrize("causal", [False, True])
def test_slopes_of_either_sign(causal):
    """Keys far away get scores of any size; the rows of a tile that lie past the last query, too."""
    for n_q, n_k in ((40, 75), (75, 40)):
        q, k, v = make(n_q, n_k, dtype=torch.float16)
        check(q, k, v, blocks=(32, 32), causal=causal, alibi_slopes=torch.tensor([-2.5, 3.0], device=DEVICE))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    n_q=st.integers(1, 50),
    n_k=st.integers(1, 50),
    left=st.integers(-1, 60),
    right=st.integers(-1, 60),
    causal=st.booleans(),
    blocks=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
)
def test_any_window(n_q, n_k, left, right, causal, blocks):
    check(*make(n_q, n_k, heads=1), blocks=blocks, causal=causal, window_size=(left, right))


@pytest.mark.parametrize("window_size", [(2**31 - 1, 0), (-1, 2**31 - 1), (2**31 - 1, 2**31 - 1)])
def test_bounds_of_any_size(window_size):
    q, k, v = (t.requires_grad_() for t in make(50, 30))
    out = interface.flash_attn_func(q, k, v, window_size=window_size)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    check_attention(out, q, k, v, window_size=window_size).raise_if_failed()
    for verdict in check_gradients(gradients, torch.ones_like(out), q, k, v, window_size=window_size):
        verdict.raise_if_failed()


class TestDropout:
    P = 0.3

    def test_forward_and_backward_drop_the_same(self):
        q, k, v = make(40, 48, heads=2, heads_kv=2)
        options = Options(0.25, dropout_p=self.P, seed=torch.tensor([77], device=DEVICE))
        out, lse = flash_v2.forward(q, k, v, options, LaunchConfig(16, 32))
        mask = kept(lambda *t: flash_v2.forward(*t, options)[0], 1, 2, 40, 48)
        dropped = dict(softmax_scale=0.25, dropout_mask=mask, dropout_p=self.P)
        check_attention(out, q, k, v, lse=lse, **dropped).raise_if_failed()
        dout = torch.randn_like(q)
        other_tiles = dict.fromkeys(("dkdv", "dq"), LaunchConfig(32, 16))
        gradients = flash_v2_backward.backward(dout, q, k, v, out, lse, options, other_tiles)
        for verdict in check_gradients(gradients, dout, q, k, v, **dropped):
            verdict.raise_if_failed()

    def test_fraction_that_is_kept(self):
        mask = kept(with_dropout(self.P), 2, 4, 64, 64)
        deviation = (self.P * (1 - self.P) / mask.numel()) ** 0.5
        assert abs(mask.float().mean().item() - (1 - self.P)) < 5 * deviation
        heads = mask.flatten(0, 1)
        assert all(not torch.equal(heads[0], other) for other in heads[1:])  # each head draws its own

    def test_manual_seed_repeats_it(self):
        q, k, v = make(20, 20)
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(interface.flash_attn_func(q, k, v, dropout_p=0.5))
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

    def test_checkpointing_draws_the_same_again(self):
        q, k, v = (t.requires_grad_() for t in make(20, 20))
        attend = lambda *t: interface.flash_attn_func(*t, dropout_p=0.5)  # noqa: E731
        gradients = []
        for checkpointed in (False, True):
            torch.manual_seed(3)
            if checkpointed:
                out = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)
            else:
                out = attend(q, k, v)
            gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


PACKED = [(10, 20), (0, 13), (35, 17), (7, 2), (3, 0)]


def packed(lengths=PACKED, *, heads=4, heads_kv=2, **sizes):
    """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k of sequences with lengths (N_q, N_k)."""
    starts = lambda ns: torch.tensor([0, *ns], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)  # noqa: E731
    n_q, n_k = zip(*lengths, strict=True)
    tensors = make(sum(n_q), sum(n_k), heads=heads, heads_kv=heads_kv, **sizes)
    return *(t[0] for t in tensors), starts(n_q), starts(n_k), max(n_q), max(n_k)


def one_by_one(q, k, v, dout, starts_q, starts_k, dtype, *, alibi_slopes=None, dropout_mask=None, **features):
    """out, lse, dq, dk and dv of packed sequences by the textbook formula in `dtype`, each sequence by itself.

    `dropout_mask` is (B, H, longest N_q, longest N_k).
    """
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
    outs, lses = [], []
    bounds = zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True)
    for b, ((first_q, last_q), (first_k, last_k)) in enumerate(bounds):
        rows, cols = slice(first_q, last_q), slice(first_k, last_k)
        own = dict(features)
        if alibi_slopes is not None:
            own["alibi_slopes"] = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[b]
        if dropout_mask is not None:
            own["dropout_mask"] = dropout_mask[b, :, : last_q - first_q, : last_k - first_k]
        out, lse = naive_attention(q[None, rows], k[None, cols], v[None, cols], return_lse=True, **own)
        outs.append(out[0])
        lses.append(lse[0])
    out = torch.cat(outs)
    return out, torch.cat(lses, dim=-1).detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))


def check_packed(lengths=PACKED, *, heads=4, heads_kv=2, head_dim=16, dtype=torch.float32, **features):
    """Forward and gradients of `flash_attn_varlen_func` by the rule."""
    spread = features.get("softcap", 1.0)
    q, k, v, *starts = packed(lengths, heads=heads, heads_kv=heads_kv, head_dim=head_dim, dtype=dtype, spread=spread)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    if features.get("alibi_slopes") is SLOPES:
        features["alibi_slopes"] = slopes(len(lengths), heads)
    out, lse, _ = seeded(interface.flash_attn_varlen_func, q, k, v, *starts, return_attn_probs=True, **features)
    dout = torch.randn_like(out)
    ours = out, lse, *torch.autograd.grad(out, (q, k, v), dout)
    if dropout_p := features.get("dropout_p"):
        features["dropout_mask"] = kept(with_dropout(dropout_p), len(lengths), heads, *starts[2:], dtype)
    exact, low = (one_by_one(q, k, v, dout, *starts[:2], d, **features) for d in (torch.float64, dtype))
    for name, *three in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, low, strict=True):
        judge(*three, name=name).raise_if_failed()


@pytest.mark.parametrize(
    "features", [{}, dict(causal=True), dict(window_size=(6, 2), dropout_p=0.3), dict(alibi_slopes=SLOPES)]
)
def test_packed_sequences(features):
    check_packed(**features)


def test_packed_tensors_are_views():
    qkv = torch.randn(2, 20, 3, 2, 16, device=DEVICE, requires_grad=True)
    q, k, v = qkv.unbind(2)
    expected = interface.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(interface.flash_attn_qkvpacked_func(qkv, causal=True), expected)
    assert torch.equal(interface.flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), expected)
    starts = torch.tensor([0, 20, 40], dtype=torch.int32, device=DEVICE)
    flat = qkv.flatten(0, 1)
    assert torch.equal(
        interface.flash_attn_varlen_qkvpacked_func(flat, starts, 20, causal=True), expected.flatten(0, 1)
    )
    one = interface.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], starts, starts, 20, 20, causal=True)
    assert torch.equal(one, expected.flatten(0, 1))
    one.sum().backward()
    assert qkv.grad.isfinite().all() and (qkv.grad[:, :, 2] != 0).any()


WRONG_SEQUENCES = {
    "int64": (TypeError, "cu_seqlens_q is torch.int64", dict(cu_seqlens_q=lambda s: s.long())),
    "a list": (TypeError, "cu_seqlens_k is list", dict(cu_seqlens_k=lambda s: s.tolist())),
    "two dimensions": (ValueError, r"pass \(B \+ 1,\)", dict(cu_seqlens_q=lambda s: s[None])),
    "not from 0": (ValueError, "must begin with 0", dict(cu_seqlens_q=lambda s: s + 1)),
    "decreasing": (ValueError, "never decrease", dict(cu_seqlens_k=lambda s: s.flip(0) - s.flip(0)[0])),
    "too long": (ValueError, "ends with 56.*only 55 rows", dict(cu_seqlens_q=lambda s: s + (s == s[-1]))),
    "other batch": (ValueError, "speaks of 5 sequences and cu_seqlens_k of 4", dict(cu_seqlens_k=lambda s: s[:-1])),
    "max too small": (ValueError, "max_seqlen_q=8, but the longest", dict(max_seqlen_q=lambda n: 8)),
    "max a tensor": (
        TypeError,
        r"of shape \(1,\): pass a Python integer",
        dict(max_seqlen_k=lambda n: torch.tensor([n])),
    ),
    "max None": (TypeError, "max_seqlen_q=None: pass a Python integer", dict(max_seqlen_q=lambda n: None)),
    "max a fraction": (TypeError, "max_seqlen_k=20.5", dict(max_seqlen_k=lambda n: n + 0.5)),
    "elsewhere": (ValueError, "move it to the device", dict(cu_seqlens_q=lambda s: s.to("meta"))),
    "paged": (ValueError, "as a block_table asks for", dict(block_table=lambda _: torch.zeros(1))),
    "blocks of no rows": (
        ValueError,
        "k and v have shape .*blocks of 0 rows",
        dict.fromkeys("kv", lambda t: t.new_zeros(3, 0, *t.shape[1:])) | dict(block_table=lambda _: torch.zeros(1)),
    ),
}


@pytest.mark.parametrize("case", WRONG_SEQUENCES)
def test_wrong_sequences_are_named(case):
    error, message, changes = WRONG_SEQUENCES[case]
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    arguments = dict(zip(names, packed(), strict=True)) | {"block_table": None}
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        interface.flash_attn_varlen_func(**arguments)


def test_wrong_packing_is_named():
    with pytest.raises(ValueError, match=r"qkv has shape .* pass \(B, N, 3, H, D\)"):
        interface.flash_attn_qkvpacked_func(torch.zeros(1, 8, 2, 2, 16, device=DEVICE))
    with pytest.raises(TypeError, match="kv is a list"):
        interface.flash_attn_kvpacked_func(torch.zeros(1, 8, 2, 16, device=DEVICE), [1])
    with pytest.raises(ValueError, match=r"\(total, H, D\)"):
        interface.flash_attn_varlen_func(*[torch.zeros(1, 8, 2, 16)] * 3, None, None, 8, 8)


# ---------------------------------------------------------------------------------------------------------------------
# The grid of flash-attn's own tests, on a GPU
# ---------------------------------------------------------------------------------------------------------------------
#
# Each two of its factors meet in all their values; multiplied out they would be thousands of kernels to compile. That
# happens once for a dtype, a head dimension and a set of features; once more for an N_q that is a multiple of 16, or of
# 4 (N_q is a stride of lse); once more for as many heads of keys as of queries. Otherwise a length costs nothing.

HALF = [torch.float16, torch.bfloat16]
HEAD_DIMS = [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
LENGTHS = [
    (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
    (2048, 2048),
]  # fmt: skip
HEADS = 6
HEADS_KV = (6, 2, 1)  # multi-head, grouped-query and multi-query attention
MASKS = {
    "full": lambda n: {},
    "causal": lambda n: dict(causal=True),
    "window": lambda n: dict(window_size=(n // 3 | 1, n // 9 | 1)),
}
WINDOWS = {
    "to the left": lambda n: dict(window_size=(n // 5 | 1, -1)),
    "to the right": lambda n: dict(window_size=(-1, n // 5 | 1)),
    "causal": lambda n: dict(window_size=(n // 5 | 1, 3), causal=True),
    "of one": lambda n: dict(window_size=(0, 0)),
    "of three": lambda n: dict(window_size=(1, 1)),
    "of whole tiles": lambda n: dict(window_size=(128, 64)),
}
EXTRAS = {
    "none": {},
    "ALiBi": dict(alibi_slopes=SLOPES),
    "softcap": dict(softcap=50.0),
    "dropout": dict(dropout_p=0.17),
}


def check_lengths(lengths, head_dim, dtype, mask, turn, **extra):
    """Forward and gradients of `flash_attn_func` by the rule, with factor 2 for both, at each of the lengths.

    `turn` chooses how many heads of keys there are, which changes where another kernel is compiled anyway.
    """
    if extra.get("alibi_slopes") is SLOPES:
        extra["alibi_slopes"] = slopes(2, HEADS) if turn % 2 else slopes(1, HEADS)[0]
    dropout_p = extra.get("dropout_p", 0.0)
    for n_q, n_k in lengths:
        heads_kv = HEADS_KV[(turn + (n_q % 16 == 0)) % 3]
        q, k, v = make(
            n_q, n_k, heads=HEADS, heads_kv=heads_kv, head_dim=head_dim, dtype=dtype, batch=2,
            spread=extra.get("softcap", 1.0),
        )  # fmt: skip
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        features = mask(n_k) | extra
        out, lse, _ = seeded(
            interface.flash_attn_func, q, k, v, deterministic=n_k % 2 == 0, return_attn_probs=True, **features
        )
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        if dropout_p:
            features["dropout_mask"] = kept(with_dropout(dropout_p), 2, HEADS, n_q, n_k, dtype)
        verdicts = [check_attention(out, q, k, v, lse=lse, **features)]
        verdicts += check_gradients(gradients, dout, q, k, v, factor=2.0, **features)
        wrong = [str(verdict) for verdict in verdicts if not verdict]
        assert not wrong, f"N_q = {n_q}, N_k = {n_k}, {heads_kv} heads of keys: {wrong}"


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_grid_of_masks(head_dim, dtype, mask):
    turn = HEAD_DIMS.index(head_dim) + HALF.index(dtype) + list(MASKS).index(mask)
    check_lengths(LENGTHS, head_dim, dtype, MASKS[mask], turn)


@pytest.mark.gpu
@pytest.mark.parametrize("extra", [name for name in EXTRAS if name != "none"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_grid_of_features(head_dim, dtype, extra):
    """Each with one mask and about half of the lengths, in turn."""
    place = HEAD_DIMS.index(head_dim)
    turn = place // 3 + HALF.index(dtype)
    lengths = [(n_q, n_k) for n_q, n_k in LENGTHS if (n_q % 16 == 0) == (turn % 2 == 0)]
    check_lengths(lengths, head_dim, dtype, list(MASKS.values())[place % 3], turn, **EXTRAS[extra])


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
@pytest.mark.parametrize("window", WINDOWS)
def test_grid_of_windows(window, head_dim, dtype):
    check_lengths(LENGTHS, head_dim, dtype, WINDOWS[window], turn=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), [(59, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16)])
def test_all_features_at_once(head_dim, dtype):
    everything = EXTRAS["ALiBi"] | EXTRAS["softcap"] | EXTRAS["dropout"]
    check_lengths(LENGTHS, head_dim, dtype, WINDOWS["causal"], turn=1, **everything)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_grid_of_packed_sequences(head_dim, dtype):
    place, turn = HEAD_DIMS.index(head_dim), HALF.index(dtype)
    random = torch.randint(1, 400, (14, 2), generator=torch.Generator().manual_seed(place)).tolist()
    lengths = [(0, 13), (1, 1), *random, (3, 0), (1, 300), (0, 0), (300, 1), (512, 256), (113, 203)]
    mask = list(MASKS.values())[place % 3](150)
    extra = list(EXTRAS.values())[(place // 3 + turn) % 4]
    if "dropout_p" in extra:
        # Of one key dS is 0, and all of it is the rounding of O in Δ: flash attention's, where the rule allows none.
        lengths = [(n_q, n_k) for n_q, n_k in lengths if n_k != 1]
    heads_kv = HEADS_KV[(place // 3 + place + turn) % 3]
    check_packed(lengths, heads=HEADS, heads_kv=heads_kv, head_dim=head_dim, dtype=dtype, **mask, **extra)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [59, 64, 128])
def test_nothing_leaks_from_one_packed_sequence_to_another(head_dim, causal):
    """Tiles reach over a sequence's end: with NaN in its neighbours, not a bit of it changes."""
    lengths = [(50, 40), (70, 90), (33, 65), (130, 129), (1, 7)]
    q, k, v, *starts = packed(lengths, heads=HEADS, heads_kv=2, head_dim=head_dim, dtype=torch.float16)
    dout = torch.randn_like(q)

    def run():
        inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out, lse, _ = interface.flash_attn_varlen_func(*inputs, *starts, causal=causal, return_attn_probs=True)
        dq, dk, dv = torch.autograd.grad(out, inputs, dout)
        return dict(out=out, lse=lse.T, dq=dq), dict(dk=dk, dv=dv)

    of_queries, of_keys = run()
    bounds = [list(pairwise(s.tolist())) for s in starts[:2]]
    for b in (0, 2, 4):
        rows, cols = (slice(*ends[b]) for ends in bounds)
        for t, where in ((q, rows), (dout, rows), (k, cols), (v, cols)):
            t[where] = float("nan")
    beside_queries, beside_keys = run()
    for b in (1, 3):
        rows, cols = (slice(*ends[b]) for ends in bounds)
        for where, clean, beside in ((rows, of_queries, beside_queries), (cols, of_keys, beside_keys)):
            for name, t in clean.items():
                assert torch.equal(t[where], beside[name][where]), f"{name} of sequence {b}"


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["batch", "packed sequences"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.17])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_100_runs_give_the_same_bits(head_dim, dropout_p, form):
    """Forward and backward; the backward without `deterministic`, too."""
    sizes = dict(heads=HEADS, heads_kv=2, head_dim=head_dim, dtype=torch.float16)
    if form == "batch":
        function, (q, k, v), starts = interface.flash_attn_func, make(1024, 1100, batch=2, **sizes), ()
    else:
        lengths = [(1000, 1100), (0, 5), (301, 77), (640, 640), (1, 900)]
        function, (q, k, v, *starts) = interface.flash_attn_varlen_func, packed(lengths, **sizes)
    dout = torch.randn_like(q)
    q, k, v = (t.requires_grad_() for t in (q, k, v))

    def run():
        arguments = dict(dropout_p=dropout_p, causal=True, return_attn_probs=True)
        out, lse, _ = seeded(function, q, k, v, *starts, **arguments)
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), dout))) | dict(out=out, lse=lse)

    first = run()
    for number in range(2, 101):
        for name, tensor in run().items():
            assert torch.equal(tensor, first[name]), f"{name} of run {number} differs from that of run 1"
