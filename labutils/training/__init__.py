"""Training a GPT-2 on long sequences: the loop, its memory, what fits, and what a long context is good for.

    choice          which number format and which attention to train with on a GPU
    step            one training step: loss, gradients, update
    loop            the training loop, and the evaluation of a model
    checkpoints     saves a run, so that it can continue later
    offload         keeps inputs of blocks and the optimizer in the CPU's memory
    fits            trains a few steps to see whether they fit into memory
    attention_used  which attention a training step really runs
    ledger          GPU memory at the peak of a step by kind, as measured
    rehearsal       the same, predicted without a GPU
    ladder          the longest sequence that trains on a card with each remedy
    parity          whether another attention trains the same model
    tasks           questions that only a long context answers
    curriculum      teaches a small model these tasks, in documents that grow

The notebooks and the command `train` use the names that are imported here.
"""

from labutils.machine.memory import memory_cap
from labutils.training.attention_used import attention_used
from labutils.training.fits import try_step
from labutils.training.loop import History, evaluate, train
from labutils.training.step import make_optimizer, resolved_autocast

__all__ = [
    "History",
    "attention_used",
    "evaluate",
    "make_optimizer",
    "memory_cap",
    "resolved_autocast",
    "train",
    "try_step",
]
