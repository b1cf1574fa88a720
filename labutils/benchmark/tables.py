"""Tables of measurements on disk: their columns, and how they are written, read and compared."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from labutils.benchmark.environment import differences
from labutils.benchmark.points import KEY, Point
from labutils.machine import files

SCHEMAS: dict[str, tuple[str, ...]] = {
    name: tuple(columns.split())
    for name, columns in {
        "attention": "impl pass dtype head_dim causal batch heads seqlen ms tflops peak_mib status",
        "training": "model impl checkpointing chunked_loss seqlen batch peak_gib reserved_gib cap_gib "
        "tokens_per_s loss status",
        "models": "model work impl batch seqlen ms tokens_per_s peak_gib status reason",
        "ladder": "model impl checkpointing chunked_loss seqlen batch peak_gib reserved_gib cap_gib "
        "tokens_per_s loss status rung predicted_gib bound tries",
        "traffic": "impl seqlen head_dim block_m block_n model_bytes counted_bytes measured_bytes pass dtype causal "
        "batch heads kernels compulsory_bytes dram_read_bytes dram_write_bytes l2_read_bytes l2_write_bytes "
        "l1_filled_bytes load_sectors_per_request store_sectors_per_request",
        "launches": "impl pass dtype causal batch heads seqlen head_dim launch kernel dram_read_bytes dram_write_bytes "
        "l2_read_bytes l2_write_bytes l1_filled_bytes load_sectors_per_request store_sectors_per_request",
        "coalescing": "stride elements useful_bytes model_bytes dram_read_bytes dram_write_bytes l2_read_bytes "
        "l2_write_bytes load_sectors_per_request store_sectors_per_request",
        "decoding": "batch seqlen heads heads_kv head_dim us gb_per_s flops intensity tflops",
        "blocks": "kernel head_dim dtype causal batch heads seqlen block_m block_n num_warps num_stages tma ms status",
        "prediction": "impl pass head_dim causal batch heads seqlen ms predicted_ms split dtype spread_ms",
        "resources": "origin kernel capability head_dim dtype causal block_m block_n num_warps num_stages tma "
        "shared_bytes tensor_columns registers spilled_bytes fits blocks_per_sm occupancy triton",
    }.items()
}
"""The columns that each stored table starts with; more may follow."""

COLUMNS: tuple[str, ...] = (
    *SCHEMAS["attention"],
    "spread_ms",
    "max_error",
    "reason",
    "overhead_bound",
    "rounds_ms",
)
"""The columns of `sweep`'s table; `sweep` says what they hold."""

SETTINGS = ("seconds", "rounds", "warm_up", "error_seconds")
"""How long a table was measured, by `bench`'s --seconds, --rounds, --warm-up and --error-seconds. For the tables that
`bench` wrote, `environment.json` has them under "settings"."""

KEYS = {"attention": KEY, "models": ("model", "work", "impl", "batch", "seqlen")}
"""The columns that tell the rows of a table apart."""

NUMBERS = ("ms", "tflops", "peak_mib", "spread_ms", "max_error")
STATUSES = ("ok", "oom", "unsupported")
WORDS = {"pass": ("fwd", "bwd"), "status": STATUSES, "dtype": ("bfloat16", "float16", "float32", "float64")}
"""Columns of an attention table that have one of a few words."""
RESULTS = Path(__file__).resolve().parent.parent / "results"
STORED_DTYPE = "bfloat16"
"""The dtype of the stored attention table that the notebooks show. The table also has float16."""


def check_schema(df: pd.DataFrame, table: str) -> None:
    """Raises ValueError unless the table starts with the columns of `SCHEMAS[table]`, in order."""
    if table not in SCHEMAS:
        raise ValueError(f"table={table!r} is not known: {', '.join(SCHEMAS)}.")
    wanted = list(SCHEMAS[table])
    got = list(df.columns[: len(wanted)])
    if got != wanted:
        raise ValueError(f"a table {table!r} starts with the columns {wanted}; this one starts with {got}.")


