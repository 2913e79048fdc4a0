"""The methods, by the name a recipe gives. Adding one is its file and one line in each table here."""

from typing import Annotated

from pydantic import Field

from dense_ssl.methods.densecl import DenseCL, DenseCLConfig
from dense_ssl.methods.method import Method, MethodConfig, Output, ParamGroup, Step
from dense_ssl.methods.moco import MoCo, MoCoConfig

__all__ = [
    "METHODS",
    "AnyMethodConfig",
    "Method",
    "MethodConfig",
    "Output",
    "ParamGroup",
    "Step",
    "make_method",
]

METHODS: dict[str, type[Method]] = {"moco": MoCo, "densecl": DenseCL}

AnyMethodConfig = Annotated[MoCoConfig | DenseCLConfig, Field(discriminator="name")]


def make_method(config: AnyMethodConfig) -> Method:
    """Return the freshly initialised method of a validated configuration."""
    return METHODS[config.name](config)  # pyright: ignore[reportCallIssue]
