"""Predicts the time of attention at shapes that nobody ran: FLOPs, exponentials, bytes, waves over SMs, overhead.

In a kernel of the flash family, each program computes a block of rows. The model of its time is

    t = overhead + c_bytes * bytes
      + fill * (c_products * products + c_exponentials * exponentials + c_programs * programs)

`products`, `exponentials` and `bytes` are the work of a shape, divided by the rate of the GPU (its ceilings): a kernel
that reaches a ceiling would have c = 1. c_programs is the time in microseconds that a program takes beside its tiles.
`fill` says how much longer the SM with the most work is busy than the average SM. The terms are added, since the
kernels of this lab do little of it at the same time. A kernel that does more at once gets smaller constants.

The constants are fitted on measured times, for each backend, pass, dtype and mask. The terms come from the shape and
from the GPU: so a fit on one GPU says something about another GPU.
"""

from __future__ import annotations

import itertools
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from labutils.analysis.roofline import Ceilings, measure_ceilings, stored_ceilings
from labutils.attention.backends import BACKENDS
from labutils.benchmark import RESULTS, Point, attention_flops, reference_results
from labutils.machine import chips, runtime

EXPONENTIALS_PER_CLOCK = 16
"""Results of ex2 that an SM delivers in a clock, compute capability 7.5 to 10.0 (CUDA C++ Programming Guide, table
"Throughput of Native Arithmetic Instructions")."""

GROUP = ("impl", "pass", "dtype", "causal")
"""The columns whose values share a fit."""


@dataclass(frozen=True)
class Gpu:
    """The rates of a GPU that the model needs.

    Attributes:
        name: of the machine.
        tflops: TFLOP/s of a large matrix product. gb_per_s: GB/s of a large copy. Both as `measure_ceilings` finds
            them.
        processors: streaming multiprocessors (SMs).
        mhz: highest clock of an SM in MHz, for the exponentials.
    """

    name: str
    tflops: float
    gb_per_s: float
    processors: int
    mhz: float

    @property
    def exponentials_per_s(self) -> float:
        """The most ex2 results that all SMs deliver in a second."""
        return EXPONENTIALS_PER_CLOCK * self.processors * self.mhz * 1e6

    @classmethod
    def of_this_machine(cls, ceilings: Ceilings) -> Gpu:
        """This machine's GPU, with ceilings measured on it.

        Args:
            ceilings: of `measure_ceilings`.

        Raises:
            RuntimeError: there is no GPU, or nvidia-smi does not say its highest clock.
        """
        if runtime.device.type != "cuda":
            raise RuntimeError("this machine has no GPU: Gpu.stored() is the H200 of the stored results.")
        properties = torch.cuda.get_device_properties(runtime.device)
        mhz = _highest_clock_mhz()
        return cls(ceilings.machine, ceilings.tflops, ceilings.gb_per_s, properties.multi_processor_count, mhz)

    @classmethod
    def stored(cls, gpu: str = "nvidia_h200") -> Gpu:
        """A GPU whose ceilings are stored.

        Args:
            gpu: a folder under labutils/results.

        Raises:
            ValueError: `chips.CARDS` does not have its number of SMs and its clock.
            FileNotFoundError: its ceilings are not stored.
        """
        if gpu not in _CARDS:
            raise ValueError(f"gpu={gpu!r} is not known: {', '.join(_CARDS)}, or Gpu.of_this_machine(ceilings).")
        ceilings, card = stored_ceilings(gpu), _CARDS[gpu]
        assert card.mhz is not None  # a card of the table whose clock the lab knows
        return cls(ceilings.machine, ceilings.tflops, ceilings.gb_per_s, card.processors, card.mhz)


def gpu_for(folder: Path) -> Gpu:
    """The GPU whose results a folder holds: with the ceilings stored in that folder, else this machine's GPU.

    A stored prediction must follow from the files beside it, so that anybody can compute it again.

    Args:
        folder: of tables, such as labutils/results/nvidia_h200.

    Raises:
        RuntimeError: the folder is not one of stored results with ceilings, and this machine has no GPU.
    """
    if folder.resolve().parent == RESULTS.resolve() and folder.name in _CARDS and (folder / "ceilings.json").exists():
        return Gpu.stored(folder.name)
    return Gpu.of_this_machine(measure_ceilings())


