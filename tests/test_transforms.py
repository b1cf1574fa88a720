"""Batched gradients, and torch.func's transforms of flash-attn's functions: right, or refused in one sentence of ours.

The results are compared with the same transform of exact attention (faults F14 and F17).
"""

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from labutils import runtime
from labutils.attention import fast_path, interface
from labutils.attention.reference import exact_attention

DEVICE = runtime.device
COPIES, BATCH = 3, 2


def make(*shape):
    return torch.randn(shape, device=DEVICE)


def tensors():
    """q, k and v of several calls: (copies, B, N, H, D)."""
    return make(COPIES, BATCH, 5, 2, 8), make(COPIES, BATCH, 6, 1, 8), make(COPIES, BATCH, 6, 1, 8)


def one_by_two():
    """q, k and v of one call with an output of few numbers, since a Jacobian has a gradient for each."""
    return make(2, 2, 1, 4), make(2, 3, 1, 4), make(2, 3, 1, 4)


def ours(**options):
    return lambda q, k, v: interface.flash_attn_func(q, k, v, **options)


def exact(**options):
    return lambda q, k, v: exact_attention(q, k, v, **options).to(q.dtype)


def loss(function):
    return lambda *args: function(*args).square().sum()


def check(transform, *args, **options):
    """A transform of our function gives what it gives of exact attention."""
    torch.testing.assert_close(
        transform(ours(**options))(*args), transform(exact(**options))(*args), atol=2e-5, rtol=1e-4
    )


OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window and softcap": dict(window_size=(2, 1), softcap=2.0),
    "a scale below 0": dict(softmax_scale=-0.4),
    "a scale of 0": dict(softmax_scale=0.0),
    "slopes": dict(alibi_slopes=torch.tensor([0.1, 0.4], device=DEVICE)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_each_copy(name):
    """F17: what per-sample gradients are computed with."""
    check(lambda f: vmap(grad(loss(f), (0, 1, 2))), *tensors(), **OPTIONS[name])


TRANSFORMS = {
    "grad": lambda f: lambda q, k, v: grad(loss(f), (0, 1, 2))(q[0], k[0], v[0]),
    "vjp": lambda f: lambda q, k, v: vjp(f, q[0], k[0], v[0])[1](torch.ones_like(q[0])),
    "vmap": vmap,
    "vmap of vmap": lambda f: lambda *args: vmap(vmap(f))(*(t[:, None] for t in args)),
    "vmap with keys for all": lambda f: lambda q, k, v: vmap(f, (0, None, None))(q, k[0], v[0]),
    "vmap of other dimensions": lambda f: (
        lambda q, k, v: vmap(f, (None, 2, 1), 1)(q[0], k.movedim(0, 2), v.movedim(0, 1))
    ),
    "grad of vmap": lambda f: grad(lambda q, k, v: loss(vmap(f, (0, None, None)))(q, k[0], v[0]), (0, 1, 2)),
    "backward of vmap": lambda f: lambda *args: backward_of_vmap(f, *args),
    "no copies": lambda f: lambda q, k, v: vmap(f)(q[:0], k[:0], v[:0]),
}


def backward_of_vmap(function, *args):
    args = [t.clone().requires_grad_() for t in args]
    return torch.autograd.grad(loss(vmap(function))(*args), args)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name):
    """F17."""
    check(TRANSFORMS[name], *tensors(), causal=True)


@pytest.mark.parametrize("options", [dict(argnums=(0, 1)), dict(chunk_size=7)], ids=["whole", "in pieces"])
def test_jacrev(options):
    """F17."""
    check(lambda f: jacrev(f, **options), *one_by_two(), causal=True)


def test_functionalize():
    args = one_by_two()
    assert torch.equal(torch.func.functionalize(ours())(*args), ours()(*args))


def test_gradients_by_the_log_sum_exp():
    args = tensors()
    ours = grad(lambda q, k, v: interface.flash_attn_func(q, k, v, return_attn_probs=True)[1].sin().sum(), (0, 1))
    theirs = grad(lambda q, k, v: exact_attention(q, k, v, return_lse=True)[1].sin().sum(), (0, 1))
    torch.testing.assert_close(vmap(ours)(*args), vmap(theirs)(*args), atol=2e-5, rtol=1e-4, check_dtype=False)


