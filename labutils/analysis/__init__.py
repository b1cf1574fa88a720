"""Explains why attention takes as long as it does. The functions used most are exported here.

traffic       models the bytes that a kernel moves, and counts them in Triton's interpreter
bounds        says which program of a launch leaves its tensors
interpreting  how `traffic` and `bounds` start a process in which kernels are interpreted
counters      compares the model with the counters of a GPU, and times copies with gaps
roofline      measures the ceilings of a machine, and places kernels under them
profiling     reads torch.profiler: operations, a timeline, the cost of launches
resources     registers, shared memory and occupancy of kernels, also for a GPU that is not there
blocks        times all block sizes of the forward kernel
prediction    predicts the time of a kernel from its shape
advice        recommends a backend for a shape
"""

from labutils.analysis.advice import Advice, recommend
from labutils.analysis.profiling import launch_overhead, profile, timeline
from labutils.analysis.resources import makespan
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
