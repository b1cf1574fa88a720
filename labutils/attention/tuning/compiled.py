"""Compiles our kernels for any GPU, without having it, and says what they need: shared memory, registers, spills.

A child process, in which Triton compiles and does not interpret, calls the host functions of the kernels with tensors
that have no data. Triton derives types and specialisation from their arguments, as for any launch, and hands them to
its `jit_cache_hook`. There the launch ends, and the kernel is compiled for the requested GPU. So the results are about
the kernels that a user's call launches on that GPU, in the configuration that the launch table has for it.

    from labutils.attention.tuning import compiled
    from labutils.machine import chips
    request = compiled.Request("forward", 64, torch.float16, chips.AMPERE_RTX)
    [[forward]] = compiled.resources_of([request], binaries=True)
    forward.shared_bytes, forward.registers, forward.blocks_per_sm
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from labutils.attention.kernels import flash_decode, flash_v1, flash_v2, flash_v2_backward, kv_append, launch
from labutils.attention.kernels.launch_config import LaunchConfig
from labutils.attention.kernels.options import Cache, Options
from labutils.attention.tuning import wgmma_races
from labutils.machine import chips
from labutils.machine.chips import GPUS, REGISTERS_PER_SM, TENSOR_MEMORY_COLUMNS, WARP_SIZE


@dataclass(frozen=True)
class Request:
    """One call of a host function, on one kind of GPU.

    Attributes:
        program: a key of `PROGRAMS`.
        head_dim: D. dtype: of q, k and v.
        capability: a key of `GPUS`.
        causal: whether the causal mask is on.
        features: those of `PROGRAMS[program].features` to switch on.
        config: launch configuration for all kernels of the program that take one; None: from the launch table.
        only: the kernel to compile, named as in `Resources.kernel`; None: all that the program launches.

    Raises:
        ValueError: the program does not exist or has no such feature, or the capability is not in the table.
    """

    program: str
    head_dim: int
    dtype: torch.dtype
    capability: chips.Capability
    causal: bool = True
    features: tuple[str, ...] = ()
    config: LaunchConfig | None = None
    only: str | None = None

    def __post_init__(self) -> None:
        if self.program not in PROGRAMS:
            raise ValueError(f"program={self.program!r} is not known: one of {', '.join(PROGRAMS)}.")
        if self.capability not in GPUS:
            raise ValueError(f"capability={self.capability} is not known: one of {', '.join(map(str, GPUS))}.")
        if unknown := set(self.features) - set(PROGRAMS[self.program].features):
            raise ValueError(f"{self.program!r} has no feature {', '.join(sorted(unknown))}.")


@dataclass(frozen=True)
class Resources:
    """What one launch of a kernel needs of a GPU.

    Attributes:
        kernel: module and name, as in "flash_v2._forward_kernel". capability: of the GPU that it was compiled for.
        constants: compile-time constants by name, block sizes among them. num_warps, num_stages: as in `LaunchConfig`.
        shared_bytes: shared memory of a block.
        tensor_columns: columns of tensor memory of a block; only 10.0 has tensor memory.
        registers: of a thread; None without `binaries` in `resources_of`.
        spilled_bytes: bytes that a thread keeps in local memory for lack of registers; None without `binaries`.
        instructions: of the kernel's PTX; None without `binaries`.
        overwritten: instructions that write a register which a product in flight may still read (see `wgmma_races`):
            any such instruction is a race. None without `binaries`, and if the kernel has no wgmma.
    """

    kernel: str
    capability: chips.Capability
    constants: dict[str, int]
    num_warps: int
    num_stages: int
    shared_bytes: int
    tensor_columns: int
    registers: int | None = None
    spilled_bytes: int | None = None
    instructions: int | None = None
    overwritten: int | None = None

    @property
    def fits(self) -> bool:
        """Whether this GPU can launch it."""
        limit = GPUS[self.capability].shared_kib * 1024
        return self.shared_bytes <= limit and self.tensor_columns <= TENSOR_MEMORY_COLUMNS

    @property
    def blocks_per_sm(self) -> int | None:
        """How many blocks an SM holds at once; None if `registers` is None."""
        if self.registers is None:
            return None
        gpu = GPUS[self.capability]
        per_warp = -(-self.registers * WARP_SIZE // 256) * 256  # registers are handed out to warps, 256 at a time
        warps = 4 * (REGISTERS_PER_SM // 4 // per_warp)  # each quarter of an SM has its own
        reserved = (gpu.shared_kib_per_sm - gpu.shared_kib) * 1024
        by_shared = gpu.shared_kib_per_sm * 1024 // max(1, self.shared_bytes + reserved)
        by_tensor_memory = TENSOR_MEMORY_COLUMNS // max(1, self.tensor_columns)
        by_warps = min(warps, gpu.warps_per_sm) // self.num_warps
        return min(by_warps, by_shared, by_tensor_memory, gpu.blocks_per_sm)

    @property
    def occupancy(self) -> float | None:
        """The warps that an SM holds as a share of the most that it can hold; None if `registers` is None."""
        blocks = self.blocks_per_sm
        return None if blocks is None else blocks * self.num_warps / GPUS[self.capability].warps_per_sm


# Sizes of the problems. Only one of them matters: 32 query heads share a key head. Decoding of two tokens treats them
# as 64 rows of a tile. With fewer rows it would reduce the table's block_m, and with one token it would drop the mask.
_B, _N, _H, _H_KV, _PAGE = 2, 1024, 64, 2, 256


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _call(r: Request, n_q: int = _N) -> tuple[torch.Tensor, torch.Tensor, Options]:
    """q, one tensor for k and v, and the options of a request."""
    on, packed = r.features, "packed" in r.features
    q = _empty(*((_B * n_q,) if packed else (_B, n_q)), _H, r.head_dim, dtype=r.dtype)
    keys = (_B * _N // _PAGE, _PAGE) if "paged" in on else (_B * _N,) if packed else (_B, _N)
    k = _empty(*keys, _H_KV, r.head_dim, dtype=r.dtype)
    options = Options(
        softmax_scale=0.125,
        window_left=250 if "window" in on else None,
        window_right=0 if r.causal else 250 if "window" in on else None,
        softcap=30.0 if "softcap" in on else None,
        alibi_slopes=_empty(_B, _H, dtype=torch.float32) if "alibi" in on else None,
        dropout_p=0.1 if "dropout" in on else 0.0,
        seed=_empty(1, dtype=torch.int64) if "dropout" in on else None,
        cu_seqlens_q=_empty(_B + 1) if packed else None,
        cu_seqlens_k=_empty(_B + 1) if packed else None,
        max_seqlen_q=n_q,
        max_seqlen_k=_N,
        block_table=_empty(_B, _N // _PAGE) if "paged" in on else None,
    )
    return q, k, options


def _cache(r: Request, table: torch.Tensor | None) -> Cache:
    lengths = _empty(_B) if "lengths" in r.features else None
    rows = lengths if table is None else None  # a paged cache has neither numbered rows nor padding
    return Cache(lengths, _N, batch_idx=rows, leftpad=rows, block_table=table)


def _v1(r: Request) -> None:
    q, k, options = _call(r)
    flash_v1.forward(q, k, k, options.softmax_scale, r.causal, r.config)


def _forward(r: Request) -> None:
    q, k, options = _call(r)
    flash_v2.forward(q, k, k, options, r.config)


def _backward(r: Request) -> None:
    q, k, options = _call(r)
    lse = _empty(*((_H, len(q)) if "packed" in r.features else (_B, _H, _N)), dtype=torch.float32)
    configs = None if r.config is None else dict.fromkeys(PROGRAMS["backward"].kernels, r.config)
    flash_v2_backward.backward(q, q, k, k, q, lse, options, configs, dlse=lse if r.features else None)


def _decode(r: Request, n_q: int = 2) -> None:
    q, k, options = _call(r, n_q)
    cache = _cache(r, options.block_table)
    flash_decode.decode(q, k, k, cache, options, splits=flash_decode.MOST_SPLITS, config=r.config)


def _append(r: Request) -> None:
    q, k, options = _call(r)
    cos = _empty(_N, r.head_dim // 2, dtype=r.dtype) if "rotary" in r.features else None
    kv_append.append(q[:, :1, :_H_KV], k, _cache(r, options.block_table), cos, cos)


@dataclass(frozen=True)
class Program:
    """A host function: how a request calls it, which entries of the launch table it reads, which features it has."""

    run: Callable[[Request], None]
    kernels: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


_SCORES = ("window", "softcap", "alibi")
PROGRAMS = {
    "v1": Program(_v1, ("v1",)),
    "forward": Program(_forward, ("forward",), (*_SCORES, "dropout", "packed", "paged")),
    "backward": Program(_backward, ("dkdv", "dq"), (*_SCORES, "dropout", "packed")),
    "decode": Program(_decode, ("decode",), (*_SCORES, "lengths", "paged")),
    "decode_prompt": Program(functools.partial(_decode, n_q=_N), ("forward",), (*_SCORES, "lengths", "paged")),
    "append": Program(_append, features=("rotary", "lengths", "paged")),
}


def _allocate(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> tuple[int, int]:
    """Bytes of shared memory and columns of tensor memory, without LLVM and ptxas, which take most of the time.

    The passes are Triton's own up to that point. The tests compare the result with a complete compilation.
    """
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.nvidia.compiler import get_ptx_version_from_options

    backend = make_backend(target)
    options = backend.parse_options(options)
    context = ir.context()
    stages: dict[str, Callable[..., Any]] = {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, source.language)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, codegen, modules, context)
    module = stages["ttgir"](stages["ttir"](module, {}), {})
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    ptx_version = get_ptx_version_from_options(options, target.arch)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, target.arch, ptx_version)
    nvidia.passes.ttnvgpuir.add_allocate_tensor_memory(manager)
    manager.run(module, "allocate")
    return module.get_int_attr("ttg.shared"), module.get_int_attr("ttg.tensor_memory_size") or 0


def _build(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> tuple[int, int, int, int, int, int | None]:
    """Both numbers of `_allocate`, and registers, spills, instructions and races, from a complete compilation."""
    kernel = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{command[0]} names no registers and no stack: {usage.strip()[-500:]!r}")
    registers, stack = map(int, found.groups())
    instructions = len(re.findall(r"^\s+(?:@%?\S+ )?[a-z][\w.:]+[^;:]*;", kernel.asm["ptx"], re.M))
    overwritten = wgmma_races.count(kernel.asm["cubin"]) if target.arch == _arch(chips.HOPPER) else None
    return kernel.metadata.shared, kernel.metadata.tmem_size or 0, registers, stack, instructions, overwritten


def _arch(capability: chips.Capability) -> int:
    """A compute capability as Triton's targets have it: (9, 0) is 90."""
    return 10 * capability[0] + capability[1]


