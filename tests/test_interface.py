"""flash-attn's interface: what it computes, what it differentiates, and what it refuses."""

import inspect

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from labutils import runtime
from labutils.attention import checks, fast_path, interface
from labutils.attention.interface import flash_attn_func, flash_attn_v1_func
from labutils.attention.kernels import flash_decode, launch_config
from labutils.attention.reference import check_attention, check_gradients, exact_attention

DEVICE = runtime.device


def make(shape=(1, 20, 2, 16), kv_shape=None, dtype=torch.float32, device=DEVICE):
    g = torch.Generator().manual_seed(0)
    kv_shape = kv_shape or shape
    return [torch.randn(s, generator=g).to(device, dtype) for s in (shape, kv_shape, kv_shape)]


@pytest.mark.parametrize("causal", [False, True])
def test_trains(causal):
    q, k, v = (t.requires_grad_() for t in make((2, 24, 4, 16), (2, 30, 2, 16)))
    out = flash_attn_func(q, k, v, causal=causal)
    check_attention(out, q, k, v, causal=causal).raise_if_failed()
    dout = torch.randn_like(out)
    out.backward(dout)
    for verdict in check_gradients([t.grad for t in (q, k, v)], dout, q, k, v, causal=causal):
        verdict.raise_if_failed()


def test_only_the_gradients_that_are_asked_for():
    q, k, v = make()
    q.requires_grad_()
    flash_attn_func(q, k, v).sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is None


def pending(t):
    """`t` as the imaginary part of a conjugate: a view with the signs of what it looks at the wrong way round."""
    view = torch.complex(t, -t).conj().imag
    assert view.is_neg()
    return view


def test_views_with_a_minus_sign_that_is_still_due():
    q, k, v = make()
    inputs = [pending(t).requires_grad_() for t in (q, k, v)]
    out = flash_attn_func(*inputs, causal=True)
    check_attention(out, q, k, v, causal=True).raise_if_failed()
    dout = torch.randn_like(q)
    gradients = torch.autograd.grad(flash_attn_func(*(t.requires_grad_() for t in (q, k, v))), (q, k, v), pending(dout))
    for verdict in check_gradients(gradients, dout, q, k, v):
        verdict.raise_if_failed()


@pytest.mark.parametrize("way", ["as the machine has it", "fast path"])
def test_gradients_with_a_minus_sign_that_is_still_due(way, monkeypatch):
    if way == "fast path":  # which otherwise only a GPU takes
        monkeypatch.setattr(fast_path, "applies", lambda *tensors: True)
        monkeypatch.setattr(fast_path, "_known", {})
    inputs = [t.requires_grad_() for t in make()]
    out, lse, _ = flash_attn_func(*inputs, return_attn_probs=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    wanted = torch.autograd.grad((out, lse), inputs, (dout, dlse), retain_graph=True)
    got = torch.autograd.grad((out, lse), inputs, (pending(dout), torch._neg_view(-dlse)))
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", ["as the machine has it", "fast path"])
def test_new_keys_with_a_minus_sign_that_is_still_due(way, monkeypatch):
    if way == "fast path":
        monkeypatch.setattr(fast_path, "applies", lambda *tensors: not any(t.is_neg() for t in tensors))
    q, k, v = make()
    caches = torch.zeros(2, 1, 24, 2, 16, device=DEVICE)
    out = interface.flash_attn_with_kvcache(q, *caches, pending(k), pending(v), cache_seqlens=0)
    assert torch.equal(caches[:, :, :20], torch.stack([k, v]))
    check_attention(out, q, k, v).raise_if_failed()


def test_v1_with_a_minus_sign_that_is_still_due():
    q, k, v = make()
    check_attention(flash_attn_v1_func(*map(pending, (q, k, v))), q, k, v).raise_if_failed()


def test_second_derivatives_are_refused():
    q, k, v = (t.requires_grad_() for t in make())
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="no second derivative|once_differentiable"):
        dq.sum().backward()


def packed(function):
    """`function` of one sequence, packed."""
    starts = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE)
    return lambda q, k, v: function(q[0], k[0], v[0], starts, starts, 20, 20)


