"""labutils.gpt2.model_benchmark: rows of a whole GPT-2 under each attention, failures included, kept on disk."""

import math

import pytest
import torch

from labutils import benchmark, runtime
from labutils.benchmark import SCHEMAS, read_results
from labutils.gpt2 import model_benchmark, models
from labutils.gpt2.attention import register_attention

OPTIONS = dict(vocab_size=61, batch=2, inference_batches=(1,), progress=False)


def row(table, **wanted):
    for name, value in wanted.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_rows_have_times_and_reasons():
    table = model_benchmark.measure_models(["nano"], ["eager", "no_such_attention", "labutils"], [8, 16], **OPTIONS)
    assert list(table.columns)[: len(SCHEMAS["models"])] == list(SCHEMAS["models"])
    assert len(table) == 3 * 2 * 5 and table.attrs["machine"] == runtime.machine and not table.attrs["interrupted"]
    for work in (*model_benchmark.TRAINING, *model_benchmark.INFERENCE):
        b = 2 if work in model_benchmark.TRAINING else 1
        eager = row(table, impl="naive", work=work, seqlen=16)
        assert eager["status"] == "ok" and eager["batch"] == b and eager["ms"] > 0
        tokens = b if work == "decode" else 16 * b
        assert eager["tokens_per_s"] == pytest.approx(1e3 * tokens / eager["ms"])
        missing = row(table, impl="no_such_attention", work=work, seqlen=16)
        assert missing["status"] == "unsupported" and "no_such_attention" in missing["reason"]
        ours = row(table, impl="triton_v2", work=work, seqlen=8)
        if runtime.interpreted:  # never timed
            assert ours["status"] == "unsupported" and math.isnan(ours["ms"]) and "interpreter" in ours["reason"]
        else:
            assert ours["status"] == "ok" and ours["peak_gib"] > 0
    step = row(table, impl="naive", work="step", seqlen=16)["ms"]
    parts = sum(row(table, impl="naive", work=work, seqlen=16)["ms"] for work in ("forward", "backward"))
    assert step > 0.5 * parts  # medians of the same steps


def test_out_of_memory_is_a_row_and_longer_lengths_are_not_tried(monkeypatch):
    tried = []

    def training(model, batch, n):
        tried.append(n)
        if n > 8:
            raise torch.OutOfMemoryError("no room")
        return {work: model_benchmark._row(2.0, batch * n, math.nan) for work in model_benchmark.TRAINING}

    monkeypatch.setattr(model_benchmark, "_training", training)
    works = model_benchmark.TRAINING
    table = model_benchmark.measure_models(["nano"], ["sdpa"], [8, 12, 16], works=works, **OPTIONS)
    assert tried == [8, 12]
    assert list(table[table["work"] == "step"]["status"]) == ["ok", "oom", "oom"]
    assert "no room" in row(table, work="step", seqlen=12)["reason"]
    assert "not tried" in row(table, work="step", seqlen=16)["reason"]
    shown = model_benchmark.side_by_side(table, "step")
    assert shown["sdpa"].tolist() == ["2.0", "OOM", "OOM"]


def test_rows_are_on_disk_and_an_interrupted_sweep_goes_on(monkeypatch, tmp_path):
    tried = []

    def training(model, batch, n):
        tried.append(n)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return {work: model_benchmark._row(1.0 * n, batch * n, math.nan) for work in model_benchmark.TRAINING}

    monkeypatch.setattr(model_benchmark, "_training", training)
    monkeypatch.setattr(model_benchmark, "environment", lambda: Made("one"))
    options = OPTIONS | dict(works=model_benchmark.TRAINING, folder=tmp_path)
    first = model_benchmark.measure_models(["nano"], ["eager", "sdpa"], [8, 16], **options)
    assert first.attrs["interrupted"] and len(first) == 2 * 2 * 3
    reached = first[~first["reason"].str.startswith("not reached")]
    assert list(reached["seqlen"]) == [8] * 3 and set(first.drop(reached.index)["status"]) == {"unsupported"}
    assert len(read_results(tmp_path, "models")) == 3
    second = model_benchmark.measure_models(["nano"], ["eager", "sdpa"], [8, 16], **options)
    assert not second.attrs["interrupted"] and len(second) == 2 * 2 * 3
    assert tried == [8, 16, 16, 8, 16]  # what was there is not measured again
    monkeypatch.setattr(model_benchmark, "environment", lambda: Made("another"))
    with pytest.raises(ValueError, match="another environment"):
        model_benchmark.measure_models(["nano"], ["eager"], [8], **options)


