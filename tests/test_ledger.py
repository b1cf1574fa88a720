"""training.ledger: which kind a piece of memory is of, the peak of an allocator's history, kinds in a rehearsal."""

import inspect

import pytest
import torch
from transformers.models.gpt2 import modeling_gpt2

from labutils import runtime
from labutils.gpt2 import models
from labutils.training import ledger, rehearsal

SIZES = ledger.Sizes(models.gpt2("nano", n_positions=8, vocab_size=1000).config)  # width 32


def inside(function):
    """A frame as a stack has it while this function runs."""
    code = inspect.unwrap(function).__code__
    return code.co_filename, code.co_firstlineno + 1


MODEL = [inside(modeling_gpt2.GPT2LMHeadModel.forward), inside(modeling_gpt2.GPT2Model.forward)]
BLOCK = [*MODEL, inside(modeling_gpt2.GPT2Block.forward)]


@pytest.mark.parametrize(
    ("frames", "size", "kind"),
    [
        (MODEL[:1], 4000, "logits"),
        (MODEL, 512, "residual stream"),
        (BLOCK, 512, "residual stream"),
        ([*BLOCK, inside(modeling_gpt2.GPT2MLP.forward), ("activations.py", 5)], 512, "MLP"),
        ([inside(modeling_gpt2.GPT2Attention.forward), *BLOCK], 512, "attention"),  # in whatever order
        ([inside(modeling_gpt2.GPT2Attention.forward), *BLOCK], 2 * 32 * 96, "16-bit weights"),
        ([inside(torch.optim.Adam.step)], 512, "AdamW"),
        ([("notebook.py", 3), inside(models.gpt2)], 4 * 32 * 96, "parameters"),
        ([], 4 * 32 * 96, "gradients"),
        ([], 4 * 1000 * 300, "logits"),
        ([], 4 * 1000 * 32, "gradients"),  # of the output matrix, not logits of 32 tokens
        ([], 4 * 8 * 32, "backward"),
        ([("elsewhere.py", 1)], 512, "backward"),
    ],
)
def test_kinds(frames, size, kind):
    assert ledger.kind_of(frames, size, SIZES) == kind


def test_in_float32_nothing_is_a_copy_of_weights():
    frames = [inside(modeling_gpt2.GPT2Attention.forward), *BLOCK]
    assert ledger.kind_of(frames, 2 * 32 * 96, SIZES, low=False) == "attention"


def test_the_peak_of_a_history():
    """What is freed before the peak is not in it, what is freed after it is; an address is used twice."""

    def event(action, addr, size, kind=""):
        return {"action": action, "addr": addr, "size": size, "frames": kind}

    trace = [
        event("free_requested", 7, 512), event("segment_alloc", 1, 2**21),
        event("alloc", 1, 1000, "MLP"), event("alloc", 2, 512, "logits"), event("free_requested", 1, 1000),
        event("free_completed", 1, 1000), event("alloc", 1, 4096, "attention"), event("alloc", 3, 1, "logits"),
        event("free_requested", 3, 1), event("alloc", 3, 100, "backward"), event("free_requested", 1, 4096),
        event("alloc", 4, 4096, "MLP"), event("free_requested", 2, 512),
    ]  # fmt: skip
    peak = ledger.at_peak(trace, lambda event: event["frames"])
    assert {kind: size * 2**30 for kind, size in peak.items()} == {"attention": 4096, "logits": 1024}
    assert ledger.at_peak([], lambda event: "MLP") == {}


def test_a_rehearsal_by_kind_adds_up_and_says_what_the_paper_says():
    """A model of one layer, where the entries are the ledger's of notebook 03."""
    n, vocab, width = 2048, 3000, 128
    options = {"vocab_size": vocab, "n_layer": 1}
    kinds = rehearsal.rehearse_by_kind("tiny", n, **options)
    assert sum(kinds.values()) == rehearsal.rehearse("tiny", n, **options) and set(kinds) <= set(ledger.KINDS)
    in_bytes = {kind: size * 2**30 for kind, size in kinds.items()}
    parameters = vocab * width + n * width + 12 * width**2 + 13 * width + 2 * width
    assert in_bytes["parameters"] == pytest.approx(4 * parameters, rel=0.01)
    assert in_bytes["AdamW"] == pytest.approx(8 * parameters, rel=0.02)
    assert in_bytes["16-bit weights"] == pytest.approx(2 * (vocab * width + 12 * width**2), rel=0.01)
    assert in_bytes["logits"] == pytest.approx(3 * 4 * n * vocab, rel=0.05)
    assert in_bytes["MLP"] == pytest.approx((3 * 4 * 4 + 4 * 2 + 5 * 2) * n * width, rel=0.02)
    chunked = rehearsal.rehearse_by_kind("tiny", n, **options, chunked_loss=256)
    assert chunked["logits"] < kinds["logits"] / 4


@pytest.mark.skipif(runtime.device.type == "cuda", reason="about a machine without a GPU; this one has one")
def test_a_cpu_has_no_history():
    with pytest.raises(RuntimeError, match="none on a CPU"):
        ledger.measure(lambda: None, 64)


@pytest.mark.gpu
@pytest.mark.skipif(runtime.device.type != "cuda", reason="needs a CUDA GPU; this machine has none")
@pytest.mark.parametrize("options", [{}, {"checkpointing": True, "chunked_loss": 1024}])
def test_the_history_agrees_with_the_allocator_and_the_rehearsal(options):
    before = torch.cuda.memory_allocated() / 2**30
    row, kinds = ledger.measure(lambda: models.gpt2("tiny", n_positions=8192), 8192, **options)
    assert row["status"] == "ok"
    # cuBLAS takes its workspace once and keeps it
    assert sum(kinds.values()) == pytest.approx(row["peak_gib"] - before, abs=0.15)
    predicted = rehearsal.rehearse_by_kind("tiny", 8192, **options)
    for kind in ("parameters", "AdamW", "logits", "residual stream"):
        assert kinds[kind] == pytest.approx(predicted[kind], rel=0.1, abs=0.1)
