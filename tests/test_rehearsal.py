"""training.rehearsal and training.ladder: predicted peaks against those an H200 measured; the search and its rows."""

import json
from dataclasses import replace

import pytest
import torch

from labutils import benchmark, runtime, training
from labutils.benchmark import tables
from labutils.gpt2 import models
from labutils.training import ladder, rehearsal

RUNGS = {rung.name: rung for rung in ladder.RUNGS}


@pytest.mark.parametrize(
    ("impl", "checkpointing", "chunked_loss", "seqlen"),
    [("naive", False, False, 2048), ("triton_v2", True, True, 8192)],
)
def test_a_rehearsed_peak_is_the_measured_one(impl, checkpointing, chunked_loss, seqlen):
    rows = benchmark.reference_results(table="training")
    rows = rows[(rows.model == "124M") & (rows.impl == impl) & (rows.seqlen == seqlen) & (rows.status == "ok")]
    rows = rows[(rows.checkpointing == checkpointing) & (rows.chunked_loss == chunked_loss)]
    peak = rehearsal.rehearse(
        "124M", seqlen, attention="eager" if impl == "naive" else "labutils", checkpointing=checkpointing,
        chunked_loss=2048 if chunked_loss else None,
    )  # fmt: skip
    assert len(rows) and peak == pytest.approx(rows.peak_gib.mean(), rel=0.05)


@pytest.mark.parametrize(("seqlen", "measured"), [(4096, 5.06), (8192, 14.34)])
def test_the_backward_pass_of_a_softmax_is_rehearsed_as_a_gpu_does_it(seqlen, measured):
    """Eager attention with both remedies, on an H200 without a cap. Its third tensor of N^2 is a fifth of the peak."""
    peak = rehearsal.rehearse("124M", seqlen, attention="eager", checkpointing=True, chunked_loss=1024)
    assert peak == pytest.approx(measured, rel=0.02)


def test_a_rehearsal_on_a_machine_with_a_gpu_is_the_same(monkeypatch):
    options = {"vocab_size": 100, "checkpointing": True, "n_layer": 1}
    peak = rehearsal.rehearse("tiny", 256, **options)
    monkeypatch.setattr(runtime, "device", torch.device("cuda"))
    monkeypatch.setattr(runtime, "interpreted", False)
    assert rehearsal.rehearse("tiny", 256, **options) == peak


def test_each_remedy_lowers_the_rehearsed_peak():
    """A model of one layer, and a sequence long enough for its activations to be what counts."""
    rungs = [RUNGS[name] for name in ("+ 16 bits", "+ chunked loss", "+ optimizer offloaded")]
    rungs = [replace(rung, model=rung.model | {"n_layer": 1}) for rung in rungs]
    peaks = [ladder.predict("tiny", rung, 4096, vocab_size=2000) for rung in rungs]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    with pytest.raises(ValueError, match="rehearsal knows"):
        rehearsal.rehearse("tiny", 64, attention="sdpa")
    with pytest.raises(ValueError, match="optimizer must be"):
        rehearsal.rehearse("tiny", 64, optimizer="sgd")


@pytest.mark.parametrize("square", [0.0, 3e-8])
def test_the_predicted_longest_is_where_the_peak_reaches_the_limit(square, monkeypatch):
    def peak(size, rung, n, *, vocab_size):
        return 1.5 + 2e-4 * n + square * n * n

    monkeypatch.setattr(ladder, "predict", peak)
    for n in (3, 12, 100):
        limit = peak("", None, n * ladder.STEP, vocab_size=0) + 1e-6
        assert ladder.predicted_longest("tiny", ladder.RUNGS[0], limit) == n * ladder.STEP
    assert ladder.predicted_longest("tiny", ladder.RUNGS[0], 1.0) == 0


