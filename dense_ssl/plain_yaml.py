"""YAML from elsewhere: plain data, of bounded size, and one kind of error.

A few hundred bytes of YAML may stand for billions of values by aliases of aliases, so what a text expands to
is counted; merge keys (`<<`), which expand while they are read, are refused.
"""

from collections.abc import Mapping
from typing import Any

import yaml

MOST_BYTES = 1 << 20  # a recipe has 3 kB
MOST_VALUES = 50_000  # with every alias written out
_BOOL = "tag:yaml.org,2002:bool"


class NotPlain(ValueError):
    """What is wrong with a text, in one line."""


def parse(text: str) -> Any:
    """Return what a YAML text holds: dictionaries, lists, and plain values.

    Raises:
        NotPlain: it is no YAML, or too large, also once its aliases are written out.
    """
    if len(text) > MOST_BYTES:
        raise NotPlain(f"{len(text):,} characters, more than {MOST_BYTES:,}")
    try:
        data = yaml.load(text, _Loader)
    except RecursionError:
        raise NotPlain("nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        raise NotPlain(" ".join(str(error).split())[:200]) from None  # of dates and numbers, too
    _count(data)
    return data


class _Loader(yaml.SafeLoader):
    """Safe, without merge keys; on, off, yes and no are words, as in YAML 1.2: `watch.on` is a key."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [(tag, words) for tag, words in found if tag != _BOOL or letter in "tTfF"]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse what would have to be merged."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                raise NotPlain(f"line {line}: merge keys (<<) are not read, write the keys out")


def _count(data: Any) -> None:
    """Walk through all values, shared ones as often as they are named."""
    waiting, seen = [data], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise NotPlain(f"aliases and all, more than {MOST_VALUES:,} values")
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
