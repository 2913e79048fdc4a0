"""What transformers makes of a folder: `python -P transformers_check.py FOLDER IN OUT`, its own process.

IN and OUT are safetensors files: normalised images [B, 3, H, W] by name, and the last hidden states of each
as [B, N, D] under the same names. Exit codes: 0, or 3 where transformers cannot be imported.
"""

import sys
import warnings

import torch
from safetensors.torch import load_file, save_file


def main(folder: str, given: str, result: str) -> int:
    """Load the folder by AutoModel and AutoImageProcessor and run it."""
    warnings.simplefilter("ignore")
    try:
        import transformers  # pyright: ignore[reportMissingImports]
        from transformers import AutoImageProcessor, AutoModel  # pyright: ignore
    except Exception as error:
        sys.stderr.write(f"{error}\n")
        return 3
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    wrong = {name: value for name, value in loading.items() if value}
    if wrong:
        raise SystemExit(f"transformers reports {wrong}")
    processor = AutoImageProcessor.from_pretrained(folder)
    grey = torch.full((3, 300, 400), 128, dtype=torch.uint8)
    pixels = processor(grey, return_tensors="pt")["pixel_values"][0].mean((1, 2))
    expected = [(128 / 255 - m) / s for m, s in zip(processor.image_mean, processor.image_std)]
    if not torch.allclose(pixels, torch.tensor(expected), atol=1e-4):
        raise SystemExit(f"its processor makes {pixels.tolist()} of grey, not {expected}")
    out = {}
    with torch.no_grad():
        for name, images in load_file(given).items():
            x = images.contiguous(memory_format=torch.channels_last)
            found = model.eval()(pixel_values=x).last_hidden_state
            found = found.flatten(2).transpose(1, 2) if found.ndim == 4 else found
            out[name] = found.contiguous()
    about = {"version": transformers.__version__, "model": type(model).__name__}
    save_file(out, result, metadata=about)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