# ------------------------------------------------------------------------------------------------------------
# Tables and their environment
# ------------------------------------------------------------------------------------------------------------


def save_results(df: pd.DataFrame, directory: str | Path, environment: Any, *, table: str = "attention") -> Path:
    """Writes `<directory>/<table>.csv` and, beside it, the environment that made it.

    Args:
        df: a table with the columns of `SCHEMAS[table]` first.
        directory: one for each GPU; made if it does not exist.
        environment: a mapping with a key "gpu", or an object with `as_dict()` such as `environment.environment()`.
        table: a key of `SCHEMAS`.

    `environment.json` has an entry for each table, since tables of one GPU are measured at different times.

    Returns:
        The path of the CSV file.

    Raises:
        ValueError: wrong columns, no "gpu" in the environment, or a directory with results of another GPU.
        OSError: the files could not be written; both are as they were.
    """
    check_schema(df, table)
    path = Path(directory) / f"{table}.csv"
    rows = df.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    # An old table beside a new environment would be a measurement that nobody made. So both change, or neither.
    files.replace_together(_with_environment(Path(directory), environment, table) | {path: rows})
    return path


def _with_environment(directory: Path, environment: Any, table: str) -> dict[Path, str]:
    """The path of `environment.json` -> its new content, with this environment for the table."""
    made_by = dict(environment.as_dict() if hasattr(environment, "as_dict") else environment)
    if "gpu" not in made_by:
        raise ValueError(f"the environment has no entry 'gpu' (it has {sorted(made_by)}): which machine measured this?")
    environments = _environments(directory)
    others = {e["gpu"] for name, e in environments.items() if name != table} - {made_by["gpu"]}
    if others:
        raise ValueError(f"{directory} holds results of {others}, not of {made_by['gpu']}: use another directory.")
    environments[table] = made_by
    return {directory / "environment.json": json.dumps(environments, indent=2, sort_keys=True) + "\n"}


def _environments(directory: Path) -> dict[str, dict]:
    path = directory / "environment.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or use another folder.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged (too deep): restore it, or use another folder.") from error
    if not isinstance(found, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("gpu", 0), str | None) for entry in found.values()
    ):
        raise ValueError(
            f"{path} is damaged: it holds no environment with an entry 'gpu' for each table. Restore it, or use "
            "another folder."
        )
    for table, entry in found.items():
        settings = entry.get("settings", {})
        if not isinstance(settings, dict) or not all(_finite(value) for value in settings.values()):
            raise ValueError(
                f"{path} is damaged: the settings of {table} are {settings!r}, and not a number for each of "
                f"{', '.join(SETTINGS)}. Restore it, or use another folder."
            )
    return found


def check_destination(directory: Path, environment: Any, table: str) -> None:
    """Raises what `save_results` would raise for this environment and folder, before anything is measured.

    Raises:
        ValueError: the folder cannot be written to, or has results of another GPU, or a damaged `environment.json`.
    """
    files.check_writable(directory, f"--out={directory}")
    _with_environment(directory, environment, table)


def read_results(directory: str | Path, table: str = "attention") -> pd.DataFrame:
    """Reads a table that `save_results` or a `Recorder` wrote, with the environment that made it.

    Args:
        directory: the folder of the table.
        table: a key of `SCHEMAS`.

    Returns:
        The table; `.attrs["environment"]` (dict) and `.attrs["machine"]` (the GPU's name, or the CPU's).

    Raises:
        FileNotFoundError: the folder has no such table, or no environment for it.
        ValueError: the file does not have the columns of its schema, is damaged, or has a point twice.
    """
    directory = Path(directory)
    path = directory / f"{table}.csv"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no {table}.csv: name a folder that holds one.")
    try:
        df = pd.read_csv(path, dtype={"reason": "str", "rounds_ms": "str"})
        check_schema(df, table)
        if table == "attention":
            _check_rows(df)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for text in {"reason", "rounds_ms"} & set(df.columns):
        df[text] = df[text].fillna("")
    environments = _environments(directory)
    if table not in environments:
        raise FileNotFoundError(f"{directory}/environment.json says nothing of {table}.csv: what made it is not known.")
    made_by = environments[table]
    df.attrs.update(environment=made_by, machine=made_by["gpu"] or made_by.get("cpu"))
    return df


