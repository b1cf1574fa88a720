"""Checkpoints: training that stops and goes on has the losses of training that never stopped."""

import random

import pytest
import torch

from labutils import runtime, training
from labutils.commands.train import _deterministic
from labutils.gpt2 import models, packing
from labutils.training import checkpoints
from labutils.training.checkpoints import Checkpoint

SEQUENCES = torch.randint(97, (10, 24), generator=torch.Generator().manual_seed(0))


# On a GPU, of the two that have dropout, the one whose backward adds in the same order each time.
ATTENTION = runtime.choose(cpu="sdpa", gpu="eager")


@pytest.fixture(autouse=True)
def _same_sums():
    with _deterministic():
        yield


def train(checkpoint=None, *, steps=6, batch=3, dropout=0.1, **options):
    """A small model whose dropout makes the losses depend on the random generators as well."""
    torch.manual_seed(0)
    model = models.gpt2(
        "nano", n_positions=24, vocab_size=97, attention=ATTENTION, attn_pdrop=dropout, resid_pdrop=dropout,
        embd_pdrop=dropout,
    ).to(runtime.device)  # fmt: skip
    history = training.train(
        model, packing.batches(SEQUENCES, batch), steps=steps, lr=1e-2, warmup=4, progress=False, checkpoint=checkpoint,
        **options,
    )  # fmt: skip
    return history, model


def losses(history):
    return dict(zip(history.frame.step, history.frame.loss, strict=True))


