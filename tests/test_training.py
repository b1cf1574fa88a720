"""labutils.training: the loop learns, stops cleanly and measures; the cap and out-of-memory are handled."""

import gc
import itertools
import math
import types
import weakref

import pytest
import torch

from labutils import runtime, training
from labutils.gpt2 import models, packing, texts
from labutils.machine import memory
from labutils.training import fits
from labutils.training.loop import HISTORY_COLUMNS

NEEDS_GPU = pytest.mark.skipif(runtime.device.type != "cuda", reason="needs a CUDA GPU; this machine has none")
COLUMNS = [
    "step",
    "loss",
    "tokens_per_s",
    "grad_norm",
    "peak_allocated_gib",
    "peak_reserved_gib",
    "loss_scale",
    "skipped",
]


def tiny(attention="sdpa", vocab_size=300, n_positions=128):
    torch.manual_seed(0)
    model = models.gpt2("tiny", n_positions=n_positions, vocab_size=vocab_size, attention=attention)
    return model.to(runtime.device)


def endless(batch=2, seqlen=32, vocab_size=300):
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, (batch, seqlen), generator=generator)


@pytest.fixture(scope="module")
def text():
    """(train, held-out) sequences of real text, and the vocabulary's size."""
    train, held_out = texts.split(texts.python_reference())
    tokenizer = packing.train_tokenizer(train, vocab_size=512)
    return *(packing.pack(part, tokenizer, 128)[0] for part in (train, held_out)), tokenizer.get_vocab_size()


# --- the loop -----------------------------------------------------------------------------------------------


def test_loss_goes_down_on_real_text_and_on_held_out_text(text):
    train, held_out, vocab_size = text
    model = tiny(vocab_size=vocab_size)
    held_out = held_out[:8].split(4)
    before = training.evaluate(model, held_out)
    assert before == pytest.approx(math.log(vocab_size), rel=0.05)  # random weights: the uniform guess
    history = training.train(model, packing.batches(train, 4), steps=25, lr=3e-3, warmup=5, progress=False)
    assert history.status == "done" and history.steps == 25
    losses = history.frame.loss
    assert losses.iloc[-5:].mean() < losses.iloc[:5].mean() - 0.3
    assert training.evaluate(model, held_out) < before - 0.4


def test_training_is_repeatable():
    losses = [
        training.train(tiny(), endless(), steps=3, progress=False, autocast_dtype=None).frame.loss.tolist()
        for _ in range(2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_history_columns_and_rows():
    history = training.train(tiny(), endless(), steps=7, log_every=3, progress=False)
    frame = history.frame
    assert list(frame.columns) == COLUMNS == list(HISTORY_COLUMNS)
    assert frame.step.tolist() == [3, 6, 7]
    assert (frame.tokens_per_s > 0).all() and (frame.grad_norm > 0).all() and history.seconds > 0
    memory = frame[["peak_allocated_gib", "peak_reserved_gib"]]
    if runtime.device.type == "cuda":
        assert (memory > 0).all(axis=None)
    else:
        assert memory.isna().all(axis=None)  # not zero: nobody counted
    assert "done after 7 steps" in str(history)


def test_progress_is_plain_text_on_stdout(capsys):
    training.train(tiny(), endless(), steps=2)
    captured = capsys.readouterr()
    assert "2/2" in captured.out and "loss" in captured.out and "tokens/s" in captured.out
    assert captured.err == ""


def test_interrupt_returns_what_there_is():
    def stop_after(count):
        yield from itertools.islice(endless(), count)
        raise KeyboardInterrupt

    model = tiny()
    before = model.transformer.wte.weight.detach().clone()
    history = training.train(model, stop_after(3), steps=100, progress=False)
    assert history.interrupted and history.status == "interrupted"
    assert history.steps == 3 and history.frame.step.tolist() == [1, 2, 3]
    assert not torch.equal(model.transformer.wte.weight, before)
    assert all(p.grad is None for p in model.parameters())


def test_interrupt_before_the_first_step_gives_an_empty_history():
    def stop():
        raise KeyboardInterrupt
        yield

    history = training.train(tiny(), stop(), steps=5, progress=False)
    assert history.interrupted and len(history.frame) == 0 and list(history.frame.columns) == COLUMNS
    assert "interrupted after 0 steps" in str(history)


def test_running_out_of_data_is_said():
    history = training.train(tiny(), itertools.islice(endless(), 2), steps=5, progress=False)
    assert history.status == "out of data" and not history.interrupted and history.steps == 2


def test_mode_and_checkpointing_are_put_back():
    model = tiny().eval()
    training.train(model, endless(), steps=1, checkpointing=True, progress=False)
    assert not model.training and not any(block.gradient_checkpointing for block in model.transformer.h)
    training.evaluate(model.train(), itertools.islice(endless(), 1))
    assert model.training


def test_an_unknown_option_leaves_the_model_as_it_was(capsys):
    model = tiny().eval()
    for work in (training.train, training.attention_used):
        arguments = {"batches": endless(), "steps": 1} if work is training.train else {"tokens": next(endless())}
        with pytest.raises(ValueError, match="True, False or 'offloaded'"):
            work(model, checkpointing="disk", **arguments)
        assert not model.training
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"chunked_loss": 16}], ids=str)
def test_memory_savers_change_nothing_in_the_result(options):
    plain, saving = tiny(), tiny()
    history = training.train(plain, endless(), steps=3, progress=False, autocast_dtype=None)
    other = training.train(saving, endless(), steps=3, progress=False, autocast_dtype=None, **options)
    assert other.frame.loss.tolist() == pytest.approx(history.frame.loss.tolist(), rel=1e-5)
    assert other.frame.grad_norm.tolist() == pytest.approx(history.frame.grad_norm.tolist(), rel=1e-4)


