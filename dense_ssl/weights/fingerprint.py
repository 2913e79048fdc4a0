"""One hash for a set of weights, so that two runs can be compared by a line of text."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over name, type, shape and bytes of every tensor, in order of name.

    Device and memory format do not enter: a channels-last tensor on a GPU hashes like its plain copy.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", memory_format=torch.contiguous_format)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
