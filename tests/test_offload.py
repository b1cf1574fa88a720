"""labutils.training.offload: what is kept on the CPU changes nothing in what a step computes."""

import pytest
import torch

from labutils import runtime, training
from labutils.gpt2 import models
from labutils.training import offload


def trained(batches, **options):
    torch.manual_seed(0)
    model = models.gpt2("nano", n_positions=32, vocab_size=100, attention="sdpa").to(runtime.device)
    history = training.train(model, iter(batches), steps=3, lr=1e-2, progress=False, autocast_dtype=None, **options)
    return history.frame.loss, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "offloaded"}, {"checkpointing": "offloaded"}, {"checkpointing": "offloaded", "chunked_loss": 7}],
    ids=str,
)
def test_the_same_weights_come_out(options):
    batches = [torch.randint(100, (2, 32)) for _ in range(3)]
    losses, weights = trained(batches)
    others, moved = trained(batches, **options)
    torch.testing.assert_close(torch.tensor(others), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(moved[name], value, rtol=1e-3, atol=1e-4)


def test_an_offloaded_optimizer_goes_on_from_its_state():
    def made(weight):
        parameter = torch.nn.Parameter(weight.clone())
        return parameter, offload.OffloadedAdamW([{"params": [parameter], "weight_decay": 0.1}], lr=0.1)

    start, gradients = torch.randn(4, 3), [torch.randn(4, 3) for _ in range(4)]
    parameter, optimizer = made(start)
    for i, gradient in enumerate(gradients):
        if i == 2:
            state, weight = optimizer.state_dict(), parameter.detach().clone()
            parameter, optimizer = made(weight)
            optimizer.load_state_dict(state)
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = torch.nn.Parameter(start.clone())
    plain = torch.optim.AdamW([{"params": [expected], "weight_decay": 0.1}], lr=0.1)
    for gradient in gradients:
        expected.grad = gradient.clone()
        plain.step()
    torch.testing.assert_close(parameter, expected)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_what_is_unknown_is_refused():
    model = models.gpt2("nano", n_positions=32, vocab_size=100, attention="sdpa")
    with pytest.raises(ValueError, match="optimizer must be"):
        training.make_optimizer(model, "sgd", lr=0.1)
    with pytest.raises(ValueError, match="checkpointing must be"):
        training.train(model.to(runtime.device), iter([]), steps=1, checkpointing="disk", progress=False)
