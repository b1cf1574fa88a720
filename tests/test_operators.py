"""How the kernels fit into PyTorch: opcheck, torch.compile, FLOP counts, autocast, checkpointing, CUDA graphs."""

import functools
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from labutils import runtime
from labutils.attention import fast_path, interface, operators
from labutils.attention.kernels import flash_v2_backward
from labutils.attention.kernels.options import Options
from labutils.attention.reference import check_attention, check_gradients, exact_attention, visible_mask
from labutils.benchmark import attention_flops

DEVICE = runtime.device
DTYPE = torch.float32 if runtime.interpreted else torch.float16
# On the CPU the default backend needs a C++ compiler; without one, tracing and AOTAutograd are still tested.
HAS_COMPILER = not runtime.interpreted or any(map(shutil.which, ("g++", "clang++", "c++")))
compiled = functools.partial(torch.compile, fullgraph=True, backend="inductor" if HAS_COMPILER else "aot_eager")


def make(n_q=20, n_k=28, *, batch=1, heads=2, heads_kv=1, head_dim=16, dtype=DTYPE, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, n_q, heads, head_dim), *[(batch, n_k, heads_kv, head_dim)] * 2]
    return [torch.randn(s, generator=g).to(DEVICE, dtype).requires_grad_(requires_grad) for s in shapes]


