"""PageTable: a sequence's pages, in an array that steps can look at without copying."""

from __future__ import annotations

import numpy as np


class PageTable:
    """int32 in the order of the sequence's tokens; 0 stands for pages that were given back."""

    def __init__(self, pages: list[int]) -> None:
        self._pages = np.array(pages, dtype=np.int32)
        self._count = len(pages)

    def __len__(self) -> int:
        return self._count

    @property
    def pages(self) -> np.ndarray:
        """int32 [len(self)], a view."""
        return self._pages[: self._count]

    def extend(self, pages: list[int]) -> None:
        count = self._count + len(pages)
        if count > len(self._pages):
            grown = np.empty(2 * count, dtype=np.int32)
            grown[: self._count] = self.pages
            self._pages = grown
        self._pages[self._count : count] = pages
        self._count = count

    def release(self, first: int, last: int) -> list[int]:
        """Take out the pages [first, last), which are returned."""
        released: list[int] = self._pages[first:last].tolist()
        self._pages[first:last] = 0
        return released

    def held(self) -> list[int]:
        """Those that were not given back."""
        return [page for page in self.pages.tolist() if page]