def reference_results(
    gpu: str = "nvidia_h200", table: str = "attention", *, dtype: str | None = STORED_DTYPE
) -> pd.DataFrame:
    """A stored table of a named GPU, with the environment that made it.

    Args:
        gpu: a directory under labutils/results.
        table: a key of `SCHEMAS`.
        dtype: only rows of this dtype, if the table has a column `dtype`; None for all rows.

    Returns:
        The table; `.attrs["environment"]` (dict) and `.attrs["machine"]` (the GPU's name).

    Raises:
        FileNotFoundError: there is no such table; the message lists the stored ones.
        ValueError: the file does not have the columns of its schema, or has no row of that dtype.
    """
    if not (RESULTS / gpu / f"{table}.csv").exists():
        stored = sorted(f"{p.parent.name}/{p.stem}" for p in RESULTS.glob("*/*.csv"))
        raise FileNotFoundError(f"no stored table {gpu}/{table}; there are: {', '.join(stored) or 'none'}.")
    df = read_results(RESULTS / gpu, table)
    if dtype is None or "dtype" not in df.columns or df.empty:
        return df
    rows = df[df["dtype"] == dtype].reset_index(drop=True)
    if rows.empty:
        raise ValueError(f"{gpu}/{table} has no rows in {dtype}; it has {', '.join(sorted(set(df['dtype'])))}.")
    return rows


def _check_rows(df: pd.DataFrame) -> None:
    """Raises ValueError, with the line, for a row of an attention table that no sweep can have written, or a double."""
    seen: dict[tuple, int] = {}
    numbers = set(NUMBERS) & set(df.columns)
    for line, row in enumerate(df.to_dict("records"), start=2):
        wrong = [name for name in ("head_dim", "batch", "heads", "seqlen") if not _whole(row[name])]
        wrong += [name for name, known in WORDS.items() if row[name] not in known]
        wrong += [] if str(row["causal"]) in ("True", "False") else ["causal"]
        wrong += (
            [] if str(row.get("overhead_bound", "")) in ("True", "False", "nan", "", "None") else ["overhead_bound"]
        )
        wrong += [name for name in numbers if not _possible(name, row[name])]
        wrong += [] if _rounds_possible(row.get("rounds_ms")) else ["rounds_ms"]
        if not wrong and row["status"] == "ok" and not row["ms"] > 0:
            wrong = ["ms"]
        if wrong:
            raise ValueError(
                f"line {line} is damaged ({', '.join(f'{name}: {row[name]}' for name in wrong)}). Delete it, and "
                "--resume measures its point again."
            )
        first = seen.setdefault(tuple(str(row[name]) for name in KEY), line)
        if first != line:
            raise ValueError(
                f"line {line} has the point of line {first} once more ({row['impl']} {row['pass']} {row['dtype']} "
                f"D={row['head_dim']} N={row['seqlen']}), and which of them counts is not known. Delete one of the two."
            )


def _whole(value: Any) -> bool:
    return _finite(value) and value >= 1 and value == int(value)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _possible(name: str, value: Any) -> bool:
    """Whether a column of `NUMBERS` may have this value. nan is a value that is missing. An error may be infinite."""
    return isinstance(value, (int, float)) and not value < 0 and (name == "max_error" or not math.isinf(value))


def _rounds_possible(text: Any) -> bool:
    """Whether the column `rounds_ms` may have this text: times in milliseconds, separated by semicolons, or nothing."""
    if text is None or (isinstance(text, float) and math.isnan(text)):
        return True
    try:
        return all(0 < float(part) < math.inf for part in str(text).split(";") if part)
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------------
# Rows on disk as they come
# ------------------------------------------------------------------------------------------------------------


