"""Attention: flash-attn's functions on this lab's Triton kernels, and the reference that decides what is right.

A call begins in `interface`, and `checks` looks at its arguments. A plain call on a GPU goes on to `fast_path`, any
other call to `operators`. Both launch the kernels of `kernels`.

    interface   flash-attn's functions: same names and arguments, with gradients
    checks      checks of their arguments, with error messages
    fast_path   launches the same compiled kernels again for a call like an earlier one
    operators   the kernels as PyTorch operators, for torch.compile and FLOP counters
    kernels     the Triton kernels, and the functions that configure and launch them
    tuning      the search for launch configurations, and what the compiler makes of each
    reference   attention in plain PyTorch: the exact result, tiled attention, the 2 x rule
    bugs        attention with a planted bug, for checks that must find it
    ring        attention over several GPUs, played on one machine
    backends    the registry of attention backends that are compared with these kernels
    probing     tries each backend on this machine
"""
