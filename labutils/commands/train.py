"""`python -m labutils train`: trains a GPT-2 as notebook 03 does, from a YAML file and flags."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from labutils.attention.backends import BACKENDS
from labutils.commands.arguments import INTERRUPTED, new_parser

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel

CONFIGS = Path(__file__).resolve().parent.parent / "training" / "configs"
"""The folder of the configurations that `--config` finds by their names."""

SMOKE_TEST = {
    "model.size": "tiny",
    "model.seqlen": 128,
    "data.text": "reference",
    "data.vocab_size": 512,
    "data.batch_size": 4,
    "data.held_out": 8,
    "optimization.steps": 20,
    "optimization.lr": 3e-3,
    "optimization.warmup": 5,
    "optimization.memory_cap_gib": None,
    "run.save_every": 10,
    "run.log_every": 1,
}
"""The options that --smoke-test sets. All others stay as given. The folder of the run is a temporary one."""


def shipped_configs() -> dict[str, Path]:
    """The configurations that the package has: name -> file."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


class _Config(ActionConfigFile):
    """The action of --config: jsonargparse's own, which takes the name of a shipped configuration as well as a path."""

    def __call__(self, parser: ArgumentParser, cfg: Namespace, values: str, option_string: str | None = None) -> None:
        if re.fullmatch(r"\w[\w.-]*", values) and not Path(values).is_file():
            shipped = shipped_configs()
            if values not in shipped:
                raise argparse.ArgumentError(
                    self, f"{values} is neither a file nor a configuration of the lab: {', '.join(shipped)}."
                )
            values = str(shipped[values])
        super().__call__(parser, cfg, values, option_string)


def parser() -> ArgumentParser:
    """The parser of the command's arguments. Each name is also a key of the YAML file."""
    parser = new_parser(
        "python -m labutils train",
        "Train a GPT-2 on long texts, as notebook 03 does, and report which attention really ran. A flag has the name "
        "of its key in the YAML file. Later flags win over earlier ones.",
        epilog="In a minute, on any machine: python -m labutils train --smoke-test. On a GPU with 16 GB: python -m "
        "labutils train --config gpt2-124m-8k. After Control-C, the same command with --resume goes on.",
    )
    parser.add_argument(
        "--config",
        action=_Config,
        metavar="FILE|NAME",
        help=f"a YAML file with these keys, or the name of a configuration of the lab: {', '.join(shipped_configs())}",
    )
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="a tiny model and 20 short steps; fails unless the held-out loss goes down, and keeps nothing. Attention, "
        "memory savers and precision are as given",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in run.folder, with the same settings. Another machine is named. If auto means "
        "another implementation or precision there, the run does not go on",
    )
    _add_model(parser.add_argument_group("model", "a GPT-2 with random weights"))
    _add_data(parser.add_argument_group("data", "texts that are on every machine, or your own; nothing is downloaded"))
    _add_optimization(parser.add_argument_group("optimization", "how a step is made"))
    _add_run(parser.add_argument_group("run", "what is kept"))
    return parser


def _add_model(model: Any) -> None:
    model.add_argument(
        "--model.size",
        type=Literal["124M", "355M", "774M", "1558M", "tiny", "nano"],
        default="124M",
        help="parameters (default: %(default)s)",
    )
    model.add_argument(
        "--model.seqlen", type=int, metavar="N", default=8192, help="tokens in a sequence, N (default: %(default)s)"
    )
    model.add_argument(
        "--model.dropout",
        type=float,
        metavar="P",
        default=0.0,
        help="of attention weights; PyTorch's flash kernel for the CPU has none (default: %(default)s)",
    )
    model.add_argument(
        "--model.rotary", type=bool, default=False, help="rotary positions, not a learned table (default: false)"
    )
    model.add_argument(
        "--model.one_gelu",
        type=bool,
        default=False,
        help="GELU as one operation, which keeps only its input; GPT-2's GELU is several operations (default: false)",
    )


