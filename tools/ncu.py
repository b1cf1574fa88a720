"""Runs a program under Nsight Compute (`ncu`), and reads what the GPU's counters saw: bytes and sectors of each kernel.

A measured program calls `profiled` for each of its cases. A kernel that does next to nothing marks where a case begins,
so that `run_under_ncu` can tell the cases apart.

ncu replays a kernel several times, once for each set of counters that fits the hardware, and empties the caches before
each. Bytes that come from L2 were therefore brought there by the kernel itself.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from labutils.machine import runtime  # isort: skip  before triton: it decides whether Triton compiles or interprets

import pandas as pd
import torch
import triton
import triton.language as tl

from labutils.analysis.counters import SECTOR

METRICS = {
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    # requests of the SMs; `lts__t_sectors` without a source would also count what one half of L2 asks of the other
    "l2_read_sectors": "lts__t_sectors_srcunit_tex_op_read.sum",
    "l2_write_sectors": "lts__t_sectors_srcunit_tex_op_write.sum",
    "l1_filled_bytes": "l1tex__m_xbar2l1tex_read_bytes.sum",
    "load_sectors_per_request": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "store_sectors_per_request": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
}
"""The columns of our tables -> the names of ncu's metrics."""

REQUIRED = ("dram_read_bytes", "dram_write_bytes")
_SUMS = [name for name in METRICS if not name.endswith("per_request")]
_UNITS = {"byte": 1, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9, "sector": 1, "": 1}


# ------------------------------------------------------------------------------------------------------------
# In the measured program
# ------------------------------------------------------------------------------------------------------------


@triton.jit
def _mark(where_ptr):
    tl.store(where_ptr, 1)


def profiled(call: Callable[[], Any]) -> None:
    """Measures the second of two calls. The first compiles and loads libraries.

    Args:
        call: one case, a function without arguments.
    """
    call()
    mark = torch.zeros(1, device=runtime.device)
    _mark[(1,)](mark)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    _mark[(1,)](mark)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


# ------------------------------------------------------------------------------------------------------------
# Running ncu
# ------------------------------------------------------------------------------------------------------------


def find_ncu() -> str:
    """The path of ncu: from PATH, or from the folders of the CUDA toolkit and Nsight Compute.

    Raises:
        FileNotFoundError: ncu is not installed there.
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
    """The command line that measures what `program` runs between the profiler's start and stop.

    ncu does not fix the GPU's clock, since bytes do not depend on it.

    Args:
        ncu: the path of ncu.
        metrics: ncu's names, such as the values of `METRICS`.
        log: the file that ncu writes.
        program: a command line.
    """
    return [
        ncu, "--csv", "--page", "details", "--print-units", "base", "--profile-from-start", "off",
        "--replay-mode", "kernel", "--cache-control", "all", "--clock-control", "none",
        "--metrics", ",".join(metrics), "--log-file", str(log), *program,
    ]  # fmt: skip


def parse_ncu(text: str) -> pd.DataFrame:
    """Turns ncu's CSV, a row for each launch and metric, into a table with a row for each launch.

    Args:
        text: what ncu wrote with `--csv --page details`. ncu's messages, which begin with "==", may stand in between.

    Returns:
        `launch` (ncu's number, in the order of launches), `kernel`, and a column for each metric by ncu's name: in
        bytes, in sectors or as a ratio; NaN for a metric that this GPU lacks ("n/a").

    Raises:
        RuntimeError: this user may not read the counters, or no kernel was measured; the message quotes ncu.
        ValueError: a unit is unknown.
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
    """The launches of each case: those between two marks of `profiled`, without the marks.

    Args:
        launches: of `parse_ncu`.

    Raises:
        RuntimeError: the first launch is not a mark, so no launch can be assigned to a case.
    """
    case = (launches["kernel"] == _mark.fn.__name__).cumsum()
    if case.iloc[0] != 1:
        raise RuntimeError(f"the first kernel that ncu measured is {launches['kernel'].iloc[0]!r}, and no mark.")
    rest = launches[launches["kernel"] != _mark.fn.__name__]
    return [rest[case[rest.index] == number].reset_index(drop=True) for number in range(1, case.max() + 1)]


def summed(launches: pd.DataFrame, kernel: str | None = None) -> dict[str, float]:
    """The sum over the launches of a case, by our names.

    Bytes are added up, and sectors as bytes. Sectors per request are those of the launch that read most from DRAM.

    Args:
        launches: of one case. kernel: only launches of this name; None for all.

    Raises:
        RuntimeError: no launch has that name.
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
    """`METRICS` without those that this ncu does not know on this GPU. Asked for one of these, ncu would stop."""
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


def run_under_ncu(program: Sequence[str], *, keep: Path | None = None) -> list[pd.DataFrame]:
    """Runs a program under ncu.

    Args:
        program: a command line; the program must call `profiled` for each of its cases.
        keep: a file to which ncu's text is copied.

    Returns:
        For each case a table of its launches, as `parse_ncu` makes it.

    Raises:
        FileNotFoundError: ncu is not installed.
        RuntimeError: there is no GPU, this user may not read its counters, or the program failed.
    """
    if runtime.device.type != "cuda":
        raise RuntimeError("hardware counters are a GPU's: this machine has none that the lab can use.")
    ncu = find_ncu()
    metrics = _known_metrics(ncu)
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
        raise RuntimeError(f"the program under ncu ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return by_case(launches)
