"""The arms of `make bench-data`: our loaders and the peers' way, each in a process of its own.

Every arm module has one function, `batches(task)`, that yields the number of images of each batch it
has made ready as uint8 tensors on the CPU (DALI: on `task.device`). The peers are written as their
documentation and the original codes of the methods use them, leaving out whatever is not decoding,
cropping, resizing and mirroring, so that nothing but that is compared.
"""
