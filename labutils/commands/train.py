"""`python -m labutils train`: trains a GPT-2 as notebook 03 does, from a YAML file and flags."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from labutils.attention.backends import BACKENDS
from labutils.commands import train_options
from labutils.commands.arguments import INTERRUPTED
from labutils.commands.train_options import parser
from labutils.machine import files

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel


def run(words: Sequence[str]) -> int:
    """Trains. Returns 0, 130 after an interrupt, 1 if training or the smoke test failed, 2 for bad arguments."""
    command_line = parser()
    options = command_line.parse_args(words)
    try:
        train_options.check(options)
        if options.smoke_test and (
            unused := train_options.shrink_to_smoke_test(options, command_line.get_defaults(), words)
        ):
            print(f"--smoke-test sets its own sizes and texts, and does not use {', '.join(unused)}.")
        for section, name in (("run", "folder"), ("data", "text")):
            if (path := options[section][name]) is not None:
                options[section][name] = str(files.expanded(path, f"{section}.{name}"))
    except ValueError as error:
        return _complain(error, 2)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; deterministic sums need it
    import torch

    try:
        with _polite_interrupts() as asked_to_stop, TemporaryDirectory() as temporary, ExitStack() as hold:
            if options.smoke_test:
                options.run.folder = temporary
            return _train(options, command_line, asked_to_stop, hold)
    except KeyboardInterrupt:
        print("\nInterrupted.")
        return INTERRUPTED
    except torch.OutOfMemoryError as error:
        remedy = "shorten model.seqlen, or set optimization.checkpointing=true or optimization.chunked_loss=2048"
        return _complain(f"the step does not fit into memory: {remedy}. ({error})", 1)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        return _complain(error, 2)
    except (RuntimeError, FloatingPointError, OSError) as error:
        return _complain(error, 1)


def _complain(error: object, status: int) -> int:
    """Prints the error on one line of stderr; returns the status."""
    print(f"labutils train: {' '.join(str(error).split())}", file=sys.stderr)
    return status


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def _train(options: Namespace, command_line: ArgumentParser, asked_to_stop: Callable[[], bool], hold: ExitStack) -> int:
    """The whole run, from its texts to the files that it keeps; returns the exit status.

    The folder of the run is held by `hold`, so that no other run writes into it.
    """
    import torch

    from labutils import training
    from labutils.gpt2 import packing
    from labutils.machine import runtime
    from labutils.training.checkpoints import check_path

    how = options.optimization
    print(runtime.summary())
    folder = None if options.run.folder is None else Path(options.run.folder)
    if folder is not None:  # before the texts, which take a while
        if not folder.exists():
            check_path(folder / "checkpoint.pt", resume=options.resume)
        files.check_writable(folder, f"run.folder={folder}")
        hold.enter_context(files.held(folder / ".lock", f"run.folder={folder}"))
        check_path(folder / "checkpoint.pt", resume=options.resume)
    if not options.smoke_test and runtime.device.type != "cuda":
        print("Without a GPU, a step of a long sequence takes minutes: --smoke-test ends in one.")
    sequences, held_out, vocab_size = _texts(options)
    attention = _attention(options)
    asked = "auto" if how.precision == "auto" else getattr(torch, how.precision)
    autocast = training.resolved_autocast(asked, runtime.device)
    checkpoint = _checkpoint(options, folder, sequences, attention, autocast)

    with ExitStack() as settings:
        if options.run.deterministic:
            settings.enter_context(_deterministic())
        if how.memory_cap_gib is not None:
            print(f"Memory: {settings.enter_context(training.memory_cap(how.memory_cap_gib))}")
        settings.enter_context(_allowed_backends(options))
        model = _model(options, vocab_size, attention)
        shared = {"autocast_dtype": autocast, "chunked_loss": how.chunked_loss}
        if options.data.documents_apart:
            shared["end_of_text"] = 0  # what the tokenizer of `_texts` has first
        used = _find_out(model, sequences[: options.data.batch_size], options, attention, shared)
        before = training.evaluate(model, held_out, **shared) if held_out else None
        if before is not None:
            print(f"Held-out loss before: {before:.3f} nats a token")
        with _history_file(folder, checkpoint) as on_row:
            history = training.train(
                model, packing.batches(sequences, options.data.batch_size, seed=options.data.seed), steps=how.steps,
                lr=how.lr, warmup=how.warmup, weight_decay=how.weight_decay, clip=how.clip,
                checkpointing=how.checkpointing, optimizer=how.optimizer, log_every=options.run.log_every,
                checkpoint=checkpoint,
                stop=asked_to_stop, on_row=on_row, **shared,
            )  # fmt: skip
        print(history)
        after = None
        if held_out and not history.interrupted:
            after = training.evaluate(model, held_out, **shared)
            print(f"Held-out loss after: {after:.3f} nats a token")
    if folder is not None:
        outcome = {"attention": used, "held_out_before": before, "held_out_after": after, "status": history.status}
        _keep(folder, outcome | {"steps": history.steps}, options, command_line)
    if history.interrupted:
        goes_on = folder is not None and (folder / "checkpoint.pt").exists() and not options.smoke_test
        kept = "The same command with --resume goes on." if goes_on else "There is no checkpoint to go on from."
        print(f"Interrupted after {history.steps} of {how.steps} steps. {kept}")
        return INTERRUPTED
    if options.smoke_test:
        if after is not None and not after < before:
            return _complain(f"the smoke test failed: the held-out loss went from {before:.3f} to {after:.3f}", 1)
        print("Smoke test passed.")
    return 0


def _keep(folder: Path, outcome: dict[str, Any], options: Namespace, command_line: ArgumentParser) -> None:
    """Writes run.json and config.yaml. Prints which files are in the folder, unless this is the smoke test."""
    from labutils.benchmark import environment

    outcome = outcome | {"environment": environment.environment().as_dict()}
    files.replace(folder / "run.json", json.dumps(outcome, indent=2) + "\n")
    options.resume = False  # it says how this run began, and is not a setting
    files.replace(folder / "config.yaml", command_line.dump(options))
    if not options.smoke_test:
        names = ("checkpoint.pt", "history.csv", "config.yaml", "run.json")
        print(f"Kept in {folder}: {', '.join(name for name in names if (folder / name).exists())}")


def _model(options: Namespace, vocab_size: int, attention: str) -> GPT2LMHeadModel:
    """The model of the options, with random weights, on the lab's device."""
    from labutils.gpt2 import models, rope
    from labutils.machine import runtime

    runtime.seed(options.run.seed)
    model = models.gpt2(
        options.model.size, n_positions=options.model.seqlen, vocab_size=vocab_size, attention=attention,
        attn_pdrop=options.model.dropout, **(models.ONE_GELU if options.model.one_gelu else {}),
    ).to(runtime.device)  # fmt: skip
    return rope.use_rope(model) if options.model.rotary else model


