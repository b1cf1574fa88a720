"""Measures attention: time, peak memory and error of every implementation, failures included, as a table.

`sweep` is the one function that measures; it returns a DataFrame with a row for each point, also for those that ran out
of memory or cannot run, with the reason. `reference_results` reads such a table as it was stored on a named GPU.
`time_call` and `peak_memory_mib` measure one function.

The parts: `implementations` has what is compared, `measuring` measures one call, `points` one point of a sweep,
`sweeping` all of them in rounds, `variations` one shape and its variants, `storing` keeps and reads tables, `decoding`
times a KV cache, `tuning` finds the fastest launch configurations, `targets` judges what the kernels are held to.
"""

from labutils.attention.backends import IMPLEMENTATIONS, Attention, Unsupported
from labutils.benchmark.decoding import decode_bandwidth
from labutils.benchmark.points import Point
from labutils.benchmark.sweeping import sweep
from labutils.benchmark.tables import (
    COLUMNS,
    RESULTS,
    SCHEMAS,
    STORED_DTYPE,
    Recorder,
    check_schema,
    compare,
    read_results,
    reference_results,
    save_results,
    speedup,
)
from labutils.benchmark.timing import (
    Timing,
    attention_flops,
    dtype_name,
    overhead_bound,
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
    "Attention",
    "Point",
    "Recorder",
    "Timing",
    "Unsupported",
    "attention_flops",
    "check_schema",
    "compare",
    "decode_bandwidth",
    "dtype_name",
    "overhead_bound",
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