def test_checkpointing_computes_the_blocks_twice():
    calls = []
    model = tiny()
    model.transformer.h[0].attn.register_forward_hook(lambda *_: calls.append(1))
    training.train(model, endless(), steps=1, progress=False)
    assert len(calls) == 1
    training.train(model, endless(), steps=1, checkpointing=True, progress=False)
    assert len(calls) == 1 + 2


def test_warmup_and_weight_decay_groups(monkeypatch):
    seen = []
    real = torch.optim.AdamW.step

    def spy(self, *args, **options):
        seen.append([(g["lr"], g["weight_decay"], len(g["params"])) for g in self.param_groups])
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    model = tiny()
    training.train(model, endless(), steps=3, lr=1.0e-3, warmup=2, progress=False)
    matrices = sum(p.ndim >= 2 for p in model.parameters())
    vectors = sum(p.ndim < 2 for p in model.parameters())
    assert [step[0][0] for step in seen] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert [(decay, count) for _, decay, count in seen[0]] == [(0.1, matrices), (0.0, vectors)]
    seen.clear()
    training.train(model, endless(), steps=5, lr=1.0e-3, warmup=2, decay=4, progress=False)
    assert [step[0][0] for step in seen] == pytest.approx([5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_checkpointed_step_on_our_kernel_is_a_step_on_sdpa():
    results = []
    for attention in ("labutils", "sdpa"):
        torch.manual_seed(0)
        model = models.gpt2("nano", n_positions=32, vocab_size=97, attention=attention).to(runtime.device)
        batches = endless(batch=1, seqlen=24, vocab_size=97)
        options = {"autocast_dtype": None, "checkpointing": attention == "labutils", "progress": False}
        results.append(training.train(model, batches, steps=2, **options).frame)
    assert results[0].loss.tolist() == pytest.approx(results[1].loss.tolist(), rel=1e-4)
    assert results[0].grad_norm.tolist() == pytest.approx(results[1].grad_norm.tolist(), rel=1e-3)


def test_float32_is_no_autocast(recwarn):
    frames = [
        training.train(tiny(), endless(), steps=2, progress=False, autocast_dtype=dtype).frame.drop(
            columns="tokens_per_s"
        )
        for dtype in (None, torch.float32)
    ]
    assert frames[0].equals(frames[1])
    assert not [str(warning.message) for warning in recwarn if "autocast" in str(warning.message)]


def test_a_loss_that_is_not_finite_stops_training():
    model = tiny()
    model.transformer.wte.weight.data[5] = float("nan")
    with pytest.raises(FloatingPointError, match="lower lr"):
        training.train(model, endless(), steps=5, progress=False)


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 2, "log_every": 0}])
def test_bad_numbers_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        training.train(tiny(), endless(), **options)


def test_evaluate_weighs_batches_by_their_predictions():
    model = tiny()
    long, short = next(endless(3, 32)), next(endless(1, 8))
    mean = training.evaluate(model, [long, short], autocast_dtype=None)
    a, b = (training.evaluate(model, [part], autocast_dtype=None) for part in (long, short))
    assert mean == pytest.approx((a * 3 * 31 + b * 7) / (3 * 31 + 7))
    chunked = training.evaluate(model, [long, short], chunked_loss=10, autocast_dtype=None)
    assert chunked == pytest.approx(mean, rel=1e-5)
    with pytest.raises(ValueError, match="no batch"):
        training.evaluate(model, [])


