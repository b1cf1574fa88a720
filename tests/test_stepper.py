"""The steps through tiles end in attention, are drawn whole, and the widget shows what the figure shows."""

import pytest
import torch

from labutils.plotting import stepper


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(3, 10, generator=generator)
    return scores, stepper.steps(scores, torch.randn(10, 2, generator=generator), block=4)


def test_the_last_state_is_attention_and_each_is_that_of_the_columns_seen(states):
    scores, found = states
    values = torch.randn(10, 2, generator=torch.Generator().manual_seed(5))
    found = stepper.steps(scores, values, block=4)
    assert [(step.start, step.stop) for step in found] == [(0, 4), (4, 8), (8, 10)]
    for step in found:
        seen = scores[:, : step.stop].double()
        torch.testing.assert_close(step.acc / step.l[:, None], seen.softmax(1) @ values[: step.stop].double())
        torch.testing.assert_close(step.m, seen.amax(1))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="they are .3, 10. and .9, 2."):
        stepper.steps(torch.zeros(3, 10), torch.zeros(9, 2), 4)


def test_figures_say_m_l_and_the_output_of_each_step(states):
    _, found = states
    fig = stepper.plot_steps(found)
    texts = {text.get_text() for ax in fig.axes for text in ax.texts}
    for step in found:
        for row in range(3):
            for value in (step.m[row], step.l[row], step.rescale[row]):
                assert stepper._number(value.item()) in texts
    assert [ax.get_title(loc="left") for ax in fig.axes][::2] == [
        "Tile 1 of 3: columns 0 to 3", "Tile 2 of 3: columns 4 to 7", "Tile 3 of 3: columns 8 to 9",
    ]  # fmt: skip
    assert fig.get_facecolor() == (1, 1, 1, 1)  # readable in a dark JupyterLab


def test_the_widget_changes_its_picture_with_the_slider(states):
    _, found = states
    controls, image = stepper.step_through(found).children
    slider = controls.children[1]
    pictures = []
    for number in range(1, len(found) + 1):  # as the titles count
        slider.value = number
        pictures.append(bytes(image.value))
    assert len(set(pictures)) == len(found) and all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_a_planted_bug_is_one_and_without_it_the_result_is_right():
    from labutils.attention import bugs, reference

    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(40, 8, generator=generator) for _ in range(3))
    batched = [t[None, :, None] for t in (q, k, v)]
    exact, exact_lse = reference.exact_attention(*batched, causal=True, return_lse=True)
    out, lse = bugs.tiles_without(q, k, v, 8, causal=True)
    torch.testing.assert_close(out, exact[0, :, 0])
    torch.testing.assert_close(lse, exact_lse[0, 0])
    for missing in ({"rescale_o": False}, {"rescale_l": False}):
        assert (bugs.tiles_without(q, k, v, 8, causal=True, **missing)[0] - exact[0, :, 0]).abs().max() > 0.01
