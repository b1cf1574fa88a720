"""Kernels keep inside of their tensors whatever lengths, places and borders are: a CUDA graph checks none of them.

On the CPU the operators run here without their checks, as in a captured graph, and every address is looked at. What
lies around a cache is NaN, and must neither be read nor be written.
"""

import pytest
import torch

from labutils import runtime
from labutils.analysis import count_traffic
from labutils.attention import checks, interface, operators
from labutils.attention.kernels import launch
from labutils.attention.reference import naive_attention

DEVICE = runtime.device
NAN = float("nan")
LEAST, MOST = -(2**31), 2**31 - 1
WRONG = (-1, 9, 1000, LEAST, MOST)

interpreted = pytest.mark.skipif(not runtime.interpreted, reason="kernels are compiled in this process")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def bits(t):
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def amid_nan(shape, dtype):
    """A tensor in the midst of a larger one that is NaN; returns both."""
    around = torch.full((3, *shape), NAN, dtype=dtype, device=DEVICE)
    around[1] = torch.randn(shape, device=DEVICE, dtype=dtype)
    return around[1], around


@pytest.fixture
def unchecked(monkeypatch):
    """As in a captured CUDA graph no value is checked. In the interpreter every address is."""
    for name in ("packed_values", "cache_values", "table_values"):
        monkeypatch.setattr(checks, name, lambda *args: None)
    monkeypatch.setattr(launch, "_INTERPRETER_BLOCK", 16)
    with count_traffic(check_bounds=True):
        yield


CAPACITY, PAGE, COLUMNS = 8, 4, 2