def starts(*lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


class TestOpcheck:
    """PyTorch's own check of an operator: schema, shapes and strides without data, and under AOTAutograd."""

    @pytest.mark.parametrize("feature", ["plain", "all", "packed"])
    def test_attention(self, feature):
        q, k, v = make()
        slopes = torch.tensor([0.1, 0.2], device=DEVICE)
        seed = torch.tensor([5], device=DEVICE)
        rest = {
            "plain": Options(0.25),
            "all": Options(0.25, 9, 0, 1.5, slopes, 0.2, seed),
            "packed": Options(0.25, None, 0, None, None, 0.0, None, starts(8, 12), starts(20, 8), 12, 20),
        }[feature]
        if feature == "packed":
            q, k, v = (t[0] for t in (q, k, v))
        torch.library.opcheck(torch.ops.labutils.flash_attention.default, (q, k, v, *rest))
        out, lse = torch.ops.labutils.flash_attention(q, k, v, *rest)
        of_the_output = (torch.randn_like(out), None, q, k, v, out, lse)
        torch.library.opcheck(torch.ops.labutils.flash_attention_backward.default, (*of_the_output, *rest[:-1]))

    def test_v1(self):
        torch.library.opcheck(torch.ops.labutils.flash_attention_v1.default, (*make(), 0.25, True))

    def test_cache(self):
        q, k, v = make(3, 3)
        caches = make(3, 40)[1:]
        cos, sin = torch.randn(2, 64, 4, device=DEVICE)
        lengths = torch.tensor([30], dtype=torch.int32, device=DEVICE)
        arguments = (q, *caches, k, v, cos, sin, lengths, 0, None, None, None, 0.25, None, 0, None, True, None, 2)
        torch.library.opcheck(torch.ops.labutils.flash_attention_with_cache.default, arguments)


class TestCompile:
    def test_forward_and_backward_in_one_graph(self):
        def layer(q, k, v):
            return interface.flash_attn_func(q * 2, k, v, causal=True, softcap=3.0) + 1

        results = []
        for run in (layer, compiled(layer)):
            q, k, v = make(requires_grad=True)
            out = run(q, k, v)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager)

    @pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
    def test_tensors_among_the_options_reach_the_backward(self, dynamic):
        """Slopes, borders and a window: what the backward of a compiled program keeps besides q, k, v, out and lse."""
        slopes = torch.tensor([0.1, 0.4], device=DEVICE)

        def layer(q, k, v, slopes, borders):
            out, lse, _ = interface.flash_attn_varlen_func(
                q * 2, k, v, borders, borders, 12, 12,
                window_size=(7, 0), alibi_slopes=slopes, softcap=2.0, return_attn_probs=True,
            )  # fmt: skip
            return out.square().sum() + lse.sum()

        results = []
        for run in (layer, compiled(layer, dynamic=dynamic)):
            q, k, v = (t.detach()[0].requires_grad_() for t in make(20, 20))
            loss = run(q, k, v, slopes, starts(8, 12))
            results.append([loss, *torch.autograd.grad(loss, (q, k, v))])
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager)

    def test_packed_sequences(self):
        q, k, v = (t[0] for t in make(20, 20))

        def run(q, k, v, cu_seqlens):
            return interface.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 12, 12, causal=True)

        fast = compiled(run)
        torch.testing.assert_close(fast(q, k, v, starts(8, 12)), run(q, k, v, starts(8, 12)))
        with pytest.raises(ValueError, match="ends with 21"):  # values are checked in compiled programs, too
            fast(q, k, v, starts(9, 12))

    def test_decoding_with_growing_lengths(self):
        def step(q, k_cache, v_cache, k, v, lengths):
            return interface.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

        fast = compiled(step)
        caches = [[t.clone() for t in make(1, 40)[1:]] for _ in range(2)]
        for length in (30, 31, 32):
            lengths = torch.tensor([length], dtype=torch.int32, device=DEVICE)
            q, k, v = make(1, 1)
            expected = step(q, *caches[0], k * length, v, lengths)
            torch.testing.assert_close(fast(q, *caches[1], k * length, v, lengths), expected)
        for eager, written in zip(*caches, strict=True):
            assert torch.equal(eager, written) and not torch.equal(written, make(1, 40)[1])

    @torch._dynamo.config.patch(capture_scalar_outputs=True)
    @pytest.mark.parametrize("read", [lambda t: t.item(), lambda t: t], ids=["item", "a tensor"])
    def test_a_longest_sequence_that_is_computed_inside(self, read):
        """F16: the compiler has no value of it, and may not ask whether it is negative."""

        def run(q, k, v, borders):
            longest = read(borders.diff().max())
            return interface.flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, causal=True)

        fast = torch.compile(run, fullgraph=True, backend="aot_eager")
        for borders in (starts(8, 12), starts(15, 5)):
            results = []
            for way in (run, fast):
                q, k, v = (t.detach()[0].requires_grad_() for t in make(20, 20))
                out = way(q, k, v, borders)
                results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
            for eager, ours in zip(*results, strict=True):
                torch.testing.assert_close(ours, eager)

    @torch._dynamo.config.patch(capture_scalar_outputs=True)
    def test_a_longest_sequence_that_is_too_short(self):
        """F16: what the compiler cannot check, the operator does."""

        def run(q, k, v, borders, longest):
            return interface.flash_attn_varlen_func(q, k, v, borders, borders, longest.item(), longest.item())

        q, k, v = (t[0] for t in make(20, 20))
        fast = torch.compile(run, fullgraph=True, backend="aot_eager")
        for longest in (-1, 11):
            with pytest.raises(ValueError, match=f"max_seqlen_q={longest}, but the longest.*12"):
                fast(q, k, v, starts(8, 12), torch.tensor(longest, device=DEVICE))

    @torch._dynamo.config.patch(capture_scalar_outputs=True)
    def test_a_length_of_the_cache_that_is_computed_inside(self):
        """F16."""

        def run(q, k, v, length):
            return interface.flash_attn_with_kvcache(q, k, v, cache_seqlens=length.item())

        arguments = (*make(1, 40), torch.tensor(30, device=DEVICE))
        fast = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(fast(*arguments), run(*arguments))

    def test_v1(self):
        q, k, v = make()
        torch.testing.assert_close(
            compiled(interface.flash_attn_v1_func)(q, k, v), interface.flash_attn_v1_func(q, k, v)
        )

    @pytest.mark.parametrize("n", [40, 57])
    def test_other_lengths_than_the_traced_one(self, n):
        run = compiled(interface.flash_attn_func, dynamic=True)
        run(*make(24, 24))
        q, k, v = make(n, n)
        check_attention(run(q, k, v), q, k, v).raise_if_failed()


