"""labutils.training.curriculum: a course teaches and goes on after an interrupt; short contexts can only guess."""

import pytest
import torch

from labutils import runtime
from labutils.training import curriculum, tasks

VOCAB = 100  # the text's entries are 1 to 99, 0 ends a document


@pytest.fixture
def stream():
    return torch.randint(1, VOCAB, (5000,), generator=torch.Generator().manual_seed(0))


def course(stream, steps=(75, 10)):
    runtime.seed(0)
    model = curriculum.small_model(VOCAB, attention="sdpa", layers=1, heads=2, width=64)
    stages = [curriculum.Stage(24, 32, steps[0], 5e-3), curriculum.Stage(96, 16, steps[1], 1e-3)]
    return curriculum.Course(model, stages, stream, VOCAB, tasks=tasks.TASKS[:1])


def test_a_course_teaches_and_a_short_context_guesses(stream):
    taught = course(stream).run(progress=False)
    asked = dict(distances=(80,), examples=64, batch=64)
    long = tasks.accuracy(taught.model, tasks.TASKS[0], stream, VOCAB, 96, **asked).iloc[0]
    before, window = taught.model_of(24), {"context": 24}
    short = tasks.accuracy(before, tasks.TASKS[0], stream, VOCAB, 96, **asked, **window).iloc[0]
    near = tasks.accuracy(before, tasks.TASKS[0], stream, VOCAB, 96, **asked | {"distances": (20,)}, **window).iloc[0]
    assert long.accuracy >= 0.9 and near.accuracy >= 0.9
    assert short.accuracy <= 0.2 and short.guess == 1 / tasks.VALUES
    assert taught.done == taught.steps and taught.run(progress=False).done == taught.steps


def test_an_interrupted_course_goes_on_as_it_would_have(stream):
    whole = course(stream, (6, 4)).run(progress=False, log_every=1)
    broken = course(stream, (6, 4))
    step = broken._step

    def interrupt(stage, i):
        if broken.done == 7 and not broken.__dict__.setdefault("stopped", False):
            broken.stopped = True
            raise KeyboardInterrupt
        return step(stage, i)

    broken._step = interrupt
    assert broken.run(progress=False, log_every=1).done == 7
    assert broken.run(progress=False, log_every=1).done == 10
    assert [row["loss"] for row in broken.rows] == pytest.approx([row["loss"] for row in whole.rows], rel=1e-3)
    with pytest.raises(KeyError, match="no stage"):
        whole.model_of(1000)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_interrupt_within_a_step_leaves_nothing_to_the_next(stream, scaled, monkeypatch):
    """Half of a step's gradients, or a scaler that has half of a step behind it."""
    whole, broken = course(stream, (4, 2)), course(stream, (4, 2))
    for one in (whole, broken):
        one._scaler = torch.amp.GradScaler(one.model.device.type, enabled=scaled, init_scale=4.0)
    whole.run(progress=False, log_every=1)
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3:
            for parameter in list(broken.model.parameters())[::2]:
                parameter.grad = None  # the backward pass had not come to these
            raise KeyboardInterrupt
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
        assert broken.run(progress=False, log_every=1).done == 2
        assert broken.run(progress=False, log_every=1).done == 6
    assert [row["loss"] for row in broken.rows] == pytest.approx([row["loss"] for row in whole.rows], rel=1e-5)


def test_a_stage_whose_last_row_was_interrupted_has_its_snapshot(stream):
    """Reading the loss waits for the GPU: that is where an interrupt most often arrives."""
    broken = course(stream, (3, 2))
    step = broken._step

    class Slow:
        def item(self):
            raise KeyboardInterrupt

    def interrupted(stage, i):
        loss, right = step(stage, i)
        return (Slow(), right) if broken.done == 2 else (loss, right)

    broken._step = interrupted
    assert broken.run(progress=False).done == 3
    assert broken.run(progress=False).done == 5
    assert broken.model_of(24).training
