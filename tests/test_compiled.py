"""Every entry of the launch table fits the GPUs that it is for: compiled for each of them, with none in the machine."""

import itertools
import os
import types
from dataclasses import replace

import pytest
import torch

from labutils.attention.kernels import launch, launch_config
from labutils.attention.kernels.launch_config import LaunchConfig
from labutils.attention.tuning import compiled
from labutils.attention.tuning.compiled import PROGRAMS, Request, Resources
from labutils.machine.chips import GPUS

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.float32)  # bfloat16 takes what float16 takes: see the test of that
PROCESSES = min(8, len(os.sched_getaffinity(0)))

# For these the table has no entry: (kernel, head dimension, dtype) by capability.
V1 = ("v1", 256, torch.float16)
NO_ENTRY = {capability: {V1} for capability in GPUS} | {(7, 5): {("dkdv", 256, torch.float32)}}

# One GPU for each way that Triton has of making a product of 16-bit tiles. For these, kernels are compiled with their
# features, too, and for head dimensions whose rows no tensor descriptor and no wide load can take: both can need more.
# Pages are left out: with them kernels need 1 KiB more at most, and mostly less, since less is loaded ahead.
THOROUGH = {(8, 6), (9, 0), (10, 0)}

BFLOAT16 = [
    Request(program, 128, torch.bfloat16, capability)
    for program in ("forward", "backward", "decode")
    for capability in ((8, 0), (9, 0))
]
FLOAT16 = [replace(request, dtype=torch.float16) for request in BFLOAT16]
# With tensor memory; with what a launch derives from optional arguments.
COMPLETE = [
    Request("v1", 64, torch.float16, (10, 0)),
    Request("decode", 64, torch.float16, (8, 6), features=("alibi", "lengths")),
]


def entry(kernel: str, head_dim: int, dtype: torch.dtype, capability, causal: bool = True) -> LaunchConfig | None:
    """The launch table's entry, None where it has none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_capability", lambda index: capability)
        try:
            return launch.pick_config(kernel, head_dim, dtype, causal, torch.device("meta"), longest=1024)
        except RuntimeError as error:
            assert "too little shared memory" in str(error)
            return None


def entries(request: Request) -> tuple[LaunchConfig | None, ...]:
    kernels = PROGRAMS[request.program].kernels
    return tuple(entry(k, request.head_dim, request.dtype, request.capability, request.causal) for k in kernels)


def requests(capability: tuple[int, int]) -> list[Request]:
    """All programs with all entries of the table; where several share theirs, causal and the largest head."""
    by_entries = {}
    for program, dtype, causal, head_dim in itertools.product(PROGRAMS, DTYPES, (False, True), HEAD_DIMS):
        request = Request(program, head_dim, dtype, capability, causal)
        by_entries[program, dtype, entries(request)] = request
    found = []
    for (*_, configs), request in by_entries.items():
        if None in configs:
            continue
        if capability in THOROUGH and request.dtype == torch.float16:
            found.append(replace(request, head_dim=request.head_dim - 1))
            if request.causal:  # the feature "window" makes any other request one of these
                features = tuple(feature for feature in PROGRAMS[request.program].features if feature != "paged")
                request = replace(request, features=features)
        found.append(request)
    return found


@pytest.fixture(scope="module")
def costs() -> dict[Request, list[Resources]]:
    """What each request launches: of the table's entries, and of those that tests compare with something."""
    wanted = [request for capability in GPUS for request in requests(capability)] + BFLOAT16 + FLOAT16 + COMPLETE
    return dict(zip(wanted, compiled.resources_of(wanted, processes=PROCESSES)))


@pytest.mark.parametrize("capability", GPUS, ids=lambda c: f"{c[0]}.{c[1]}")
def test_every_entry_of_the_launch_table_fits(capability, costs):
    seen = {request: found for request, found in costs.items() if request.capability == capability}
    assert seen
    too_large = [cost for found in seen.values() for cost in found if not cost.fits]
    assert not too_large, f"a block may use {GPUS[capability].shared_kib} KiB and 512 columns of tensor memory"


def test_the_table_has_no_other_gaps():
    for capability in GPUS:
        gaps = {
            (kernel, head_dim, dtype)
            for kernel in launch_config.KERNELS
            for head_dim in HEAD_DIMS
            for dtype in DTYPES
            if entry(kernel, head_dim, dtype, capability) is None
        }
        assert gaps == NO_ENTRY[capability]