def test_with_a_chunked_loss_the_longest_that_is_asked_for_is_rehearsed_first(monkeypatch):
    rehearsed = []

    def peak(size, rung, n, *, vocab_size):
        rehearsed.append(n // ladder.STEP)
        return 2.0 + max(0.01 * n / ladder.STEP, 0.1 * n / ladder.STEP - 2)  # it turns at 22 · STEP

    monkeypatch.setattr(ladder, "predict", peak)
    rung, most = RUNGS["+ chunked loss"], 64 * ladder.STEP
    assert ladder.predicted_longest("tiny", rung, 6.5, most=most) == most and rehearsed == [64]
    assert ladder.predicted_longest("tiny", rung, 5.05, most=most) == 50 * ladder.STEP
    assert max(rehearsed) == 64
    assert ladder.predicted_longest("tiny", rung, 5.0, most=ladder.STEP) == ladder.STEP


def test_a_chunked_loss_with_eager_attention_is_a_parabola(monkeypatch):
    rung = ladder.Rung("eager, chunked", attention="eager", options={"chunked_loss": 2048})
    monkeypatch.setattr(ladder, "predict", lambda size, rung, n, *, vocab_size: 1.5 + 2e-4 * n + 3e-8 * n * n)
    limit = ladder.predict("", rung, 12 * ladder.STEP, vocab_size=0) + 1e-6
    assert ladder.predicted_longest("tiny", rung, limit) == 12 * ladder.STEP


def test_a_rehearsal_is_made_once(monkeypatch):
    calls = []

    def rehearse(size, seqlen, **options):
        calls.append(seqlen)
        return {"MLP": 1.0}

    monkeypatch.setattr(rehearsal, "rehearse_by_kind", rehearse)
    for vocab_size in (123, 123, 124):
        kinds = ladder.predict_by_kind("made up", RUNGS["+ chunked loss"], 2048, vocab_size=vocab_size)
        assert kinds == {"MLP": 1.0}
        kinds["MLP"] = 2.0  # the caller's own
    assert calls == [2048, 2048]


@pytest.mark.parametrize("true", [500, 1024, 7000, 70_000, 131_072, 10**6])
@pytest.mark.parametrize("guess", [1024, 65_536, 131_072])
def test_the_search_ends_at_the_longest(true, guess):
    tried = list(ladder.search(lambda n: n <= true, guess, most=2**17))
    fits, too_long = [n for n, ok in tried if ok], [n for n, ok in tried if not ok]
    assert len({n for n, _ in tried}) == len(tried) < 16
    assert all(n % ladder.STEP == 0 and n <= 2**17 for n, _ in tried)
    if true < ladder.STEP:
        assert not fits
    elif true >= 2**17:
        assert max(fits) == 2**17
    else:
        assert min(too_long) - max(fits) <= max(ladder.STEP, max(fits) / 16)
    with pytest.raises(ValueError, match="most"):
        next(ladder.search(lambda n: True, 1024, most=10))


def found(size, rung, cap_gib, *, on_try, **options):
    """What `longest` would find, in no time: each rung twice the one before."""
    position = ladder.RUNGS.index(rung)
    row = dict.fromkeys(benchmark.SCHEMAS["training"], 0) | {"model": size, "cap_gib": cap_gib, "status": "ok"}
    on_try(1024, True)
    return row | {"impl": "naive", "seqlen": 1024 * 2**position, "rung": rung.name, "peak_gib": 1.0}


def test_an_interrupted_ladder_goes_on(tmp_path):
    calls = []

    def interrupted(size, rung, cap_gib, **options):
        if len(calls) == 2:
            calls.append("stop")
            raise KeyboardInterrupt
        calls.append(rung.name)
        return found(size, rung, cap_gib, **options)

    settings = {"rungs": ladder.RUNGS[:4], "folder": tmp_path, "progress": False}
    first = ladder.ladder(("124M",), 16.0, find=interrupted, **settings)
    assert len(first) == 2 and first.attrs["interrupted"]
    whole = ladder.ladder(("124M",), 16.0, find=interrupted, **settings)
    assert len(whole) == 4 and not whole.attrs["interrupted"]
    assert calls == [*[rung.name for rung in ladder.RUNGS[:2]], "stop", *[rung.name for rung in ladder.RUNGS[2:4]]]
    tables.check_schema(whole, "training")
    assert json.loads((tmp_path / "ladder.json").read_text())["rows"][0]["rung"] == "eager, float32"
    with pytest.raises(ValueError, match="another folder"):
        ladder.ladder(("124M",), 12.0, find=interrupted, **settings)


def test_a_ladder_gives_the_rungs_that_it_is_asked_for(tmp_path, capsys):
    settings = {"folder": tmp_path, "progress": False}
    ladder.ladder(("124M", "355M"), 16.0, rungs=ladder.RUNGS[:2], find=found, **settings)
    few = ladder.ladder(("355M",), 16.0, rungs=ladder.RUNGS[1:3], find=found, **settings)
    assert list(few["model"]) == ["355M"] * 2 and list(few["rung"]) == [rung.name for rung in ladder.RUNGS[1:3]]
    assert len(json.loads((tmp_path / "ladder.json").read_text())["rows"]) == 5  # what is known stays known

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    ladder.ladder(("774M",), 16.0, rungs=ladder.RUNGS[:2], find=interrupted, **settings)
    assert "Interrupted after 0 of 2 rungs" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(runtime.device.type != "cuda", reason="needs a CUDA GPU; this machine has none")
def test_longest_under_a_small_cap_and_the_rehearsal_agrees():
    row = ladder.longest("tiny", RUNGS["+ chunked loss"], 2.5, most=2**16)
    assert row["status"] == "ok" and row["seqlen"] >= ladder.STEP
    assert row["predicted_gib"] == pytest.approx(row["peak_gib"], rel=0.1)
    # and the process is fit for work
    after = training.try_step(lambda: models.gpt2("nano", n_positions=64, vocab_size=100, attention="sdpa"), 64)
    assert after["status"] == "ok" and torch.cuda.memory_allocated() < 2**28
