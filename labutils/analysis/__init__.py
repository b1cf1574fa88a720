"""Explains times: bytes moved (modelled, counted, measured), ceilings and roofline, profiles, resources, predictions.

The parts: `traffic` models and counts bytes, `counters` reads a GPU's own by ncu, `roofline` has the ceilings of a
machine and what stands under them, `profiling` reads torch.profiler, `resources` compiles for GPUs that are not there,
`scheduling` places programs on multiprocessors, `tuning` tries block sizes, `prediction` predicts times, `advice` says
what to take. What is used most is named here.
"""

from labutils.analysis.advice import Advice, recommend
from labutils.analysis.profiling import launch_overhead, profile, timeline
from labutils.analysis.roofline import (
    Ceilings,
    decode_points,
    exponential_tflops,
    in_turn,
    measure_ceilings,
    measure_exponentials,
    roofline_points,
    stored_ceilings,
)
from labutils.analysis.scheduling import makespan
from labutils.analysis.traffic import (
    Bytes,
    Traffic,
    compulsory_bytes,
    count_traffic,
    counted_traffic,
    io_bytes,
    total_bytes,
)

__all__ = [
    "Advice",
    "Bytes",
    "Ceilings",
    "Traffic",
    "compulsory_bytes",
    "count_traffic",
    "counted_traffic",
    "decode_points",
    "exponential_tflops",
    "in_turn",
    "io_bytes",
    "launch_overhead",
    "makespan",
    "measure_ceilings",
    "measure_exponentials",
    "profile",
    "recommend",
    "roofline_points",
    "stored_ceilings",
    "timeline",
    "total_bytes",
]
