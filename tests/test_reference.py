"""The oracles against PyTorch, the tilings against the oracles, and the 2 x rule against planted faults."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.attention import reference


def make(n_q=33, n_k=57, heads=4, heads_kv=2, head_dim=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, n_q, heads, head_dim, generator=g).to(dtype)
    k, v = torch.randn(2, 2, n_k, heads_kv, head_dim, generator=g).to(dtype)
    return q, k, v


@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_is_pytorchs(causal):
    q, k, v = make(n_q=40, n_k=40)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.double().transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(reference.exact_attention(q, k, v, causal=causal), expected, rtol=1e-12, atol=1e-12)


def test_causal_mask_is_aligned_to_the_bottom_right():
    assert reference.causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert reference.causal_mask(3, 1).tolist() == [[False], [False], [True]]


def test_softmax_scale_and_lse():
    q, k, v = make()
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double().repeat_interleave(2, 2)) * 0.3
    _, lse = reference.exact_attention(q, k, v, softmax_scale=0.3, return_lse=True)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_without_a_mask_nothing_is_paid_for_one():
    """Naive attention is a line in every benchmark: two products, a scale, a softmax, and views."""
    q, k, v = make(heads=2, heads_kv=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        reference.naive_attention(q, k, v)
    called = {event.key for event in profiler.key_averages()}
    assert {"aten::bmm", "aten::_softmax"} <= called
    assert not called & {
        "aten::masked_fill",
        "aten::masked_fill_",
        "aten::all",
        "aten::any",
        "aten::arange",
        "aten::item",
    }


@pytest.mark.parametrize("window", [(-1, -1), (3, 2), (3, -1), (-1, 2), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(4, 9), (9, 4), (5, 5), (9, 1)])
def test_rows_that_see_nothing_are_zero_under_any_mask(n_q, n_k, window, causal):
    q, k, v = make(n_q=n_q, n_k=n_k)
    out, lse = reference.naive_attention(q, k, v, causal=causal, window_size=window, return_lse=True)
    seen = reference.visible_mask(n_q, n_k, causal=causal, window_size=window).any(dim=1)
    assert out.isfinite().all() and (out[:, ~seen] == 0).all()
    assert (lse.isneginf() == ~seen).all()


def test_queries_that_see_nothing_give_zeros_and_finite_gradients():
    q, k, v = (t.requires_grad_() for t in make(n_q=9, n_k=4))
    out, lse = reference.naive_attention(q, k, v, causal=True, return_lse=True)
    assert out[:, :5].abs().max() == 0 and out[:, 5:].abs().min() > 0
    assert lse[..., :5].isneginf().all() and lse[..., 5:].isfinite().all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.floats(-200, 200), st.booleans())
def test_online_softmax_is_softmax(n, block, shift, with_masked):
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) * 10 + shift
    if with_masked and n > 1:
        x[:, 0] = -math.inf
    torch.testing.assert_close(reference.online_softmax(x, block), x.softmax(-1))
    torch.testing.assert_close(reference.safe_softmax(x), x.softmax(-1))


def test_trace_holds_maximum_and_sum_of_what_was_seen():
    x = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0], dtype=torch.float64)
    for step in reference.online_softmax_trace(x, 2):
        seen = x[: step["stop"]]
        assert step["m"] == seen.max()
        torch.testing.assert_close(step["l"], (seen - seen.max()).exp().sum())


def test_trace_refuses_empty_blocks():
    with pytest.raises(ValueError, match="block=0"):
        reference.online_softmax_trace(torch.ones(3), 0)


@pytest.mark.parametrize("tiled", [reference.tiled_attention_v1, reference.tiled_attention_v2])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 7, 16]), st.sampled_from([1, 5, 16]), st.booleans())
def test_tilings_are_right_at_any_shape(tiled, n_q, n_k, block_m, block_n, causal):
    q, k, v = make(n_q, n_k, head_dim=8)
    out, lse = tiled(q, k, v, causal=causal, block_m=block_m, block_n=block_n, return_lse=True)
    reference.check_attention(out, q, k, v, causal=causal, lse=lse).raise_if_failed()


@pytest.mark.parametrize("tiled", [reference.tiled_attention_v1, reference.tiled_attention_v2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tilings_obey_the_rule_in_sixteen_bits(tiled, dtype):
    q, k, v = make(100, 130, dtype=dtype)
    out = tiled(q, k, v, causal=True)
    assert out.dtype == dtype
    reference.check_attention(out, q, k, v, causal=True).raise_if_failed()


class TestRule:
    def test_passes_the_formula_itself_and_names_the_place_of_a_fault(self):
        q, k, v = make(dtype=torch.float16)
        out = reference.naive_attention(q, k, v)
        assert reference.check_attention(out, q, k, v)
        out[1, 7, 3, 5] += 0.25
        verdict = reference.check_attention(out, q, k, v)
        assert not verdict and verdict.where == (1, 7, 3, 5) and "WRONG" in str(verdict) and verdict.ratio > 1
        with pytest.raises(AssertionError, match=r"out\[1, 7, 3, 5\]"):
            verdict.raise_if_failed()

    def test_limit_is_twice_the_error_of_the_formula(self):
        ref, low = torch.zeros(4, dtype=torch.float64), torch.full((4,), 0.5)
        assert reference.judge(torch.full((4,), 1.0), ref, low)
        assert not reference.judge(torch.full((4,), 1.001), ref, low)
        assert reference.judge(torch.full((4,), 1.4), ref, low, factor=3)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_values_that_are_not_numbers_fail(self, bad):
        ref = torch.zeros(4, dtype=torch.float64)
        out = torch.zeros(4)
        out[2] = bad
        verdict = reference.judge(out, ref, torch.full((4,), 9.0))
        assert not verdict and verdict.where == (2,)

    def test_nan_in_the_formula_gives_no_licence(self):
        ref = torch.zeros(4, dtype=torch.float64)
        assert not reference.judge(torch.ones(4), ref, torch.full((4,), math.nan))

    def test_same_infinities_are_right(self):
        ref = torch.tensor([-math.inf, 1.0], dtype=torch.float64)
        assert reference.judge(ref.float(), ref, ref.float())
        assert not reference.judge(torch.tensor([0.0, 1.0]), ref, ref.float())

    def test_wrong_lse_fails_though_the_output_is_right(self):
        q, k, v = make()
        out, lse = reference.naive_attention(q, k, v, return_lse=True)
        assert reference.check_attention(out, q, k, v, lse=lse)
        verdict = reference.check_attention(out, q, k, v, lse=lse + 0.1)
        assert not verdict and verdict.name == "lse"

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match="shapes differ"):
            reference.judge(torch.zeros(2), torch.zeros(3), torch.zeros(3))

    def test_gradients(self):
        q, k, v = (t.requires_grad_() for t in make(dtype=torch.float16))
        dout = torch.randn_like(q)
        grads = list(torch.autograd.grad(reference.naive_attention(q, k, v), (q, k, v), dout))
        assert all(reference.check_gradients(grads, dout, q, k, v))
        grads[0] = grads[0] * 1.1
        assert [bool(x) for x in reference.check_gradients(grads, dout, q, k, v)] == [False, True, True]


def test_another_default_device():
    """F15: what is made on the way lies where the inputs lie."""
    from labutils.attention import bugs, probing

    q, k, v = make()
    expected = (
        reference.check_attention(q * 2, q, k, v),
        bugs.tiles_without(q[0, :, 0], k[0, :, 0], v[0, :, 0], 8, causal=True),
    )
    with torch.device("meta"):
        assert reference.check_attention(q * 2, q, k, v) == expected[0]
        for a, b in zip(
            bugs.tiles_without(q[0, :, 0], k[0, :, 0], v[0, :, 0], 8, causal=True), expected[1], strict=True
        ):
            assert torch.equal(a, b)
        assert all(not t.is_meta for t in probing._sample())
