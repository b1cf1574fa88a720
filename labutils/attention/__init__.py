"""Attention: flash-attn's functions on this lab's Triton kernels, and the reference that decides what is right.

A call goes from `interface` through `checks` to `fast_path`, if a call like it came before, or else to `operators`;
both launch a function of `kernels`.

    interface   flash-attn's functions: same names and arguments, with gradients
    checks      checks of their arguments, with error messages
    fast_path   launches again what an earlier call like this one launched
    operators   the kernels as PyTorch operators, for torch.compile and FLOP counters
    kernels     the Triton kernels, and the functions that configure and launch them
    tuning      the search for launch configurations, and what the compiler makes of each
    reference   attention in plain PyTorch: the exact result, tiled attention, the 2 x rule
    bugs        attention with a planted bug, for checks that must find it
    ring        attention over several GPUs, played on one machine
    backends    the registry of attention backends that are compared with these kernels
    probing     tries each backend on this machine
"""
