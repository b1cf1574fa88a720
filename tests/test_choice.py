"""labutils.training.choice: what is chosen for GPUs that are not there."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from labutils import runtime, training
from labutils.training import choice


def test_a_t4_gets_float16_a_scaler_and_the_memory_efficient_backend():
    t4 = choice.for_capability((7, 5))
    assert (t4.dtype, t4.scaled, t4.attention) == (torch.float16, True, "sdpa")
    assert t4.backends == (SDPBackend.EFFICIENT_ATTENTION,)
    for reason in ("bfloat16", "scaled", "flash", "tensor cores"):
        assert reason in str(t4)


@pytest.mark.parametrize("of", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_later_gpus_get_bfloat16_and_our_kernels(of):
    chosen = choice.for_capability(of)
    assert (chosen.dtype, chosen.scaled, chosen.attention) == (torch.bfloat16, False, "labutils")
    assert SDPBackend.FLASH_ATTENTION in chosen.backends
    assert (SDPBackend.CUDNN_ATTENTION in chosen.backends) == (of >= (9, 0))
    assert SDPBackend.MATH not in chosen.backends


def test_the_choice_is_what_the_lab_does():
    for of in ((7, 5), (8, 6), (9, 0), None):
        assert choice.for_capability(of).dtype == runtime.default_dtype(of)
    here = choice.for_capability(runtime.capability)
    assert here.dtype == (training.resolved_autocast("auto", runtime.device) or torch.float32)


def test_what_triton_does_not_compile_for_is_refused():
    with pytest.raises(ValueError, match="7.5 or higher"):
        choice.for_capability((7, 0))
