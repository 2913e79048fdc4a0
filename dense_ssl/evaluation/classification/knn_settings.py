"""The settings of k-NN; read without torch, as other votes of kept neighbours need none (knn_again.py)."""

from typing import Annotated, Literal

from pydantic import Field

from dense_ssl.config import Config as BaseConfig
from dense_ssl.evaluation.choices import Filter, Pool, Several

VOTING = frozenset({"k", "temperature", "batch_size"})  # change no feature


class Config(BaseConfig):
    """Settings of the protocol; the defaults are ImageNet's."""

    size: Annotated[int, Field(ge=16)] = 224  # side of the network's input in pixels
    k: Several[Annotated[int, Field(ge=1)]] = (10, 20, 100, 200)
    # neighbours; `k=20` and `k=10,20` are understood
    temperature: Annotated[float, Field(gt=0)] = 0.07
    pool: Pool = "cls"
    resampling: Filter = "bilinear"  # MoCo's and DenseCL's; DINO, iBOT and UDI: bicubic
    bank: Literal["fp32", "fp16"] = "fp32"  # how features are kept; similarities are float32
    batch_size: Annotated[int, Field(ge=1)] = 64
    max_train: Annotated[int, Field(ge=1)] | None = None  # evenly spaced share of a large split
    max_val: Annotated[int, Field(ge=1)] | None = None
