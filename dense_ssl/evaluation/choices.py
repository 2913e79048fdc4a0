"""Types of settings that several protocols share, and the texts they are understood from; without torch."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

# cls: the first class token (a ResNet's: its pooled map); second: the next one (UDI's cls+);
# both: the two beside each other; mean: of the last block's cells; cls+mean: of ViT-B's linear probe.
Pool = Literal["cls", "second", "both", "mean", "cls+mean"]
Filter = Literal["bilinear", "bicubic"]  # Pillow's, antialiased

T = TypeVar("T")


def _several(value: Any) -> Any:
    """`10,20` and a number alone are the values of a tuple."""
    if isinstance(value, str):
        return value.split(",")
    return (value,) if isinstance(value, int | float) else value


def _both_sides(value: Any) -> Any:
    """`192,256` and a number alone are a height and a width."""
    if isinstance(value, str):
        return value.split(",")
    return (value, value) if isinstance(value, int) else value


Side = Annotated[int, Field(ge=16)]  # pixels
Size = Annotated[tuple[Side, Side], BeforeValidator(_both_sides)]  # height and width
Several = Annotated[tuple[T, ...], BeforeValidator(_several)]
Range = Annotated[tuple[float, float], BeforeValidator(_several)]
