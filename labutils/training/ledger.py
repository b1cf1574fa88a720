"""The ledger of a training step, by kind: what each byte at the peak is for.

A piece of memory says where in the program it was asked for. `training.rehearsal` looks at its own stack, and PyTorch's
allocator of GPU memory keeps the stack of each allocation in its history (`torch.cuda.memory._record_memory_history`);
`kind_of` reads both alike, so that what was predicted and what was measured are split in the same way.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from labutils import training
from labutils.gpt2 import models
from labutils.machine import runtime

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel

KINDS = (
    "parameters", "AdamW", "16-bit weights", "residual stream", "attention", "MLP", "logits", "gradients", "backward",
)  # fmt: skip
"""What memory is for. "residual stream" has the LayerNorms and embeddings with it, "attention" and "MLP" the inputs of
their linear layers, "logits" the loss; "gradients" are those of the parameters, and "backward" what else the backward
pass makes on its way."""


@functools.cache
def _places() -> dict[str, list[tuple[int, int, int, str]]]:
    """The functions of each file of interest: first line, last line, depth, kind. The deepest one in a stack counts."""
    from torch.optim import adam, adamw, optimizer
    from transformers.models.gpt2 import modeling_gpt2 as gpt2

    functions: list[tuple[int, str, Any]] = [
        (0, "logits", models.language_model_loss), (0, "logits", gpt2.GPT2LMHeadModel.forward),
        (1, "residual stream", gpt2.GPT2Model.forward), (1, "logits", models._chunk_loss),
        (2, "residual stream", gpt2.GPT2Block.forward),
        (3, "attention", gpt2.GPT2Attention.forward), (3, "MLP", gpt2.GPT2MLP.forward),
        (4, "gradients", torch.nn.utils.clip_grad_norm_),
        (5, "parameters", models.gpt2), (5, "parameters", torch.nn.Module.to),
    ]  # fmt: skip
    places: dict[str, list[tuple[int, int, int, str]]] = {}
    for depth, kind, function in functions:
        code = inspect.unwrap(function).__code__
        lines, first = inspect.getsourcelines(code)
        places.setdefault(code.co_filename, []).append((first, first + len(lines) - 1, depth, kind))
    for module in (adam, adamw, optimizer):
        places[module.__file__] = [(0, 10**9, 6, "AdamW")]
    return places


class Sizes:
    """Sizes in bytes by which pieces are known that no line of Python asked for.

    Autocast's 16-bit copies of weights are made inside of an operator, and a GPU's backward pass runs in a thread of
    its own, without a stack in Python.

    Args:
        config: of the model.

    Attributes:
        copies: of the 16-bit copies of the matrices.
        gradients: of the matrices' gradients, in 16 and in 32 bits.
        row: logits of one token (V, a number and not bytes).
    """

    def __init__(self, config: GPT2Config):
        width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
        matrices = {width * 3 * width, width * width, width * inner, config.vocab_size * width}
        self.copies = {2 * n for n in matrices}  # a sequence as long as a matrix is wide would be taken for it
        self.gradients = self.copies | {4 * n for n in matrices}
        self.row = config.vocab_size

    def logits(self, size: int) -> bool:
        """Whether so many bytes are logits: whole rows of them, in 16 bits of 256 tokens or more, in 32 of 128."""
        return size not in self.gradients and size % (2 * self.row) == 0 and size // (2 * self.row) >= 256


def kind_of(frames: Iterable[tuple[str, int]], size: int, sizes: Sizes, *, low: bool = True) -> str:
    """The kind, of `KINDS`, of a piece of memory.

    Args:
        frames: file and line of each function on the stack that asked for it, in any order; none of a backward pass.
        size: bytes asked for.
        sizes: of the model.
        low: products are in 16 bits, with copies of the weights.

    Returns:
        That of the deepest function which is known; where none is, the kind is told by the size.
    """
    places = _places()
    deepest, kind = -1, ""
    for file, line in frames:
        for first, last, depth, name in places.get(file, ()):
            if first <= line <= last and depth > deepest:
                deepest, kind = depth, name
    if kind in ("attention", "MLP", "logits") and low and size in sizes.copies:
        return "16-bit weights"
    if kind:
        return kind
    if size in sizes.gradients:
        return "gradients"
    return "logits" if sizes.logits(size) else "backward"


def allocated(size: int) -> int:
    """Bytes that PyTorch's allocator of GPU memory hands out where so many are asked for: multiples of 512."""
    return -(-size // 512) * 512


def at_peak(trace: Sequence[Mapping[str, Any]], kind: Callable[[Mapping[str, Any]], str]) -> dict[str, float]:
    """GiB of each kind that are alive when most memory is.

    Args:
        trace: events of the allocator in their order, as `torch.cuda.memory._snapshot()["device_traces"]` has them for
            a device: "action", "addr", "size" and, for an "alloc", "frames". What was there before is not in it.
        kind: of an "alloc" event.

    Returns:
        GiB of the kinds that are alive at the peak; their sum is the peak, in the allocator's pieces of 512 bytes.
    """
    alive: dict[int, tuple[int, str]] = {}
    now: dict[str, int] = dict.fromkeys(KINDS, 0)
    total = highest = 0
    peak = dict(now)
    for event in trace:
        if event["action"] == "alloc":
            size, name = allocated(event["size"]), kind(event)
            alive[event["addr"]] = size, name
            now[name] += size
            total += size
            if total > highest:
                highest, peak = total, dict(now)
        elif event["action"] == "free_requested" and event["addr"] in alive:
            size, name = alive.pop(event["addr"])
            now[name] -= size
            total -= size
    return {name: size / training.GIB for name, size in peak.items() if size}


def measure(
    model_factory: Callable[[], GPT2LMHeadModel], seqlen: int, **options: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """`training.try_step` under the eyes of the allocator's history: its row, and GiB of each kind at the peak.

    Args:
        model_factory, seqlen, options: as for `try_step`.

    Returns:
        The row of `try_step`, and GiB by `KINDS`; no kinds where the step did not fit.

    Raises:
        RuntimeError: there is no CUDA GPU; a CPU's allocator keeps no history.
        ValueError, KeyboardInterrupt: as `try_step`.
    """
    if runtime.device.type != "cuda":
        raise RuntimeError(
            "the history of allocations is kept by PyTorch's CUDA allocator: there is none on a CPU. "
            "labutils.training.rehearsal.rehearse_by_kind counts without a GPU"
        )
    configs = []

    def made() -> GPT2LMHeadModel:
        model = model_factory()
        configs.append(model.config)
        return model

    training.free_memory()
    # Stacks in Python alone: those in C++ cost minutes to put names to. "alloc": none for what is freed.
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python")
    device = torch.cuda.current_device()
    try:
        begin = len(torch.cuda.memory._snapshot()["device_traces"][device])  # of a recording before this one
        row = training.try_step(made, seqlen, **options)
        trace = torch.cuda.memory._snapshot()["device_traces"][device][begin:]
    finally:
        torch.cuda.memory._record_memory_history(None)
    if row["status"] != "ok":
        return row, {}
    sizes = Sizes(configs[0])
    dtype = training.resolved_autocast(options.get("autocast_dtype", "auto"), runtime.device)

    def kind(event: Mapping[str, Any]) -> str:
        frames = ((frame["filename"], frame["line"]) for frame in event.get("frames", ()))
        return kind_of(frames, event["size"], sizes, low=dtype is not None)

    return row, at_peak(trace, kind)


def stack() -> list[tuple[str, int]]:
    """File and line of each function that is running, the innermost first."""
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno or 0))
        frame = frame.f_back
    return frames
