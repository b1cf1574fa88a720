"""The options of `python -m labutils train`: their declaration, the configurations of the lab, and what is allowed."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from labutils.commands.arguments import new_parser
from labutils.machine import files

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
        try:
            path = files.expanded(values, "--config")
            if re.fullmatch(r"\w[\w.-]*", values) and not path.is_file():
                shipped = shipped_configs()
                if values not in shipped:
                    raise ValueError(
                        f"{values} is neither a file nor a configuration of the lab: {', '.join(shipped)}."
                    )
                path = shipped[values]
            text = _read_config(path, {action.dest for action in parser._actions})
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        before, parser.exit_on_error = parser.exit_on_error, False
        try:
            super().__call__(parser, cfg, text, option_string)
        except (argparse.ArgumentError, TypeError) as error:  # jsonargparse has seen no file, only its text
            raise argparse.ArgumentError(self, f"{path}: {getattr(error, 'message', error)}") from error
        finally:
            parser.exit_on_error = before


def _read_config(path: Path, known: set[str]) -> str:
    """The text of a configuration, without sections that have no key, so that their keys have the defaults.

    Args:
        path: a YAML file.
        known: the names of all options.

    Raises:
        ValueError: the file cannot be read, is not YAML in UTF-8, or has a key that is not known. The message names it.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        found = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}): save it in this encoding.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}): correct it.") from error
    if found is None:
        return "{}"
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, and not keys with values such as `model:`.")
    sections = {name.partition(".")[0] for name in known if "." in name}
    for section in sections & set(found):
        if len(re.findall(rf"(?m)^{section}[ \t]*:", text)) > 1:
            raise ValueError(
                f"{path} has the section {section} more than once, and YAML keeps only the last: join them."
            )
        if found[section] is None:  # all its keys are commented out
            text = re.sub(rf"(?m)^{section}[ \t]*:[ \t]*(null|~)?[ \t]*(#.*)?$", "", text)
        elif not isinstance(found[section], dict):
            raise ValueError(f"{path}: {section} is a section with keys, and here it is {found[section]!r}.")
    for name in (n for key, value in found.items() for n in _names(key, value if key in sections else None)):
        if name not in known | sections:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Do you mean {near[0]}?" if near else ""
            raise ValueError(f"{path}: the key {name} is not known.{hint} --help lists all.")
    return "{}" if yaml.safe_load(text) is None else text


def _names(key: Any, value: Any) -> list[str]:
    """The names of the options in an entry of a configuration."""
    return [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [str(key)]


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


# ------------------------------------------------------------------------------------------------------------
# What is allowed
# ------------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """The numbers that an option allows, which are finite.

    Attributes:
        least, most: the smallest and the largest number.
        above: whether `least` itself is not allowed. below: the same of `most`.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def allows(self, number: float) -> bool:
        """Whether the number is in the range. No range has nan or an infinity."""
        low = self.least < number if self.above else self.least <= number
        return low and (number < self.most if self.below else number <= self.most)

    def __str__(self) -> str:
        low = f"above {self.least:,}" if self.above else f"at least {self.least:,}"
        return f"{low} and {'below' if self.below else 'at most'} {self.most:,}"


MANY = 10**9
LARGEST_SEED = 2**63 - 1
RANGES = {
    "model.seqlen": Range(2, 2**24),
    "model.dropout": Range(0, 1, below=True),
    "data.vocab_size": Range(257, 2**24),
    "data.batch_size": Range(1, 2**24),
    "data.held_out": Range(0, MANY),
    "data.seed": Range(0, LARGEST_SEED),
    "optimization.steps": Range(1, MANY),
    "optimization.lr": Range(0, 10, above=True),
    "optimization.warmup": Range(0, MANY),
    "optimization.weight_decay": Range(0, 10),
    "optimization.clip": Range(0, 10**9, above=True),
    "optimization.chunked_loss": Range(1, MANY),
    "optimization.memory_cap_gib": Range(0, 2**20, above=True),
    "run.save_every": Range(1, MANY),
    "run.log_every": Range(1, MANY),
    "run.seed": Range(0, LARGEST_SEED),
}
"""What each number may be. 257 entries of a tokenizer are the bytes and the end of a text."""


def check(options: Namespace) -> None:
    """Raises ValueError, with the key, if a number is out of its range, or if options contradict each other."""
    for name, allowed in RANGES.items():
        number = options[name]
        if number is not None and not allowed.allows(number):
            raise ValueError(f"{name}={number}: it must be {allowed}.")
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
    for name in ("run.folder", "data.text"):
        if options[name] == "":
            raise ValueError(f"{name} is empty: name a folder, or leave it out.")
    if options.resume and options.smoke_test:
        raise ValueError("--smoke-test keeps nothing, so that there is nothing for --resume to go on with.")
    if options.resume and options.run.folder is None:
        raise ValueError("--resume needs the folder of the run to go on with: give --run.folder.")


def shrink_to_smoke_test(options: Namespace, defaults: Namespace, words: Sequence[str]) -> list[str]:
    """Sets the options of `SMOKE_TEST`.

    Args:
        options: all options; changed.
        defaults: their defaults.
        words: the command line.

    Returns:
        The options that were asked for otherwise, by a flag or a configuration, and so are not used: "data.text=mine".
    """
    unused = []
    for name, value in (SMOKE_TEST | {"run.folder": None}).items():
        given = options[name]
        flagged = any(word.split("=")[0] == f"--{name}" for word in words)
        if given != value and (flagged or given != defaults[name]):
            unused.append(f"{name}={given}")
        options[name] = value
    return unused
