"""Every kernel against the oracle by the 2 x rule: shapes, dtypes, strides, masks, tile edges, planted garbage."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labutils import runtime
from labutils.attention import fast_path, interface
from labutils.attention.kernels import flash_v1, flash_v2, flash_v2_backward
from labutils.attention.kernels.launch import pick_config
from labutils.attention.kernels.launch_config import LaunchConfig
from labutils.attention.kernels.options import Options
from labutils.attention.reference import check_attention, check_gradients, naive_attention

DEVICE = runtime.device
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = DTYPES[1:]
BACKWARD = ("dkdv", "dq")
FULL, CAUSAL = (None, None), (None, 0)  # windows


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    """Other processes run tests on the same GPU, and PyTorch keeps what it has once allocated."""
    yield
    torch.cuda.empty_cache()


def make(n_q, n_k, *, heads=2, heads_kv=None, head_dim=32, dtype=torch.float32, batch=1, seed=0, spread=1.0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    q = torch.randn(batch, n_q, heads, head_dim, generator=g, device=DEVICE) * spread
    k, v = torch.randn(2, batch, n_k, heads_kv or heads, head_dim, generator=g, device=DEVICE) * spread
    return tuple(t.to(dtype) for t in (q, k, v))


def check(q, k, v, *, causal, config=None, scale=None, v1=True):
    """Forward of both kernels and backward of v2, each by the rule."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kwargs = dict(causal=causal, softmax_scale=scale)
    if v1:
        out, lse = flash_v1.forward(q, k, v, scale, causal, config)
        check_attention(out, q, k, v, lse=lse, **kwargs).raise_if_failed()
    options = Options(scale, *(CAUSAL if causal else FULL))
    out, lse = flash_v2.forward(q, k, v, options, config)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    check_attention(out, q, k, v, lse=lse, **kwargs).raise_if_failed()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    configs = dict.fromkeys(BACKWARD, config) if config else None
    gradients = flash_v2_backward.backward(dout, q, k, v, out, lse, options, configs)
    for verdict in check_gradients(gradients, dout, q, k, v, **kwargs):
        verdict.raise_if_failed()


