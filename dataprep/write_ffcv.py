"""Records to FFCV's own file format, version 2, in plain numpy: FFCV itself is not needed to write.

The file, as FFCV 1.0.2 reads it (all little endian):

    header              version, number of fields, page size, number of samples, address of the table
    field descriptors   type id and name of each field: `image` (RGBImageField), `label` (IntField)
    metadata            one row a sample: mode, width, height, address of the image; label
    pages               from the next multiple of the page size on: the JPEG bytes, none across a page
    allocation table    one row a sample: sample, address, length in bytes

Every address follows from the lengths, so the file is written front to back in one pass.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table", "<u8"),
    ],
    align=True,
)
DESCRIPTOR = np.dtype(
    [("type_id", "<u1"), ("name", "<u1", (16,)), ("arguments", "<u1", (1024,))], align=True
)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("address", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("address", "<u8"), ("length", "<u8")])

VERSION = 2
INT_FIELD, RGB_IMAGE_FIELD = 1, 2
JPG_MODE = 0
MIN_PAGE = 8 << 20  # FFCV's default; larger only where one record needs it
MAX_PAGE = 1 << 31  # the largest power of two that the header's 32 bits hold


def page_size_for(longest: int) -> int:
    """Return the page size in bytes for a longest record of `longest` bytes: a power of two."""
    page = MIN_PAGE
    while page < longest:
        page *= 2
    if page > MAX_PAGE:
        raise ValueError(f"a record of {longest} bytes is larger than FFCV's largest page")
    return page


def allocate(lengths: np.ndarray, page_size: int) -> np.ndarray:
    """Return uint64 [n]: the file address of each record, in order, none crossing a page."""
    count = len(lengths)
    metadata_end = HEADER.itemsize + 2 * DESCRIPTOR.itemsize + count * SAMPLE.itemsize
    address = -(-metadata_end // page_size) * page_size
    addresses = np.empty(count, dtype=np.uint64)
    for index, length in enumerate(lengths.tolist()):
        if address % page_size + length > page_size:
            address = -(-address // page_size) * page_size
        addresses[index] = address
        address += length
    return addresses


def write_beton(
    file: BinaryIO,
    *,
    sizes: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    payloads: Iterable[bytes | memoryview],
) -> tuple[str, int]:
    """Write a whole .beton to `file` and return its sha256 in hex and its size in bytes.

    Args:
        file: open for binary writing, at 0.
        sizes: int32 [n, 2] (height, width).
        labels: int64 [n].
        lengths: int64 [n], bytes of each record.
        payloads: the JPEG bytes of each record, in order, of these lengths.
    """
    count = len(lengths)
    page_size = page_size_for(int(lengths.max()))
    addresses = allocate(lengths, page_size)
    end = int(addresses[-1]) + int(lengths[-1])
    table_address = -(-end // page_size) * page_size

    header = np.zeros((), dtype=HEADER)
    header["version"], header["num_fields"], header["page_size"] = VERSION, 2, page_size
    header["num_samples"], header["table"] = count, table_address
    fields = np.zeros(2, dtype=DESCRIPTOR)
    for row, (name, type_id) in zip(
        fields, (("image", RGB_IMAGE_FIELD), ("label", INT_FIELD)), strict=True
    ):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
    samples = np.zeros(count, dtype=SAMPLE)
    samples["image"]["mode"] = JPG_MODE
    samples["image"]["height"], samples["image"]["width"] = sizes[:, 0], sizes[:, 1]
    samples["image"]["address"] = addresses
    samples["label"] = labels
    table = np.zeros(count, dtype=ALLOCATION)
    table["sample"], table["address"], table["length"] = np.arange(count), addresses, lengths

    out = _Hashed(file)
    out.write(header.tobytes() + fields.tobytes() + samples.tobytes())
    written = 0
    for address, length, payload in zip(addresses.tolist(), lengths.tolist(), payloads):
        assert len(payload) == length, "the records changed between planning and writing"
        out.pad_to(address)
        out.write(payload)
        written += 1
    assert written == count, "fewer records than planned"
    out.pad_to(table_address)
    out.write(table.tobytes())
    return out.digest.hexdigest(), out.position


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sizes int32 [n, 2], labels int64 [n] and addresses int64 [n] from a .beton's metadata.

    Raises:
        ValueError: the file is not a .beton as written here.
    """
    header = _header(path)
    fields = np.fromfile(path, DESCRIPTOR, count=2, offset=HEADER.itemsize)
    start = HEADER.itemsize + fields.nbytes
    names = [bytes(name).rstrip(b"\0") for name in fields["name"]]
    types = fields["type_id"].tolist()
    samples = np.fromfile(path, SAMPLE, count=int(header["num_samples"]), offset=start)
    image = samples["image"]
    if names != [b"image", b"label"] or types != [RGB_IMAGE_FIELD, INT_FIELD]:
        raise ValueError(f"{path}: its fields are not image and label")
    if len(samples) != header["num_samples"] or (image["mode"] != JPG_MODE).any():
        raise ValueError(f"{path}: its metadata is damaged")
    sizes = np.stack([image["height"], image["width"]], axis=1).astype(np.int32)
    return sizes, samples["label"].astype(np.int64), image["address"].astype(np.int64)


def read_allocations(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 [n] offsets and int64 [n] lengths of the records of a .beton.

    Raises:
        ValueError: the file is not a .beton as written here.
    """
    header = _header(path)
    table = np.fromfile(path, ALLOCATION, offset=int(header["table"]))
    if len(table) != header["num_samples"]:
        raise ValueError(f"{path}: its allocation table is damaged")
    table = table[np.argsort(table["sample"])]
    return table["address"].astype(np.int64), table["length"].astype(np.int64)


def _header(path: Path) -> np.ndarray:
    header = np.fromfile(path, HEADER, count=1)
    if len(header) != 1 or header["version"][0] != VERSION or header["num_fields"][0] != 2:
        raise ValueError(f"{path}: not an FFCV file of version {VERSION} with two fields")
    end = path.stat().st_size
    if header["table"][0] > end or header["num_samples"][0] > end // SAMPLE.itemsize:
        raise ValueError(f"{path}: its header is damaged")
    return header[0]


class _Hashed:
    """A file being written front to back, with its sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)

    def pad_to(self, position: int) -> None:
        """Fill with zeros up to `position`."""
        while self.position < position:
            self.write(bytes(min(position - self.position, 1 << 20)))
