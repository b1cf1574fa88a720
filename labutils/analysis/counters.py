"""Bytes that a GPU's own counters saw: DRAM, L2 and sectors of each kernel, by Nsight Compute (`ncu`).

`measure_traffic` runs attention under ncu and puts what it says beside the IO model and the counted bytes;
`measure_coalescing` does the same for a copy with gaps between the elements. Each starts a process of its own under
ncu, in which a kernel that does next to nothing marks where one case ends and the next begins.

ncu replays a kernel several times, once for each set of counters that fits the hardware, with the caches emptied before
each: what comes from L2 was brought there by this kernel.
"""

from __future__ import annotations

import csv
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import triton
import triton.language as tl

from labutils.analysis.profiling import short_operation
from labutils.analysis.traffic import compulsory_bytes, counted_traffic, io_bytes, total_bytes
from labutils.benchmark import SCHEMAS, Unsupported, dtype_name, time_call
from labutils.machine import runtime

SECTOR = 32
"""Bytes of a sector, the smallest piece that L2 hands over."""

METRICS = {
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    # asked of L2 by the SMs; `lts__t_sectors` without a source would count what one half of L2 asks of the other, too
    "l2_read_sectors": "lts__t_sectors_srcunit_tex_op_read.sum",
    "l2_write_sectors": "lts__t_sectors_srcunit_tex_op_write.sum",
    "l1_filled_bytes": "l1tex__m_xbar2l1tex_read_bytes.sum",
    "load_sectors_per_request": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "store_sectors_per_request": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
}
"""Our names of what is measured -> ncu's."""

REQUIRED = ("dram_read_bytes", "dram_write_bytes")
_SUMS = [name for name in METRICS if not name.endswith("per_request")]
_UNITS = {"byte": 1, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9, "sector": 1, "": 1}

LENGTHS = (1024, 2048, 4096, 8192)
# impl in the table -> pass, kernel as the IO model calls it, kernel as ncu calls it (None: all that the call launches)
CASES = {
    "naive": ("fwd", "naive", None),
    "sdpa_flash": ("fwd", None, None),
    "triton_v1": ("fwd", "v1", "_forward_kernel"),
    "triton_v2": ("fwd", "v2", "_forward_kernel"),
    "triton_v2_dq": ("bwd", "dq", "_dq_kernel"),
    "triton_v2_dkdv": ("bwd", "dkdv", "_dkdv_kernel"),
}
_TABLE_ENTRY = {"v1": "v1", "v2": "forward", "dq": "dq", "dkdv": "dkdv"}
STRIDES = (1, 2, 4, 8, 16, 32)


# ------------------------------------------------------------------------------------------------------------
# Running ncu, reading what it writes
# ------------------------------------------------------------------------------------------------------------


