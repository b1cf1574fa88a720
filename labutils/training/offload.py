"""What a training step need not keep on the GPU: the inputs of checkpointed blocks, and the optimizer with its state.

Both trade the bus between GPU and CPU for memory, and change nothing in the result but rounding. They are rungs of
the ladder in `labutils.training.ladder`, and options of `labutils.training.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def offloaded_checkpoint(function: Callable[..., Any], *inputs: Any) -> Any:
    """Runs a block and keeps its inputs alone, in the CPU's memory; the backward fetches them and runs it again.

    The reentrant form of checkpointing saves a block's inputs the way operators do, so that PyTorch's hooks for saved
    tensors (`torch.autograd.graph.save_on_cpu`) can carry them away; within the block nothing is saved, and so nothing
    else travels. The memory is pinned where there is a GPU.

    Args:
        function: the block.
        inputs: of the block, tensors and others; one of the tensors must ask for a gradient, or none reaches the
            block's parameters.

    Returns:
        What the block returns.
    """
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, use_reentrant=True)


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW on the CPU: the GPU keeps parameters and gradients, the CPU both moments and a copy of the parameters.

    A step copies the gradients over, updates there, and copies the parameters back: for parameters in float32, 8 bytes
    each leave the GPU for 8 that travel in each step (Ren et al. 2021, ZeRO-Offload, arXiv 2101.06840).

    Args:
        params: parameters or groups of them, as every optimizer takes them.
        options: `lr`, `betas`, `weight_decay`, ... as `torch.optim.AdamW` takes them.
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
            ValueError: a closure; it would have to run on the GPU in between.
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
            torch.cuda.synchronize()  # the copies must be there before the CPU reads them
        self._inner.step()
        for there, here in pairs:
            if there.grad is not None:
                there.copy_(here, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # and back before the next step writes the copies anew

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's; the parameters' copies are made anew from the model by `load_state_dict`."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a `state_dict`; the model's weights must have been loaded before."""
        self._inner.load_state_dict(state_dict)
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            outer |= {key: value for key, value in inner.items() if key != "params"}
            for there, here in zip(outer["params"], inner["params"], strict=True):
                here.data.copy_(there.detach())
