"""The Triton kernels, with the host functions that configure and launch them.

The functions here take checked arguments; programs call `labutils.attention.interface`, which checks them.

    flash_v1           the forward pass of FlashAttention-1, for reading
    flash_v2           the forward pass of FlashAttention-2
    flash_v2_backward  its backward pass
    flash_decode       few queries against a KV cache
    kv_append          writes new keys and values into a KV cache
    tiles, scores      what the kernels share: loads and stores; scale, masks, dropout
    options            what a call asks besides its tensors
    launch             picks a configuration and starts a kernel; replay starts it again
    launch_config      what a configuration is; launch_table has the shipped ones, tuned_table the user's
"""