class Made:
    """An environment by its driver."""

    def __init__(self, driver):
        self.driver = driver

    def as_dict(self):
        return {"gpu": "Some GPU", "driver": self.driver, "date": "2026-11-21"}


def test_speedup_and_what_is_not_in_a_table(monkeypatch):
    def training(model, batch, n):
        ms = 6.0 if model.config._attn_implementation == "eager" else 2.0
        return {work: model_benchmark._row(ms, batch * n, math.nan) for work in model_benchmark.TRAINING}

    monkeypatch.setattr(model_benchmark, "_training", training)
    table = model_benchmark.measure_models(["nano"], ["eager", "sdpa"], [8], works=("step",), **OPTIONS)
    fast = benchmark.speedup(table)
    assert row(fast, impl="sdpa")["speedup"] == 3.0 and row(fast, impl="naive")["speedup"] == 1.0
    assert model_benchmark.side_by_side(fast, "step", "speedup")["sdpa"].tolist() == ["3.00"]
    with pytest.raises(ValueError, match="naive, sdpa"):
        benchmark.speedup(table, over="flash_attn")
    with pytest.raises(ValueError, match="no row of 'prefill'"):
        model_benchmark.side_by_side(table, "prefill")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"works": ("walk",)}, "forward, backward"),
        ({"sizes": ["125M"]}, "124M"),
        ({"seqlens": []}, "one length of 2"),
        ({"attentions": []}, "one attention"),
    ],
)
def test_wrong_arguments(changes, words):
    arguments = dict(sizes=["nano"], attentions=["eager"], seqlens=[8]) | changes
    with pytest.raises(ValueError, match=words):
        model_benchmark.measure_models(**arguments)


def test_attentions_that_cannot_run_are_named_with_their_reason():
    register_attention()
    can, reasons = model_benchmark.usable_attentions(
        ["sdpa", "no_such_attention", "labutils"], lambda: models.gpt2("nano", vocab_size=61)
    )
    assert can == ["sdpa", "labutils"] and "no_such_attention" in reasons["no_such_attention"]


@pytest.mark.parametrize(
    ("seconds_each", "calls", "kept"),
    [([5.0, 1.0, 1.0], 3, 2), ([5.0, 0.1, 0.1], 5, 3), ([5.0] + [0.001] * 11, 12, 10)],
    ids=["long", "short", "very short"],
)
def test_short_calls_are_repeated_more_often_and_warmed_up_twice(monkeypatch, seconds_each, calls, kept):
    now, made = [0.0], []

    def call():
        now[0] += seconds_each[min(len(made), len(seconds_each) - 1)]
        made.append(len(made))
        return made[-1]

    monkeypatch.setattr(model_benchmark.time, "perf_counter", lambda: now[0])
    assert model_benchmark._repeated(call, 0.35) == list(range(calls - kept, calls))
    assert len(made) == calls


def test_a_recorder_keeps_the_table_of_models(tmp_path):
    """It reads a stored table and writes the same bytes again, one row with the point of another, and no other key."""
    stored = benchmark.reference_results(table="models")
    made_by = stored.attrs["environment"]
    path = benchmark.save_results(stored, tmp_path, made_by, table="models")
    before = path.read_bytes()
    recorder = benchmark.Recorder(tmp_path, made_by, table="models", resume=True)
    point = ("124M", "step", "triton_v2", 4, 8192)
    measured = stored.set_index(["model", "work", "impl", "batch", "seqlen"]).loc[point, "ms"]
    assert len(recorder.rows) == len(stored) and recorder.rows[point]["ms"] == measured
    recorder.write()
    assert path.read_bytes() == before
    recorder.rows["124M", "step", "mine", 4, 8192] = recorder.rows[point] | {"ms": measured / 2}
    recorder.write()
    faster = benchmark.speedup(read_results(tmp_path, "models"), over="triton_v2")
    assert row(faster, impl="mine")["speedup"] == pytest.approx(2.0, rel=1e-5)