def _add_data(data: Any) -> None:
    data.add_argument(
        "--data.text",
        type=str,
        metavar="TEXT",
        default="sources",
        help="reference, sources (of Python's own library), or a folder of .txt files (default: %(default)s)",
    )
    data.add_argument(
        "--data.vocab_size",
        type=int,
        metavar="ENTRIES",
        default=4096,
        help="entries of the tokenizer that is trained on them (default: %(default)s)",
    )
    data.add_argument(
        "--data.batch_size", type=int, metavar="B", default=1, help="sequences in a step (default: %(default)s)"
    )
    data.add_argument(
        "--data.documents_apart",
        type=bool,
        default=False,
        help="attention and positions begin anew in each document of a sequence (default: false)",
    )
    data.add_argument(
        "--data.held_out",
        type=int,
        metavar="SEQUENCES",
        default=8,
        help="sequences of other texts on which the loss is measured before and after; 0: none (default: %(default)s)",
    )
    data.add_argument(
        "--data.seed", type=int, metavar="SEED", default=0, help="of the split and of the order (default: %(default)s)"
    )


def _add_optimization(how: Any) -> None:
    how.add_argument(
        "--optimization.flash_attention",
        type=bool,
        default=True,
        help="true: a flash kernel; false: standard attention (default: true)",
    )
    how.add_argument(
        "--optimization.flash_attention_force",
        type=bool,
        default=False,
        help="raise an error unless a flash kernel runs (default: false)",
    )
    how.add_argument(
        "--optimization.disable_math_fallback",
        type=bool,
        default=False,
        help="forbid the math backend, which stores the N x N matrix (default: false)",
    )
    how.add_argument(
        "--optimization.implementation",
        type=Literal["auto", "labutils", "sdpa"],
        default="auto",
        help="of flash attention: this lab's kernels, PyTorch's, or auto: this lab's on a GPU of compute capability "
        "8.0 or higher, else PyTorch's (default: %(default)s)",
    )
    how.add_argument(
        "--optimization.steps",
        type=int,
        metavar="STEPS",
        default=100,
        help="optimizer steps, with those before --resume (default: %(default)s)",
    )
    how.add_argument(
        "--optimization.lr",
        type=float,
        metavar="RATE",
        default=6e-4,
        help="learning rate of AdamW (default: %(default)s)",
    )
    how.add_argument(
        "--optimization.warmup",
        type=int,
        metavar="STEPS",
        default=10,
        help="steps until the learning rate is reached (default: %(default)s)",
    )
    how.add_argument(
        "--optimization.weight_decay",
        type=float,
        metavar="RATE",
        default=0.1,
        help="of matrices (default: %(default)s)",
    )
    how.add_argument(
        "--optimization.clip",
        type=float,
        metavar="NORM",
        default=1.0,
        help="largest gradient norm (default: %(default)s)",
    )
    how.add_argument(
        "--optimization.precision",
        type=Literal["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of autocast; auto: what suits the GPU (default: %(default)s)",
    )
    how.add_argument(
        "--optimization.checkpointing",
        type=bool | Literal["offloaded"],
        default=False,
        metavar="{true,false,offloaded}",
        help="recompute activations in the backward instead of keeping them; offloaded: also keep the blocks' inputs "
        "on the CPU (default: false)",
    )
    how.add_argument(
        "--optimization.chunked_loss",
        type=int | None,
        default=None,
        metavar="POSITIONS",
        help="positions for which logits exist at a time; null: all (default: null)",
    )
    how.add_argument(
        "--optimization.optimizer",
        type=Literal["adamw", "offloaded"],
        default="adamw",
        help="AdamW beside the model, in one kernel on a GPU; offloaded: its state and its work are on the CPU "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--optimization.memory_cap_gib",
        type=float | None,
        default=None,
        metavar="GIB",
        help="imitate a GPU with so many GiB; null: no cap (default: null)",
    )


def _add_run(kept: Any) -> None:
    kept.add_argument(
        "--run.folder",
        type=str | None,
        default=None,
        metavar="FOLDER",
        help="for checkpoint.pt, history.csv, config.yaml and run.json; null: nothing is kept (default: null)",
    )
    kept.add_argument(
        "--run.save_every",
        type=int,
        metavar="STEPS",
        default=50,
        help="steps between checkpoints (default: %(default)s)",
    )
    kept.add_argument(
        "--run.log_every",
        type=int,
        metavar="STEPS",
        default=1,
        help="steps between rows of the history (default: %(default)s)",
    )
    kept.add_argument("--run.seed", type=int, metavar="SEED", default=0, help="of the weights (default: %(default)s)")
    kept.add_argument(
        "--run.deterministic",
        type=bool,
        default=True,
        help="the same losses in each run; some kernels are slower (default: true)",
    )


def run(words: Sequence[str]) -> int:
    """Trains. Returns 0, 130 after an interrupt, 1 if training or the smoke test failed, 2 for bad arguments."""
    command_line = parser()
    options = command_line.parse_args(words)
    if options.smoke_test:
        for name, value in SMOKE_TEST.items():
            options[name] = value
    try:
        _check(options)
    except ValueError as error:
        return _complain(error, 2)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; deterministic sums need it
    import torch

    try:
        with _polite_interrupts() as asked_to_stop, TemporaryDirectory() as temporary:
            if options.smoke_test:
                options.run.folder = temporary
            return _train(options, command_line, asked_to_stop)
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


def _check(options: Namespace) -> None:
    """Raises ValueError if options contradict each other, or if a number is too small."""
    how = options.optimization
    for name, on in {
        "flash_attention_force": how.flash_attention_force,
        "disable_math_fallback": how.disable_math_fallback,
        "implementation": how.implementation != "auto",
    }.items():
        if on and not how.flash_attention:
            raise ValueError(
                f"optimization.flash_attention=false asks for standard attention, and optimization.{name} for another: "
                "leave one of them out."
            )
    if not 0.0 <= options.model.dropout < 1.0:
        raise ValueError(f"model.dropout={options.model.dropout}: it must be from 0 to below 1.")
    least = {
        "optimization.steps": 1, "optimization.warmup": 0, "run.save_every": 1, "run.log_every": 1, "data.held_out": 0,
        "data.batch_size": 1, "model.seqlen": 2,
    }  # fmt: skip
    for name, number in least.items():
        if options[name] < number:
            raise ValueError(f"{name}={options[name]}: it must be at least {number}.")
    if options.resume and options.smoke_test:
        raise ValueError("--smoke-test keeps nothing, so that there is nothing for --resume to go on with.")
    if options.resume and options.run.folder is None:
        raise ValueError("--resume needs the folder of the run to go on with: give --run.folder.")


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def _train(options: Namespace, command_line: ArgumentParser, asked_to_stop: Callable[[], bool]) -> int:
    """The whole run, from its texts to the files that it keeps; returns the exit status."""
    import torch

    from labutils import training
    from labutils.gpt2 import packing
    from labutils.machine import runtime
    from labutils.training.checkpoints import check_path

    how = options.optimization
    print(runtime.summary())
    folder = None if options.run.folder is None else Path(options.run.folder)
    if folder is not None:  # before the texts, which take a while
        check_path(folder / "checkpoint.pt", resume=options.resume)
        _writable(folder)
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
    from labutils.machine import files

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
        documents = list(dict.fromkeys(path.read_text(encoding="utf-8") for path in paths))
    train, other = texts.split(documents, seed=options.data.seed)
    tokenizer = packing.train_tokenizer(train, options.data.vocab_size)
    sequences, stats = packing.pack(train, tokenizer, n)
    print(f"Text: {stats}")
    held_out: Sequence[torch.Tensor] = []
    if options.data.held_out:
        held_out = packing.pack(other, tokenizer, n)[0][: options.data.held_out].split(options.data.batch_size)
    return sequences, held_out, tokenizer.get_vocab_size()


def _writable(folder: Path) -> None:
    """Makes the folder of the run. Raises ValueError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"run.folder={folder} cannot be written to ({error}): name another.") from error


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
    """Writes history.csv, a row at a time. After --resume it begins with the rows up to the checkpoint."""
    if folder is None:
        yield lambda row: None
        return
    from labutils.training.loop import HISTORY_COLUMNS

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "history.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HISTORY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(checkpoint.rows)
        file.flush()

        def write(row: dict) -> None:
            writer.writerow(row)
            file.flush()

        yield write
