"""The package behind the four notebooks, in nine rooms:

    machine     what this machine is, and how the lab runs on it
    attention   what attention is (the reference), flash-attn's functions, the kernels under them, their tuning
    benchmark   time, memory and error of every backend, and the environment that they were measured in
    analysis    why it takes that long: bytes, roofline, profiles, prediction, advice
    gpt2        a GPT-2 on the lab's attention: model, positions, loss, texts
    training    the training loop, its memory, what fits, long contexts
    plotting    every figure
    exercises   checks, hints and answers, and the grading of returned notebooks
    commands    python -m labutils NAME

A room imports only from rooms above it in this list; `results` holds stored tables.

The way of a call: `flash_attn_func` (`attention.interface`) checks its arguments. A call like one before is launched
again at once (`attention.fast_path`); any other goes through PyTorch's dispatcher (`attention.operators`). Both end in
the host function of a kernel (`attention.kernels`), which asks for a launch configuration and starts it.

Import labutils before triton: on a machine without a GPU, `labutils.runtime` switches Triton's interpreter on, and
Triton reads that switch only once, when it is imported.
"""

import importlib
import sys
from typing import Any

__version__ = "0.2.0.dev0"

_FLASH_ATTN = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)
"""What the package `flash_attn` hands on, too. Imported when asked for: `import labutils` stays fast."""

__all__ = ["__version__", "runtime", *_FLASH_ATTN]

# The help of a command needs no torch, and what a command runs imports `runtime` first, as every module does. Two kinds
# of command lines import labutils: `python -m labutils`, where the first argument is "-m" while Python looks for the
# module, and the scripts of `tools`, which say so with LABUTILS_COMMAND_LINE.
if sys.argv[:1] != ["-m"] and not hasattr(sys.modules.get("__main__"), "LABUTILS_COMMAND_LINE"):
    from labutils.machine import runtime  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _FLASH_ATTN:
        return getattr(importlib.import_module("labutils.attention.interface"), name)
    if name == "runtime":
        return importlib.import_module("labutils.machine.runtime")
    raise AttributeError(f"module 'labutils' has no attribute {name!r}")
