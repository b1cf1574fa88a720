"""training.parity finds a wrong attention and passes a right one; attention.ring merges to attention itself."""

import pandas as pd
import pytest
import torch

from labutils import runtime
from labutils.attention import reference, ring
from labutils.gpt2 import models
from labutils.training import parity

# Tensor cores add the products of a short row at once, so that its order is none: it takes more there to see one.
N = runtime.choose(cpu=32, gpu=512)


def losses(steps=3):
    def make_model(attention, seed):
        torch.manual_seed(seed)
        wrong = {"scale_attn_weights": False} if attention.startswith("wrong") else {}
        attention = attention.removeprefix("wrong-")
        model = models.gpt2(
            "nano", n_positions=N, vocab_size=60, attention=attention, initializer_range=0.3, **wrong
        ).to(runtime.device)
        return model

    def make_batches(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(60, (2, N), generator=generator) for _ in range(steps)]

    return parity.loss_parity(make_model, make_batches, ("sdpa", "wrong, sdpa"), steps=steps, lr=1e-3, seeds=(0, 1))


def test_a_wrong_attention_is_farther_off_than_the_spread():
    frame = losses()
    assert list(frame.columns) == [parity.EXACT, "eager", *parity.OTHER_ORDERS, "sdpa", "wrong, sdpa"]
    assert list(frame.index.names) == ["seed", "step"] and len(frame) == 2 * 3
    assert not frame.loc[0].equals(frame.loc[1])
    table = parity.judge_parity(frame).set_index("run")
    rms = table.rms_from_eager
    assert 0 < rms[list(parity.OTHER_ORDERS)].max() < 1e-3  # another order is another rounding, and no more
    assert rms["sdpa"] < 1e-3 < rms["wrong, sdpa"]
    assert not table.in_spread["wrong, sdpa"] and table.in_spread[parity.OTHER_ORDERS[0]]
    assert table.within["sdpa"] and not table.within["wrong, sdpa"]


def test_a_comparison_of_fewer_steps_than_asked_for_is_none():
    def make_model(attention, seed):
        return models.gpt2("nano", n_positions=8, vocab_size=16, attention=attention).to(runtime.device)

    with pytest.raises(ValueError, match="ended after 1 of 3 steps"):
        parity.loss_parity(make_model, lambda seed: [torch.zeros(1, 8, dtype=torch.int64)], steps=3)
    with pytest.raises(ValueError, match="no seed"):
        parity.loss_parity(make_model, lambda seed: [], steps=3, seeds=())


def test_errors_are_judged_from_the_run_in_32_bits():
    """Runs that err by known amounts: only one that errs more than twice standard attention's largest error fails."""
    runs = (parity.EXACT, "eager", *parity.OTHER_ORDERS, "good", "bad")
    errors = dict(zip(runs, (0, 1, 2, 3, 1, 5.9, 6.1), strict=True))
    frame = pd.DataFrame({name: [2 + size, 2 - size, 2 + size] for name, size in errors.items()})
    table = parity.judge_parity(frame).set_index("run")
    assert table.error.to_dict() == pytest.approx({name: size for name, size in errors.items() if name != parity.EXACT})
    assert table.within["good"] and not table.within["bad"]
    assert table.rms_from_eager["good"] == pytest.approx(4.9) and not table.in_spread["good"]  # 3 - 1 is the spread


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ring_is_attention(ranks):
    q, k, v = (torch.randn(2, 16, 3, 8, dtype=torch.float64) for _ in range(3))
    out, work = ring.ring_attention(q, k, v, ranks)
    torch.testing.assert_close(out, reference.naive_attention(q, k, v, causal=True))
    assert work == list(range(1, ranks + 1))
    with pytest.raises(ValueError, match="dealt out"):
        ring.ring_attention(q, k, v, 5)


def test_merging_with_nothing_changes_nothing():
    out, lse = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 4)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged, kept in zip(ring.merge(out, lse, *nothing), (out, lse), strict=True):
        torch.testing.assert_close(merged, kept)
    assert not ring.merge(*nothing, *nothing)[0].isnan().any()


def test_messages_hide_behind_enough_tokens():
    link = {"width": 768, "tflops": 400.0, "gigabytes_per_s": 50.0}
    least = ring.ring_seconds(10**6, 8, **link)["tokens_to_hide"]
    assert least == pytest.approx(8000)  # 2 bytes · 400e12 / (2 · 50e9)
    assert ring.ring_seconds(8 * 8001, 8, **link)["hidden"] and not ring.ring_seconds(8 * 7999, 8, **link)["hidden"]
