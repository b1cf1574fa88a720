"""No kernel for Hopper writes a register that a product in flight still reads, and a kernel that does is found."""

import base64
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from labutils.attention.kernels.launch_config import LaunchConfig
from labutils.attention.tuning import compiled, wgmma_races
from labutils.attention.tuning.compiled import PROGRAMS, Request

PROCESSES = min(8, len(os.sched_getaffinity(0)))


def code(*lines: str) -> str:
    """Machine code as nvdisasm writes it: a line that ends with a colon is a label."""
    text = []
    for number, line in enumerate(lines):
        text.append(line if line.endswith(":") else f"        /*{16 * number:04x}*/                   {line} ;")
    return "\n".join(text)


PRODUCT = "HGMMA.64x64x16.F32 R24, R100, gdesc[UR8].tnspB, R24, gsb0"  # R24 to R55 += (R100 to R103) times a tile
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("lines", "bad"),
    [
        ([PRODUCT, "FADD R100, R1, R2", WAIT], [0x10]),  # its left operand
        ([PRODUCT, "FADD R55, R1, R2", WAIT], [0x10]),  # its accumulator
        ([PRODUCT, WAIT, "FADD R100, R1, R2"], []),
        ([PRODUCT, "FADD R104, R100, R55", WAIT], []),  # reads them
        ([PRODUCT, "LDS.64 R98, [R2]", WAIT], []),
        ([PRODUCT, "LDS.128 R98, [R2]", WAIT], [0x10]),
        ([PRODUCT, "STS.64 [R100+UR4], R24", WAIT], []),  # a store writes no register
        ([PRODUCT, "SHFL.BFLY PT, R103, R1, 0x1, 0x1f", WAIT], [0x10]),  # behind a predicate
        ([PRODUCT, "HGMMA.64x64x16.F32 R24, R104, gdesc[UR8], R24, gsb0", "MOV R100, R1", "EXIT"], [0x20]),
        # One product of two is waited for: the older.
        ([PRODUCT, "HGMMA.64x64x16.F32 R60, R104, gdesc[UR8], R60, gsb0", WAIT[:-1] + "1", "MOV R100, R1"], []),
        ([PRODUCT, "HGMMA.64x64x16.F32 R60, R104, gdesc[UR8], R60, gsb0", WAIT[:-1] + "1", "MOV R104, R1"], [0x30]),
        # As many may run on as there are, or more.
        ([PRODUCT, "HGMMA.64x64x16.F32 R60, R104, gdesc[UR8], R60, gsb0", WAIT[:-1] + "3", "MOV R100, R1"], [0x30]),
        ([PRODUCT, "HMMA.16816.F32 R98, R2, R4, R98", WAIT], [0x10]),  # writes R98 to R101
        ([PRODUCT, "HMMA.16816.F16 R98, R2, R4, R98", WAIT], []),
        # Around a loop, where ptxas does not look.
        ([".L_x_0:", "MOV R100, R1", WAIT, PRODUCT, "@!P0 BRA `(.L_x_0)", "EXIT"], [0x10]),
        ([".L_x_0:", WAIT, "MOV R100, R1", PRODUCT, "@!P0 BRA `(.L_x_0)", "EXIT"], []),
        # Past a branch that is taken, and past one that may be.
        ([PRODUCT, "BRA `(.L_x_0)", "MOV R100, R1", ".L_x_0:", WAIT, "EXIT"], []),
        ([PRODUCT, "@P0 BRA `(.L_x_0)", "MOV R100, R1", ".L_x_0:", WAIT, "EXIT"], [0x20]),
    ],
)
def test_what_counts_as_a_race(lines, bad):
    assert [instruction.address for instruction in wgmma_races.overwritten(code(*lines))] == bad


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="no instructions"):
        wgmma_races.overwritten("")
    with pytest.raises(ValueError, match="a kind of product that is not known here: 0x0000 HGMMA.SP"):
        wgmma_races.overwritten(code("HGMMA.SP R24, R100, gdesc[UR8], R24"))


@pytest.fixture(scope="module")
def rotated():
    """Machine code of the two kernels of rotated_kernels.py: "early" and "late"."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("rotated_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cubins = {name: base64.b64decode(cubin) for name, cubin in json.loads(done.stdout).items()}
    assert all(wgmma_races.count(cubin) is not None for cubin in cubins.values())
    return {name: wgmma_races.machine_code(cubin) for name, cubin in cubins.items()}


def test_a_loop_that_computes_ahead_is_found(rotated):
    # Triton 3.6 to 3.8 make the race of `early`; 3.9 copies P to other registers behind the wait.
    makes_the_race = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
    assert bool(wgmma_races.overwritten(rotated["early"])) == makes_the_race
    assert not wgmma_races.overwritten(rotated["late"])


def test_a_wait_that_lets_products_run_on_is_found(rotated):
    # Every version makes this race: `late` as compiled, with waits that no longer wait for the older product.
    assert WAIT in rotated["late"]
    assert wgmma_races.overwritten(rotated["late"].replace(WAIT, WAIT[:-1] + "2"))


def test_no_kernel_of_ours_has_it():
    wanted = [
        Request(program, head_dim, torch.float16, (9, 0), causal)
        for program, head_dim, causal in itertools.product(("forward", "backward"), (64, 128, 256), (False, True))
    ]
    wanted += [
        Request(
            program, 128, torch.bfloat16, (9, 0), features=tuple(f for f in PROGRAMS[program].features if f != "paged")
        )
        for program in ("forward", "backward")
    ]
    wanted += [Request(program, 128, torch.float16, (9, 0)) for program in ("v1", "decode")]
    wanted.append(Request("forward", 64, torch.float16, (9, 0), features=("paged",)))
    wanted.append(Request("backward", 64, torch.float16, (9, 0), config=LaunchConfig(64, 64, 4, 3, tma=False)))
    for request, kernels in zip(wanted, compiled.resources_of(wanted, binaries=True, processes=PROCESSES)):
        for kernel in kernels:
            if kernel.kernel != "flash_decode._merge_kernel":  # which adds up, and multiplies no matrices
                assert kernel.overwritten == 0, (request, kernel)  # not None: there are products that can be in flight