@pytest.mark.parametrize(
    "function",
    [flash_attn_func, flash_attn_v1_func, packed(interface.flash_attn_varlen_func), interface.flash_attn_with_kvcache],
    ids=["fixed", "v1", "varlen", "cache"],
)
def test_a_derivative_in_forward_mode_is_refused(function):
    """A kernel returns no tangent, which PyTorch would take for a derivative of zero."""
    q, k, v = make()
    for place in range(3):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(lambda t: function(*(q, k, v)[:place], t, *(q, k, v)[place + 1 :]), (q,), (q,))  # noqa: B023
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            function(q, forward_ad.make_dual(k, k), v)
        function(q, k, v)  # of what has no tangent the derivative is zero


def test_returns_lse_like_flash_attn():
    q, k, v = make()
    out, lse, probabilities = flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.shape == (1, 2, 20) and lse.dtype == torch.float32 and probabilities is None
    check_attention(out, q, k, v, lse=lse).raise_if_failed()


def test_v1_computes_the_same():
    q, k, v = make()
    check_attention(flash_attn_v1_func(q, k, v, causal=True), q, k, v, causal=True).raise_if_failed()


def test_softmax_scale():
    q, k, v = make()
    out = flash_attn_func(q, k, v, softmax_scale=0.7)
    check_attention(out, q, k, v, softmax_scale=0.7).raise_if_failed()
    assert not check_attention(out, q, k, v)


SHARED = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None " + (
    "deterministic=False return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
ARGUMENTS = {
    "flash_attn_func": f"q k v {SHARED}",
    "flash_attn_kvpacked_func": f"q kv {SHARED}",
    "flash_attn_qkvpacked_func": f"qkv {SHARED}",
    "flash_attn_varlen_func": f"q k v {LENGTHS} {SHARED} block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q kv {LENGTHS} {SHARED}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {SHARED}",
}


def written(function) -> str:
    """Names, order and defaults of the arguments, as in ARGUMENTS."""
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    texts = [p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace(" ", "") for p in parameters]
    return " ".join(texts)


@pytest.mark.parametrize("function", ARGUMENTS)
def test_arguments_are_those_of_flash_attn(function):
    """Of flash_attn 2.8; those of `flash_attn_with_kvcache` are in test_cache.py."""
    assert written(getattr(interface, function)) == ARGUMENTS[function]


@pytest.mark.gpu
@pytest.mark.parametrize("function", ARGUMENTS)
def test_arguments_are_those_of_the_flash_attn_here(function):
    theirs = pytest.importorskip("flash_attn", reason="compares with the flash_attn package, which is not installed")
    assert written(getattr(interface, function)) == written(getattr(theirs, function))