# --- does it fit --------------------------------------------------------------------------------------------

ROW = [
    "model",
    "impl",
    "checkpointing",
    "chunked_loss",
    "seqlen",
    "batch",
    "peak_gib",
    "reserved_gib",
    "cap_gib",
]
ROW += ["tokens_per_s", "loss", "status"]


def test_try_step_is_a_row_of_training_csv():
    row = training.try_step(tiny, 32, 2, steps=2, chunked_loss=16)
    assert list(row) == ROW
    assert (row["model"], row["impl"], row["status"]) == ("tiny", "sdpa", "ok")
    assert (row["seqlen"], row["batch"], row["chunked_loss"], row["checkpointing"]) == (32, 2, True, False)
    assert row["tokens_per_s"] > 0 and row["loss"] == pytest.approx(math.log(300), rel=0.1)
    assert math.isnan(row["cap_gib"])
    assert math.isnan(row["peak_gib"]) == (runtime.device.type == "cpu")
    named = training.try_step(lambda: tiny("eager"), 16, steps=1)
    assert named["impl"] == "naive"
    assert training.try_step(lambda: tiny("eager"), 16, steps=1, impl="mine")["impl"] == "mine"


def test_a_row_names_attention_as_the_other_tables_do():
    config = types.SimpleNamespace(_attn_implementation="flash_attention_2", lab_size="124M")
    names = fits._names(types.SimpleNamespace(config=config), None)
    assert names == {"model": "124M", "impl": "flash_attn"}


def test_out_of_memory_is_a_row_and_its_memory_is_free(monkeypatch):
    made = []

    def factory():
        made.append(weakref.ref(model := tiny()))
        return model

    def too_large(model, tokens, **options):
        held = torch.zeros(10)  # what a real failure leaves behind in its traceback
        made.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(training.step, "language_model_loss", too_large)
        row = training.try_step(factory, 32, 2)
    assert row["status"] == "oom" and list(row) == ROW
    assert (row["model"], row["impl"], row["seqlen"]) == ("tiny", "sdpa", 32)
    assert all(math.isnan(row[name]) for name in ("peak_gib", "reserved_gib", "tokens_per_s", "loss"))
    gc.collect()
    assert len(made) == 2 and all(reference() is None for reference in made)
    assert training.try_step(factory, 32, 2, steps=1)["status"] == "ok"  # the process goes on


def test_a_model_that_does_not_even_load_is_out_of_memory():
    def factory():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert training.try_step(factory, 32)["status"] == "oom"


def test_other_errors_are_not_taken_for_out_of_memory():
    with pytest.raises(ValueError, match="n_positions=128"):
        training.try_step(tiny, 256)
    with pytest.raises(ValueError, match=r"\(1, 64\)"):
        training.try_step(tiny, 64, batches=endless(batch=1, seqlen=32))
    with pytest.raises(ValueError, match="ended after 1 of 3"):
        training.try_step(tiny, 32, batches=itertools.islice(endless(batch=1), 1))


def test_try_step_hands_an_interrupt_on():
    def stop():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        training.try_step(tiny, 32, batches=stop())


@pytest.mark.skipif(runtime.device.type == "cuda", reason="about machines without a GPU; this one has one")
def test_memory_cap_is_refused_on_a_cpu():
    with pytest.raises(RuntimeError, match="on the CPU here"), training.memory_cap(16):
        pass
    with pytest.raises(RuntimeError, match="on the CPU here"):
        training.try_step(tiny, 32, cap_gib=16)


def test_the_cap_counts_the_context():
    gib = 2**30
    cap = memory._plan_cap(16.0, total_bytes=140 * gib, context_bytes=gib // 2)
    assert (cap.cap_gib, cap.context_gib, cap.allocator_gib) == (16.0, 0.5, 15.5)
    smaller = memory._plan_cap(16.0, total_bytes=8 * gib, context_bytes=gib)
    assert (smaller.cap_gib, smaller.allocator_gib) == (8.0, 7.0)  # the card is its own limit
    with pytest.raises(ValueError, match="no room left"):
        memory._plan_cap(0.5, total_bytes=8 * gib, context_bytes=gib)


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@NEEDS_GPU
def test_cap_is_enforced_and_taken_back():
    before = torch.cuda.get_per_process_memory_fraction()
    with training.memory_cap(3.0) as cap:
        assert 0.05 < cap.context_gib < 3.0
        room = cap.allocator_gib - torch.cuda.memory_reserved() / 2**30 - 0.1
        fits = torch.empty(int(room * 2**30), dtype=torch.uint8, device="cuda")
        free, total = torch.cuda.mem_get_info()
        assert (total - free) / 2**30 < 3.0  # with the context, no more is in use on the device
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**30, dtype=torch.uint8, device="cuda")
        del fits
    assert torch.cuda.get_per_process_memory_fraction() == before
    with pytest.raises(ZeroDivisionError), training.memory_cap(3.0):
        raise ZeroDivisionError
    assert torch.cuda.get_per_process_memory_fraction() == before
    torch.empty(int(3.5 * 2**30), dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()


@pytest.mark.gpu
@NEEDS_GPU
def test_cap_below_what_is_alive_is_refused():
    alive = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match="alive already"), training.memory_cap(2.0):
        pass
    del alive
    torch.cuda.empty_cache()


