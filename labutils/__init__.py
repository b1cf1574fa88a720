"""The package behind the four notebooks: attention kernels, their oracles, and the tools that measure and draw them.

Import it before triton: on a machine without a GPU, `labutils.runtime` switches Triton's interpreter on, and
Triton reads that switch only once, when it is imported.
"""

from labutils import runtime

__version__ = "0.1.0"
__all__ = ["runtime", "__version__"]
