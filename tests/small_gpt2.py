"""A GPT-2 small enough for a CPU and for Triton's interpreter, and tokens for it: for several test files."""

import torch

from labutils import runtime
from labutils.gpt2 import models

VOCAB = 97


def make(attention="labutils", **overrides):
    """Two layers of width 32, with the same weights for each attention; in evaluation mode."""
    torch.manual_seed(0)
    fields = {"n_positions": 64, "vocab_size": VOCAB, "attention": attention} | overrides
    return models.gpt2("nano", **fields).to(runtime.device).eval()


def tokens(batch, length, seed=1):
    """int64 (batch, length), random."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed)).to(runtime.device)