CPU = torch.device("cpu")
META = torch.device("meta")
Q = (1, 20, 4, 16)
WRONG_INPUTS = {
    "a list": (TypeError, "q is a list", lambda q, k, v: ([1.0], k, v), {}),
    "three dimensions": (ValueError, r"\(B, N, H, D\)", lambda q, k, v: (q[0], k, v), {}),
    "k and v differ": (ValueError, "both must be", lambda q, k, v: (q, k[:, :5], v), {}),
    "batch sizes differ": (ValueError, "batch size 2", lambda q, k, v: (q.expand(2, -1, -1, -1), k, v), {}),
    "head dimensions differ": (ValueError, "head dimension", lambda q, k, v: (q, k[..., :8], v[..., :8]), {}),
    "heads do not divide": (ValueError, "must divide", lambda q, k, v: (q, k[:, :, :3], v[:, :, :3]), {}),
    "no key heads": (ValueError, "must divide", lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), {}),
    "head dimension zero": (ValueError, "1 to 256", lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), {}),
    "head dimension too large": (
        ValueError,
        "1 to 256",
        lambda q, k, v: [t.repeat(1, 1, 1, 17) for t in (q, k, v)],
        {},
    ),  # fmt: skip
    "dtypes differ": (TypeError, "convert them to one", lambda q, k, v: (q.half(), k, v), {}),
    "float64": (TypeError, "float64 is not supported", lambda q, k, v: (q.double(), k.double(), v.double()), {}),
    "integers": (TypeError, "int32 is not supported", lambda q, k, v: (q.int(), k.int(), v.int()), {}),
    "devices differ": (ValueError, "move them to one device", lambda q, k, v: (q, k.to(META), v), {}),
    "no query heads": (ValueError, "q has 0 heads", lambda q, k, v: (q[:, :, :0], k, v), {}),
    "scale a tensor with a dimension": (
        TypeError, r"softmax_scale is a torch.float32 tensor of shape \(1,\)", lambda q, k, v: (q, k, v),
        {"softmax_scale": torch.tensor([0.3])},
    ),
    "scale with a gradient": (
        NotImplementedError, "softmax_scale requires a gradient.*detach", lambda q, k, v: (q, k, v),
        {"softmax_scale": torch.tensor(0.3, requires_grad=True)},
    ),
    "scale infinite": (ValueError, "finite number", lambda q, k, v: (q, k, v), {"softmax_scale": float("-inf")}),
    # F21: scaled_dot_product_attention has its mask as the fourth argument
    "a mask": (
        TypeError, r"dropout_p, the fourth argument.*take no mask", lambda q, k, v: (q, k, v),
        {"dropout_p": torch.ones(20, 20, dtype=torch.bool)},
    ),
    "causal a word": (TypeError, "causal is a str.*True or False", lambda q, k, v: (q, k, v), {"causal": "no"}),
    "causal a list": (TypeError, "causal is a list.*True or False", lambda q, k, v: (q, k, v), {"causal": [True]}),
    "lse a word": (
        TypeError, "return_attn_probs is a str", lambda q, k, v: (q, k, v), {"return_attn_probs": "no"}
    ),
    "window of tensors": (
        ValueError, "two integers", lambda q, k, v: (q, k, v), {"window_size": (torch.tensor(3), 0)}
    ),
    "scale a word": (TypeError, "softmax_scale is a str", lambda q, k, v: (q, k, v), {"softmax_scale": "large"}),
    "scale beyond float32": (ValueError, "float32's range", lambda q, k, v: (q, k, v), {"softmax_scale": 1e39}),
    "scale that float32 has as zero": (ValueError, "float32's", lambda q, k, v: (q, k, v), {"softmax_scale": 1e-50}),
    "dropout None": (TypeError, "dropout_p is a NoneType", lambda q, k, v: (q, k, v), {"dropout_p": None}),
    "dropout that float32 has as one": (
        ValueError, "dropout_p=0.999999999", lambda q, k, v: (q, k, v), {"dropout_p": 1 - 1e-9}
    ),
    "window of fractions": (ValueError, "two integers", lambda q, k, v: (q, k, v), {"window_size": (2.7, 0)}),
    "window infinite": (ValueError, "two integers", lambda q, k, v: (q, k, v), {"window_size": (float("inf"), 0)}),
    "window of digits": (ValueError, "two integers", lambda q, k, v: (q, k, v), {"window_size": "34"}),
    "softcap None": (TypeError, "softcap is a NoneType", lambda q, k, v: (q, k, v), {"softcap": None}),
    "softcap a list": (TypeError, "softcap is a list", lambda q, k, v: (q, k, v), {"softcap": [1.0]}),
    "softcap beyond float32": (ValueError, "softcap=1e\\+39", lambda q, k, v: (q, k, v), {"softcap": 1e39}),
    "scale NaN": (ValueError, "finite number", lambda q, k, v: (q, k, v), {"softmax_scale": float("nan")}),
    "dropout one": (ValueError, "dropout_p=1.0", lambda q, k, v: (q, k, v), {"dropout_p": 1.0}),
    "dropout negative": (ValueError, "dropout_p=-0.1", lambda q, k, v: (q, k, v), {"dropout_p": -0.1}),
    "dropout NaN": (ValueError, "dropout_p=nan", lambda q, k, v: (q, k, v), {"dropout_p": float("nan")}),
    "window one-sided": (ValueError, "two integers", lambda q, k, v: (q, k, v), {"window_size": (8,)}),
    "window a number": (ValueError, "two integers", lambda q, k, v: (q, k, v), {"window_size": 8}),
    "softcap negative": (ValueError, "softcap=-1", lambda q, k, v: (q, k, v), {"softcap": -1.0}),
    "softcap infinite": (ValueError, "softcap=inf", lambda q, k, v: (q, k, v), {"softcap": float("inf")}),
    "slopes a list": (TypeError, "alibi_slopes is list", lambda q, k, v: (q, k, v), {"alibi_slopes": [1.0] * 4}),
    "slopes float64": (
        TypeError,
        "alibi_slopes is torch.float64",
        lambda q, k, v: (q, k, v),
        {"alibi_slopes": torch.ones(4, device=DEVICE).double()},
    ),
    "slopes of the wrong shape": (
        ValueError,
        "pass \\(4,\\)",
        lambda q, k, v: (q, k, v),
        {"alibi_slopes": torch.ones(3, device=DEVICE)},
    ),
    "slopes elsewhere": (
        ValueError,
        "move it to the device",
        lambda q, k, v: (q, k, v),
        {"alibi_slopes": torch.ones(4, device=META)},
    ),
    "slopes with a gradient": (
        NotImplementedError,
        "detach",
        lambda q, k, v: (q, k, v),
        {"alibi_slopes": torch.ones(4, device=DEVICE, requires_grad=True)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_input_is_named(case):
    error, message, change, kwargs = WRONG_INPUTS[case]
    with pytest.raises(error, match=message):
        flash_attn_func(*change(*make(Q)), **kwargs)


def test_the_checks_let_pass_what_the_kernels_have():
    kernels = launch_config.HEAD_DIMS[-1], flash_decode.MOST_SPLITS
    assert kernels == (checks.LARGEST_HEAD_DIM, checks.LARGEST_SPLITS)


def test_layout_of_sdpa_is_recognised():
    q, k, v = make((1, 20, 4, 16), (1, 30, 4, 16))
    with pytest.raises(ValueError, match=r"transpose\(1, 2\)"):
        flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)))