class TestFlops:
    def counted(self, run) -> dict:
        with FlopCounterMode(display=False) as counter:
            run()
        return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}

    def test_forward_and_backward(self):
        q, k, v = make(heads=4, heads_kv=2, requires_grad=True)
        flops = self.counted(lambda: interface.flash_attn_func(q, k, v).sum().backward())
        convention = dict(batch=1, heads=4, seqlen_q=20, seqlen_k=28, head_dim=16)
        assert flops["labutils.flash_attention"] == attention_flops(**convention)
        assert flops["labutils.flash_attention_backward"] == attention_flops(**convention, backward=True)

    def test_v1(self):
        q, k, v = make()
        flops = self.counted(lambda: interface.flash_attn_v1_func(q, k, v, causal=True))
        assert flops["labutils.flash_attention_v1"] == 4 * 2 * 16 * int(visible_mask(20, 28, causal=True).sum())

    def test_masks_are_left_out(self):
        q, k, v = make()
        flops = self.counted(lambda: interface.flash_attn_func(q, k, v, causal=True, window_size=(7, 0)))
        pairs = int(visible_mask(20, 28, window_size=(7, 0)).sum())
        assert sum(flops.values()) == 4 * 2 * 16 * pairs

    def test_packed_sequences(self):
        q, k, v = (t[0] for t in make(20, 28))
        run = lambda: interface.flash_attn_varlen_func(q, k, v, starts(8, 12), starts(20, 8), 12, 20)  # noqa: E731
        assert sum(self.counted(run).values()) == 4 * 2 * 16 * (8 * 20 + 12 * 8)

    def test_decoding(self):
        q, *caches = make(1, 40)
        run = lambda: interface.flash_attn_with_kvcache(q, *caches, cache_seqlens=30)  # noqa: E731
        assert sum(self.counted(run).values()) == 4 * 2 * 16 * 30

    @pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (5, 9), (9, 5), (13, 13), (0, 4), (4, 0)])
    @pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (0, 2), (20, 30), (-1, 4), (2, -1)])
    def test_visible_pairs(self, n_q, n_k, window):
        bounds = (None if side < 0 else side for side in window)
        assert operators.visible_pairs(n_q, n_k, *bounds) == int(visible_mask(n_q, n_k, window_size=window).sum())


class TestAutocast:
    def test_computes_in_its_dtype(self):
        low = torch.bfloat16
        q, k, v = make(dtype=torch.float32, requires_grad=True)
        with torch.autocast(DEVICE.type, low):
            out = interface.flash_attn_func(q, k, v, causal=True)
        assert out.dtype == low
        check_attention(out, *(t.to(low) for t in (q, k, v)), causal=True).raise_if_failed()
        out.sum().backward()
        assert q.grad.dtype == torch.float32

    @pytest.mark.parametrize("function", [interface.flash_attn_func, interface.flash_attn_v1_func])
    def test_mends_dtypes_that_differ(self, function):
        q, k, v = make(dtype=torch.float32)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert function(q, k.bfloat16(), v).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_gradients_are_the_same_however_often_a_form_was_seen(autocast):
    """A backward that is launched again has other addresses and the same kernels: the same bits as from scratch."""
    low = torch.float16
    for seed in range(4):
        torch.manual_seed(seed)
        fused = torch.randn(2, 200, 3 * 4, 64, device=DEVICE, dtype=torch.float32 if autocast else low)
        q, k, v = (t.requires_grad_() for t in fused.split(4, dim=2))  # strided, as GPT-2 hands them over
        with torch.autocast(DEVICE.type, low, enabled=autocast):
            out, lse, _ = interface.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        for dout in (torch.randn_like(out), torch.ones((), device=DEVICE, dtype=low).expand(out.shape)):
            ours = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            half = [t.detach().to(low) for t in (q, k, v)]
            options = Options(64**-0.5, window_right=0)
            scratch = flash_v2_backward.backward(dout, *half, out.detach(), lse.detach(), options)
            for a, b in zip(ours, scratch, strict=True):
                assert torch.equal(a, b.to(a.dtype))
    assert any(known.backwards for known in fast_path._known.values())


