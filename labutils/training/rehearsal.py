"""Rehearsal of a training step without a GPU: its peak memory, predicted on tensors without data.

PyTorch's fake tensors have a shape and a dtype, but no data. A step on them runs the same operators as a real step:
forward, backward and optimizer. Counting the tensors that are alive gives the peak that a GPU's allocator will see.
Only workspaces of cuBLAS and memory inside kernels are missing. It takes seconds, on any machine, for any model, length
and remedy.

The tensors claim to be on the CPU, because a PyTorch built without CUDA has no other device. Two differences of a GPU
are imitated: autocast computes some operators in float32, and the backward pass of a softmax makes a large tensor for
itself.
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

from labutils.gpt2 import models
from labutils.gpt2.loss import language_model_loss
from labutils.machine import runtime
from labutils.machine.memory import GIB
from labutils.training import ledger
from labutils.training.step import make_optimizer, set_checkpointing

# On a GPU it first multiplies gradient and output into a third tensor; all three have the size of the scores
# (`softmax_backward_cuda_out` in PyTorch's aten/src/ATen/native/cuda/SoftMax.cu).
_SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.default


class _Alive(TorchDispatchMode):
    """Counts the bytes of storages by kind, from the operator that makes one until its last reference is gone."""

    def __init__(self, sizes: ledger.Sizes, low: bool) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.by_kind: dict[str, int] = dict.fromkeys(ledger.KINDS, 0)
        self.at_peak: dict[str, int] = {}
        self.making: str | None = None  # the kind of all new tensors; None: the stack tells it
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
        """The bytes that the allocator would hand out for a tensor that is made now, and its kind."""
        kind = self.making or ledger.kind_of(ledger.stack(), nbytes, self._sizes, low=self._low)
        return ledger.allocated(nbytes), kind

    def _count_for_a_moment(self, nbytes: int) -> None:
        """Counts a temporary tensor that an operator makes beside its result, and frees when it returns."""
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
    """The function in float32 under autocast, as on a GPU; on a CPU, autocast would keep the input's dtype."""

    def computed(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    return computed


def _parked_checkpoint(function: Callable[..., Any], *inputs: Any) -> Any:
    """`labutils.training.offload.offloaded_checkpoint`, with meta tensors for the tensors that leave the GPU."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to("meta"), lambda t: torch.empty_like(t, device="cpu")):
        return checkpoint(function, *inputs, use_reentrant=True)


def rehearse(size: str, seqlen: int, **options: Any) -> float:
    """Predicted peak of the memory that a training step allocates on a GPU.

    Args:
        size, seqlen, options: as for `rehearse_by_kind`.

    Returns:
        GiB.
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
    """Predicted memory on a GPU at the peak of a training step, by kind.

    Args:
        size, vocab_size, attention, overrides: as for `gpt2.models.gpt2`; `n_positions` is `seqlen` by default.
        seqlen: N.
        batch: B.
        autocast_dtype: the dtype of products; None is no autocast: float32 throughout.
        checkpointing, chunked_loss, optimizer: as for `labutils.training.train`.

    Returns:
        GiB by `labutils.training.ledger.KINDS`; kinds without memory are left out.

    Raises:
        ValueError: an attention that cannot be rehearsed (the kernel of "sdpa" depends on the GPU), or an unknown size
            or option.
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
    # transformers looks whether positions restart within a row. Fake positions have no values to look at; they do not.
    one_document = mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    # The fake tensors are on the CPU. On a machine with a GPU, our attention would refuse CPU tensors without this.
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
            set_checkpointing(model, checkpointing)
        if checkpointing == "offloaded":
            for block in model.transformer.h:
                block._gradient_checkpointing_func = _parked_checkpoint
        # An offloaded optimizer has no memory on the GPU: its step copies from gradients and to parameters.
        stepper = make_optimizer(model, lr=1e-4, fused=True) if optimizer == "adamw" else None
        if stepper is not None:  # from the second step of a run on, its state exists: make it first
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            stepper.step()
            model.zero_grad(set_to_none=True)
        tokens = torch.zeros(batch, seqlen, dtype=torch.int64, device="cpu")
        with torch.autocast("cpu", dtype=autocast_dtype, enabled=autocast_dtype is not None):
            loss = language_model_loss(model, tokens, chunked_loss=chunked_loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if stepper is not None:
            stepper.step()
    return {kind: size / GIB for kind, size in alive.at_peak.items() if size}
