"""labutils.gpt2.loss: the chunked loss is the loss, packed documents are kept apart, and losses by position add up."""

import pytest
import torch
from small_gpt2 import make, tokens

from labutils import runtime, training
from labutils.gpt2 import loss, models, packing, rope


@pytest.mark.parametrize("chunk", [16, 7, 1000])
def test_chunked_loss_equals_the_models_own(chunk):
    model, ids = make("sdpa").double(), tokens(2, 33)
    model.train()
    losses, gradients = [], []
    for chunked_loss in (None, chunk):
        value = loss.language_model_loss(model, ids, chunked_loss=chunked_loss)
        model.zero_grad()
        value.backward()
        losses.append(value.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    # Both compute the cross-entropy itself in float32.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for plain, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-7)


def test_chunked_loss_never_makes_all_logits():
    model, ids = make("sdpa"), tokens(1, 33)
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    loss.language_model_loss(model, ids, chunked_loss=8).backward()
    assert max(rows) == 8 and sum(rows) == 2 * 32  # forward, and again in the backward


def test_chunked_loss_under_autocast():
    model, ids = make("sdpa").train(), tokens(1, 33)
    with torch.autocast(runtime.device.type, dtype=torch.bfloat16):
        plain = loss.language_model_loss(model, ids)
        chunked = loss.language_model_loss(model, ids, chunked_loss=8)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 1), "N of 2 or more"), ((8,), "N of 2 or more"), ((), "N of 2 or more"), ((1, 65), "n_positions=64")],
    ids=str,
)
def test_loss_refuses_lengths_the_model_has_not(shape, message):
    with pytest.raises(ValueError, match=message):
        loss.language_model_loss(make("sdpa"), torch.zeros(shape, dtype=torch.int64, device=runtime.device))


def test_loss_refuses_an_empty_chunk():
    with pytest.raises(ValueError, match="at least 1"):
        loss.language_model_loss(make("sdpa"), tokens(1, 8), chunked_loss=0)


# --- documents kept apart -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "rotary"), [("labutils", True), ("sdpa", False), ("sdpa", True), ("eager", False)]
)
def test_documents_kept_apart_lose_what_each_loses_alone(attention, rotary):
    torch.manual_seed(0)
    tokens = torch.randint(1, 50, (2, 40))
    tokens[0, 10] = tokens[1, 7] = 0
    model = models.gpt2("nano", n_positions=64, vocab_size=50, attention=attention, initializer_range=0.3)
    model = (rope.use_rope(model) if rotary else model).to(runtime.device)
    tokens = tokens.to(runtime.device)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in tokens[:, None]:
            ends = packing.document_borders(row, 0).tolist()
            for begin, end in zip(ends[:-1], ends[1:], strict=True):
                total += loss.language_model_loss(model, row[:, begin:end]).item() * (end - begin - 1)
                count += end - begin - 1
        apart = loss.language_model_loss(model, tokens, end_of_text=0).item()
        chunked = loss.language_model_loss(model, tokens, end_of_text=0, chunked_loss=7).item()
        mixed = loss.language_model_loss(model, tokens).item()
    assert apart == pytest.approx(total / count, rel=1e-3) == chunked
    assert abs(mixed - apart) > 1e-2
    assert training.evaluate(model, tokens.split(1), end_of_text=0, autocast_dtype=None) == pytest.approx(
        apart, rel=1e-3
    )


# --- loss by position ---------------------------------------------------------------------------------------


def rotary_model():
    torch.manual_seed(0)
    model = models.gpt2("nano", n_positions=64, vocab_size=60, attention="sdpa", initializer_range=0.3)
    return rope.use_rope(model).to(runtime.device)


def test_losses_of_tokens_are_the_models_and_windows_shorten_the_context():
    model = rotary_model()
    tokens = torch.randint(60, (3, 40))
    losses = loss.token_losses(model, tokens, chunk=7)
    with torch.no_grad():
        whole = loss.language_model_loss(model, tokens.to(runtime.device))
    assert losses.mean().item() == pytest.approx(whole.item(), rel=1e-2)
    windowed = loss.token_losses(model, tokens, context=16)
    torch.testing.assert_close(windowed[:, :15], losses[:, :15], rtol=1e-3, atol=1e-3)
    # token 20 belongs to the window of tokens 8 to 23: it knows tokens 8 to 19
    alone = loss.token_losses(model, tokens[:, 8:24])
    torch.testing.assert_close(windowed[:, 15:23], alone[:, 7:15], rtol=1e-3, atol=1e-3)
    # and the last token to the window that ends with the sequence
    torch.testing.assert_close(windowed[:, -1], loss.token_losses(model, tokens[:, 24:])[:, -1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(windowed[:, 20:], losses[:, 20:], atol=1e-3)
    with pytest.raises(ValueError, match="even"):
        loss.token_losses(model, tokens, context=15)
    with pytest.raises(ValueError, match="N of 2 or more"):
        loss.token_losses(model, tokens[:, :1])
    with pytest.raises(ValueError, match="N of 2 or more"):  # of a model that has no longest sequence
        loss.language_model_loss(model, tokens[:, :1])


def test_error_bars_count_sequences_and_not_tokens():
    losses = torch.tensor([[1.0, 1.0, 5.0, 5.0], [3.0, 3.0, 7.0, 7.0]])
    table = loss.by_position(losses, [1, 3, 5])
    assert table["mean"].tolist() == [2.0, 6.0] and table["error"].tolist() == pytest.approx([1.0, 1.0])
    assert table["from"].tolist() == [1, 3] and table["sequences"].tolist() == [2, 2]
    for edges in ([3, 1], [0, 2], [1, 9], [1]):
        with pytest.raises(ValueError, match="edges"):
            loss.by_position(losses, edges)
    with pytest.raises(ValueError, match="two sequences"):
        loss.by_position(losses[:1], [1, 3])


def test_a_fall_compares_each_sequence_with_itself():
    """Files of different difficulty that all fall alike: the means overlap, the fall is certain."""
    level = torch.tensor([1.0, 5.0, 9.0])[:, None]
    losses = level + torch.tensor([0.5, 0.5, 0.0, 0.0])  # positions 1 and 2, then 3 and 4
    assert loss.fall(losses, (1, 3), (3, 5)) == pytest.approx((0.5, 0.0))
    apart = losses + torch.tensor([[0.0, 0, 0, 0], [0.3, 0.3, 0, 0], [-0.3, -0.3, 0, 0]])
    assert loss.fall(apart, (1, 3), (3, 5)) == pytest.approx((0.5, 0.3 / 3**0.5))
    with pytest.raises(ValueError, match="ascend"):
        loss.fall(losses, (1, 3), (3, 9))