class TestGradientOfTheLogSumExp:
    def test_alone_and_with_the_output(self):
        q, k, v = make(dtype=torch.float32, requires_grad=True)
        exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
        for weight_out in (0.0, 1.0):
            out, lse, _ = interface.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
            loss = weight_out * out.square().sum() + lse.sin().sum() if weight_out else lse.sin().sum()
            ours = torch.autograd.grad(loss, (q, k, v), allow_unused=True, materialize_grads=True)
            out, lse = exact_attention(*exact, causal=True, return_lse=True)
            loss = weight_out * out.square().sum() + lse.sin().sum()
            theirs = torch.autograd.grad(loss, exact)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4)

    def test_parts_of_the_keys_can_be_merged_and_trained(self):
        """What ring attention does: two parts of the keys on their own, merged by their log-sum-exps."""
        q, k, v = make(dtype=torch.float32, requires_grad=True)
        parts = [
            interface.flash_attn_func(q, *kv, return_attn_probs=True)[:2]
            for kv in zip(k.split(16, 1), v.split(16, 1), strict=True)
        ]
        weights = torch.stack([lse for _, lse in parts]).softmax(0)
        out = sum(w.transpose(1, 2)[..., None] * part for w, (part, _) in zip(weights, parts, strict=True))
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        q, k, v = (t.detach() for t in (q, k, v))
        check_attention(out.detach(), q, k, v).raise_if_failed()
        for verdict in check_gradients(gradients, dout, q, k, v):
            verdict.raise_if_failed()


@pytest.mark.parametrize(
    ("there", "paged", "message"),
    [
        ("q", False, "cu_seqlens_q came without cu_seqlens_k"),
        ("q", True, "cu_seqlens_q came without cu_seqlens_k"),
        ("k", False, "cu_seqlens_k came without cu_seqlens_q"),
        ("", True, "block_table came without cu_seqlens_q and cu_seqlens_k"),
    ],
)
def test_packed_sequences_without_their_borders(there, paged, message):
    """The functions of the interface cannot be called so; the operator can."""
    q, k, v = (t[0] if there else t for t in make(20, 20))
    table = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE) if paged else None
    borders = [starts(8, 12) if name == there else None for name in "qk"]
    options = Options(0.25, None, 0, None, None, 0.0, None, *borders, 12, 20, table)
    with pytest.raises(ValueError, match=message):
        torch.ops.labutils.flash_attention(q, k, v, *options)


def test_the_cache_has_no_backward_and_says_so():
    q, *caches = make(1, 40)
    out = interface.flash_attn_with_kvcache(q.requires_grad_(), *caches)
    with pytest.raises(RuntimeError, match="backward through labutils.flash_attention_with_cache"):
        out.sum().backward()


def test_checkpointed_layer_has_the_same_gradients():
    def attend(q, k, v):
        return interface.flash_attn_func(q, k, v, causal=True)

    q, k, v = make(requires_grad=True)
    plain = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    out = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(out.square().sum(), (q, k, v)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph_of_forward_and_backward():
    q, k, v = make(200, 300, head_dim=64, requires_grad=True)
    packed = [t.detach()[0].requires_grad_() for t in (q, k, v)]
    lengths = starts(60, 140), starts(100, 200)

    def step():
        out = interface.flash_attn_func(q, k, v, causal=True)
        other = interface.flash_attn_varlen_func(*packed, *lengths, 140, 200, causal=True)
        loss = out.square().sum() + other.square().sum()
        return [out, other, *torch.autograd.grad(loss, (q, k, v, *packed))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.mul_(0.5)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)
