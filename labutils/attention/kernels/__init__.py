"""The Triton kernels, with the host functions that configure and launch them.

The functions here take checked arguments; programs call `labutils.attention.interface`, which checks them.

    flash_v1           the forward pass of FlashAttention-1, for reading
    flash_v2           the forward pass of FlashAttention-2
    flash_v2_backward  its backward pass
    flash_decode       few queries against a KV cache
    kv_append          writes new keys and values into a KV cache
    tiles, scores      what the kernels share: loads and stores; scale, masks, dropout
    options            what a call asks for besides q, k and v; where a KV cache holds its keys
    launch             picks a launch configuration and launches a kernel
    replay             launches a kernel again with other tensors
    launch_config      what a launch configuration is
    launch_table       the shipped configurations
    tuned_table        the user's own configurations
"""
