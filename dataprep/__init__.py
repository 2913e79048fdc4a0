"""Offline preparation of image data: folders and archives in, verified FFCV and DALI shards out.

Knows nothing of torch or of training. Run from the repository root: `python -m dataprep --help`.
"""

__version__ = "0"
