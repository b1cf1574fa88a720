"""Explains times: bytes moved (modelled, counted, measured), ceilings and roofline, profiles, resources, predictions.

The parts: `traffic` models and counts bytes, `roofline` has the ceilings of a machine and what stands under them,
`profiling` reads torch.profiler, `resources` compiles for GPUs that are not there.
"""

from labutils.analysis.profiling import profile
from labutils.analysis.roofline import Ceilings, measure_ceilings, roofline_points, stored_ceilings
from labutils.analysis.traffic import (
    Bytes,
    Traffic,
    compulsory_bytes,
    count_traffic,
    counted_traffic,
    io_bytes,
    total_bytes,
)
from labutils.benchmark import attention_flops

__all__ = [
    "Bytes",
    "Ceilings",
    "Traffic",
    "attention_flops",
    "compulsory_bytes",
    "count_traffic",
    "counted_traffic",
    "io_bytes",
    "measure_ceilings",
    "profile",
    "roofline_points",
    "stored_ceilings",
    "total_bytes",
]