def _texts(options: Namespace) -> tuple[torch.Tensor, Sequence[torch.Tensor], int]:
    """Sequences to train on (S, N), batches of other sequences to evaluate on, and the size of the vocabulary."""
    from labutils.gpt2 import packing, texts

    what, n = options.data.text, options.model.seqlen
    if what in ("reference", "sources"):
        documents = texts.python_reference() if what == "reference" else texts.python_sources()
    else:
        paths = sorted(Path(what).glob("*.txt"))
        if len(paths) < 2:
            raise ValueError(
                f"data.text={what!r} is neither 'reference' nor 'sources' nor a folder with two .txt files or more."
            )
        documents = list(dict.fromkeys(map(_read_text, paths)))
        if len(documents) < 2:
            raise ValueError(f"data.text={what!r}: all its .txt files have the same text, and one part is held out.")
        if not all(documents):
            empty = next(path for path in paths if not _read_text(path))
            raise ValueError(f"data.text={what!r}: {empty} is empty. Remove it, or fill it.")
    train, other = texts.split(documents, seed=options.data.seed)
    tokenizer = packing.train_tokenizer(train, options.data.vocab_size)
    sequences, stats = packing.pack(train, tokenizer, n)
    print(f"Text: {stats}")
    held_out: Sequence[torch.Tensor] = []
    if options.data.held_out:
        held_out = packing.pack(other, tokenizer, n)[0][: options.data.held_out].split(options.data.batch_size)
    return sequences, held_out, tokenizer.get_vocab_size()


def _read_text(path: Path) -> str:
    """A user's text. Raises ValueError, with the file, if it cannot be read or is not in UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"data.text: {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.text: {path} is not text in UTF-8 (byte {error.start}): save it in this encoding."
        ) from error


def _checkpoint(
    options: Namespace, folder: Path | None, sequences: torch.Tensor, attention: str, autocast: torch.dtype | None
) -> Any:
    """The run's checkpoint. Its settings are those that the losses depend on, with `auto` resolved for this machine.

    Raises:
        ValueError: the checkpoint to go on from has other settings, or more steps than are asked for.
    """
    if folder is None:
        return None
    from labutils.benchmark import environment
    from labutils.training.checkpoints import Checkpoint

    how = options.optimization
    shaping = ("flash_attention", "lr", "warmup", "weight_decay", "clip", "checkpointing", "chunked_loss", "optimizer")
    settings = {
        **{f"model.{name}": options.model[name] for name in ("size", "seqlen", "dropout", "rotary", "one_gelu")},
        **{f"data.{name}": options.data[name] for name in ("batch_size", "seed", "documents_apart")},
        **{f"optimization.{name}": how[name] for name in shaping},
        "optimization.implementation": attention,
        "optimization.precision": "float32" if autocast is None else str(autocast).removeprefix("torch."),
        "run.seed": options.run.seed,
        "texts (SHA-256)": hashlib.sha256(sequences.numpy().tobytes()).hexdigest(),
    }
    checkpoint = Checkpoint(
        folder / "checkpoint.pt", every=options.run.save_every, settings=settings,
        environment=environment.environment().as_dict(), resume=options.resume,
    )  # fmt: skip
    if checkpoint.steps > how.steps:
        raise ValueError(
            f"optimization.steps={how.steps}, but {checkpoint.path} was written after {checkpoint.steps} steps, those "
            "before --resume included: ask for more, or train in another folder."
        )
    if checkpoint.moved:
        print(
            f"The checkpoint was written in another environment ({'; '.join(checkpoint.moved)}). Implementation and "
            "precision are the same, but other hardware or code may round differently: the losses go on, perhaps not "
            "to the last digit."
        )
    if checkpoint.steps == how.steps:
        print(f"All {how.steps} steps were done before: nothing is left to train.")
    return checkpoint


def _attention(options: Namespace) -> str:
    """The name under which transformers finds the attention of the options."""
    from labutils.machine import runtime
    from labutils.training import choice

    how = options.optimization
    if not how.flash_attention:
        return "eager"
    if how.implementation != "auto":
        return how.implementation
    return choice.for_capability(runtime.capability).attention


def _allowed_backends(options: Namespace) -> Any:
    """A context in which only the allowed backends of SDPA run. SDPA raises RuntimeError if none of them can."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    how = options.optimization
    if not (how.flash_attention_force or how.disable_math_fallback):
        return nullcontext()
    of_sdpa = [backend for backend in BACKENDS.values() if backend.sdp_backend]
    allowed = [backend for backend in of_sdpa if (backend.flash if how.flash_attention_force else backend.fused)]
    return sdpa_kernel([getattr(SDPBackend, backend.sdp_backend) for backend in allowed])


