"""labutils.machine.chips: the one table of GPUs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labutils import runtime
from labutils.machine import chips

PACKAGE = Path(chips.__file__).resolve().parents[1]
TABLE = PACKAGE / "machine" / "chips.py"


def capabilities_in(source):
    """Lines on which code (not text) writes the compute capability of a GPU of the table as a tuple of numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple) and all(isinstance(element, ast.Constant) for element in node.elts):
            values = tuple(element.value for element in node.elts)
            if values in chips.GPUS and all(type(value) is int for value in values):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_writes_a_compute_capability(path):
    lines = capabilities_in(path.read_text())
    if path == TABLE:
        assert len(lines) == len(chips.GPUS)
    else:
        assert not lines, f"lines {lines}: take the name of machine/chips.py, such as chips.TMA, or add one there"


def test_a_compute_capability_is_noticed():
    assert capabilities_in('"""As (9, 0)."""\nif of >= (8, 0) or of == (9, 0):\n    x = (8, 1)') == [2, 2]


def test_the_table_is_read_without_torch():
    code = (
        "import sys; sys.argv = ['-m']; import labutils.machine.chips as c; print(len(c.GPUS), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(chips.GPUS)), "False"]


def test_limits_fit_together():
    assert list(chips.GPUS) == sorted(chips.GPUS) and next(iter(chips.GPUS)) == chips.OLDEST
    for capability, chip in chips.GPUS.items():
        reserved = chip.shared_kib_per_sm - chip.shared_kib
        assert reserved == (0 if capability < chips.AMPERE else 1) and chip.names and chip.architecture
    for name, card in chips.CARDS.items():
        assert name in chips.GPUS[card.capability].names.split(", ")
        assert card.source.startswith("NVIDIA") and card.tflops > 0 and card.gb_per_s > 0


@pytest.mark.parametrize("capability", chips.GPUS)
def test_text_and_back(capability):
    assert chips.undotted(chips.dotted(capability)) == capability


def test_text_that_is_no_capability_is_refused():
    with pytest.raises(ValueError):
        chips.undotted("9")


@pytest.mark.gpu
@pytest.mark.skipif(runtime.capability not in chips.GPUS, reason="about a GPU of the table")
def test_this_gpu_has_the_limits_of_the_table():
    chip, properties = chips.GPUS[runtime.capability], torch.cuda.get_device_properties(0)
    assert properties.shared_memory_per_block_optin == chip.shared_kib * 1024
    assert properties.shared_memory_per_multiprocessor == chip.shared_kib_per_sm * 1024
    assert properties.regs_per_multiprocessor == chips.REGISTERS_PER_SM
    assert properties.max_threads_per_multi_processor == chip.warps_per_sm * chips.WARP_SIZE
    [card] = [card for name, card in chips.CARDS.items() if name in runtime.machine.split()] or [None]
    assert card is None or card.processors == properties.multi_processor_count