def after(calls):
    """A `stop` that is true from its n-th question on."""
    left = [calls]

    def stop():
        left[0] -= 1
        return left[0] < 0

    return stop


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=str)
def test_three_steps_and_three_more_are_six(tmp_path, autocast):
    if autocast is not None and runtime.device.type == "cpu":
        pytest.skip("float16 with loss scaling is for GPUs")
    options = {"autocast_dtype": autocast}
    whole, model = train(**options)
    path = tmp_path / "run" / "checkpoint.pt"
    first, _ = train(Checkpoint(path, every=100), stop=after(3), **options)
    assert first.status == "interrupted" and first.steps == 3 and len(first.frame) == 3
    torch.manual_seed(99)
    random.seed(99)
    second, resumed = train(Checkpoint(path, every=100, resume=True), **options)
    assert second.status == "done" and second.steps == 6
    assert losses(second) == losses(whole)  # to the last bit
    assert list(second.frame.grad_norm) == list(whole.frame.grad_norm)
    for mine, theirs in zip(resumed.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_kill_loses_the_steps_since_the_last_checkpoint_and_no_more(tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole, _ = train(steps=8)

    class Killed(BaseException):
        pass

    def kill():
        if stop():
            raise Killed

    stop = after(5)
    with pytest.raises(Killed):
        train(Checkpoint(path, every=2), steps=8, stop=kill)
    resumed = Checkpoint(path, every=2, resume=True)
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4]
    history, _ = train(resumed, steps=8)
    assert losses(history) == losses(whole)


def test_keyboard_interrupt_in_a_step_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    whole, _ = train()
    real, calls = torch.optim.AdamW.step, []

    def step(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        history, _ = train(Checkpoint(path, every=1))
    assert history.interrupted and history.steps == 3
    history, _ = train(Checkpoint(path, resume=True))
    assert losses(history) == losses(whole)


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train(Checkpoint(path, every=100), steps=2)
    before = path.read_bytes()

    def half(state, file):
        file.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        train(Checkpoint(path, resume=True), steps=4)
    assert path.read_bytes() == before
    assert list(tmp_path.glob(".*")) == []  # half a file on a full disk keeps it full


@pytest.mark.parametrize("damage", [b"", b"garbage\n", b"aa", None], ids=["empty", "garbage", "two letters", "cut off"])
def test_a_damaged_checkpoint_is_told(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    train(Checkpoint(path), steps=1)
    path.write_bytes(path.read_bytes()[:3000] if damage is None else damage)
    with pytest.raises(ValueError, match="checkpoint.pt is damaged"):
        Checkpoint(path, resume=True)


def test_a_file_of_something_else_is_told(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no checkpoint of this lab"):
        Checkpoint(path, resume=True)


def test_going_on_where_everything_was_done_trains_nothing(tmp_path):
    path = tmp_path / "checkpoint.pt"
    first, _ = train(Checkpoint(path), steps=3)
    again, _ = train(Checkpoint(path, resume=True), steps=3)
    assert again.status == "done" and losses(again) == losses(first)


def test_what_cannot_be_gone_on_from(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        Checkpoint(path, resume=True)
    with pytest.raises(ValueError, match="every=0"):
        Checkpoint(path, every=0)
    with pytest.raises(TypeError, match="state_dict"):
        training.train(
            models.gpt2("nano", n_positions=24, vocab_size=97, attention="sdpa").to(runtime.device),
            iter([SEQUENCES]), steps=1, progress=False, checkpoint=Checkpoint(path),
        )  # fmt: skip
    train(Checkpoint(path, settings={"lr": 1e-2}), steps=1)
    with pytest.raises(FileExistsError, match="--resume"):
        Checkpoint(path)
    with pytest.raises(ValueError, match="lr: 0.01, now 0.1"):
        Checkpoint(path, settings={"lr": 0.1}, resume=True)
    stored = torch.load(path, weights_only=True)
    torch.save(stored | {"format": 0}, path)
    with pytest.raises(ValueError, match="of format 0, and this version of the lab reads 3: go on with the version"):
        Checkpoint(path, settings={"lr": 1e-2}, resume=True)


def test_a_checkpoint_knows_where_it_was_written(tmp_path):
    path = tmp_path / "checkpoint.pt"
    train(Checkpoint(path, environment={"torch": "1", "date": "a"}), steps=1)
    assert Checkpoint(path, environment={"torch": "1", "date": "b"}, resume=True).moved == []
    resumed = Checkpoint(path, environment={"torch": "2", "gpu": "Some GPU"}, resume=True)
    assert resumed.moved == ["gpu: None, now Some GPU", "torch: 1, now 2"] and resumed.steps == 1


def test_batches_go_on_from_their_place():
    one = packing.batches(SEQUENCES, 3, seed=5)
    for _ in range(5):
        next(one)
    state = one.state_dict()
    expected = [next(one) for _ in range(5)]
    other = packing.batches(SEQUENCES, 3, seed=6)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=False))
    with pytest.raises(ValueError, match="among 10 sequences, but here are 4"):
        packing.batches(SEQUENCES[:4]).load_state_dict(state)


# -- which attention ran ---------------------------------------------------------------------------------------


def nano(attention, **options):
    torch.manual_seed(0)
    return models.gpt2("nano", n_positions=24, vocab_size=97, attention=attention, **options).to(runtime.device)


def test_attention_used_is_found_out_by_running():
    used = training.attention_used(nano("eager"), SEQUENCES[:1])
    assert used == {"naive": 2}  # a call in each of the two layers
    assert training.attention_used(nano("labutils"), SEQUENCES[:1]) == {"triton_v2": 2}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert training.attention_used(nano("sdpa"), SEQUENCES[:1]) == {"sdpa_math": 2}
        assert training.attention_used(nano("sdpa"), SEQUENCES[:1], checkpointing=True) == {"sdpa_math": 4}


@pytest.mark.skipif(runtime.device.type == "cuda", reason="about PyTorch's kernel for the CPU")
def test_a_silent_fallback_is_noticed():
    """Asked for with the same name: without dropout the flash kernel runs, with it the math backend."""
    assert training.attention_used(nano("sdpa"), SEQUENCES[:1]) == {"sdpa_flash": 2}
    assert training.attention_used(nano("sdpa", attn_pdrop=0.1), SEQUENCES[:1]) == {"sdpa_math": 2}


@pytest.mark.gpu
@pytest.mark.skipif((runtime.capability or (0, 0)) < (8, 0), reason="needs a GPU of compute capability 8.0")
def test_gpu_each_backend_is_recognised():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "sdpa_flash": SDPBackend.FLASH_ATTENTION,
        "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa_math": SDPBackend.MATH,
    }
    torch.manual_seed(0)
    model = models.gpt2("tiny", n_positions=64, vocab_size=97, attention="sdpa").to(runtime.device)
    tokens = torch.randint(97, (1, 64))
    for name, backend in backends.items():
        with sdpa_kernel(backend):
            assert training.attention_used(model, tokens) == {name: 2}


def test_looking_changes_nothing():
    model = nano("sdpa", resid_pdrop=0.1).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    training.attention_used(model, SEQUENCES[:1], checkpointing=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training and not any(block.gradient_checkpointing for block in model.transformer.h)
