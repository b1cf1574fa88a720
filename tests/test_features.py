"""What flash-attn's interface can do besides: windows, softcap, ALiBi, dropout, packed sequences and packed tensors.

Small cases run everywhere. On a GPU the grid of flash-attn's own tests follows, through the public functions.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labutils import interface, runtime
from labutils.kernels import flash_v2, flash_v2_backward
from labutils.kernels.flash_v2 import Options
from labutils.kernels.launch import LaunchConfig
from labutils.reference import check_attention, check_gradients, judge, naive_attention

DEVICE = runtime.device
SLOPES = "slopes"  # stands for a tensor of the right shape


def make(n_q, n_k, *, heads=2, heads_kv=1, head_dim=16, dtype=torch.float32, batch=1, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    q = torch.randn(batch, n_q, heads, head_dim, generator=g, device=DEVICE)
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


def check(q, k, v, blocks=None, **features):
    """Forward and backward of the kernels, in tiles of `blocks`, by the rule."""
    if features.get("alibi_slopes") is SLOPES:
        features["alibi_slopes"] = slopes(q.shape[0], q.shape[2])
    left, right = features.get("window_size", (-1, -1))
    window = (None if left < 0 else left, 0 if features.get("causal") else None if right < 0 else right)
    options = Options(q.shape[-1] ** -0.5, window, features.get("softcap") or None, features.get("alibi_slopes"))
    config = LaunchConfig(*blocks) if blocks else None
    out, lse = flash_v2.forward(q, k, v, options, config)
    check_attention(out, q, k, v, lse=lse, **features).raise_if_failed()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    configs = dict.fromkeys(("delta", "dkdv", "dq"), config) if config else None
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
        other_tiles = dict.fromkeys(("delta", "dkdv", "dq"), LaunchConfig(32, 16))
        gradients = flash_v2_backward.backward(dout, q, k, v, out, lse, options, other_tiles)
        for verdict in check_gradients(gradients, dout, q, k, v, **dropped):
            verdict.raise_if_failed()

    def test_fraction_that_is_kept(self):
        mask = kept(lambda *t: seeded(interface.flash_attn_func, *t, dropout_p=self.P), 2, 4, 64, 64)
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


LENGTHS = [(10, 20), (0, 13), (35, 17), (7, 2), (3, 0)]


def packed(dtype=torch.float32, lengths=LENGTHS):
    starts = lambda ns: torch.tensor([0, *ns], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)  # noqa: E731
    n_q, n_k = zip(*lengths, strict=True)
    q, k, v = (t[0] for t in make(sum(n_q), sum(n_k), heads=4, heads_kv=2, dtype=dtype))
    return q, k, v, starts(n_q), starts(n_k), max(n_q), max(n_k)


@pytest.mark.parametrize("features", [{}, dict(causal=True), dict(window_size=(6, 2)), dict(alibi_slopes=SLOPES)])
def test_packed_sequences(features):
    q, k, v, *starts = packed()
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    if features.get("alibi_slopes") is SLOPES:
        features = dict(alibi_slopes=slopes(len(LENGTHS), 4))
    out, lse, _ = interface.flash_attn_varlen_func(q, k, v, *starts, return_attn_probs=True, **features)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for b in range(len(LENGTHS)):
        own = dict(features)
        if "alibi_slopes" in own:
            own["alibi_slopes"] = own["alibi_slopes"][b]
        rows, cols = (slice(int(s[b]), int(s[b + 1])) for s in starts[:2])
        one = [q[rows][None], k[cols][None], v[cols][None]]
        check_attention(out[rows][None], *one, lse=lse[None, :, rows], **own).raise_if_failed()
        part = [gradients[0][rows][None], gradients[1][cols][None], gradients[2][cols][None]]
        for verdict in check_gradients(part, dout[rows][None], *one, **own):
            verdict.raise_if_failed()


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
    "too short": (ValueError, "ends with", dict(cu_seqlens_q=lambda s: s.clamp(max=30))),
    "other batch": (ValueError, "speaks of 5 sequences and cu_seqlens_k of 4", dict(cu_seqlens_k=lambda s: s[:-1])),
    "max too small": (ValueError, "max_seqlen_q=8, but the longest", dict(max_seqlen_q=lambda n: 8)),
    "max a tensor": (TypeError, "pass a Python integer", dict(max_seqlen_k=lambda n: torch.tensor(n))),
    "elsewhere": (ValueError, "move it to the device", dict(cu_seqlens_q=lambda s: s.to("meta"))),
    "paged": (NotImplementedError, "block_table", dict(block_table=lambda _: torch.zeros(1))),
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [59, 64, 128, 256])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("n_q", "n_k"), [(113, 203), (512, 256), (1023, 1024)])
def test_features_on_a_gpu(n_q, n_k, feature, head_dim, dtype):
    features = dict(FEATURES[feature])
    if "window_size" in features:  # scaled to these lengths
        features["window_size"] = tuple(w if w < 0 else 17 * w for w in features["window_size"])
    check(*make(n_q, n_k, heads=6, heads_kv=2, head_dim=head_dim, dtype=dtype, batch=2), **features)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("feature", [{}, dict(causal=True), dict(window_size=(50, 20)), dict(softcap=50.0)])
def test_flash_attn_itself_is_not_much_nearer(feature, head_dim, dtype):
    """Argument for argument against the flash_attn package: our error is at most 1.5 times its own."""
    theirs = pytest.importorskip("flash_attn", reason="compares with the flash_attn package, which is not installed")
    q, k, v = make(512, 768, heads=8, heads_kv=2, head_dim=head_dim, dtype=dtype, batch=2)
    ours = check_attention(interface.flash_attn_func(q, k, v, **feature), q, k, v, **feature)
    other = check_attention(theirs.flash_attn_func(q, k, v, **feature), q, k, v, **feature)
    assert ours.error <= 1.5 * other.error + 1e-5, (ours, other)