_CARDS = {"nvidia_h200": chips.CARDS["H200"]}  # for the number of SMs and the clock, which stored results lack


def _highest_clock_mhz() -> float:
    asked = [
        "nvidia-smi",
        "--query-gpu=clocks.max.sm",
        "--format=csv,noheader,nounits",
        f"--id={runtime.device.index or 0}",
    ]
    try:
        done = subprocess.run(asked, capture_output=True, text=True)
        return float(done.stdout.split()[0])
    except OSError as error:
        said = str(error)
    except (ValueError, IndexError):  # "[N/A]", or nothing
        said = f"{done.stdout.strip()} {done.stderr.strip()}".strip() or "it prints nothing"
    raise RuntimeError(
        f"nvidia-smi does not say the highest clock of an SM ({said}): install NVIDIA's driver with its tools, or give "
        "the clock yourself, as Gpu(..., mhz=...)."
    )


# ------------------------------------------------------------------------------------------------------------
# The work of a shape
# ------------------------------------------------------------------------------------------------------------

_PRODUCTS = {"fwd": 2, "bwd": 5}  # matrix products of N x N x D
_TENSORS = {"fwd": 4, "bwd": 8}  # q, k, v, o; in the backward pass dout, dq, dk and dv as well

FITTED = ("overhead", "bytes", "products", "exponentials", "programs")
"""The terms of the model, in the order of `Fit.constants`."""


def padded(head_dim: int) -> int:
    """The head dimension that the model assumes a kernel computes with: the next multiple of 32."""
    return -(-head_dim // 32) * 32


def terms(row: Mapping[str, Any], gpu: Gpu, block: int, resident: float, slowdown: float) -> dict[str, float]:
    """The work of a shape, in milliseconds at the ceilings of a GPU.

    Args:
        row: pass, dtype, head_dim, causal, batch, heads, seqlen.
        gpu: the GPU whose ceilings count.
        block: rows and columns of a tile.
        resident: programs that an SM holds at once.
        slowdown: time of a program that has an SM to itself, over the time per program on an SM that is full.

    Returns:
        A value for each of `FITTED` ("overhead" is 1; products, exponentials and programs have `fill` in them) and
        `fill` itself.
    """
    n, d = int(row["seqlen"]), int(row["head_dim"])
    heads = int(row["batch"]) * int(row["heads"])
    blocks = math.ceil(n / block)
    tiles = blocks * (blocks + 1) // 2 if row["causal"] else blocks**2
    pairs = heads * tiles * block * block  # scores computed, also those that a mask hides within a tile
    programs = heads * blocks
    even = programs / gpu.processors
    if row["causal"]:  # the longest program starts first; shorter ones fill the gaps, and the longest must end
        waves = max(even, slowdown * blocks**2 / tiles)
    else:  # equal programs run in waves
        most = math.ceil(even)
        waves = max(most, slowdown * math.ceil(most / resident))
    fill = waves / even
    itemsize = getattr(torch, row["dtype"]).itemsize
    return {
        "overhead": 1.0,
        "bytes": _TENSORS[row["pass"]] * heads * n * d * itemsize / gpu.gb_per_s / 1e6,
        "products": fill * 2 * _PRODUCTS[row["pass"]] * pairs * padded(d) / gpu.tflops / 1e9,
        "exponentials": fill * pairs / gpu.exponentials_per_s * 1e3,
        "programs": fill * even * 1e-3,  # a microsecond each
        "fill": fill,
    }


# ------------------------------------------------------------------------------------------------------------
# Fit and prediction
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """The constants of one backend, pass, dtype and mask.

    Attributes:
        constants: by the names of `FITTED`. overhead: milliseconds. bytes, products, exponentials: their time as a
            multiple of the time at the ceiling. programs: microseconds of a program.
        block, resident, slowdown: as for `terms`.
        rows: how many measurements it was fitted on.
    """

    constants: dict[str, float]
    block: int
    resident: float
    slowdown: float
    rows: int

    def parts(self, row: Mapping[str, Any], gpu: Gpu) -> dict[str, float]:
        """Milliseconds of each term of the model for a shape (a row as for `terms`) on a GPU. Their sum is the
        prediction.
        """
        asked = terms(row, gpu, self.block, self.resident, self.slowdown)
        return {name: self.constants[name] * asked[name] for name in FITTED}

    def predict(self, row: Mapping[str, Any], gpu: Gpu) -> float:
        """Predicted milliseconds of a shape (a row as for `terms`) on a GPU."""
        return sum(self.parts(row, gpu).values())


_BLOCKS = (64, 128)
_RESIDENT = (1, 2, 3, 4)
_SLOWDOWN = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)


