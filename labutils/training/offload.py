"""Offloading to the CPU: the inputs of checkpointed blocks, and the optimizer with its state.

Both save GPU memory and cost traffic between GPU and CPU. They change the result only by rounding. They are options of
`labutils.training.train`, and rungs of the ladder in `labutils.training.ladder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def offloaded_checkpoint(function: Callable[..., Any], *inputs: Any) -> Any:
    """Runs a block and keeps only its inputs, in the CPU's memory. The backward pass fetches them and runs it again.

    The reentrant form of checkpointing saves a block's inputs as operators do, so PyTorch's hooks for saved tensors
    (`torch.autograd.graph.save_on_cpu`) can move them to the CPU. Within the block nothing is saved, so nothing else is
    moved. The CPU's memory is pinned if there is a GPU.

    Args:
        function: the block.
        inputs: arguments of the block. At least one tensor must require a gradient; otherwise the block's parameters
            get none.

    Returns:
        The output of the block.
    """
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, use_reentrant=True)


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW on the CPU: the GPU keeps parameters and gradients, the CPU both moments and a copy of the parameters.

    A step copies the gradients to the CPU, updates there, and copies the parameters back. With float32 this saves 8
    bytes of GPU memory for each parameter, and each step copies 8 bytes for it (Ren et al. 2021, ZeRO-Offload, arXiv
    2101.06840).

    Args:
        params: parameters or groups of them, as for any optimizer.
        options: `lr`, `betas`, `weight_decay`, ... of `torch.optim.AdamW`.
    """

    def __init__(self, params: Iterable[Any], **options: Any):
        super().__init__(params, {})
        pinned = torch.cuda.is_available()
        groups = []
        for group in self.param_groups:
            copies = [torch.empty_like(p, device="cpu", pin_memory=pinned).copy_(p.detach()) for p in group["params"]]
            groups.append({key: value for key, value in group.items() if key != "params"} | {"params": copies})
        self._inner = torch.optim.AdamW(groups, **options)
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            outer |= {key: value for key, value in inner.items() if key != "params"}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update.

        Raises:
            ValueError: a closure, which would have to run on the GPU in the middle of the step.
        """
        if closure is not None:
            raise ValueError("OffloadedAdamW takes no closure: compute the gradients before step()")
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner |= {key: value for key, value in outer.items() if key != "params"}  # the learning rate may have moved
            pairs += zip(outer["params"], inner["params"], strict=True)
        for there, here in pairs:
            if there.grad is None:
                here.grad = None
            else:
                if here.grad is None:
                    here.grad = torch.empty_like(here, pin_memory=here.is_pinned())
                here.grad.copy_(there.grad, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies must be complete before the CPU reads them
        self._inner.step()
        for there, here in pairs:
            if there.grad is not None:
                there.copy_(here, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # and before the next step overwrites the CPU's parameters

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state. The copies of the parameters are not in it; `load_state_dict` makes new ones."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a `state_dict`. Load the model's weights first."""
        self._inner.load_state_dict(state_dict)
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            outer |= {key: value for key, value in inner.items() if key != "params"}
            for there, here in zip(outer["params"], inner["params"], strict=True):
                here.data.copy_(there.detach())
