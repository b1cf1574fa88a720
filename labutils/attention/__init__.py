"""Attention: the reference that decides what is right, flash-attn's functions, the kernels under them, their tuning."""