class Step:
    """One step of decoding with a cache: two sequences, the second of which is always right."""

    def __init__(self, *, page=None, rotary=False, n_q=1, n_new=1, positions=CAPACITY + 1, dtype=torch.float32, d=16):
        torch.manual_seed(0)
        self.q = torch.randn(2, n_q, 4, d, device=DEVICE, dtype=dtype)
        self.k, self.v = (torch.randn(2, n_new, 2, d, device=DEVICE, dtype=dtype) for _ in range(2))
        shape = (5, PAGE, 2, d) if page else (3, CAPACITY, 2, d)
        (self.k_cache, self.around_k), (self.v_cache, self.around_v) = (amid_nan(shape, dtype) for _ in range(2))
        self.indices = {"cache_seqlens": ints(5, 3)}
        if page:
            self.indices["block_table"] = ints(3, 0, 4, 2).view(2, COLUMNS)
        else:
            self.indices |= {"cache_batch_idx": ints(2, 0), "cache_leftpad": ints(1, 2)}
        self.rotary = torch.rand(2, positions, d // 2, device=DEVICE, dtype=dtype) if rotary else (None, None)

    def put(self, name, value, at=0):
        self.indices[name].view(-1)[at] = value
        return self

    def run_plain(self, *, splits=1, causal=True):
        """out and lse by the operator."""
        take = self.indices.get
        return operators.undispatched_with_cache(
            self.q, self.k_cache, self.v_cache, self.k, self.v, *self.rotary, take("cache_seqlens"), 0,
            take("cache_batch_idx"), take("cache_leftpad"), take("block_table"),
            0.25, None, 0 if causal else None, None, True, None, splits,
        )  # fmt: skip

    def run(self, **options):
        """out and lse by the operator; nothing around the caches has changed."""
        found = self.run_plain(**options)
        self.assert_nothing_around_is_written()
        return found

    def assert_nothing_around_is_written(self):
        for around in (self.around_k, self.around_v):
            assert around[0].isnan().all() and around[2].isnan().all(), "written outside of the cache"


def assert_no_row(out, lse):
    assert (out == 0).all() and (lse == -torch.inf).all()


PLACES = {  # which entry of which index is wrong
    "cache_seqlens": (None, 0),
    "cache_batch_idx": (None, 0),
    "cache_leftpad": (None, 0),
    "cache_seqlens of pages": (PAGE, 0),
    "block_table": (PAGE, 0),
    "block_table, where a key is appended": (PAGE, 1),
}


@interpreted
@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("place", PLACES)
def test_a_step_keeps_inside_of_the_cache(place, value, unchecked):
    """F34: appending, rotating and decoding in two splits, with one index that is wrong."""
    page, at = PLACES[place]
    name = place.split()[0].rstrip(",")
    right, wrong = (Step(page=page, rotary=True) for _ in range(2))
    wrong.put(name, value, at)
    expected, expected_lse = right.run(splits=2)
    before = wrong.k_cache.clone()
    out, lse = wrong.run(splits=2)
    assert out.isfinite().all()
    assert torch.equal(out[1], expected[1]) and torch.equal(lse[1], expected_lse[1])
    if name == "cache_batch_idx" or (name == "cache_seqlens" and value < 0):
        assert_no_row(out[0], lse[0])
    if name == "cache_leftpad":  # cut to the length, which is 6 with the key that is appended
        cut = Step(rotary=True).put(name, min(max(value, 0), 6)).run(splits=2)
        assert torch.equal(out, cut[0]) and torch.equal(lse, cut[1])
    elif (name, at) != ("block_table", 0):  # the first sequence has no place to append to
        changed = (bits(wrong.k_cache) != bits(before)).any(-1).any(-1).nonzero().tolist()
        assert changed == [[0, 3]] if page is None else changed == [[4, 3]]


@interpreted
@pytest.mark.parametrize("causal", [False, True])
def test_keys_in_blocks_that_do_not_exist_are_masked(causal, unchecked):
    """F34: the other keys of the sequence are seen as if these had a mask."""
    step = Step(page=PAGE).put("block_table", -1)
    out, _ = step.run(causal=causal)
    k, v = (torch.stack([c[0, 0], t[0, 0]])[None] for c, t in ((step.k_cache, step.k), (step.v_cache, step.v)))
    expected = naive_attention(step.q[:1], k, v, softmax_scale=0.25)
    torch.testing.assert_close(out[:1], expected)


@interpreted
@pytest.mark.parametrize("positions", [0, 3])
def test_positions_that_the_rotary_tables_lack(positions, unchecked):
    """F34: keys and queries there are not rotated."""
    step = Step(rotary=True, positions=positions)
    out, _ = step.run()
    assert torch.equal(step.k_cache[0, 3], step.k[1, 0]) and torch.equal(step.k_cache[2, 5], step.k[0, 0])
    assert torch.equal(out, Step().run()[0])


def varlen(q, k, v, cu_q, cu_k, most_q, most_k, table=None, left=None, right=0):
    """out, lse, and without a block table the gradients of packed sequences, by the operators."""
    options = 0.25, left, right, None, None, 0.0, None, cu_q, cu_k, most_q, most_k
    out, lse = operators.undispatched_forward(q, k, v, *options, table)
    if table is not None:
        return out, lse
    dout = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(out.dtype)
    return out, lse, *operators.flash_attention_backward(dout, None, q, k, v, out, lse, *options)


CU_Q, CU_K = (0, 5, 12, 20), (0, 7, 20, 23)


@interpreted
@pytest.mark.parametrize("value", [-1, 17, 1000, LEAST, MOST])
@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
def test_packed_sequences_keep_inside_of_their_tensors(which, at, value, unchecked):
    """F34: forward and backward, with one border that is wrong."""
    q, k, v = (torch.randn(n, h, 16, device=DEVICE) for n, h in ((20, 4), (23, 2), (23, 2)))
    expected = varlen(q, k, v, ints(*CU_Q), ints(*CU_K), 8, 13)
    borders = {"cu_seqlens_q": ints(*CU_Q), "cu_seqlens_k": ints(*CU_K)}
    borders[which][at] = value
    found = varlen(q, k, v, *borders.values(), 8, 13)
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        rows = slice(0, 5) if name in ("out", "lse", "dq") else slice(0, 7)  # the first sequence, whose borders hold
        if name == "lse":
            ours, theirs = ours.T, theirs.T
        assert torch.equal(ours[rows], theirs[rows]) or value < CU_Q[1], name  # negative borders lead into its rows


@interpreted
@pytest.mark.parametrize("value", [-1, 5, 1000, LEAST, MOST])
def test_packed_pages_keep_inside_of_the_cache(value, unchecked):
    """F34: a block or a border that is wrong."""
    q, k, v = (torch.randn(*n, 16, device=DEVICE) for n in ((6, 4), (5, PAGE, 2), (5, PAGE, 2)))
    cu_q, cu_k, table = ints(0, 2, 6), ints(0, 6, 13), ints(3, 0, 4, 2).view(2, COLUMNS)
    expected = varlen(q, k, v, cu_q, cu_k, 4, 8, table)[0]
    table[1, 0] = value
    out = varlen(q, k, v, cu_q, cu_k, 4, 8, table)[0]
    assert out.isfinite().all() and torch.equal(out[:2], expected[:2])
    table[1, 0], cu_k[2] = 4, value
    assert torch.equal(varlen(q, k, v, cu_q, cu_k, 4, 8, table)[0][:2], expected[:2])


@interpreted
def test_sequences_longer_than_max_seqlen(unchecked):
    """F34: rows from max_seqlen on are left out, and nothing of them that was never computed reaches a gradient."""
    q, k, v = (torch.randn(n, h, 16, device=DEVICE) for n, h in ((60, 4), (60, 2), (60, 2)))
    cu = ints(0, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, **options: torch.full(_flat(shape), NAN, **options))
        *_, dk, dv = varlen(q, k, v, cu, cu, 16, 60)
    assert dk.isfinite().all() and dv.isfinite().all()


def _flat(shape):
    return shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape


# ---------------------------------------------------------------------------------------------------------------------
# Padding, which flash-attn ignores: rows behind the last sequence, entries without a sequence
# ---------------------------------------------------------------------------------------------------------------------


def garbage(monkeypatch):
    """Memory that nobody has written to is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: _fill(empty(*args, **options)))


def _fill(t):
    return t.fill_(NAN) if t.is_floating_point() else t


@pytest.mark.parametrize("borders", [(0, 4, 11, 11, 11), (0, 4, 4, 11), (0, 0), (0,)])
def test_packed_rows_behind_the_last_sequence_are_ignored(borders, monkeypatch):
    """F36: out and gradients are 0 there, lse is -inf; before them nothing changes."""
    garbage(monkeypatch)
    q, k, v = (torch.randn(97, h, 16, device=DEVICE) for h in (4, 2, 2))
    q[borders[-1] :] = k[borders[-1] :] = v[borders[-1] :] = NAN
    cu, longest = ints(*borders), max([b - a for a, b in zip(borders, borders[1:], strict=False)], default=0)
    whole, cut = [], []
    for found, rows in ((whole, 97), (cut, borders[-1])):
        inputs = [t[:rows].clone().requires_grad_() for t in (q, k, v)]
        out, lse, _ = interface.flash_attn_varlen_func(
            *inputs, cu, cu, longest, longest, causal=True, return_attn_probs=True
        )
        dout = torch.linspace(-1, 1, out[: borders[-1]].numel(), device=DEVICE).view(-1, 4, 16)
        dout = torch.cat([dout, torch.ones_like(out[borders[-1] :])])
        found += [out, lse.T, *torch.autograd.grad(out, inputs, dout)]
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), whole, cut, strict=True):
        assert torch.equal(ours[: borders[-1]], theirs), name
        assert (ours[borders[-1] :] == (-torch.inf if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("n_new", [0, 1, 3])
@pytest.mark.parametrize("page", [None, PAGE])
def test_entries_of_a_cache_that_are_padding(page, n_new):
    """F36: a length of -1 gives zeros and appends nothing, whatever the other indices of that entry are."""
    step = Step(page=page, n_new=max(n_new, 1), n_q=2)
    new = dict(k=step.k, v=step.v) if n_new else {}
    before = step.k_cache.clone(), step.v_cache.clone()
    put = lambda: dict(k_cache=before[0].clone(), v_cache=before[1].clone())  # noqa: E731
    right = put()
    expected, expected_lse = interface.flash_attn_with_kvcache(
        step.q, **right, **new, **step.indices, causal=True, return_softmax_lse=True
    )
    for name, t in step.indices.items():
        t[0] = -1 if name != "cache_leftpad" else 77
    padded = put()
    out, lse = interface.flash_attn_with_kvcache(
        step.q, **padded, **new, **step.indices, causal=True, return_softmax_lse=True
    )
    assert_no_row(out[0], lse[0])
    assert torch.equal(out[1], expected[1]) and torch.equal(lse[1], expected_lse[1])
    for name, old in zip(("k_cache", "v_cache"), before, strict=True):
        theirs = [4, 2] if page else 0  # blocks or row of the sequence that is there
        assert torch.equal(padded[name][theirs], right[name][theirs])
        padded[name][theirs] = old[theirs]
        assert torch.equal(padded[name], old)


@pytest.mark.parametrize("most", [2**31, 2**40, 2**70])
@pytest.mark.parametrize("which", ["max_seqlen_q", "max_seqlen_k"])
def test_a_length_that_kernels_cannot_count_is_named(which, most):
    """F29."""
    q = torch.randn(16, 2, 16, device=DEVICE)
    lengths = {"max_seqlen_q": 16, "max_seqlen_k": 16, which: most}
    with pytest.raises(ValueError, match=f"{which}={most}.*below 2"):
        interface.flash_attn_varlen_func(q, q, q, ints(0, 16), ints(0, 16), **lengths)


def test_a_length_far_above_the_rows():
    """F29: as many programs as the rows need, not as the length would."""
    q = torch.randn(16, 2, 16, device=DEVICE, requires_grad=True)
    found = []
    for most in (16, 2**31 - 1):
        out = interface.flash_attn_varlen_func(q, q, q, ints(0, 16), ints(0, 16), most, most)
        found.append((out, torch.autograd.grad(out.sum(), q)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Offsets beyond 2**31
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(tmp_path):
    """A function from values (..., D) to the same values with so large a stride of D that its offsets pass 2**31.

    The elements lie in a file with holes, of which only the pages that are touched take memory.
    """

    def spread(t):
        stride = 2**31 // (t.shape[-1] - 1) + 4096
        name = tmp_path / f"{len(list(tmp_path.iterdir()))}.bin"
        flat = torch.from_file(
            str(name), shared=True, size=(t.shape[-1] - 1) * stride + t[..., 0].numel(), dtype=t.dtype
        )
        spread = flat.as_strided(t.shape, (*t[..., 0].contiguous().stride(), stride))
        spread.copy_(t)
        return spread

    return spread


@interpreted
def test_strides_of_the_last_dimension_beyond_two_to_the_31(sparse):
    """F5: forward and backward, v1, a cache and what is appended to it."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 9, 2, 16, dtype=torch.float16) for _ in range(4))
    far = [sparse(t) for t in (q, k, v)]
    results = []
    for inputs, gradient in (((q, k, v), dout), (far, sparse(dout))):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = interface.flash_attn_func(*inputs, causal=True)
        results.append([out, *torch.autograd.grad(out, inputs, gradient)])
        with torch.no_grad():
            results[-1].append(interface.flash_attn_v1_func(*inputs, causal=True))
            results[-1].append(interface.flash_attn_with_kvcache(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_appended_to_a_cache_with_strides_beyond_two_to_the_31(sparse):
    """F5."""
    near, far = Step(rotary=True, dtype=torch.float16), Step(rotary=True, dtype=torch.float16)
    for name in ("k_cache", "v_cache", "q", "k", "v"):
        setattr(far, name, sparse(getattr(far, name)))
    assert all(torch.equal(a, b) for a, b in zip(near.run(), far.run(), strict=True))
    assert torch.equal(near.k_cache, far.k_cache) and torch.equal(near.v_cache, far.v_cache)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_tensors_stored_with_the_head_dimension_outermost(backward):
    """F5: more than 2**31 elements, stored as (D, B, N, H)."""
    if runtime.memory_gib < 64:
        pytest.skip("needs a GPU with 64 GiB")
    n = 2**25 + 2**20
    q = torch.randn(1, 64, 2, 64, device=DEVICE, dtype=torch.float16)
    far = []
    for _ in range(3):  # 33 million rows of one head, of which the call sees the last 100
        t = torch.empty(64, 1, n, 1, device=DEVICE, dtype=torch.float16)
        assert t.numel() > 2**31
        far.append(t.permute(1, 2, 3, 0)[:, -100:].normal_())
    dout = far[2][:, -64:].expand(-1, -1, 2, -1) if backward else None
    results = []
    for tensors in ((q, *far[:2]), (q, *(t.contiguous() for t in far[:2]))):
        inputs = [t.detach().requires_grad_(backward) for t in tensors]
        for _ in range(3):  # the third call is a replay
            out = interface.flash_attn_func(*inputs, causal=True)
        found = [out]
        if backward:
            found += torch.autograd.grad(out, inputs, dout)
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Captured CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


def captured(call):
    """`call()` as a CUDA graph, and its results, which every replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_a_captured_step_keeps_inside_of_the_cache(place, splits):
    """F34: replays with indices that are wrong; the second sequence is always right."""
    page, at = PLACES[place]
    name = place.split()[0].rstrip(",")
    step = Step(page=page, rotary=True, dtype=torch.float16, d=64)
    graph, (out, lse) = captured(lambda: step.run_plain(splits=splits))
    graph.replay()
    expected, good = out[1].clone(), step.indices[name].view(-1)[at].item()
    for value in WRONG:
        step.put(name, value, at)
        graph.replay()
        assert out.isfinite().all() and torch.equal(out[1], expected)
        if name == "cache_batch_idx" or (name == "cache_seqlens" and value < 0):
            assert_no_row(out[0], lse[0])
        step.assert_nothing_around_is_written()
    step.put(name, good, at)
    graph.replay()
    assert out.isfinite().all() and torch.equal(out[1], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [-1, 17, 1000, LEAST, MOST])
@pytest.mark.parametrize("which", [0, 1])
def test_captured_packed_sequences_keep_inside_of_their_tensors(which, value):
    """F34: forward and backward."""
    inputs = [torch.randn(n, h, 64, device=DEVICE, dtype=torch.float16) for n, h in ((20, 4), (23, 2), (23, 2))]
    borders = ints(*CU_Q), ints(*CU_K)
    graph, results = captured(lambda: varlen(*inputs, *borders, 8, 13))
    graph.replay()
    expected = [t.clone() for t in results]
    good = borders[which][3].item()
    borders[which][3] = value
    graph.replay()
    torch.cuda.synchronize()
    borders[which][3] = good
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
