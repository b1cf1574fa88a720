"""Argument for argument against the flash_attn package, where there is a GPU and the package: no less exact than it.

The same arguments go to a function of ours and to flash-attn's of the same name, forward and backward. Each of our
results may be at most 1.5 times as far from float64 as flash-attn's own, in the root of the mean square. The largest of
a million errors is a matter of luck, and differs by nearly two either way from one draw of inputs to the next: it may
be three times theirs.
"""

import math

import pytest
import torch
from test_features import make, one_by_one, packed, slopes

from labutils import runtime
from labutils.attention import interface
from labutils.attention.reference import exact_attention

DEVICE = runtime.device
HALF = [torch.float16, torch.bfloat16]
HEAD_DIMS = [64, 128]
HEADS = 6
BATCH = 2

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def flash_attn():
    return pytest.importorskip("flash_attn", reason="compares with the flash_attn package, which is not installed")


def pack(function, q, k, v):
    """The tensors that a function takes first: q, k and v, or some of them side by side."""
    if "qkvpacked" in function:
        return [torch.stack([q, k, v], dim=-3)]
    if "kvpacked" in function:
        return [q, torch.stack([k, v], dim=-3)]
    return [q, k, v]


def unpack(function, tensors):
    if "qkvpacked" in function:
        return tensors[0].unbind(-3)
    if "kvpacked" in function:
        return tensors[0], *tensors[1].unbind(-3)
    return tensors


def results(module, function, q, k, v, dout, starts, features):
    """out, lse, dq, dk and dv of one function, in the form of packed sequences: (total, H, D), lse (H, total_q)."""
    tensors = [t.detach().clone().requires_grad_() for t in pack(function, q, k, v)]
    out, lse, _ = getattr(module, function)(*tensors, *starts, return_attn_probs=True, **features)
    found = out.detach(), lse, *unpack(function, torch.autograd.grad(out, tensors, dout))
    if "varlen" not in function:
        found = [t.transpose(0, 1).flatten(1) if t is lse else t.flatten(0, 1) for t in found]
    return dict(zip(("out", "lse", "dq", "dk", "dv"), found))


def errors(found, exact):
    """Distances from float64, by result, where the exact value is finite: (root of the mean square, largest)."""
    distances = {name: (found[name].double() - right)[right.isfinite()] for name, right in exact.items()}
    return {name: (d.square().mean().sqrt().item(), d.abs().max().item()) for name, d in distances.items()}


def compare(flash_attn, function, q, k, v, starts=(), **features):
    """The two implementations of `function`; `starts` is what the functions for packed sequences take besides."""
    dout = torch.randn_like(q)
    arguments = q, k, v, dout, starts, features
    ours, theirs = (results(module, function, *arguments) for module in (interface, flash_attn))
    features = {name: value for name, value in features.items() if name != "deterministic"}
    if "varlen" in function:
        bounds = starts[:2] if len(starts) == 4 else starts[:1] * 2
    else:
        bounds = [torch.arange(len(t) + 1) * t.shape[1] for t in (q, k)]
        q, k, v, dout = (t.flatten(0, 1) for t in (q, k, v, dout))
    exact = one_by_one(q, k, v, dout, *bounds, torch.float64, **features)
    exact = dict(zip(("out", "lse", "dq", "dk", "dv"), exact))
    hidden = exact["lse"].isneginf()  # rows that see no key: lse is -inf here, and inf there
    assert ours["lse"][hidden].isneginf().all() and theirs["lse"][hidden].isinf().all()
    if features.get("causal") and features.get("alibi_slopes") is not None:
        del exact["lse"]  # flash-attn adds slope * j there: the same probabilities, but another sum in each row
    our_errors, their_errors = errors(ours, exact), errors(theirs, exact)
    for name, right in exact.items():
        what = f"{name} of {function}, q {tuple(q.shape)}, k {tuple(k.shape)}"
        largest = right[right.isfinite()].abs().max().item()
        (mine, my_largest), (other, other_largest) = our_errors[name], their_errors[name]
        assert other_largest <= 0.05 * largest, (
            f"{what}: flash-attn computes something else, off by {other_largest:.2e}"
        )
        assert mine <= 1.5 * other + 1e-6, f"{what}: error {mine:.2e}, and flash-attn's is {other:.2e}"
        assert my_largest <= 3 * other_largest + 1e-5, f"{what}: largest error {my_largest:.2e} and {other_largest:.2e}"


FEATURES = {
    "full": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(51, 21)),
    "window to the left": dict(window_size=(75, -1)),
    "causal window": dict(window_size=(99, -1), causal=True),
    "softcap": dict(softcap=5.0),
    "softcap in a window": dict(softcap=5.0, window_size=(51, 21)),
    "ALiBi of each head": dict(alibi_slopes=(HEADS,)),
    "ALiBi of each sequence and head": dict(alibi_slopes=(BATCH, HEADS)),
    "causal ALiBi": dict(alibi_slopes=(HEADS,), causal=True),
    "deterministic": dict(deterministic=True, causal=True),
    "softmax_scale": dict(softmax_scale=0.3),
}


