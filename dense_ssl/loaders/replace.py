"""What happens to a record that cannot be shown: its neighbour takes its place, within a cap."""

import logging
from collections.abc import Callable
from typing import TypeVar

from dense_ssl.config import UserError

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Replacements:
    """The records found unreadable so far, and the rule that replaces them.

    The rule depends on nothing but the data, so every loader and every resumed run show the same
    record instead: the next readable one, the first record coming after the last.
    """

    def __init__(self, num_images: int, max_share: float) -> None:
        self.reasons: dict[int, str] = {}
        self._num_images = num_images
        self._max_share = max_share

    def note(self, index: int, reason: str) -> None:
        """Count record `index` as unreadable and say so once.

        Raises:
            UserError: more than the allowed share of all records is unreadable.
        """
        if index in self.reasons:
            return
        self.reasons[index] = reason
        _log.warning("record %d is replaced by its neighbour: %s", index, reason)
        if len(self.reasons) > self._max_share * self._num_images:
            raise UserError(
                f"{len(self.reasons)} of {self._num_images} records are unreadable, more than "
                f"data.max_replaced={self._max_share} allows (last: record {index}, {reason}): "
                "check the data with `make verify`, or raise the cap"
            )

    def show(self, index: int, read: Callable[[int], T]) -> tuple[int, T]:
        """Return the first readable record from `index` on, and what `read` made of it.

        Raises:
            UserError: too many records are unreadable, or all of them.
        """
        for step in range(self._num_images):
            candidate = (index + step) % self._num_images
            if candidate in self.reasons:
                continue
            try:
                return candidate, read(candidate)
            except (OSError, ValueError) as error:
                self.note(candidate, " ".join(str(error).split()))
        raise UserError("no record of the data set is readable: check it with `make verify`")
