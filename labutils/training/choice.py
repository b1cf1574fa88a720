"""Which number format and which attention to train with on a GPU of a given compute capability, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from labutils.machine import chips


@dataclass(frozen=True)
class Choice:
    """How to train on a machine.

    Attributes:
        dtype: the dtype of autocast, which matrix products use.
        scaled: whether the loss is scaled, so that small gradients do not vanish (torch.amp.GradScaler).
        attention: the name for `labutils.gpt2.models.gpt2`.
        backends: the backends of PyTorch's attention that "sdpa" may use on this machine, the best first. None of them
            stores the N x N matrix.
        why: one sentence for each decision.
    """

    dtype: torch.dtype
    scaled: bool
    attention: str
    backends: tuple[SDPBackend, ...]
    why: str

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        names = ", ".join(backend.name.lower() for backend in self.backends)
        scaled = " with a scaled loss" if self.scaled else ""
        return f"{name}{scaled}, attention {self.attention!r} (of PyTorch's backends: {names}). {self.why}"


def for_capability(capability: tuple[int, int] | None) -> Choice:
    """The choice for a GPU of this compute capability, or for a CPU (None). The machine need not have such a GPU.

    Raises:
        ValueError: a capability below 7.5: neither Triton nor flash-attn compiles for such GPUs.
    """
    if capability is None:
        return Choice(
            torch.float32, False, "sdpa", (SDPBackend.FLASH_ATTENTION,),
            "A CPU computes fastest in float32. Our kernels run in Triton's interpreter there, far too slow to train "
            "with; PyTorch has a flash kernel for the CPU.",
        )  # fmt: skip
    if capability < chips.OLDEST:
        raise ValueError(
            f"compute capability {chips.dotted(capability)}: the lab needs {chips.dotted(chips.OLDEST)} or higher. Ask "
            "for None and train on the CPU"
        )
    if capability < chips.BFLOAT16:
        return Choice(
            torch.float16, True, "sdpa", (SDPBackend.EFFICIENT_ATTENTION,),
            "Tensor cores of this generation have no bfloat16. float16 has too few exponent bits for small gradients, "
            "so the loss is scaled. PyTorch's flash backend and flash-attn need 8.0; Triton uses no tensor cores here, "
            "so that our kernels are right and slow. The memory-efficient backend stores no N x N matrix either, and "
            "uses them.",
        )  # fmt: skip
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if capability >= chips.HOPPER:
        backends.insert(0, SDPBackend.CUDNN_ATTENTION)
    return Choice(
        torch.bfloat16, False, "labutils", tuple(backends),
        "bfloat16 has float32's range of exponents, so that the loss needs no scaling. Our kernels use tensor cores "
        "from 8.0 on" + ("; cuDNN has kernels for this generation besides." if capability >= chips.HOPPER else "."),
    )  # fmt: skip