class Recorder:
    """Writes a table into a folder, complete after each row, so that a later run can go on from there.

    Args:
        directory: made if it does not exist.
        environment: as for `save_results`.
        table: a key of `KEYS`: "attention" or "models".
        resume: go on with the rows in the folder.
        settings: a value for each of `SETTINGS`. `environment.json` keeps them with the table's environment.

    Attributes:
        rows: the row of each point, without the columns of `KEYS`. Add to it, then call `write`.
        settings_known: whether the settings of all rows are known. They are not if none are given, or if the folder
            has rows without settings. `environment.json` then has none.

    Raises:
        FileExistsError: the folder has rows, and `resume` is False.
        ValueError: the rows to go on with were measured in another environment or with other settings; or the folder
            has other tables of another GPU; or the settings are not those of `SETTINGS`.
    """

    def __init__(
        self,
        directory: str | Path,
        environment: Any,
        *,
        table: str = "attention",
        resume: bool = False,
        settings: Mapping[str, float] | None = None,
    ):
        if settings is not None and set(settings) != set(SETTINGS):
            raise ValueError(f"settings={sorted(settings)}: give {', '.join(SETTINGS)}.")
        self.directory = Path(directory)
        self.table = table
        self.path = self.directory / f"{table}.csv"
        made_by = dict(environment.as_dict() if hasattr(environment, "as_dict") else environment)
        self.environment = made_by
        self.rows: dict[Any, dict] = {}
        self.settings_known = settings is not None
        if self.path.exists():
            if not resume:
                raise FileExistsError(
                    f"{self.path} holds measurements already: go on with --resume, name another folder with --out, "
                    "or delete that file."
                )
            stored = read_results(self.directory, table)
            changes = differences(stored.attrs["environment"], made_by)
            if changes:
                raise ValueError(
                    f"{self.path} was measured in another environment ({'; '.join(changes)}), and one table must "
                    "not mix two. Measure in that environment again, name another folder (a command: with --out), or "
                    "delete that file."
                )
            self.rows = rows_by_point(stored) if table == "attention" else _rows_by_key(stored, KEYS[table])
            before = stored.attrs["environment"].get("settings")
            if before is None and self.rows:
                self.settings_known = False
            elif settings is not None and before is not None and (others := other_settings(before, settings)):
                raise ValueError(
                    f"{self.path} was measured with other settings ({'; '.join(others)}), and one table must not mix "
                    "two. Give those again, name another folder with --out, or delete that file."
                )
        if self.settings_known:
            made_by["settings"] = dict(settings or {})
        files.replace_together(_with_environment(self.directory, made_by, table))

    def write(self) -> None:
        """Puts all rows on disk. A program that reads the file meanwhile finds whole rows."""
        columns = COLUMNS if self.table == "attention" else SCHEMAS[self.table]
        lines: list[list[str]] = [list(columns)]
        for point, row in self.rows.items():
            values = dict(zip(KEYS[self.table], point, strict=True)) | row
            lines.append([_text(values.get(column)) for column in columns])
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(lines)
        files.replace(self.path, text.getvalue())


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def other_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between the settings of two tables, as options of `bench`: ["--seconds 0.3, now 0.1", ...]."""
    return [
        f"--{name.replace('_', '-')} {before.get(name)}, now {now.get(name)}"
        for name in SETTINGS
        if before.get(name) != now.get(name)
    ]


def rows_by_point(df: pd.DataFrame) -> dict[Point, dict]:
    """The rows of an attention table by point, as a sweep holds them."""
    rows = {}
    for record in df.to_dict("records"):
        row = {column: record.get(column) for column in COLUMNS if column not in KEY}
        bound = row["overhead_bound"]
        row["overhead_bound"] = None if bound is None or pd.isna(bound) else str(bound) == "True"
        rows[Point.of(record)] = row
    return rows


def _rows_by_key(df: pd.DataFrame, key: tuple[str, ...]) -> dict[tuple, dict]:
    """The rows of a table by their values in the columns `key`."""
    return {tuple(record.pop(name) for name in key): record for record in df.to_dict("records")}


def as_table(rows: Mapping[Point, Mapping[str, Any]]) -> pd.DataFrame:
    """A table with `COLUMNS` from rows by point."""
    df = pd.DataFrame([point.as_dict() | dict(row) for point, row in rows.items()], columns=list(COLUMNS))
    for column in NUMBERS:
        df[column] = df[column].astype(float)
    return df


def save_json(df: pd.DataFrame, path: str | Path, environment: Mapping[str, Any]) -> None:
    """Writes a table as JSON: {"environment": {...}, "rows": [{column: value, ...}, ...]}. A missing value is null.

    Raises:
        OSError: as for `files.replace`.
    """
    rows = [{name: _plain(value) for name, value in record.items()} for record in df.to_dict("records")]
    files.replace(path, json.dumps({"environment": dict(environment), "rows": rows}, indent=1) + "\n")


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None if value is None or math.isnan(value) else str(value)
    return value.item() if hasattr(value, "item") else value


# ------------------------------------------------------------------------------------------------------------
# Comparing
# ------------------------------------------------------------------------------------------------------------


def compare(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The points that two tables have in common, side by side.

    Args:
        first, second: attention tables, with `ms` and `spread_ms`.

    Returns:
        The columns of the point, `first_ms` and `second_ms`, and:

        - `difference`: of the two medians, relative to the larger one.
        - `spread`: the larger `spread_ms` of the two, relative to the same.
        - `covered`: whether the difference is within the spread.
        - `overhead_bound`: whether it is True in either table.

        Points that did not run in both tables are left out.

    Raises:
        ValueError: the tables have no measured point in common.
    """
    keys = list(KEY)
    if any("spread_ms" not in table.columns for table in (first, second)):
        raise ValueError("a table without the column spread_ms cannot be compared: measure it again.")
    wanted = [*keys, "ms", "spread_ms", *({"overhead_bound"} & set(first.columns) & set(second.columns))]
    both = first[wanted].merge(second[wanted], on=keys, suffixes=("_1", "_2"))
    both = both[both["ms_1"].notna() & both["ms_2"].notna()].reset_index(drop=True)
    if both.empty:
        raise ValueError("the two tables have no measured point in common: same shapes, dtypes and implementations?")
    larger = both[["ms_1", "ms_2"]].max(axis=1)
    difference = (both["ms_1"] - both["ms_2"]).abs() / larger
    spread = both[["spread_ms_1", "spread_ms_2"]].max(axis=1) / larger
    bound = pd.Series(False, index=both.index)
    for column in {"overhead_bound_1", "overhead_bound_2"} & set(both.columns):
        bound |= both[column].map(lambda value: str(value) == "True")
    return both[keys].assign(
        first_ms=both["ms_1"], second_ms=both["ms_2"], difference=difference, spread=spread,
        covered=difference <= spread, overhead_bound=bound,
    )  # fmt: skip


def speedup(df: pd.DataFrame, over: str = "naive") -> pd.DataFrame:
    """The table with a column `speedup`: time of `over` divided by time of the row, if both differ only in `impl`.

    The value is NaN if either did not run.

    Args:
        df: an attention table, or a table of whole models (`labutils.gpt2.model_benchmark.measure_models`).
        over: an implementation in it.

    Raises:
        ValueError: `over` is not among the implementations, or has a point twice.
    """
    if over not in set(df["impl"]):
        raise ValueError(f"over={over!r} is not in the table, which has {', '.join(sorted(set(df['impl'])))}.")
    keys = [name for name in KEYS["models" if "model" in df.columns else "attention"] if name != "impl"]
    base = df.loc[df["impl"] == over, [*keys, "ms"]].rename(columns={"ms": "base_ms"})
    if base.duplicated(keys).any():
        raise ValueError(f"{over} stands more than once at the same point: pass one sweep at a time.")
    merged = df.merge(base, on=keys, how="left")
    result = merged.drop(columns="base_ms").assign(speedup=merged["base_ms"] / merged["ms"])
    result.attrs.update(df.attrs)
    return result
