"""PageTable: a sequence's pages, in an array that steps can look at without copying."""

from __future__ import annotations

import numpy as np


class PageTable:
    """int32 in the order of the sequence's tokens; 0 stands for pages that were given back.

    pages: int32 [len(self)], a view: the same object until the table changes.
    """

    def __init__(self, pages: list[int]) -> None:
        self._room = self.pages = np.array(pages, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.pages)

    def extend(self, pages: list[int]) -> None:
        first, count = len(self.pages), len(self.pages) + len(pages)
        if count > len(self._room):
            grown = np.empty(2 * count, dtype=np.int32)
            grown[:first] = self.pages
            self._room = grown
        self._room[first:count] = pages
        self.pages = self._room[:count]

    def release(self, first: int, last: int) -> list[int]:
        """Take out the pages [first, last), which are returned."""
        released: list[int] = self.pages[first:last].tolist()
        self.pages = self._room[: len(self.pages)]
        self.pages[first:last] = 0
        return released

    def held(self) -> list[int]:
        """Those that were not given back."""
        return [page for page in self.pages.tolist() if page]
