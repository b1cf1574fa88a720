"""labutils.gpt2.rope: RoPE against complex numbers and against flash-attn, and in a model."""

import pytest
import torch

from labutils import runtime
from labutils.gpt2 import models, rope


def small(attention="sdpa", rotary=True, n_positions=64):
    torch.manual_seed(0)
    model = models.gpt2("nano", n_positions=n_positions, vocab_size=60, attention=attention, initializer_range=0.3)
    return (rope.use_rope(model) if rotary else model).to(runtime.device)


def test_rope_is_a_product_with_a_complex_number():
    x, place = torch.randn(11, 3, 16, dtype=torch.float64).float(), torch.randint(100_000, (11,))
    turned = rope.apply_rope(x, *rope.rope_angles(place, 16))
    torch.testing.assert_close(turned.double(), rope.rope_by_complex_numbers(x, place), rtol=0, atol=1e-5)
    assert rope.apply_rope(x.half(), *rope.rope_angles(place, 16)).dtype == torch.float16


def test_a_score_depends_on_the_distance_alone():
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(i, j):
        turn = lambda x, p: rope.apply_rope(x, *rope.rope_angles(torch.tensor([p]), 8))  # noqa: E731
        return (turn(q, i) * turn(k, j)).sum()

    assert score(5, 2) == pytest.approx(score(1005, 1002).item(), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3).item(), abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(runtime.device.type != "cuda", reason="needs a CUDA GPU; this machine has none")
def test_rope_is_flash_attns():
    rotary = pytest.importorskip("flash_attn.layers.rotary")
    x = torch.randn(2, 33, 3, 64, device="cuda", dtype=runtime.dtype)
    cos, sin = rope.rope_angles(torch.arange(33, device="cuda"), 64)
    theirs = rotary.apply_rotary_emb(x, cos.to(x.dtype), sin.to(x.dtype), interleaved=False)
    exact = rope.apply_rope(x.double().float(), cos, sin)
    ours = rope.apply_rope(x, cos, sin)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa", "labutils"])
def test_a_model_with_rope_sees_distances_and_not_places(attention):
    model = small(attention)
    tokens = torch.randint(60, (1, 20), device=runtime.device)
    shifted = torch.arange(7, 27, device=runtime.device)[None]
    with torch.no_grad():
        here, there = model(tokens).logits, model(tokens, position_ids=shifted).logits
        torch.testing.assert_close(here, there, rtol=1e-2, atol=1e-2)
        model(torch.randint(60, (1, 90), device=runtime.device))  # longer than any table of positions
        learned = small(attention, rotary=False)
        assert (learned(tokens).logits - learned(tokens, position_ids=shifted).logits).abs().max() > 0.1
        assert (here - learned(tokens).logits).abs().max() > 0.1


def test_rope_is_given_once_and_to_even_heads():
    with pytest.raises(ValueError, match="already"):
        rope.use_rope(small())
    with pytest.raises(ValueError, match="even"):
        rope.rope_angles(torch.arange(3), 7)
    with pytest.raises(ValueError, match="base"):
        rope.rope_angles(torch.arange(3), 8, base=1.0)
    with pytest.raises(ValueError, match="N, D/2"):
        rope.apply_rope(torch.zeros(3, 1, 8), *rope.rope_angles(torch.arange(4), 8))
