"""The last few things that were read, for two threads: a merge is computed a little ahead of the one that is scored."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")
MOST = 8  # sets of adapters or statistics


class Recent:
    """Values by key; of more than a few the one that was asked for longest ago is let go.

    >>> recent = Recent()
    >>> recent.get("a", lambda: 1), recent.get("a", lambda: 2)
    (1, 1)
    """

    def __init__(self) -> None:
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], T]) -> T:
        """Give a key's value; where it is not there it is read, perhaps by both threads, which do not wait for each other."""
        with self._guard:
            known = [self._values[key]] if key in self._values else []
        value: T = known[0] if known else read()
        with self._guard:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > MOST:
                self._values.popitem(last=False)
        return value
