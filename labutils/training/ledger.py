"""The memory of a training step by kind: what each byte at the peak is for.

The Python stack of an allocation tells its kind. `measure` gets the stacks from the history of PyTorch's GPU allocator
(`torch.cuda.memory._record_memory_history`), and `training.rehearsal` looks at its own stack. `kind_of` reads both, so
predicted and measured memory are split in the same way.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from labutils.gpt2 import loss, models
from labutils.machine import runtime
from labutils.machine.memory import GIB, free_memory
from labutils.training.fits import try_step
from labutils.training.step import resolved_autocast

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel

KINDS = (
    "parameters", "AdamW", "16-bit weights", "residual stream", "attention", "MLP", "logits", "gradients", "backward",
)  # fmt: skip
"""The kinds of memory. "residual stream" includes LayerNorms and embeddings, "attention" and "MLP" include the inputs
of their linear layers, "logits" includes the loss. "gradients" are those of the parameters; "backward" is everything
else that the backward pass makes."""


@functools.cache
def _places() -> dict[str, list[tuple[int, int, int, str]]]:
    """The known functions of each file: first line, last line, depth, kind. The deepest function in a stack counts."""
    from torch.optim import adam, adamw, optimizer
    from transformers.models.gpt2 import modeling_gpt2 as gpt2

    functions: list[tuple[int, str, Any]] = [
        (0, "logits", loss.language_model_loss), (0, "logits", gpt2.GPT2LMHeadModel.forward),
        (1, "residual stream", gpt2.GPT2Model.forward), (1, "logits", loss._chunk_loss),
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
    """Sizes in bytes that tell the kind of an allocation without a Python stack.

    Autocast makes 16-bit copies of weights inside an operator. On a GPU the backward pass runs in its own thread, which
    has no Python stack.

    Args:
        config: of the model.

    Attributes:
        copies: sizes of the 16-bit copies of the matrices.
        gradients: sizes of the matrices' gradients, in 16 and in 32 bits.
        row: number of logits of one token, V (not bytes).
    """

    def __init__(self, config: GPT2Config):
        width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
        matrices = {width * 3 * width, width * width, width * inner, config.vocab_size * width}
        self.copies = {2 * n for n in matrices}  # wrong for a sequence that is as long as a matrix is wide
        self.gradients = self.copies | {4 * n for n in matrices}
        self.row = config.vocab_size

    def logits(self, size: int) -> bool:
        """Whether so many bytes are logits: whole rows, of at least 256 tokens in 16 bits or 128 tokens in 32 bits."""
        return size not in self.gradients and size % (2 * self.row) == 0 and size // (2 * self.row) >= 256


def kind_of(frames: Iterable[tuple[str, int]], size: int, sizes: Sizes, *, low: bool = True) -> str:
    """The kind of an allocation, one of `KINDS`.

    Args:
        frames: file and line of each function on its stack, in any order; empty in a GPU's backward pass.
        size: requested bytes.
        sizes: sizes of the model.
        low: whether products are in 16 bits, with copies of the weights.

    Returns:
        The kind of the deepest known function. If the stack has no known function, the size tells the kind.
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
    """Bytes that PyTorch's GPU allocator hands out for a request of `size` bytes: the next multiple of 512."""
    return -(-size // 512) * 512


def at_peak(trace: Sequence[Mapping[str, Any]], kind: Callable[[Mapping[str, Any]], str]) -> dict[str, float]:
    """GiB of each kind at the moment when most memory is allocated.

    Args:
        trace: events of the allocator in their order, a device's entry of
            `torch.cuda.memory._snapshot()["device_traces"]`: "action", "addr", "size" and, for an "alloc", "frames".
            Memory that was allocated before is not in it.
        kind: gives the kind of an "alloc" event.

    Returns:
        GiB of each kind that is alive at the peak. Their sum is the peak, in the allocator's multiples of 512 bytes.
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
    return {name: size / GIB for name, size in peak.items() if size}


def measure(
    model_factory: Callable[[], GPT2LMHeadModel], seqlen: int, **options: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """`training.try_step` with the allocator's history switched on: its row, and GiB of each kind at the peak.

    Args:
        model_factory, seqlen, options: as for `try_step`.

    Returns:
        The row of `try_step`, and GiB by `KINDS`; an empty dict if the step did not fit.

    Raises:
        RuntimeError: there is no CUDA GPU; a CPU's allocator keeps no history.
        ValueError, KeyboardInterrupt: as `try_step`.
    """
    if runtime.device.type != "cuda":
        raise RuntimeError(
            "PyTorch's CUDA allocator keeps the history of allocations: there is none on a CPU. "
            "labutils.training.rehearsal.rehearse_by_kind predicts them without a GPU"
        )
    configs = []

    def made() -> GPT2LMHeadModel:
        model = model_factory()
        configs.append(model.config)
        return model

    free_memory()
    # Only Python stacks: resolving the names of C++ stacks takes minutes. "alloc": freed memory needs no stack.
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python")
    device = torch.cuda.current_device()
    try:
        begin = len(torch.cuda.memory._snapshot()["device_traces"][device])  # events of an earlier recording
        row = try_step(made, seqlen, **options)
        trace = torch.cuda.memory._snapshot()["device_traces"][device][begin:]
    finally:
        torch.cuda.memory._record_memory_history(None)
    if row["status"] != "ok":
        return row, {}
    sizes = Sizes(configs[0])
    dtype = resolved_autocast(options.get("autocast_dtype", "auto"), runtime.device)

    def kind(event: Mapping[str, Any]) -> str:
        frames = ((frame["filename"], frame["line"]) for frame in event.get("frames", ()))
        return kind_of(frames, event["size"], sizes, low=dtype is not None)

    return row, at_peak(trace, kind)


def stack() -> list[tuple[str, int]]:
    """File and line of each function on the Python stack, the innermost first."""
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno or 0))
        frame = frame.f_back
    return frames