def find_ncu() -> str:
    """The path of ncu: on PATH, or where the CUDA toolkit and Nsight Compute install it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    if found := shutil.which("ncu"):
        return found
    places = [*Path("/usr/local").glob("cuda*/bin/ncu"), *Path("/opt/nvidia/nsight-compute").glob("*/ncu")]
    if not places:
        raise FileNotFoundError(
            "ncu is not on PATH, nor under /usr/local/cuda or /opt/nvidia/nsight-compute: install Nsight Compute."
        )
    return str(sorted(places)[-1])


def ncu_command(ncu: str, metrics: Iterable[str], log: str | Path, program: Sequence[str]) -> list[str]:
    """The command line that measures `metrics` (ncu's names) of what `program` runs between profiler start and stop.

    The clock is left to the GPU, since bytes do not depend on it.

    Args:
        ncu: of `find_ncu`.
        metrics: ncu's names, as the values of `METRICS`.
        log: the file that ncu writes.
        program: a command line.
    """
    return [
        ncu, "--csv", "--page", "details", "--print-units", "base", "--profile-from-start", "off",
        "--replay-mode", "kernel", "--cache-control", "all", "--clock-control", "none",
        "--metrics", ",".join(metrics), "--log-file", str(log), *program,
    ]  # fmt: skip


def parse_ncu(text: str) -> pd.DataFrame:
    """ncu's CSV (a row for each launch and metric) as a table with a row for each launch.

    Args:
        text: what ncu wrote with `--csv --page details`; its own messages, which begin with "==", may be among it.

    Returns:
        `launch` (ncu's number, in the order of launches), `kernel`, and a column for each metric by ncu's name: in
        bytes, sectors or as a ratio, NaN for one that this GPU does not have ("n/a").

    Raises:
        RuntimeError: the counters are closed to this user, or no kernel was measured; with ncu's own words.
        ValueError: a unit that is not known.
    """
    if "ERR_NVGPUCTRPERM" in text:
        raise RuntimeError(
            "this user may not read the GPU's counters (ERR_NVGPUCTRPERM): run as root, or have the administrator load "
            "the driver with NVreg_RestrictProfilingToAdminUsers=0. See https://developer.nvidia.com/ERR_NVGPUCTRPERM"
        )
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[int, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        if not row.get("Metric Name"):
            continue
        launch = int(row["ID"])
        entry = launches.setdefault(launch, {"launch": launch, "kernel": row["Kernel Name"].split("(")[0]})
        entry[row["Metric Name"]] = _number(row["Metric Value"], row["Metric Unit"], row["Metric Name"])
    if not launches:
        said = " ".join(line for line in text.splitlines() if line.startswith("=="))
        raise RuntimeError(f"ncu measured no kernel: {said[-1500:] or 'it wrote nothing'}")
    return pd.DataFrame([launches[launch] for launch in sorted(launches)])


def _number(value: str, unit: str, metric: str) -> float:
    value = value.replace(",", "")
    if value in ("n/a", "nan", ""):
        return float("nan")
    if metric.endswith(".ratio"):
        return float(value)
    if unit.lower() not in _UNITS:
        raise ValueError(f"ncu gives {metric} in {unit!r}, which is not among {', '.join(filter(None, _UNITS))}.")
    return float(value) * _UNITS[unit.lower()]


def by_case(launches: pd.DataFrame) -> list[pd.DataFrame]:
    """The launches of each case, between the marks that the measured process set; marks left out.

    Raises:
        RuntimeError: the first launch is no mark, so that it is not known what the launches belong to.
    """
    case = (launches["kernel"] == _mark.fn.__name__).cumsum()
    if case.iloc[0] != 1:
        raise RuntimeError(f"the first kernel that ncu measured is {launches['kernel'].iloc[0]!r}, and no mark.")
    rest = launches[launches["kernel"] != _mark.fn.__name__]
    return [rest[case[rest.index] == number].reset_index(drop=True) for number in range(1, case.max() + 1)]


def summed(launches: pd.DataFrame, kernel: str | None = None) -> dict[str, float]:
    """What the launches of a case take together, by our names; with `kernel`, those of that name alone.

    Bytes and sectors are added up (sectors given as bytes); sectors per request are those of the launch that read most
    from DRAM, or of the only one.

    Raises:
        RuntimeError: no launch of that name.
    """
    chosen = launches if kernel is None else launches[launches["kernel"] == kernel]
    if chosen.empty:
        raise RuntimeError(f"ncu measured no {kernel or 'kernel'}, but {sorted(set(launches['kernel']))}.")
    names = {ours: ncu for ours, ncu in METRICS.items() if ncu in chosen.columns}
    total = {ours: float(chosen[ncu].sum(min_count=1)) for ours, ncu in names.items() if ours in _SUMS}
    for name in ("l2_read_sectors", "l2_write_sectors"):
        total[name.replace("sectors", "bytes")] = SECTOR * total.pop(name, float("nan"))
    largest = chosen.loc[chosen[METRICS["dram_read_bytes"]].idxmax()]
    ratios = {ours: float(largest[ncu]) for ours, ncu in names.items() if ours not in _SUMS}
    return {"kernels": len(chosen)} | total | ratios


def _known_metrics(ncu: str) -> dict[str, str]:
    """`METRICS`, without those that this ncu does not know on this GPU: asked for, they would end it."""
    done = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True)
    known = {line.split()[0] for line in done.stdout.splitlines() if line.strip() and "__" in line.split()[0]}
    if not known:
        raise RuntimeError(f"ncu --query-metrics lists no metric: {(done.stderr or done.stdout).strip()[-1000:]}")
    found = {ours: name for ours, name in METRICS.items() if name.split(".")[0] in known}
    if missing := set(METRICS) - set(found):
        print(f"This GPU or ncu has no counter for {', '.join(sorted(missing))}: left out.", file=sys.stderr)
    if lacking := set(REQUIRED) - set(found):
        raise RuntimeError(f"ncu has no counter for {', '.join(sorted(lacking))} on this GPU.")
    return found


def run_under_ncu(function: str, *arguments: Any, keep: Path | None = None) -> list[pd.DataFrame]:
    """Runs a function of this module in a process under ncu; the launches of each of its cases.

    Args:
        function: its name; it is called with `arguments`, which must be of JSON's types.
        keep: a file to which ncu's own text is copied.

    Raises:
        FileNotFoundError: see `find_ncu`.
        RuntimeError: no GPU, no access to counters, or the process failed.
    """
    if runtime.device.type != "cuda":
        raise RuntimeError("hardware counters are a GPU's: this machine has none that the lab can use.")
    ncu = find_ncu()
    metrics = _known_metrics(ncu)
    code = f"import json, sys; from labutils.analysis import counters; counters.{function}(*json.loads(sys.argv[1]))"
    program = [sys.executable, "-c", code, json.dumps(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ncu_command(ncu, metrics.values(), log, program)
        done = subprocess.run(command, capture_output=True, text=True)
        text = log.read_text(encoding="utf-8") if log.exists() else ""
    if keep is not None:
        keep.write_text(text, encoding="utf-8")
    try:
        launches = parse_ncu(text)
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{done.stdout[-1000:]}{done.stderr[-2000:]}") from None
    if done.returncode != 0:
        raise RuntimeError(f"the process under ncu ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return by_case(launches)


# ------------------------------------------------------------------------------------------------------------
# What runs under ncu
# ------------------------------------------------------------------------------------------------------------


@triton.jit
def _mark(where_ptr):
    tl.store(where_ptr, 1)


@triton.jit
def _copy_with_gaps(x_ptr, y_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * STRIDE
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


def _profiled(call: Callable[[], Any]) -> None:
    """One call that is measured, after one that is not: the first compiles and loads libraries."""
    call()
    mark = torch.zeros(1, device=runtime.device)
    _mark[(1,)](mark)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    _mark[(1,)](mark)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _run_attention(cases: list[dict]) -> None:
    from labutils import benchmark

    for case in cases:
        shape = (case["batch"], case["seqlen"], case["heads"], case["head_dim"])
        dtype = getattr(torch, case["dtype"])
        q, k, v, dout = (torch.randn(shape, device=runtime.device, dtype=dtype) for _ in range(4))
        attention = benchmark.IMPLEMENTATIONS[case["call"]]
        if case["pass"] == "fwd":
            with torch.no_grad():
                _profiled(functools.partial(attention, q, k, v, causal=case["causal"]))
        else:
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out = attention(*leaves, causal=case["causal"])
            _profiled(functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True))


def _run_copies(strides: list[int], elements: int) -> None:
    for stride in strides:
        x = torch.zeros(elements * stride, device=runtime.device)
        y = torch.empty_like(x)
        _profiled(functools.partial(_copy_with_gaps[(elements // 1024,)], x, y, STRIDE=stride, BLOCK=1024))


# ------------------------------------------------------------------------------------------------------------
# Traffic of attention
# ------------------------------------------------------------------------------------------------------------


def planned_traffic(
    impls: Iterable[str] = tuple(CASES),
    seqlens: Iterable[int] = LENGTHS,
    *,
    batch: int = 1,
    heads: int = 16,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    blocks: Mapping[str, tuple[int, int]] | None = None,
) -> pd.DataFrame:
    """The rows of traffic.csv before anything is measured: shapes, block sizes, the IO model's and compulsory bytes.

    Args:
        impls: of `CASES`. seqlens: N.
        batch, heads, head_dim, dtype, causal: B, H, D and so on, the same for all rows.
        blocks: (block_m, block_n) by the IO model's kernel; those that the launch table has for this machine where not
            given.

    Returns:
        A table with the columns of `SCHEMAS["traffic"]`, where what is counted or measured is NaN.

    Raises:
        ValueError: an unknown implementation.
    """
    from labutils.attention.kernels.launch import pick_config

    impls = list(impls)
    unknown = [name for name in impls if name not in CASES]
    if unknown:
        raise ValueError(f"impls={unknown}: choose from {', '.join(CASES)}.")
    rows = []
    for n in seqlens:
        shape = {"batch": batch, "heads": heads, "seqlen": n, "head_dim": head_dim}
        for impl in impls:
            which, kernel, _ = CASES[impl]
            row: dict[str, Any] = shape | {"impl": impl, "pass": which, "dtype": dtype_name(dtype), "causal": causal}
            if kernel in _TABLE_ENTRY:
                if blocks is None:
                    config = pick_config(_TABLE_ENTRY[kernel], head_dim, dtype, causal, runtime.device, longest=n)
                    row |= {"block_m": config.block_m, "block_n": config.block_n}
                else:
                    row |= dict(zip(("block_m", "block_n"), blocks[kernel], strict=True))
            if kernel is not None:
                sizes = {name: row[name] for name in ("block_m", "block_n") if name in row}
                row["model_bytes"] = io_bytes(
                    kernel, **shape, **sizes, dtype_bytes=dtype.itemsize, causal=causal, per_tensor=False
                )
            if which == "fwd":
                row["compulsory_bytes"] = compulsory_bytes(**shape, dtype_bytes=dtype.itemsize)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(SCHEMAS["traffic"]))


def with_counts(table: pd.DataFrame, up_to: int = 2048, done: Callable[[int], None] = lambda n: None) -> pd.DataFrame:
    """The table with `counted_bytes` filled in for our kernels, up to a sequence length; needs no GPU.

    One head is counted, and stands for all: the kernels do the same for each. Takes 5 ms for each tile, which at
    N = 8,192 is a minute or two a kernel.

    Args:
        table: of `planned_traffic`, or stored.
        up_to: the longest N that is counted.
        done: told 1 after each row.
    """
    table = table.copy()
    for place, row in table.iterrows():
        kernel = CASES[row["impl"]][1]
        if kernel in _TABLE_ENTRY and row["seqlen"] <= up_to and pd.isna(row["counted_bytes"]):
            counted = counted_traffic(
                kernel, seqlen=int(row["seqlen"]), head_dim=int(row["head_dim"]), block_m=int(row["block_m"]),
                block_n=int(row["block_n"]), dtype=getattr(torch, row["dtype"]), causal=bool(row["causal"]),
            )  # fmt: skip
            table.loc[place, "counted_bytes"] = row["batch"] * row["heads"] * total_bytes(counted)
        done(1)
    return table


def measure_traffic(table: pd.DataFrame, *, keep: Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table with what ncu measured on this machine, and every launch that it measured.

    Args:
        table: of `planned_traffic`.
        keep: a file to which ncu's own text is copied.

    Returns:
        The same rows, with `measured_bytes` (read from and written to DRAM, together), both parts of it, the bytes
        asked of L2 by the SMs, the bytes that L1 received, and sectors per request. `sdpa_flash` and `naive` are sums
        over all kernels of a call; the others are the one kernel that the IO model describes. And the table of
        `by_launch`.

    Raises:
        RuntimeError: see `run_under_ncu`.
    """
    calls, cases = _cases(table)
    found = run_under_ncu("_run_attention", cases, keep=keep)
    if len(found) != len(cases):
        raise RuntimeError(f"{len(cases)} cases ran under ncu, and it marked {len(found)}.")
    return merged(table, calls, cases, found), by_launch(cases, found)


def _cases(table: pd.DataFrame) -> tuple[pd.DataFrame, list[dict]]:
    """The call that each row of a planned table belongs to, and the calls to be run, each once."""
    keys = ["pass", "dtype", "causal", "batch", "heads", "seqlen", "head_dim"]
    called = table["impl"].str.replace(r"_(dq|dkdv)$", "", regex=True).rename("call")
    calls = pd.concat([called, table[keys]], axis=1)
    return calls, json.loads(calls.drop_duplicates().to_json(orient="records"))


def merged(table: pd.DataFrame, calls: pd.DataFrame, cases: list[dict], found: list[pd.DataFrame]) -> pd.DataFrame:
    """The table with what was found of each case, in the columns that the schema has for it.

    Args:
        table: of `planned_traffic`. calls: the call of each of its rows.
        cases: each call once, as `_run_attention` takes them. found: the launches of each.
    """
    by_call = {tuple(case.values()): launches for case, launches in zip(cases, found, strict=True)}
    table = table.copy()
    for place, call in zip(table.index, calls.itertuples(index=False, name=None), strict=True):
        values = summed(by_call[call], CASES[table.loc[place, "impl"]][2])
        values["measured_bytes"] = values["dram_read_bytes"] + values["dram_write_bytes"]
        for name in set(values) & set(table.columns):
            table.loc[place, name] = values[name]
    return table


def by_launch(cases: list[dict], found: list[pd.DataFrame]) -> pd.DataFrame:
    """Every launch of every case, in order, with the columns of `SCHEMAS["launches"]`: the kernels that PyTorch adds to
    ours, and the single operations of naive attention.

    Args:
        cases: as `_run_attention` takes them. found: the launches of each.
    """
    rows = []
    for case, launches in zip(cases, found, strict=True):
        for name, launch in launches.groupby("launch", sort=False):
            shape = {key: case[key] for key in ("pass", "dtype", "causal", "batch", "heads", "seqlen", "head_dim")}
            kernel = short_operation(launch["kernel"].iloc[0])
            rows.append({"impl": case["call"]} | shape | {"launch": name, "kernel": kernel} | summed(launch))
    return pd.DataFrame(rows, columns=list(SCHEMAS["launches"]))


def explained(traffic: pd.DataFrame) -> pd.DataFrame:
    """Where the model's bytes go, of the rows of a measured table: ratios that a sentence can stand on.

    Args:
        traffic: of `measure_traffic`, or the stored table "traffic".

    Returns:
        By impl and seqlen: `SM / model`, bytes that came into L1 and shared memory and bytes stored, by those of the IO
        model (1 where the SMs move what the model says); `L2 / SM`, bytes that L2 was asked to read by those that
        arrived (below 1 where one answer served several SMs); `DRAM reads / once` and `DRAM writes / once`, by the
        bytes of `moved_once`; and `comes back (MiB)`, of `comes_back`. NaN where the blocks, and so the model, are not
        known.
    """
    once = [moved_once(row) for row in traffic.to_dict("records")]
    return pd.DataFrame(
        {
            "impl": traffic["impl"],
            "seqlen": traffic["seqlen"],
            "SM / model": (traffic["l1_filled_bytes"] + traffic["l2_write_bytes"]) / traffic["model_bytes"],
            "L2 / SM": traffic["l2_read_bytes"] / traffic["l1_filled_bytes"],
            "DRAM reads / once": traffic["dram_read_bytes"] / [reads for reads, _ in once],
            "DRAM writes / once": traffic["dram_write_bytes"] / [writes for _, writes in once],
            "comes back (MiB)": [comes_back(row) / 2**20 for row in traffic.to_dict("records")],
        }
    )


def moved_once(row: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that a call of `CASES` reads, and writes, if each of its kernels moves each of its tensors once.

    Naive attention is six kernels: two that lay K and V out, a product, the scale, the softmax, a product. v1 reads O,
    l and m as well, which PyTorch has filled.

    Args:
        row: of a table of `planned_traffic`, without a mask.
    """
    heads, rows = row["batch"] * row["heads"], row["seqlen"]
    size = getattr(torch, row["dtype"]).itemsize
    slim, matrix, one = heads * rows * row["head_dim"] * size, heads * rows * rows * size, heads * rows * 4
    state = heads * rows * row["head_dim"] * 4 + 2 * one  # v1's O, l and m, in float32
    return {
        "naive": (3 * matrix + 5 * slim, 3 * matrix + 3 * slim),
        "sdpa_flash": (3 * slim, slim + one),
        "triton_v1": (3 * slim + state, state),
        "triton_v2": (3 * slim, slim + one),
        "triton_v2_dq": (5 * slim + one, slim + 2 * one),
        "triton_v2_dkdv": (4 * slim + 2 * one, 2 * slim),
    }[row["impl"]]


def comes_back(row: Mapping[str, Any]) -> int:
    """Bytes that a call of `CASES` needs again and again, or hands from kernel to kernel, of all heads together.

    Naive attention's S; Q, O, l and m of v1, once for each block of K and V; K and V of the kernels with a block of Q;
    Q, dO and two numbers a row of the one with a block of K and V.
    """
    heads, rows = row["batch"] * row["heads"], row["seqlen"]
    size, d = getattr(torch, row["dtype"]).itemsize, row["head_dim"]
    return {
        "naive": heads * rows * rows * size,
        "triton_v1": heads * rows * (d * (size + 4) + 8),
        "triton_v2_dkdv": heads * rows * (2 * d * size + 8),
    }.get(row["impl"], heads * rows * 2 * d * size)


# ------------------------------------------------------------------------------------------------------------
# Coalescing
# ------------------------------------------------------------------------------------------------------------


def sectors_touched(stride: int, elements: int = 1024, itemsize: int = 4) -> int:
    """How many sectors `elements` numbers of `itemsize` bytes lie in, each `stride` numbers behind the one before."""
    return len({i * stride * itemsize // SECTOR for i in range(elements)})


def planned_coalescing(strides: Iterable[int] = STRIDES, elements: int = 2**22) -> pd.DataFrame:
    """What a float32 copy with gaps should ask of memory: `useful_bytes`, and `model_bytes` by whole sectors, read and
    written.

    Args:
        strides: numbers from one element to the next.
        elements: how many are copied, a multiple of 1,024.
    """
    rows = [
        {
            "stride": s,
            "elements": elements,
            "useful_bytes": 2 * 4 * elements,
            "model_bytes": 2 * SECTOR * sectors_touched(s) * (elements // 1024),
        }
        for s in strides
    ]
    return pd.DataFrame(rows, columns=list(SCHEMAS["coalescing"]))


def time_copies(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `planned_coalescing` with `ms` and `useful_gb_per_s` of each copy on this GPU.

    Raises:
        Unsupported: no GPU.
    """
    if runtime.device.type != "cuda":
        raise Unsupported("copies are timed on a GPU: in the interpreter a time means nothing.")
    times = []
    for row in table.itertuples():
        x = torch.zeros(row.elements * row.stride, device=runtime.device)
        y, copy = torch.empty_like(x), _copy_with_gaps[(row.elements // 1024,)]
        call = functools.partial(copy, x, y, STRIDE=row.stride, BLOCK=1024)
        times.append(time_call(call, seconds=0.1).median_ms)
    return table.assign(ms=times, useful_gb_per_s=table["useful_bytes"] / pd.Series(times, index=table.index) / 1e6)


def measure_coalescing(table: pd.DataFrame, *, keep: Path | None = None) -> pd.DataFrame:
    """The table of `planned_coalescing` with what ncu measured on this machine, in bytes and sectors per request.

    Args:
        table: of `planned_coalescing`.
        keep: a file to which ncu's own text is copied.

    Raises:
        RuntimeError: see `run_under_ncu`.
    """
    elements = int(table["elements"].iloc[0])
    found = run_under_ncu("_run_copies", [int(s) for s in table["stride"]], elements, keep=keep)
    if len(found) != len(table):
        raise RuntimeError(f"{len(table)} copies ran under ncu, and it marked {len(found)}.")
    table = table.copy()
    for place, launches in zip(table.index, found, strict=True):
        for name, value in summed(launches, _copy_with_gaps.fn.__name__).items():
            if name in table.columns:
                table.loc[place, name] = value
    return table
