"""The methods, by the name a recipe gives. Adding one is its file and one line in each table here."""

import logging
from typing import Annotated

from pydantic import Field

from dense_ssl.methods.densecl import DenseCL, DenseCLConfig
from dense_ssl.methods.densecl_dc import DenseCLDC, DenseCLDCConfig
from dense_ssl.methods.ibot import DinoConfig, IBot, IBotConfig
from dense_ssl.methods.ibot_dc import IBotDC, IBotDCConfig
from dense_ssl.methods.method import Method, MethodConfig, Output, ParamGroup, Step
from dense_ssl.methods.moco import MoCo, MoCoConfig
from dense_ssl.methods.revisiting import Revisiting, RevisitingConfig
from dense_ssl.methods.sere import Sere, SereConfig
from dense_ssl.methods.udi import Udi, UdiConfig

__all__ = [
    "METHODS",
    "AnyMethodConfig",
    "Method",
    "MethodConfig",
    "Output",
    "ParamGroup",
    "Step",
    "make_method",
    "warn_of_own_keys",
]

logger = logging.getLogger("dense_ssl")

METHODS: dict[str, type[Method]] = {
    "moco": MoCo,
    "revisiting": Revisiting,
    "densecl": DenseCL,
    "densecl_dc": DenseCLDC,
    "ibot": IBot,
    "ibot_dc": IBotDC,
    "dino": IBot,
    "sere": Sere,
    "udi": Udi,
}

AnyMethodConfig = Annotated[
    MoCoConfig
    | RevisitingConfig
    | DenseCLConfig
    | DenseCLDCConfig
    | IBotConfig
    | IBotDCConfig
    | DinoConfig
    | SereConfig
    | UdiConfig,
    Field(discriminator="name"),
]


def make_method(config: AnyMethodConfig) -> Method:
    """Return the freshly initialised method of a validated configuration."""
    return METHODS[config.name](config)  # pyright: ignore[reportCallIssue]


def warn_of_own_keys(config: AnyMethodConfig, num_images: int) -> None:
    """Say when a queue reaches back a whole epoch: each image then meets its own old key as a negative."""
    length = config.model_dump().get("queue_length", 0)
    if length >= num_images:
        logger.warning(
            "method.queue_length=%d holds keys of every one of the %d images: each meets its own old key "
            "as a negative, which undoes what is learned; %d would do",
            *(length, num_images, max(num_images // 4, 1)),
        )