def _not_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Least squares with constants of 0 or more. It tries which constants are 0, few zeros first.

    A choice is the best if all other constants come out as 0 or more, and if no constant that is 0 would lower the
    error by growing (the conditions of Karush, Kuhn and Tucker).
    """
    best, best_error = np.zeros(a.shape[1]), math.inf
    for size in range(a.shape[1], 0, -1):
        for chosen in itertools.combinations(range(a.shape[1]), size):
            x = np.zeros(a.shape[1])
            x[list(chosen)] = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
            if (x < 0).any():
                continue
            left = b - a @ x
            error = float((left**2).sum())
            if error < best_error:
                best, best_error = x, error
            slope = a.T @ left / np.linalg.norm(a, axis=0).clip(min=1e-300)
            if (slope <= 1e-9 * np.linalg.norm(b)).all():
                return x
    return best


def fit_one(rows: Sequence[Mapping[str, Any]], gpu: Gpu) -> Fit:
    """The constants with the least squares of relative errors, over `rows` of one backend, pass, dtype and mask.

    It tries all values of block, resident and slowdown. In a sweep of a fixed number of tokens, all rows may fill the
    GPU several times over. Then resident and slowdown make no difference, and the smallest values are taken. Such a
    sweep cannot separate bytes from overhead either, since all of its rows move the same bytes.

    Args:
        rows: shapes as for `terms`, with `ms`.
        gpu: the GPU that measured them.

    Raises:
        ValueError: fewer rows than constants.
    """
    if len(rows) < len(FITTED):
        raise ValueError(f"{len(rows)} measurements do not determine {len(FITTED)} constants: measure more shapes.")
    best: Fit | None = None
    best_error = math.inf
    ms = np.array([row["ms"] for row in rows])
    for block, resident, slowdown in itertools.product(_BLOCKS, _RESIDENT, _SLOWDOWN):
        if slowdown > resident:  # a program that is alone has no more than all resident programs share
            continue
        asked = [terms(row, gpu, block, resident, slowdown) for row in rows]
        a = np.array([[one[name] for name in FITTED] for one in asked]) / ms[:, None]
        constants = _not_negative(a, np.ones(len(ms)))
        error = float(((a @ constants - 1) ** 2).sum())
        if error < best_error * (1 - 1e-6):
            named = dict(zip(FITTED, constants.tolist(), strict=True))
            best, best_error = Fit(named, block, resident, slowdown, len(rows)), error
    assert best is not None
    return best


def predictable() -> list[str]:
    """The backends that the model is for: their kernels have programs that each compute a block of rows.

    Naive attention is not among them, since its operations run one after another. v1 has one program for each head.
    """
    return [backend.name for backend in BACKENDS.values() if backend.row_programs]


def fit(measured: pd.DataFrame, gpu: Gpu) -> dict[tuple, Fit]:
    """One `Fit` for each backend, pass, dtype and mask in a table of measurements; failures are left out.

    Args:
        measured: a table such as attention.csv, with the columns of `GROUP`, the shape and `ms`.
        gpu: the GPU that measured it.

    Raises:
        ValueError: a group has too few rows.
    """
    ok = measured[measured["ms"].notna() & measured["impl"].isin(predictable())]
    return {key: fit_one(rows.to_dict("records"), gpu) for key, rows in ok.groupby(list(GROUP))}


def predict(fits: Mapping[tuple, Fit], shapes: pd.DataFrame, gpu: Gpu) -> pd.DataFrame:
    """The table of shapes with a column `predicted_ms`; rows of a group without a fit are left out.

    Args:
        fits: values of the columns `GROUP` -> their `Fit`.
        shapes: rows with the columns of a measured table; times are not read.
        gpu: the GPU whose time is predicted.
    """
    known = [tuple(row[name] for name in GROUP) in fits for row in shapes.to_dict("records")]
    found = shapes[known].copy()
    found["predicted_ms"] = [
        fits[tuple(row[name] for name in GROUP)].predict(row, gpu) for row in found.to_dict("records")
    ]
    return found


def errors(predicted: pd.DataFrame) -> pd.Series:
    """|predicted / measured - 1| of each row."""
    return (predicted["predicted_ms"] / predicted["ms"] - 1).abs().rename("error")


def error_summary(predicted: pd.DataFrame, by: Iterable[str] = ("impl", "pass")) -> pd.DataFrame:
    """Median, 90th percentile and largest of the absolute relative errors, for each group of rows and for all rows.

    Args:
        predicted: with `ms` and `predicted_ms`.
        by: the columns that make the groups.

    Returns:
        Rows by the names of the groups and "all"; columns shapes (how many), median, 90 % and largest.
    """
    parts = {" ".join(map(str, key)): rows for key, rows in predicted.groupby(list(by), sort=False)}
    table = {
        name: [len(rows), errors(rows).median(), errors(rows).quantile(0.9), errors(rows).max()]
        for name, rows in (parts | {"all": predicted}).items()
    }
    return pd.DataFrame.from_dict(table, orient="index", columns=["shapes", "median", "90 %", "largest"])


def each_length_in_turn(measured: pd.DataFrame, gpu: Gpu) -> pd.DataFrame:
    """The table with `predicted_ms`, each row predicted by a fit on the rows of all other lengths.

    Args:
        measured: as for `fit`.
        gpu: the GPU that measured it.

    Raises:
        ValueError: a group has too few rows without one of the lengths.
    """
    parts = [
        predict(fit(measured[measured["seqlen"] != n], gpu), measured[measured["seqlen"] == n], gpu)
        for n in sorted(set(measured["seqlen"]))
    ]
    return pd.concat(parts)


def by_head_dim(
    fits: Mapping[tuple, Fit], held_out: pd.DataFrame, gpu: Gpu, instead: Mapping[int, int]
) -> pd.DataFrame:
    """The median error, with its sign, for each backend, pass and head dimension.

    Args:
        fits, gpu: as for `predict`.
        held_out: measurements.
        instead: head dimension -> another that is put into the model as well. {96: 128} also predicts D = 96 as
            D = 128, for kernels that compute 96 columns as 128.

    Returns:
        Rows by backend and pass; columns "D = 64" and so on, and "D = 96 as 128".
    """
    columns = {}
    for d, rows in held_out.groupby("head_dim"):
        for taken in (d, instead.get(d)):
            if taken is not None:
                guess = predict(fits, rows.assign(head_dim=taken), gpu)
                error = (guess["predicted_ms"] / guess["ms"] - 1).groupby([guess["impl"], guess["pass"]], sort=False)
                columns[f"D = {d}" if taken == d else f"D = {d} as {taken}"] = error.median()
    return pd.DataFrame(columns)


# ------------------------------------------------------------------------------------------------------------
# Shapes to measure for the fit and for its test
# ------------------------------------------------------------------------------------------------------------

MEASURED = ("triton_v2", "sdpa_flash", "sdpa_cudnn")
"""The predictable backends in the stored table: each more costs some 230 measurements."""

_LEAST_FLOPS, _MOST_FLOPS = 4e10, 4e12  # of a forward pass: a smaller one measures launching, a larger one takes long
_FIT_LENGTHS, _FIT_HEADS = (1024, 2048, 4096, 8192, 16384), (1, 4, 12, 32, 128, 512)  # heads of all sequences


def fit_shapes() -> list[dict]:
    """Shapes for the fit: N a power of two, D 64 and 128, few programs to many.

    Each is {"batch", "heads", "seqlen", "head_dim", "causal"}. The shapes with 16,384 tokens and H * D = 2,048 are also
    in the stored sweep (attention.csv).
    """
    shapes = [
        {"batch": max(1, total // 32), "heads": min(total, 32), "seqlen": n, "head_dim": d, "causal": causal}
        for d, n, total, causal in itertools.product((64, 128), _FIT_LENGTHS, _FIT_HEADS, (False, True))
    ]
    return [shape for shape in shapes if _LEAST_FLOPS <= _flops(shape) <= _MOST_FLOPS]


def held_out_shapes(count: int = 60) -> list[dict]:
    """Shapes that test the model; always the same. N is not a power of two; D is 64, 96 or 128.

    The fit of the model never sees these lengths.

    Args:
        count: how many shapes; a smaller count gives the first of them.
    """
    generator = np.random.default_rng(0)
    shapes: dict[tuple, dict] = {}
    while len(shapes) < count:
        shape = {
            "batch": int(generator.choice([1, 2, 3, 5, 8])),
            "heads": int(generator.choice([1, 3, 6, 10, 16, 24, 40])),
            "seqlen": int(8 * generator.integers(700 // 8, 14000 // 8)),
            "head_dim": int(generator.choice([64, 64, 96, 128, 128])),
            "causal": bool(generator.integers(2)),
        }
        power_of_two = shape["seqlen"] & (shape["seqlen"] - 1) == 0
        if _LEAST_FLOPS <= _flops(shape) <= _MOST_FLOPS and not power_of_two:
            shapes[tuple(shape.values())] = shape
    return list(shapes.values())


def _flops(shape: Mapping[str, Any]) -> float:
    return attention_flops(
        batch=shape["batch"], heads=shape["heads"], seqlen_q=shape["seqlen"], head_dim=shape["head_dim"],
        causal=shape["causal"],
    )  # fmt: skip


def points_to_measure(
    impls: Iterable[str] = MEASURED, passes: Iterable[str] = ("fwd", "bwd"), dtype: str = "bfloat16"
) -> dict[Point, str]:
    """Every point of `fit_shapes` and `held_out_shapes` -> its split, "fit" or "held_out".

    The points of one shape follow each other.

    Args:
        impls, passes, dtype: as in a `Point`; each shape has a point for each backend and pass.
    """
    impls, passes = list(impls), list(passes)
    return {
        Point(impl, which, dtype, s["head_dim"], s["causal"], s["batch"], s["heads"], s["seqlen"]): split
        for split, shapes in (("fit", fit_shapes()), ("held_out", held_out_shapes()))
        for s in shapes
        for impl in impls
        for which in passes
    }


def stored_predictions(gpu: str = "nvidia_h200") -> pd.DataFrame:
    """The stored measurements of both splits with their predictions: the columns of `SCHEMAS["prediction"]`.

    Args:
        gpu: a folder under labutils/results.

    Raises:
        FileNotFoundError: this GPU has no such table: `python tools/study.py shapes` measures one.
    """
    return reference_results(gpu, "prediction", dtype=None)


def predicted_table(measured: pd.DataFrame, gpu: Gpu) -> pd.DataFrame:
    """The table with `predicted_ms` for all rows, by a fit on the rows with split "fit".

    Args:
        measured: as for `fit`, with `split`.
        gpu: the GPU that measured it.

    Raises:
        ValueError: too few rows to fit.
    """
    return predict(fit(measured[measured["split"] == "fit"], gpu), measured, gpu)