def test_v1_has_no_backward_and_says_so():
    q, k, v = make()
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward"):
        flash_attn_v1_func(q, k, v)
    with torch.no_grad():
        flash_attn_v1_func(q, k, v)


def test_bfloat16_on_turing_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Tesla T4")
    monkeypatch.setattr(runtime, "interpreted", False)

    class OnGpu(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 0))

    tensors = [t.to("cpu", torch.bfloat16).as_subclass(OnGpu) for t in make()]
    with pytest.raises(TypeError, match="Tesla T4 has no bfloat16.*float16"):
        flash_attn_func(*tensors)


@pytest.mark.gpu
def test_tensors_on_the_cpu_are_refused_on_a_gpu_machine():
    with pytest.raises(ValueError, match="move the tensors to the GPU"):
        flash_attn_func(*make(device=CPU))


def test_a_device_without_kernels():
    class Elsewhere(torch.Tensor):
        device = property(lambda self: torch.device("xpu", 0))

    with pytest.raises(ValueError, match="q is on xpu"):
        flash_attn_func(*(t.cpu().as_subclass(Elsewhere) for t in make()))


@pytest.mark.parametrize("scale", [0.0, -0.7, -3, 1e-30], ids=str)
def test_a_scale_that_is_not_positive(scale):
    """F37: flash-attn takes it; forward and all gradients are those of the formula."""
    q, k, v = (t.requires_grad_() for t in make((2, 20, 2, 16), (2, 24, 1, 16)))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    options = dict(softmax_scale=scale, causal=True)
    out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    true, true_lse = exact_attention(*exact, **options, return_lse=True)
    for a, b in zip((out, lse), (true, true_lse), strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum() + lse.sin().sum(), (q, k, v))
    theirs = torch.autograd.grad((true * weight).sum() + true_lse.sin().sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)
    for function in (flash_attn_v1_func, interface.flash_attn_with_kvcache):
        with torch.no_grad():
            got = function(q, k, v, softmax_scale=scale, causal=True)
        torch.testing.assert_close(got.double(), true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor(0.3).double(), torch.tensor(2), np.float32(0.3)])
def test_a_scale_without_dimensions(scale):
    """F37: it is read, and read anew in each call."""
    q, k, v = make()
    assert torch.equal(
        flash_attn_func(q, k, v, softmax_scale=scale), flash_attn_func(q, k, v, softmax_scale=float(scale))
    )
    if torch.is_tensor(scale):
        scale.mul_(2)
        assert torch.equal(
            flash_attn_func(q, k, v, softmax_scale=scale), flash_attn_func(q, k, v, softmax_scale=float(scale))
        )


@pytest.mark.parametrize(("window", "same"), [((-2, -1), (-1, -1)), ((-7, 3), (-1, 3)), ((4, -2), (4, -1))])
def test_any_negative_side_of_a_window_has_no_bound(window, same):
    """F37."""
    q, k, v = make()
    assert torch.equal(flash_attn_func(q, k, v, window_size=window), flash_attn_func(q, k, v, window_size=same))