def test_each_kernel_of_the_table_is_compiled_as_the_table_has_it(costs):
    assert {kernel for program in PROGRAMS.values() for kernel in program.kernels} == set(launch_config.KERNELS)
    for request, found in costs.items():
        for config in entries(request):
            assert any(
                cost.constants.get("BLOCK_M") == config.block_m
                and cost.constants.get("BLOCK_N") == config.block_n
                and (cost.num_warps, cost.num_stages) == (config.num_warps, config.num_stages)
                for cost in found
            ), (request, config, found)


def test_a_configuration_can_be_too_large():
    large = LaunchConfig(128, 128, 8, 3)
    wanted = [Request("forward", 128, torch.float16, capability, config=large) for capability in ((9, 0), (8, 9))]
    [[hopper], [ada]] = compiled.resources_of(wanted)
    assert hopper.fits
    assert not ada.fits
    assert ada.shared_bytes > 99 * 1024


def test_bfloat16_takes_what_float16_takes(costs):
    for bfloat16, float16 in zip(BFLOAT16, FLOAT16):
        assert costs[bfloat16] == costs[float16]


def test_the_short_way_gives_what_a_complete_compilation_gives(costs):
    short = [cost for request in COMPLETE for cost in costs[request]]
    complete = [cost for found in compiled.resources_of(COMPLETE, binaries=True) for cost in found]
    assert len(short) == len(complete) == 3
    assert short[0].tensor_columns > 0
    for one, other in zip(short, complete):
        assert one == replace(other, registers=None, spilled_bytes=None, instructions=None, overwritten=None)
        assert one.blocks_per_sm is one.occupancy is None
        assert 16 < other.registers <= 255
        assert other.spilled_bytes >= 0
        assert 0 < other.occupancy <= 1


@pytest.mark.parametrize(
    "capability, warps, shared_kib, columns, registers, blocks",
    [
        ((9, 0), 8, 64, 0, 128, 2),  # registers: 128 * 256 of 65,536
        ((9, 0), 4, 32, 0, 168, 3),  # registers: 5,376 a warp, three warps in each quarter
        ((9, 0), 4, 112, 0, 64, 2),  # shared memory, 1 KiB more a block: 226 of 228
        ((9, 0), 4, 114, 0, 64, 1),
        ((7, 5), 4, 32, 0, 64, 2),  # Turing takes nothing on top
        ((8, 6), 4, 0, 0, 16, 12),  # warps
        ((8, 6), 2, 0, 0, 16, 16),  # blocks
        ((10, 0), 4, 16, 256, 64, 2),  # tensor memory
        ((10, 0), 4, 16, 544, 64, 0),
    ],
)
def test_blocks_per_sm(capability, warps, shared_kib, columns, registers, blocks):
    cost = Resources("kernel", capability, {}, warps, 2, shared_kib * 1024, columns, registers, 0)
    assert cost.blocks_per_sm == blocks
    assert cost.occupancy == blocks * warps / GPUS[capability].warps_per_sm
    assert cost.fits == (blocks > 0)


def test_what_cannot_be_compiled_is_named():
    with pytest.raises(RuntimeError, match="too little shared memory for the kernel 'dkdv'") as raised:
        compiled.resources_of([Request("backward", 256, torch.float32, (7, 5))])
    assert "program='backward', head_dim=256" in str(raised.value)
    with pytest.raises(ValueError, match="'nothing' is not known: one of v1, forward"):
        Request("nothing", 64, torch.float16, (8, 0))
    with pytest.raises(ValueError, match=r"capability=\(7, 0\) is not known"):
        Request("forward", 64, torch.float16, (7, 0))
    with pytest.raises(ValueError, match="'backward' has no feature paged"):
        Request("backward", 64, torch.float16, (8, 0), features=("window", "paged"))


def test_cuobjdump_that_answers_something_else(monkeypatch):
    kernel = types.SimpleNamespace(asm={"cubin": b""})
    monkeypatch.setattr(compiled.triton, "compile", lambda *args, **options: kernel)
    answer = types.SimpleNamespace(stdout="usage: cuobjdump [options] <file>\n")
    monkeypatch.setattr(compiled, "subprocess", types.SimpleNamespace(run=lambda *args, **options: answer))
    with pytest.raises(RuntimeError, match="names no registers and no stack: 'usage: cuobjdump"):
        compiled._build(None, None, {})