_known: dict[tuple, tuple] = {}  # results of the child process, by kernel, target and options


def _launches(request: Request, binaries: bool) -> list[Resources]:
    """Calls the program of a request and compiles what it launches; only the child process does."""
    target = GPUTarget("cuda", _arch(request.capability), WARP_SIZE)
    found = []

    def compile_and_stop(*, fn: Any, compile: Any, **_: Any) -> bool:
        kernel = fn.jit_function
        name = f"{fn.module.rpartition('.')[2]}.{fn.name}"
        if request.only not in (None, name):
            return True
        source = ASTSource(kernel, compile["signature"], compile["constants"], compile["configs"][0])
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        key = (source.hash(), target.arch, *options.values())
        if key not in _known:
            _known[key] = (_build if binaries else _allocate)(source, target, options)
        constants = {kernel.arg_names[place]: compile["constants"][place,] for place in kernel.constexprs}
        found.append(Resources(name, request.capability, constants, *options.values(), *_known[key]))
        return True  # tells Triton that nothing is left to compile, so that it launches nothing

    triton.knobs.runtime.jit_cache_hook = compile_and_stop
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: target.arch,
            get_current_stream=lambda device: None,
        )
    )
    launch._capability = lambda device_index: request.capability  # type: ignore[assignment]  # this process is a GPU's
    PROGRAMS[request.program].run(request)
    if not found:
        raise RuntimeError("no kernel was compiled: Triton's interpreter may be on, or its hook has changed")
    return found