# The lengths of flash-attn's own tests where they are small, and those at which tiles of 16 and 32 end or begin.
SHAPES = [(1, 1), (16, 16), (17, 33), (33, 17), (1, 40), (40, 1), (64, 64), (65, 63)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
def test_lengths_across_tile_edges(n_q, n_k, causal):
    check(*make(n_q, n_k), causal=causal, config=LaunchConfig(32, 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_dtypes(dtype, causal):
    check(*make(100, 130, dtype=dtype), causal=causal)


@pytest.mark.parametrize("head_dim", [1, 7, 16, 40, 59, 64, 128, 200, 256])
def test_head_dimensions(head_dim):
    check(*make(48, 48, head_dim=head_dim, dtype=torch.float16), causal=True, v1=head_dim <= 128)


@pytest.mark.parametrize("heads_kv", [4, 2, 1])
def test_grouped_query_attention(heads_kv):
    check(*make(20, 36, heads=4, heads_kv=heads_kv, batch=2), causal=True)


# On a GPU each example compiles five kernels, one after the other.
@settings(max_examples=runtime.choose(cpu=20, gpu=6), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    n_q=st.integers(1, 70),
    n_k=st.integers(1, 70),
    head_dim=st.integers(16, 40),
    blocks=st.sampled_from([(16, 16), (16, 32), (32, 16), (64, 32)]),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_odd_shapes(n_q, n_k, head_dim, blocks, causal, dtype, seed):
    q, k, v = make(n_q, n_k, heads=1, head_dim=head_dim, dtype=dtype, seed=seed)
    check(q, k, v, causal=causal, config=LaunchConfig(*blocks))


def strided_like_gpt2(batch, n, heads, head_dim, dtype=torch.float32):
    """q, k, v as GPT-2 hands them over: slices of one fused (B, N, 3 H D) tensor."""
    fused = torch.randn(batch, n, 3 * heads * head_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    return [t.view(batch, n, heads, head_dim) for t in fused.split(heads * head_dim, dim=2)]


LAYOUTS = {
    "fused": lambda t: t,
    "heads_first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last_dimension_strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "last_dimension_outermost": lambda t: t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "expanded_heads": lambda t: t[:, :, :1].expand(-1, -1, t.shape[2], -1),
    "reversed_rows": lambda t: torch.cat([t, t], dim=1)[:, 3 : 3 + t.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    q, k, v = map(LAYOUTS[layout], strided_like_gpt2(2, 40, 2, 16))
    check(q, k, v, causal=True)


ALIGNMENTS = {
    "contiguous": lambda t: t.contiguous(),
    "two_bytes_off": lambda t: torch.nn.functional.pad(t, (1, 15), value=float("nan"))[..., 1:-15],
    "sixteen_bytes_off": lambda t: torch.nn.functional.pad(t, (8, 8), value=float("nan"))[..., 8:-8],
    "rows_of_odd_length": lambda t: torch.nn.functional.pad(t, (0, 3), value=float("nan"))[..., :-3],
}


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("layout", LAYOUTS | ALIGNMENTS)
def test_any_strides_in_half_precision(layout, head_dim):
    """On Hopper tiles are read through tensor descriptors where strides and addresses allow it: in some of these."""
    arrange = (LAYOUTS | ALIGNMENTS)[layout]
    inputs = strided_like_gpt2(2, 200, 4, head_dim, torch.float16)
    q, k, v = (arrange(t).detach().requires_grad_() for t in inputs)
    out, lse, _ = interface.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    check_attention(out, q, k, v, lse=lse, causal=True).raise_if_failed()
    one_row = torch.randn(head_dim, device=DEVICE).half()  # what out.sum(dim=(0, 1, 2)) would hand over, but for values
    for dout in (arrange(inputs[1]).detach(), one_row.expand(out.shape)):
        gradients = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        for verdict in check_gradients(gradients, dout, q, k, v, causal=True):
            assert verdict, f"dout with strides {dout.stride()}: {verdict}"


def test_which_tensor_is_misaligned_makes_another_form():
    """A compiled kernel may load an aligned tensor in words of 16 bytes: each call must find its own, in any order."""

    def at(offset, t):
        memory = torch.zeros(t.numel() + 8, dtype=t.dtype, device=DEVICE)
        memory[offset : offset + t.numel()] = t.flatten()
        return memory[offset : offset + t.numel()].view(t.shape)

    tensors = make(130, 130, head_dim=64, dtype=torch.float16)
    options = (0.125, True, (-1, -1), 0.0)
    before = len(fast_path._known)
    for misaligned in range(3):
        q, k, v = (at(4 * (place == misaligned), t) for place, t in enumerate(tensors))
        out, lse = fast_path.known_call(q, k, v, options, lambda: Options(0.125, *CAUSAL)).output(q, k, v)
        check_attention(out, q, k, v, lse=lse, softmax_scale=0.125, causal=True).raise_if_failed()
    assert len(fast_path._known) == before + 3


def test_gradient_of_the_output_may_have_any_strides():
    q, k, v = make(24, 24)
    out, lse = flash_v2.forward(q, k, v, Options(0.2))
    dout = torch.ones((), device=DEVICE).expand(out.shape)  # what out.sum().backward() hands over
    gradients = flash_v2_backward.backward(dout, q, k, v, out, lse, Options(0.2))
    for verdict in check_gradients(gradients, dout, q, k, v, softmax_scale=0.2):
        verdict.raise_if_failed()


@pytest.mark.parametrize("dtype", HALF)
def test_no_nan_on_large_scores(dtype):
    check(*make(70, 70, dtype=dtype, spread=8.0), causal=True)


LARGEST = torch.finfo(torch.float16).max  # 65,504
# What becomes of normal q, k, v and dout. Signs make scores that float32 holds exactly, however large they are.
OVERFLOWING = {
    "scores beyond float16": lambda q, k, v, dout: (64 * q.sign(), 128 * k.sign(), v, dout),
    "queries of the largest float16": lambda q, k, v, dout: (LARGEST * q.sign(), k.sign(), v, dout / 32),
    "values of the largest float16": lambda q, k, v, dout: (q, k, LARGEST * v.sign(), dout / 32),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", OVERFLOWING)
def test_overflows_nowhere(case, dtype):
    """Where naive attention in float16 gives inf or NaN, these kernels compute what is right.

    The rule is of no use then. What they may be off is a tenth of the largest value: float32 holds a log-sum-exp of
    500,000 to 1/32, and the backward has each probability from it.
    """
    q, k, v = make(200, 230, heads=6, heads_kv=2, head_dim=64, batch=2)
    dout = torch.randn(q.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    *inputs, dout = (t.to(dtype) for t in OVERFLOWING[case](q, k, v, dout))

    def run(attend, *inputs):
        inputs = [t.requires_grad_() for t in inputs]
        out = attend(*inputs, causal=True)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, inputs, dout.to(out.dtype)))))

    exact = run(naive_attention, *(t.double() for t in inputs))
    naive = run(naive_attention, *(t.half() for t in inputs))
    assert not all(t.isfinite().all() for t in naive.values()), "this case overflows nowhere, and so tests nothing"
    for name, ours in run(interface.flash_attn_func, *inputs).items():
        assert exact[name].to(dtype).isfinite().all(), f"the exact {name} has no place in {dtype}"
        assert ours.isfinite().all(), f"{name} is infinite or NaN"
        largest = exact[name].abs().max().item()
        error = (ours.double() - exact[name]).abs().max().item()
        assert error <= 0.1 * largest, f"{name}: error {error:.2e} where the largest value is {largest:.2e}"


def test_reads_and_writes_nothing_outside_its_tensors():
    """Neighbours in memory hold NaN, and stay NaN."""
    n, heads, head_dim = 21, 2, 24
    backing = torch.full((4, 2 * n, heads, head_dim + 8), float("nan"), device=DEVICE)
    views = [backing[i : i + 1, 5 : 5 + n, :, 3 : 3 + head_dim] for i in range(3)]
    for view, t in zip(views, make(n, n, heads=heads, head_dim=head_dim), strict=True):
        view.copy_(t)
    before = backing.clone()
    check(*views, causal=False, config=LaunchConfig(16, 32))
    assert torch.equal(before.isnan(), backing.isnan())


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 96])
def test_reads_nothing_outside_its_tensors_in_half_precision(head_dim):
    """Neighbours before and behind each row, before the first row and after the last hold NaN."""
    n = 150
    backing = torch.full((4, 2 * n, 2, head_dim + 16), float("nan"), dtype=torch.float16, device=DEVICE)
    q, k, v, dout = backing[:, None, 5 : 5 + n, :, 8:-8]  # at multiples of 16 bytes, as tensor descriptors ask for
    for view, t in zip((q, k, v), make(n, n, head_dim=head_dim, dtype=torch.float16), strict=True):
        view.copy_(t)
    dout.copy_(q.flip(1))
    for causal in (False, True):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        out = interface.flash_attn_func(*inputs, causal=causal)
        check_attention(out, *inputs, causal=causal).raise_if_failed()
        for verdict in check_gradients(torch.autograd.grad(out, inputs, dout), dout, *inputs, causal=causal):
            verdict.raise_if_failed()


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_what_a_call_allocates_is_freed(dropout_p):
    def call(n):
        q, k, v = (t.requires_grad_() for t in make(n, n, head_dim=64, dtype=torch.float16))
        interface.flash_attn_func(q, k, v, causal=True, dropout_p=dropout_p).sum().backward()

    def allocated():
        gc.collect()
        return torch.cuda.memory_allocated()

    call(100)
    before = allocated()
    for n in (64, 101, 128, 200, 64):
        call(n)
    assert allocated() == before, f"{allocated() - before} bytes stay allocated"


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("kernel", [flash_v1, flash_v2])
def test_empty_sequences(kernel, n_q, n_k):
    q, k, v = make(n_q, n_k)
    out, lse = kernel.forward(q, k, v, 0.2 if kernel is flash_v1 else Options(0.2))
    assert out.shape == q.shape and (out == 0).all() and lse.isneginf().all()
    if kernel is flash_v2:
        gradients = flash_v2_backward.backward(out, q, k, v, out, lse, Options(0.2))
        assert all((g == 0).all() for g in gradients)


def test_same_bits_every_time():
    q, k, v = make(90, 70, dtype=torch.float16, heads=2)
    runs = []
    for _ in range(3):
        out, lse = flash_v2.forward(q, k, v, Options(0.2, *CAUSAL))
        runs.append((out, lse, *flash_v2_backward.backward(out, q, k, v, out, lse, Options(0.2, *CAUSAL))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


class TestLaunchTable:
    @pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [1, 16, 64, 80, 128, 192, 256])
    def test_every_gpu_has_an_entry(self, monkeypatch, capability, dtype, head_dim):
        monkeypatch.setattr("labutils.attention.kernels.launch._capability", lambda index: capability)
        for kernel in ("forward", *BACKWARD, *(("v1",) if head_dim <= 128 else ())):
            if (capability, dtype, kernel) == ((7, 5), torch.float32, "dkdv") and head_dim > 128:
                with pytest.raises(RuntimeError, match="too little shared memory.*torch.float16"):
                    pick_config(kernel, head_dim, dtype, True, torch.device("cuda", 0), longest=4096)
                continue
            config = pick_config(kernel, head_dim, dtype, True, torch.device("cuda", 0), longest=4096)
            assert config.block_m >= 16 and config.block_n >= 16
            if capability < (8, 0) or dtype == torch.float32:
                assert max(config.block_m, config.block_n) <= 32

    def test_a_gpu_too_old_is_named(self, monkeypatch):
        monkeypatch.setattr("labutils.attention.kernels.launch._capability", lambda index: (6, 1))
        with pytest.raises(RuntimeError, match=r"compute capability 6\.1.*LABUTILS_DEVICE=cpu"):
            pick_config("forward", 64, torch.float16, True, torch.device("cuda", 0), longest=64)

    def test_head_dimensions_are_padded_to_a_power_of_two(self):
        assert [LaunchConfig.block_d(d) for d in (1, 16, 17, 64, 65, 128)] == [16, 16, 32, 64, 128, 128]


# The same grid for v2 is in test_features.py, where it goes through the public functions.
LENGTHS = [
    (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
    (2048, 2048),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [32, 40, 59, 64, 80, 96, 111, 128])
def test_v1_at_the_lengths_of_flash_attns_tests(head_dim, dtype, causal):
    for n_q, n_k in LENGTHS:
        q, k, v = make(n_q, n_k, heads=6, heads_kv=2, head_dim=head_dim, dtype=dtype, batch=2)
        out, lse = flash_v1.forward(q, k, v, head_dim**-0.5, causal)
        verdict = check_attention(out, q, k, v, lse=lse, causal=causal)
        assert verdict, f"N_q = {n_q}, N_k = {n_k}: {verdict}"


@pytest.mark.gpu
def test_more_programs_than_a_grid_dimension_holds():
    q, k, v = make(20, 20, batch=9000, heads=8, head_dim=16, dtype=torch.float16)
    check(q, k, v, causal=True, v1=False)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements():
    """A view whose last rows lie more than 2**31 elements behind its first."""
    n, stride = 70_000, 32_768
    backing = torch.zeros(n * stride, dtype=torch.float16, device=DEVICE)
    big = backing.as_strided((1, n, 1, 16), (0, stride, 0, 1))
    q, k, v = make(64, n, heads=1, head_dim=16, dtype=torch.float16)
    big.copy_(k)
    out, lse = flash_v2.forward(q, big, v, Options(0.25, *CAUSAL))
    check_attention(out, q, k, v, causal=True, softmax_scale=0.25, lse=lse).raise_if_failed()
    gradients = flash_v2_backward.backward(out, q, big, v, out, lse, Options(0.25, *CAUSAL))
    for verdict in check_gradients(gradients, out, q, k, v, causal=True, softmax_scale=0.25):
        verdict.raise_if_failed()


# B and N, where 2**24 rows of 128 are 2**31 elements; and places to look at: sequence, first and last row.
LARGE = {
    "one sequence": (1, 2**24 + 1000, [(0, 0, 300), (0, 2**24 - 200, 2**24 + 150), (0, 2**24 + 700, 2**24 + 1000)]),
    "many sequences": (2**14 + 8, 1024, [(0, 0, 300), (2**14 - 1, 724, 1024), (2**14, 0, 300), (2**14 + 7, 500, 1024)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE)
def test_tensors_of_more_than_two_to_the_31_elements(case):
    """Forward and backward at the beginning, around element 2**31 and at the end.

    In a window of 64 a row sees its own key and the 64 before, so attention of some rows and those keys alone is what
    they should be. dout is zero in all other rows: then no other row adds to dK and dV there, and no gradient elsewhere
    may be anything but zero.
    """
    if runtime.memory_gib < 100:
        pytest.skip(f"needs 36 GiB beside what else runs on the GPU; this one has {runtime.memory_gib:.0f} GiB in all")
    batch, n, places = LARGE[case]
    window = 64
    random = lambda *shape: torch.randn(*shape, 128, dtype=torch.float16, device=DEVICE)  # noqa: E731
    q, k, v = (random(batch, n, 1).requires_grad_() for _ in range(3))
    out, lse, _ = interface.flash_attn_func(q, k, v, window_size=(window, 0), return_attn_probs=True)
    dout = torch.zeros_like(out)
    for b, first, last in places:
        dout[b, first:last] = random(last - first, 1)
    gradients = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), dout)))
    elsewhere = {name: int(t.count_nonzero()) for name, t in gradients.items()}
    for b, first, last in places:
        one, rows, cols = slice(b, b + 1), slice(first, last), slice(max(first - window, 0), last)
        part = q[one, rows], k[one, cols], v[one, cols]
        where = f"sequence {b}, rows {first} to {last}"
        verdict = check_attention(out[one, rows], *part, lse=lse[one, :, rows], window_size=(window, 0))
        assert verdict, f"{where}: {verdict}"
        parts = gradients["dq"][one, rows], gradients["dk"][one, cols], gradients["dv"][one, cols]
        for verdict in check_gradients(parts, dout[one, rows], *part, window_size=(window, 0)):
            assert verdict, f"{where}: {verdict}"
        for name, t in zip(gradients, parts):
            elsewhere[name] -= int(t.count_nonzero())
    assert elsewhere == dict(dq=0, dk=0, dv=0), f"gradients where none belong: {elsewhere}"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_of_16_rows_through_descriptors(head_dim):
    """A crash here breaks the GPU's context: `tune` tries such configurations, one after the other in one process."""
    config = LaunchConfig(16, 64, 4, 3 if head_dim < 256 else 2, tma=True)
    check(*make(256, 256, head_dim=head_dim, dtype=torch.float16), causal=False, config=config, v1=False)


@pytest.mark.gpu
def test_a_configuration_too_large_for_the_gpu_is_named():
    q, k, v = make(256, 256, head_dim=128, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="too small for LaunchConfig"):
        flash_v2.forward(q, k, v, Options(0.1), LaunchConfig(256, 256, 8, 6))
