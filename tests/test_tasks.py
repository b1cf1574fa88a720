"""labutils.training.tasks: documents are what they say; a course teaches and goes on; short contexts can only guess."""

import pytest
import torch

from labutils import runtime
from labutils.training import tasks

TEXT, VOCAB = 100, 100  # the text's entries are 1 to 99, 0 ends a document


@pytest.fixture
def stream():
    return torch.randint(1, TEXT, (5000,), generator=torch.Generator().manual_seed(0))


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("task", tasks.TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("distance", [None, 40, 90])
def test_the_answer_stands_where_it_is_said(task, distance, stream):
    made = tasks.make(task, stream, VOCAB, 128, 16, generator=generator(), distance=distance)
    assert made.tokens.shape == (16, 128) and made.answers == task.answers
    words = VOCAB + tasks.VALUES + 2 * tasks.TASKS.index(task)
    for row, far in zip(made.tokens, made.distance.tolist(), strict=True):
        places = (row == words).nonzero()[:, 0]
        assert len(places) == task.statements and (row == words + 1).sum() == 1  # one question
        stated = row[places + 1]
        assert torch.equal(row[-task.answers :], stated[-task.answers :])
        assert ((stated >= VOCAB) & (stated < VOCAB + tasks.VALUES)).all()
        first = places[task.statements - task.answers] + 1
        assert 128 - task.answers - first == far
        if distance is not None:
            assert far - distance in (0, 1)  # statements stand in slots of two tokens
        if task.top:
            assert row[places[0] - 1] == 0
        # outside of statements and question the text is as it was: nothing gives the answer away
        assert (row >= VOCAB).sum() == 2 * task.statements + 1 + task.answers


def test_documents_too_short_are_refused(stream):
    fact = tasks.TASKS[0]
    with pytest.raises(ValueError, match="tokens or more"):
        tasks.make(fact, stream, VOCAB, 3, 1, generator=generator())
    with pytest.raises(ValueError, match="fewer than a document"):
        tasks.make(fact, stream[:50], VOCAB, 64, 1, generator=generator())
    with pytest.raises(ValueError, match="take one of .'fact', 'dialogue'"):
        tasks.make(tasks.Task("mine", "?"), stream, VOCAB, 64, 1, generator=generator())
    for distance in (0, 127, 500):
        with pytest.raises(ValueError, match="does not fit"):
            tasks.make(fact, stream, VOCAB, 128, 1, generator=generator(), distance=distance)


def course(stream, steps=(75, 10)):
    runtime.seed(0)
    model = tasks.small_model(VOCAB, attention="sdpa", layers=1, heads=2, width=64)
    stages = [tasks.Stage(24, 32, steps[0], 5e-3), tasks.Stage(96, 16, steps[1], 1e-3)]
    return tasks.Course(model, stages, stream, VOCAB, tasks=tasks.TASKS[:1])


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
