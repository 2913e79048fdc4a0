"""Fused Triton kernels beside their plain torch references; imports torch and triton, nothing else.

Run from the repository root: this folder is never installed. The name is shared with a package on the
index that other libraries look for, so `__version__` says "too old to be that one".
"""

__version__ = "0"
