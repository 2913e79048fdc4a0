"""Words that several protocols' settings share; read without torch."""

from typing import Literal

# cls: the first class token (a ResNet's: its pooled map); second: the next one (UDI's cls+);
# both: the two beside each other; mean: of the last block's cells; cls+mean: of ViT-B's linear probe.
Pool = Literal["cls", "second", "both", "mean", "cls+mean"]
Filter = Literal["bilinear", "bicubic"]  # Pillow's, antialiased
