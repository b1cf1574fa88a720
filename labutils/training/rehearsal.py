"""A training step without a GPU and without numbers: what would be alive on the GPU at its peak.

PyTorch's fake tensors have a shape and a dtype, and no data. A step on them runs the same operators as a real one,
forward, backward and optimizer, and says which tensors each of them makes. Counting those that are alive gives the
peak that the allocator of a GPU will see, but for workspaces of cuBLAS and what kernels use within themselves, for
any model, length and remedy, in seconds, on any machine. The tensors claim to be the CPU's, since a PyTorch built
without CUDA knows no others; what autocast does differently on a GPU is played after it, and so is the one operator
that makes a large tensor for itself there: the backward pass of a softmax.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from labutils import training
from labutils.gpt2 import models
from labutils.machine import runtime
from labutils.training import ledger

# On a GPU it first multiplies the gradient and the output, of the scores' size each, into a third tensor of that size
# (`softmax_backward_cuda_out` in PyTorch's aten/src/ATen/native/cuda/SoftMax.cu).
_SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.default


class _Alive(TorchDispatchMode):
    """Counts the bytes of storages by kind, from when an operator makes one until nobody holds it."""

    def __init__(self, sizes: ledger.Sizes, low: bool) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.by_kind: dict[str, int] = dict.fromkeys(ledger.KINDS, 0)
        self.at_peak: dict[str, int] = {}
        self.making: str | None = None  # the kind of all that is made, where it is not to be found out
        self._sizes, self._low = sizes, low
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        if function is _SOFTMAX_BACKWARD:
            self._count_for_a_moment(args[0].nbytes)
        return result

    def _size_and_kind(self, nbytes: int) -> tuple[int, str]:
        """What the allocator hands out for a tensor that is made now, in bytes; and what it is."""
        kind = self.making or ledger.kind_of(ledger.stack(), nbytes, self._sizes, low=self._low)
        return ledger.allocated(nbytes), kind

    def _count_for_a_moment(self, nbytes: int) -> None:
        """A tensor that an operator makes for itself, beside its result, and drops when it returns."""
        size, kind = self._size_and_kind(nbytes)
        if self.bytes + size > self.peak:
            self.peak, self.at_peak = self.bytes + size, self.by_kind | {kind: self.by_kind[kind] + size}

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size, kind = self._size_and_kind(storage.nbytes())

        def gone(_: Any) -> None:
            del self._seen[key]
            self.bytes -= size
            self.by_kind[kind] -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.by_kind[kind] += size
        if self.bytes > self.peak:
            self.peak, self.at_peak = self.bytes, dict(self.by_kind)


def _in_float32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What autocast computes in float32 on a GPU, and in its input's own dtype on a CPU."""

    def computed(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    return computed


def _parked_checkpoint(function: Callable[..., Any], *inputs: Any) -> Any:
    """`labutils.training.offload.offloaded_checkpoint`, with meta tensors for those that leave the GPU."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to("meta"), lambda t: torch.empty_like(t, device="cpu")):
        return checkpoint(function, *inputs, use_reentrant=True)


def rehearse(size: str, seqlen: int, **options: Any) -> float:
    """Peak of the memory allocated on a GPU by a training step, in GiB, counted without one.

    Args:
        size, seqlen, options: as for `rehearse_by_kind`.
    """
    return sum(rehearse_by_kind(size, seqlen, **options).values())


def rehearse_by_kind(
    size: str,
    seqlen: int,
    *,
    batch: int = 1,
    vocab_size: int = 50257,
    attention: Literal["labutils", "eager"] = "labutils",
    autocast_dtype: torch.dtype | None = torch.bfloat16,
    checkpointing: bool | Literal["offloaded"] = False,
    chunked_loss: int | None = None,
    optimizer: Literal["adamw", "offloaded"] = "adamw",
    **overrides: Any,
) -> dict[str, float]:
    """What is alive on a GPU at the peak of a training step, in GiB by kind (`ledger.KINDS`), without one.

    Args:
        size, vocab_size, attention, overrides: as for `gpt2.models.gpt2`; `n_positions` is `seqlen` unless given.
        seqlen: N.
        batch: B.
        autocast_dtype: of products; None is no autocast, and float32 throughout.
        checkpointing, chunked_loss, optimizer: as for `labutils.training.train`.

    Returns:
        GiB by `labutils.training.ledger.KINDS`, without those of which nothing is there.

    Raises:
        ValueError: an attention that a rehearsal cannot play (PyTorch chooses the kernel of "sdpa" by the GPU), or an
            unknown size or option.
    """
    if attention not in ("labutils", "eager"):
        raise ValueError(f"attention={attention!r}: a rehearsal knows 'labutils' and 'eager'")
    if optimizer not in ("adamw", "offloaded"):
        raise ValueError(f"optimizer must be 'adamw' or 'offloaded', got {optimizer!r}")
    with torch.device("meta"):
        model = models.gpt2(size, vocab_size=vocab_size, attention=attention, **({"n_positions": seqlen} | overrides))
    alive = _Alive(ledger.Sizes(model.config), autocast_dtype is not None)
    power, softmax = (
        mock.patch.object(torch, "pow", _in_float32(torch.pow)),
        mock.patch.object(F, "softmax", _in_float32(F.softmax)),
    )
    # transformers looks whether positions begin again within a row. These have no values to look at, and do not.
    one_document = mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    # On a machine with a GPU, too, these are tensors of the CPU, where attention would refuse them.
    here = mock.patch.multiple(runtime, device=torch.device("cpu"), interpreted=True)
    with here, FakeTensorMode(allow_non_fake_inputs=True), alive, one_document, power, softmax:
        alive.making = "parameters"
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
        model.tie_weights()
        alive.peak, alive.making = alive.bytes, None
        model.train()
        if checkpointing:
            training.set_checkpointing(model, checkpointing)
        if checkpointing == "offloaded":
            for block in model.transformer.h:
                block._gradient_checkpointing_func = _parked_checkpoint
        # An optimizer that is offloaded has nothing here; its step copies from and to what is there.
        stepper = training.make_optimizer(model, lr=1e-4, fused=True) if optimizer == "adamw" else None
        if stepper is not None:  # its state is there from the second step of a run on: make it first
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            stepper.step()
            model.zero_grad(set_to_none=True)
        tokens = torch.zeros(batch, seqlen, dtype=torch.int64, device="cpu")
        with torch.autocast("cpu", dtype=autocast_dtype, enabled=autocast_dtype is not None):
            loss = models.language_model_loss(model, tokens, chunked_loss=chunked_loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if stepper is not None:
            stepper.step()
    return {kind: size / training.GIB for kind, size in alive.at_peak.items() if size}
