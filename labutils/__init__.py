"""The package behind the four notebooks: attention kernels, their oracles, and the tools that measure and draw them.

Import it before triton: on a machine without a GPU, `labutils.runtime` switches Triton's interpreter on, and Triton
reads that switch only once, when it is imported.
"""

import sys

# While Python looks for the module of `python -m labutils`, the first argument is "-m". A command's help needs no
# torch; what a command runs imports `runtime` first, as every module does.
if sys.argv[:1] != ["-m"]:
    from labutils import runtime  # noqa: F401

__version__ = "0.1.0"
__all__ = ["__version__", "runtime"]
