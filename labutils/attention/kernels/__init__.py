"""The Triton kernels, how they are configured, launched and compiled, and how a call finds them again.

The functions here take checked arguments; programs call `labutils.attention.interface`, which does the checking.

The parts: `flash_v1` and `flash_v2` have the forward passes, `flash_v2_backward` the backward, `flash_decode` the
attention over a KV cache and `append` what writes to it; `tiles` and `scores` are what the kernels share. `launch`
starts them, `launch_table` has their configurations, `prepared` the short way for a call seen before. `compiled` and
`candidates` ask the compiler about GPUs that need not be there, `in_flight` looks for races in what it made; `plain`
makes the kernels without their features.
"""
