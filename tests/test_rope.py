"""labutils.gpt2.rope: RoPE against complex numbers and against flash-attn; loss by position."""

import pytest
import torch

from labutils import runtime
from labutils.gpt2 import models, rope


def small(attention="sdpa", rope=True, n_positions=64):
    torch.manual_seed(0)
    model = models.gpt2("nano", n_positions=n_positions, vocab_size=60, attention=attention, initializer_range=0.3)
    return (rope.use_rope(model) if rope else model).to(runtime.device)


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
        learned = small(attention, rope=False)
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


def test_losses_of_tokens_are_the_models_and_windows_shorten_the_context():
    model = small()
    tokens = torch.randint(60, (3, 40))
    losses = rope.token_losses(model, tokens, chunk=7)
    with torch.no_grad():
        whole = models.language_model_loss(model, tokens.to(runtime.device))
    assert losses.mean().item() == pytest.approx(whole.item(), rel=1e-2)
    windowed = rope.token_losses(model, tokens, context=16)
    torch.testing.assert_close(windowed[:, :15], losses[:, :15], rtol=1e-3, atol=1e-3)
    # token 20 belongs to the window of tokens 8 to 23: it knows tokens 8 to 19
    alone = rope.token_losses(model, tokens[:, 8:24])
    torch.testing.assert_close(windowed[:, 15:23], alone[:, 7:15], rtol=1e-3, atol=1e-3)
    # and the last token to the window that ends with the sequence
    torch.testing.assert_close(windowed[:, -1], rope.token_losses(model, tokens[:, 24:])[:, -1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(windowed[:, 20:], losses[:, 20:], atol=1e-3)
    with pytest.raises(ValueError, match="even"):
        rope.token_losses(model, tokens, context=15)
    with pytest.raises(ValueError, match="N of 2 or more"):
        rope.token_losses(model, tokens[:, :1])
    with pytest.raises(ValueError, match="N of 2 or more"):  # of a model that has no longest sequence
        models.language_model_loss(model, tokens[:, :1])


def test_error_bars_count_sequences_and_not_tokens():
    losses = torch.tensor([[1.0, 1.0, 5.0, 5.0], [3.0, 3.0, 7.0, 7.0]])
    table = rope.by_position(losses, [1, 3, 5])
    assert table["mean"].tolist() == [2.0, 6.0] and table["error"].tolist() == pytest.approx([1.0, 1.0])
    assert table["from"].tolist() == [1, 3] and table["sequences"].tolist() == [2, 2]
    for edges in ([3, 1], [0, 2], [1, 9], [1]):
        with pytest.raises(ValueError, match="edges"):
            rope.by_position(losses, edges)
    with pytest.raises(ValueError, match="two sequences"):
        rope.by_position(losses[:1], [1, 3])


def test_a_fall_compares_each_sequence_with_itself():
    """Files of different difficulty that all fall alike: the means overlap, the fall is certain."""
    level = torch.tensor([1.0, 5.0, 9.0])[:, None]
    losses = level + torch.tensor([0.5, 0.5, 0.0, 0.0])  # positions 1 and 2, then 3 and 4
    assert rope.fall(losses, (1, 3), (3, 5)) == pytest.approx((0.5, 0.0))
    apart = losses + torch.tensor([[0.0, 0, 0, 0], [0.3, 0.3, 0, 0], [-0.3, -0.3, 0, 0]])
    assert rope.fall(apart, (1, 3), (3, 5)) == pytest.approx((0.5, 0.3 / 3**0.5))
    with pytest.raises(ValueError, match="ascend"):
        rope.fall(losses, (1, 3), (3, 9))
