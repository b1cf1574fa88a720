"""The Triton kernels: `flash_v1` and `flash_v2`, their launch configurations, and the tile loads that they share.

The functions here take checked arguments; programs call `labutils.interface`, which does the checking.
"""
