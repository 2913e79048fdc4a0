"""One reader attacked with damage that is kept where it reaches new code: `python -m dense_ssl.fuzz.guided`.

libFuzzer, through Atheris, mutates; of every two mutations one is ours. It ends its process, so each
reader has one of its own, which `make fuzz ARGS="--engine atheris"` starts.
"""

import hashlib
import importlib
import logging
import sys
import warnings
from pathlib import Path

# Nothing of the readers may be imported before Atheris is asked to count their branches.
MEASURED = ["dense_ssl", "dataprep", "PIL", "yaml", "safetensors"]
# What numba compiles has to stay as it is written.
COMPILED = [
    "dense_ssl.box_sampling", "dense_ssl.rng", "dense_ssl.views", "dense_ssl.methods.masks",
    *(f"dense_ssl.loaders.{name}" for name in (
        "cut_decoded", "cutter", "decoder", "ffcv", "jpeg", "resample", "simd",
    )),
]  # fmt: skip
LONGEST = 2  # times the longest sound file


def main(name: str, seconds: str, seed: str, found: str, scratch: str) -> None:
    """Attack the reader `name` for some seconds; the process ends with libFuzzer's exit code."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=MEASURED, exclude=COMPILED):
        import numpy as np
        import torch

        from dense_ssl.fuzz.mutations import a_number_replaced, mutated
        from dense_ssl.fuzz.targets import Range, chosen

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    (target,) = chosen(name)
    ground = Range(Path(scratch))
    sound = ground.sound_files(target)
    kept, corpus = Path(found) / name, Path(found) / "corpus" / name
    for folder in (kept, corpus):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(sound):
        (corpus / f"sound-{number}").write_bytes(data)
    broken: set[str] = set()

    def attempt(data: bytes) -> None:
        reason = ground.attempt(target, data)
        if reason is None or (place := reason.rpartition(" at ")[2]) in broken:
            return
        broken.add(place)
        path = kept / hashlib.sha256(data).hexdigest()[:16]
        path.write_bytes(data)
        sys.stdout.write(f"  {path}: {' '.join(reason.split())}\n")
        sys.stdout.flush()

    def damaged(data: bytes, most: int, number: int) -> bytes:
        rng = np.random.default_rng(number)
        if rng.integers(0, 2):
            return atheris.Mutate(data, most)
        small = len(data) < 100_000 and rng.integers(0, 3) == 0
        return (a_number_replaced(data, rng) if small else mutated(data, sound, rng))[:most]

    options = {
        "max_total_time": seconds, "seed": int(seed) + 1,  # libFuzzer takes 0 for "any"
        "max_len": LONGEST * max(map(len, sound)), "artifact_prefix": f"{kept}/",
        "rss_limit_mb": 0, "timeout": 60, "print_final_stats": 1,  # bounds.py holds the limits
    }  # fmt: skip
    words = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *words, str(corpus)], attempt, custom_mutator=damaged)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