def _find_out(
    model: GPT2LMHeadModel, tokens: torch.Tensor, options: Namespace, attention: str, shared: dict
) -> dict[str, int]:
    """Profiles one step, and prints which attention ran in it.

    Returns:
        Name of the attention -> how often it ran.

    Raises:
        RuntimeError: no allowed attention can run, or one that is not allowed ran.
    """
    from labutils import training
    from labutils.machine import runtime

    how = options.optimization
    try:
        used = training.attention_used(model, tokens, checkpointing=how.checkpointing, **shared)
    except RuntimeError as error:
        text = str(error)
        if "No available kernel" not in text and "No viable backend" not in text:
            raise
        switch = "flash_attention_force" if how.flash_attention_force else "disable_math_fallback"
        why = "it has no dropout on a CPU; " if options.model.dropout and runtime.device.type == "cpu" else ""
        raise RuntimeError(
            f"optimization.{switch}=true, and no kernel that it allows can run this step: {why}`python -m labutils "
            f"check` says which run here. PyTorch says: {text}"
        ) from error
    where = {"cpu": "the CPU", "cuda": "the GPU"}[runtime.device.type]
    if "triton_v2" in used and runtime.interpreted:
        where = "the CPU, in Triton's interpreter"
    ran = "; ".join(f"{_described(name)} ({name}), {calls} times" for name, calls in used.items())
    print(f"Attention that ran in a profiled step, on {where}: {ran or 'none that is known'}. Asked for: {attention}.")
    slow = [name for name in used if not BACKENDS[name].flash]
    if how.flash_attention_force and (slow or not used):
        raise RuntimeError(
            f"optimization.flash_attention_force=true, but {'; '.join(map(_described, slow)) or 'nothing'} "
            "ran: `python -m labutils check` says what runs on this machine and why the rest does not."
        )
    if how.disable_math_fallback and (stored := [name for name in used if _stores_the_matrix(name)]):
        ran = " and ".join(map(_described, stored))
        raise RuntimeError(
            f"optimization.disable_math_fallback=true, but {ran}, ran: `python -m labutils check` says what runs "
            "on this machine and why the rest does not."
        )
    return used


def _stores_the_matrix(name: str) -> bool:
    return BACKENDS[name].io_model == "naive"


def _described(name: str) -> str:
    """What ran, in words, for a name that `labutils.training.attention_used` gives."""
    return BACKENDS[name].title + (", which stores the N x N matrix" if _stores_the_matrix(name) else "")


# ------------------------------------------------------------------------------------------------------------
# Around it
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def _polite_interrupts() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM asks the loop to stop after its step. The second one interrupts at once."""
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # Not print: if the signal comes in the middle of a print, Python forbids a second one.
        os.write(2, b"\nStopping after this step; once more stops at once.\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Uses PyTorch's deterministic kernels, with a warning if an operation has none."""
    import torch

    was, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def _history_file(folder: Path | None, checkpoint: Any) -> Iterator[Callable[[dict], None]]:
    """Writes history.csv, a row at a time. After --resume it begins with the rows up to the checkpoint.

    The file of an earlier run is replaced with the first row, when the checkpoint has been loaded without an error.
    """
    if folder is None:
        yield lambda row: None
        return
    from labutils.training.loop import HISTORY_COLUMNS

    before = checkpoint.rows
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        file: Any = None

        def begin() -> Any:
            new = stack.enter_context((folder / "history.csv").open("w", encoding="utf-8", newline=""))
            writer = csv.DictWriter(new, HISTORY_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(before)
            new.flush()
            return new

        def write(row: dict) -> None:
            nonlocal file
            file = file or begin()
            csv.DictWriter(file, HISTORY_COLUMNS, lineterminator="\n").writerow(row)
            file.flush()

        yield write
        file = file or begin()
