"""Measures attention: time, peak memory and error of every implementation, as tables with their environment.

`sweep` measures implementations over sequence lengths. Its table has a row for each point. If a point runs out of
memory or cannot run, its row says why. `reference_results` reads such a table as it was stored on a named GPU.
`time_call` and `peak_memory_mib` measure one function.

    environment  GPU, driver and versions of this machine, and which backends run on it
    timing       measures one call: time, spread, peak memory, whether launching bounds it
    points       measures one point: one implementation at one shape, whatever happens
    sweeping     measures many points in rounds
    variants     measures one shape and variants of it
    tables       columns of the stored tables, and how they are written, read and compared
    launches     checks and times one launch configuration, for `python -m labutils tune`
"""

from labutils.attention.backends import IMPLEMENTATIONS, Unsupported
from labutils.benchmark.points import Point
from labutils.benchmark.sweeping import sweep
from labutils.benchmark.tables import (
    COLUMNS,
    RESULTS,
    SCHEMAS,
    STORED_DTYPE,
    Recorder,
    compare,
    read_results,
    reference_results,
    save_results,
    speedup,
)
from labutils.benchmark.timing import (
    attention_flops,
    dtype_name,
    peak_memory_mib,
    time_call,
    time_issuing,
    time_replayed,
    torch_profiler,
    watch_interpreter,
)
from labutils.benchmark.variants import vary

__all__ = [
    "COLUMNS",
    "IMPLEMENTATIONS",
    "RESULTS",
    "SCHEMAS",
    "STORED_DTYPE",
    "Point",
    "Recorder",
    "Unsupported",
    "attention_flops",
    "compare",
    "dtype_name",
    "peak_memory_mib",
    "read_results",
    "reference_results",
    "save_results",
    "speedup",
    "sweep",
    "time_call",
    "time_issuing",
    "time_replayed",
    "torch_profiler",
    "vary",
    "watch_interpreter",
]
