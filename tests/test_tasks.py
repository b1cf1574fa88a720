"""labutils.training.tasks: documents ask what they say, and do not give the answer away."""

import pytest
import torch

from labutils.training import tasks

VOCAB = 100  # the text's entries are 1 to 99, 0 ends a document


@pytest.fixture
def stream():
    return torch.randint(1, VOCAB, (5000,), generator=torch.Generator().manual_seed(0))


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