def test_packed_sequences():
    q, k, v = (t[:, 0] for t in tensors())
    starts = [torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([0, 3, 5], [0, 2, 6])]

    def packed(q, k, v):
        return interface.flash_attn_varlen_func(q, k, v, *starts, 3, 4, causal=True)

    def apart(q, k, v):
        parts = zip(q.split([3, 2]), k.split([2, 4]), v.split([2, 4]), strict=True)
        return torch.cat([exact(causal=True)(*(t[None] for t in part))[0] for part in parts])

    both = (vmap(grad(loss(f), (0, 1, 2)))(q, k, v) for f in (packed, apart))
    torch.testing.assert_close(*both, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_drops_the_same_weights_in_the_backward(randomness):
    """out is linear in v: its product with any dout is that of v with the gradient by v."""
    q, k, v = (t[:1].expand(COPIES, -1, -1, -1, -1) for t in tensors())

    def both_products(q, k, v):
        out, pull = vjp(lambda v: interface.flash_attn_func(q, k, v, dropout_p=0.4), v)
        dout = out.sin()
        return out, (out * dout).sum(), (v * pull(dout)[0]).sum()

    out, ours, theirs = vmap(both_products, randomness=randomness)(q, k, v)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (out.std(0) > 1e-6).any() == (randomness == "different")


class TestBatchedGradients:
    """F14: several gradients by the output at once, for a graph that was made before."""

    @pytest.fixture(params=["as the machine has it", "fast path"])
    def way(self, request, monkeypatch):
        monkeypatch.setattr(fast_path, "_known", {})
        if request.param == "fast path" and runtime.interpreted:  # on a GPU it applies anyway
            monkeypatch.setattr(fast_path, "applies", lambda *tensors: True)
            monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: runtime.device.index, raising=False)

    @pytest.mark.parametrize("batched", ["is_grads_batched", "vmap"])
    @pytest.mark.parametrize("options", [{}, dict(dropout_p=0.4)], ids=["plain", "dropout"])
    def test_as_one_after_the_other(self, way, batched, options):
        q, k, v = (t.requires_grad_() for t in one_by_two())
        for with_lse in (False, True, False):  # on a GPU the third call is a replay
            out, lse, _ = interface.flash_attn_func(q, k, v, return_attn_probs=True, **options)
            outputs = (out, lse) if with_lse else (out,)
            douts = tuple(make(2, *t.shape) for t in outputs)

            def gradients(*douts, outputs=outputs, **how):
                return torch.autograd.grad(outputs, (q, k, v), douts, retain_graph=True, **how)

            got = gradients(*douts, is_grads_batched=True) if batched != "vmap" else vmap(gradients)(*douts)
            for i in range(2):
                for a, b in zip(got, gradients(*(t[i] for t in douts)), strict=True):
                    torch.testing.assert_close(a[i], b, atol=1e-6, rtol=1e-5)

    def test_jacobian(self, way):
        q, k, v = one_by_two()
        jacobian = lambda f: torch.autograd.functional.jacobian(lambda q: f(q, k, v), q, vectorize=True)  # noqa: E731
        torch.testing.assert_close(jacobian(ours()), jacobian(exact()), atol=2e-5, rtol=1e-4)

    def test_operators_are_seen_in_the_backward_alone(self, way):
        """A FLOP counter that begins after the forward pass."""
        from torch.utils.flop_counter import FlopCounterMode

        q, k, v = (t[0].requires_grad_() for t in tensors())
        for _ in range(3):
            out = interface.flash_attn_func(q, k, v)
            with FlopCounterMode(display=False) as counter:
                out.sum().backward()
            assert "labutils.flash_attention_backward" in map(str, counter.get_flop_counts()["Global"])


class TestWithoutDerivative:
    def test_v1(self):
        args = tensors()
        torch.testing.assert_close(vmap(interface.flash_attn_v1_func)(*args), vmap(exact())(*args))

    def test_a_cache(self):
        q, k, v = tensors()
        lengths = torch.tensor([[3, 4], [6, 2], [1, 5]], dtype=torch.int32, device=DEVICE)

        def attend(q, k, v, lengths):
            return interface.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)

        one_by_one = torch.stack([attend(*args) for args in zip(q, k, v, lengths, strict=True)])
        assert torch.equal(vmap(attend)(q, k, v, lengths), one_by_one)

    def test_appending(self):
        q, k, v = tensors()
        lengths = torch.tensor([[3, 0], [2, 2], [1, 3]], dtype=torch.int32, device=DEVICE)

        def append(q, k_cache, v_cache, k, v, lengths):
            return interface.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

        ours, theirs = ([torch.zeros(COPIES, BATCH, 9, 1, 8, device=DEVICE) for _ in range(2)] for _ in range(2))
        out = vmap(append)(q, *ours, k, v, lengths)
        one_by_one = torch.stack([append(*args) for args in zip(q, *theirs, k, v, lengths, strict=True)])
        for a, b in zip((out, *ours), (one_by_one, *theirs), strict=True):
            assert torch.equal(a, b)

    def test_they_may_stand_beside_what_is_differentiated(self):
        q, k, v = (t[0] for t in tensors())
        for function in (interface.flash_attn_v1_func, interface.flash_attn_with_kvcache):
            found = grad(lambda w: (w * function(q, k, v)).sum())(torch.ones((), device=DEVICE))  # noqa: B023
            torch.testing.assert_close(found, exact()(q, k, v).sum(), atol=1e-4, rtol=1e-4)


def shared_cache(q, k, v):
    caches = [torch.zeros(BATCH, 9, 1, 8, device=DEVICE) for _ in range(2)]
    append = lambda q, k, v: interface.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=3)  # noqa: E731
    vmap(append)(q, k, v)


REFUSED = {
    "second derivative": (
        "no second derivative", lambda q, k, v: grad(lambda q: grad(loss(ours()))(q, k[0], v[0]).sum())(q[0])
    ),
    "jacrev of jacrev": (
        "no second derivative",
        lambda q, k, v: jacrev(jacrev(lambda q: loss(ours())(q, k[0, :1], v[0, :1])))(q[0, :1, :1]),
    ),
    "hessian": ("no forward-mode", lambda q, k, v: hessian(lambda q: loss(ours())(q, k[0], v[0]))(q[0])),
    "jvp": ("no forward-mode", lambda q, k, v: jvp(lambda q: ours()(q, k[0], v[0]), (q[0],), (q[0],))),
    "v1": ("v1_func has no backward", lambda q, k, v: grad(loss(interface.flash_attn_v1_func))(q[0], k[0], v[0])),
    "v1 under vmap": (
        "v1_func has no backward",
        lambda q, k, v: grad(lambda q: loss(vmap(interface.flash_attn_v1_func))(q, k, v))(q),
    ),
    "a cache": (
        "kvcache has no backward",
        lambda q, k, v: grad(loss(interface.flash_attn_with_kvcache))(q[0], k[0], v[0]),
    ),
    "a cache for all copies": ("cache that all entries share", shared_cache),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words_of_ours(case):
    """F17."""
    message, call = REFUSED[case]
    with pytest.raises((NotImplementedError, ValueError), match=message):
        call(*tensors())