_CHILD = """
import sys, types
package = types.ModuleType("labutils")  # the real labutils would switch Triton's interpreter on
package.__path__ = [sys.argv[1]]
sys.modules["labutils"] = package
from labutils.attention.tuning import compiled
exec(sys.argv[2])
compiled._answer()
"""


def _answer() -> None:
    """The child process: reads requests from stdin, and writes lists of `Resources` to stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # other output must not mix with the answers
    torch.cuda.device = lambda device: contextlib.nullcontext()  # the tensors are on no device
    run = JITFunction.run
    # Triton returns None if its hook has ended a launch. Host functions expect a compiled kernel.
    JITFunction.run = lambda *args, **kwargs: run(*args, **kwargs) or MagicMock()
    requests, binaries = pickle.load(sys.stdin.buffer)
    found = []
    for request in requests:
        try:
            found.append(_launches(request, binaries))
        except OSError as error:
            raise RuntimeError(
                f"{request} could not be compiled, since a file could not be written or read ({error}). If that is "
                "Triton's cache: set TRITON_CACHE_DIR to a folder that you may write and that has room"
            ) from error
        except Exception as error:
            raise RuntimeError(f"{request} could not be compiled") from error
    pickle.dump(found, answers)


def _ask_child(requests: list[Request], binaries: bool, setup: str) -> list[list[Resources]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(Path(__file__).resolve().parents[2]), setup],
        input=pickle.dumps((requests, binaries)),
        capture_output=True,
        env=environment,
    )
    if child.returncode != 0:
        raise RuntimeError(
            f"the process that compiles for other GPUs ended with status {child.returncode}:\n"
            f"{child.stderr.decode(errors='replace')[-4000:]}"
        )
    return pickle.loads(child.stdout)


def resources_of(
    requests: Iterable[Request], *, binaries: bool = False, processes: int = 1, setup: str = ""
) -> list[list[Resources]]:
    """Compiles what each request launches.

    Args:
        requests: what to compile; equal requests are compiled once.
        binaries: compile to the end, for registers and spills. Else only shared and tensor memory become known, in a
            third of the time or less: 0.1 to 4 s a kernel.
        processes: how many compile at once; each takes a CPU core and half a GiB.
        setup: Python statements that each process runs before it compiles, such as some that replace a kernel.

    Returns:
        For each request its launches, in their order.

    Raises:
        RuntimeError: the launch table has no entry for a request, or a kernel does not compile; the message ends with
            the child process's traceback.
    """
    requests = list(requests)
    different = list(dict.fromkeys(requests))
    shares = [share for i in range(processes) if (share := different[i::processes])]
    with ThreadPoolExecutor(max_workers=processes) as pool:
        answers = pool.map(lambda share: _ask_child(share, binaries, setup), shares)
        found = {request: answer for share, part in zip(shares, answers) for request, answer in zip(share, part)}
    return [found[request] for request in requests]