@pytest.mark.gpu
@NEEDS_GPU
def test_a_real_out_of_memory_frees_everything():
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()

    def eager():
        return models.gpt2("124M", n_positions=4096, attention="eager")

    assert training.try_step(eager, 4096, cap_gib=6.0)["status"] == "oom"
    assert torch.cuda.memory_allocated() <= before + 2**28  # cuBLAS keeps its workspaces
    assert training.try_step(tiny, 64, cap_gib=6.0)["status"] == "ok"


@pytest.mark.gpu
@pytest.mark.skipif(
    (runtime.memory_gib or 0) < 15 or runtime.dtype != torch.bfloat16,
    reason="needs a GPU with 16 GB and bfloat16",
)
def test_gpt2_trains_8192_tokens_in_16_gb_where_eager_does_not():
    def gpt2(attention):
        return lambda: models.gpt2("124M", n_positions=8192, attention=attention)

    ours = training.try_step(gpt2("labutils"), 8192, cap_gib=16.0)
    assert ours["status"] == "ok" and ours["impl"] == "triton_v2"
    assert ours["peak_gib"] <= ours["reserved_gib"] < 16.0
    assert 9.0 < ours["loss"] < 12.0  # log(50257) = 10.8
    eager = training.try_step(gpt2("eager"), 8192, cap_gib=16.0)
    assert eager["status"] == "oom" and eager["impl"] == "naive"
    saving = training.try_step(gpt2("labutils"), 8192, cap_gib=16.0, checkpointing=True, chunked_loss=2048)
    assert saving["status"] == "ok" and saving["peak_gib"] < 0.5 * ours["peak_gib"]


@pytest.mark.gpu
@NEEDS_GPU
def test_autocast_is_the_gpus_dtype():
    seen = []
    model = tiny()
    model.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    training.train(model, endless(), steps=1, progress=False)
    assert seen == [runtime.dtype]


@pytest.mark.gpu
@NEEDS_GPU
def test_float16_trains_with_loss_scaling():
    model = tiny()
    before = model.transformer.wte.weight.detach().clone()
    history = training.train(model, endless(), steps=8, autocast_dtype=torch.float16, progress=False)
    assert history.status == "done" and history.frame.loss.notna().all()
    assert math.isfinite(history.frame.grad_norm.iloc[-1])  # the first steps may only find the scale
    assert not torch.equal(model.transformer.wte.weight, before)


def test_steps_whose_scaled_gradients_overflow_are_skipped_and_counted(monkeypatch):
    """A scale that float16 cannot bear: the first steps change no weight, and the history says how many."""
    scaler = torch.amp.GradScaler

    def steep(*args, **kwargs):
        return scaler(*args, **kwargs, init_scale=2.0**36)

    torch.manual_seed(0)
    model = models.gpt2("nano", n_positions=16, vocab_size=50, attention="sdpa").to(runtime.device)
    before = model.transformer.wte.weight.detach().clone()
    batches = [torch.randint(50, (2, 16)) for _ in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(torch.amp, "GradScaler", steep)
        history = training.train(model, batches, steps=2, autocast_dtype=torch.float16, progress=False)
    assert history.frame["skipped"].tolist() == [1, 2] and history.frame["loss_scale"].tolist() == [2.0**35, 2.0**34]
    assert torch.equal(model.transformer.wte.weight, before) and "2 steps skipped" in str(history)
    history = training.train(model, batches, steps=2, autocast_dtype=None, progress=False)
    assert history.frame["skipped"].tolist() == [0, 0] and history.frame["loss_scale"].tolist() == [1.0, 1.0]
    assert not torch.equal(model.transformer.wte.weight, before) and "skipped" not in str(history)