def arguments(feature, batch=BATCH):
    """The keyword arguments of a feature, with a tensor where the table has the shape of ALiBi's slopes."""
    features = dict(FEATURES[feature])
    if "alibi_slopes" in features:
        table = slopes(batch, HEADS)
        features["alibi_slopes"] = table if len(features["alibi_slopes"]) == 2 else table[0]
    return features


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_features(flash_attn, head_dim, dtype, feature):
    lengths = [(512, 768), (1024, 1024), (128, 217), (768, 512)]
    if feature == "window to the left":
        lengths.pop()  # flash-attn takes N_k for no bound to the right, which is one where N_q > N_k
    for n_q, n_k in lengths:
        tensors = make(n_q, n_k, heads=HEADS, heads_kv=2, head_dim=head_dim, dtype=dtype, batch=BATCH)
        compare(flash_attn, "flash_attn_func", *tensors, **arguments(feature))


@pytest.mark.parametrize("heads_kv", [6, 3, 1])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_heads(flash_attn, head_dim, dtype, heads_kv):
    tensors = make(512, 768, heads=HEADS, heads_kv=heads_kv, head_dim=head_dim, dtype=dtype, batch=BATCH)
    compare(flash_attn, "flash_attn_func", *tensors, causal=True)


SEQUENCES = [(200, 333), (1, 77), (333, 200), (130, 1), (512, 512)]
FORMS = [
    "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func",
]  # fmt: skip


@pytest.mark.parametrize("feature", ["causal", "softcap in a window", "ALiBi of each sequence and head"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("function", FORMS)
def test_packed_tensors_and_packed_sequences(flash_attn, function, head_dim, dtype, feature):
    of_itself = "qkvpacked" in function  # as many keys as queries, and as many heads of them
    sizes = dict(heads=HEADS, heads_kv=HEADS if of_itself else 2, head_dim=head_dim, dtype=dtype)
    if "varlen" in function:
        lengths = [(n_q, n_q if of_itself else n_k) for n_q, n_k in SEQUENCES]
        q, k, v, starts_q, starts_k, longest_q, longest_k = packed(lengths, **sizes)
        starts = (starts_q, longest_q) if of_itself else (starts_q, starts_k, longest_q, longest_k)
        compare(flash_attn, function, q, k, v, starts, **arguments(feature, len(lengths)))
    else:
        compare(flash_attn, function, *make(512, 512, batch=BATCH, **sizes), **arguments(feature))


class TestDropout:
    """The masks cannot be the same: each implementation draws its own from a seed. What they do on average can be.

    With P_ij kept with probability 1 - p and then divided by 1 - p, the output of one head has the mean of attention
    without dropout, and the variance p / (1 - p) Σ_j P_ij² v_jd². So with the same q, k and v in each of many heads,
    the mean over the heads must be that far from it, and no more.
    """

    P = 0.17
    HEADS = 512

    def many_heads(self, flash_attn, q, k, v):
        """Outputs (N_q, heads, D) in float64, by implementation."""
        q, k, v = (t.expand(-1, -1, self.HEADS, -1).contiguous() for t in (q, k, v))
        modules = dict(ours=interface, theirs=flash_attn)
        return {name: module.flash_attn_func(q, k, v, dropout_p=self.P)[0].double() for name, module in modules.items()}

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_mean_and_variance_of_the_output(self, flash_attn, head_dim, dtype):
        q, k, v = make(128, 128, heads=1, heads_kv=1, head_dim=head_dim, dtype=dtype)
        undropped = exact_attention(q, k, v)[0, :, 0]
        unit = torch.eye(128, dtype=torch.float64, device=DEVICE)[None, :, None]
        probabilities = exact_attention(*(t.double() for t in (q, k)), unit)[0, :, 0]
        variance = self.P / (1 - self.P) * probabilities.square() @ v[0, :, 0].double().square()
        for name, out in self.many_heads(flash_attn, q, k, v).items():
            spread = (out - undropped[:, None]).square().mean(dim=1) / variance
            off = (out.mean(dim=1) - undropped).square() / variance * self.HEADS
            assert 0.95 < spread.mean() < 1.05, f"{name}: variance {spread.mean():.3f} of what it should be"
            assert 0.9 < off.mean() < 1.1, f"{name}: the mean is off by {off.mean().sqrt():.3f} standard errors"

    def test_fraction_that_is_kept(self, flash_attn):
        """Read off as in test_features: equal weights, and V the unit matrix.

        flash-attn compares a random byte with floor(255 (1 - p)), so what it keeps is a multiple of 1/256.
        """
        zeros = torch.zeros(1, 128, 1, 128, dtype=torch.float16, device=DEVICE)
        unit = torch.eye(128, dtype=torch.float16, device=DEVICE)[None, :, None]
        outs = self.many_heads(flash_attn, zeros, zeros, unit)
        expected = dict(ours=1 - self.P, theirs=(math.floor(255 * (1 - self.P)) + 1) / 256)
        deviation = (self.P * (1 - self.P) / outs["ours"].numel()) ** 0.5
        for name, out in outs.items():
            fraction = (out != 0).double().mean().item()
            assert abs(fraction - expected[name]) < 5 * deviation, f"{name}: {fraction:.5f} of the weights are kept"