@pytest.mark.parametrize("causal", [True, 1, np.True_, np.int64(1)], ids=repr)
def test_truth_values(causal):
    q, k, v = make()
    assert torch.equal(flash_attn_func(q, k, v, causal=causal), flash_attn_func(q, k, v, causal=True))


class TestMeta:
    """F37: tensors on the device "meta" have shapes and no values."""

    def test_functions(self):
        q, k, v = make((2, 20, 4, 16), (2, 30, 2, 16), device=META)
        starts = torch.zeros(4, dtype=torch.int32, device=META)
        lengths = torch.zeros(2, dtype=torch.int32, device=META)
        for out, shape in (
            (flash_attn_func(q, k, v, causal=True, dropout_p=0.1), q.shape),
            (flash_attn_func(q, k, v, return_attn_probs=True)[1], (2, 4, 20)),
            (interface.flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, 20, 30), (20, 4, 16)),
            (interface.flash_attn_with_kvcache(q, k, v, cache_seqlens=7), q.shape),
            (interface.flash_attn_with_kvcache(q, k, v, k[:, :1], v[:, :1], cache_seqlens=lengths), q.shape),
            (flash_attn_v1_func(q, k, v), q.shape),
        ):
            assert (out.device, tuple(out.shape)) == (META, tuple(shape))

    def test_gradients(self):
        q, k, v = (t.requires_grad_() for t in make((2, 20, 4, 16), (2, 30, 2, 16), device=META))
        flash_attn_func(q, k, v).sum().backward()
        assert all(t.grad.device == META and t.grad.shape == t.shape for t in (q, k, v))

    def test_half_of_the_tensors(self):
        q, k, v = make()
        with pytest.raises(ValueError, match="k on meta.*one device"):
            flash_attn_func(q, k.to(META), v)


class TestPackedSequences:
    def call(self, **options):
        q, k, v = (t[0] for t in make((1, 12, 2, 16)))
        starts = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
        longest = options.pop("longest", 7)
        return interface.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, **options)

    @pytest.mark.parametrize("longest", [torch.tensor(7), torch.tensor(7, dtype=torch.int32), np.int64(7)], ids=repr)
    def test_the_longest_without_dimensions(self, longest):
        """F35: `cu_seqlens.diff().max()`, as transformers passes it."""
        torch.manual_seed(0)
        out = self.call(longest=longest)
        torch.manual_seed(0)
        assert torch.equal(out, self.call())

    @pytest.mark.parametrize(
        ("longest", "error", "message"),
        [
            (torch.tensor([7]), TypeError, r"max_seqlen_q is a torch.int64 tensor of shape \(1,\)"),
            (torch.tensor(7.0), TypeError, "max_seqlen_q is a torch.float32 tensor"),
            ("7", TypeError, "max_seqlen_q='7'"),
            (7.0, TypeError, "max_seqlen_q=7.0"),
            (-1, ValueError, "max_seqlen_q=-1.*0 or more"),
            (torch.tensor(-1), ValueError, "max_seqlen_q=-1.*0 or more"),
            (torch.tensor(6), ValueError, "max_seqlen_q=6, but the longest"),
        ],
        ids=repr,
    )
    def test_no_longest(self, longest, error, message):
        with pytest.raises(error, match=message):
            self.call(longest=longest)

    @pytest.mark.parametrize("way", ["eager", "compiled"])
    def test_pages_and_a_gradient(self, way):
        """F18: the forward pass runs, as in flash-attn; the backward says what to do."""
        q, k, v = make((1, 5, 2, 16), (2, 4, 1, 16))
        q.requires_grad_()
        starts = [torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([0, 2, 5], [0, 3, 7])]
        table = torch.tensor([[0], [1]], dtype=torch.int32, device=DEVICE)

        def run(q, k, v):
            return interface.flash_attn_varlen_func(q[0], k, v, *starts, 3, 4, block_table=table)

        if way == "compiled":
            run = torch.compile(run, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            expected = run(q, k, v)
        out = run(q, k, v)
        assert torch.equal(out.detach(), expected) and out.requires_grad
        with pytest.raises(NotImplementedError, match="no backward through a paged cache.*no_grad"):
            out.sum().backward()
