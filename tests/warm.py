"""What ranks of tests have in common, imported and compiled once: see `ranks`."""

import numpy as np
import timm  # noqa: F401

from dense_ssl import pretrain  # noqa: F401
from dense_ssl.views import ViewSpec, draw_epoch

draw_epoch((ViewSpec(name="global", count=1, size=16),), np.full((1, 2), 32), seed=0, epoch=0)
