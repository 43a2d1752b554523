"""BlockManager: the pool of pages, and which token prefixes they hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import xxhash


def root_hash(key: str) -> bytes:
    """Start of a hash chain; sequences with different keys (a tenant's salt) never meet."""
    return xxhash.xxh3_128_digest(key.encode())


def block_hash(parent: bytes, token_ids: np.ndarray) -> bytes:
    """128-bit xxh3 over the parent's digest and one page of int32 token ids."""
    return xxhash.xxh3_128_digest(parent + token_ids.tobytes())


class BlockManager:
    """Reference-counted pages with a content hash each; every operation is O(1) a page.

    A page is either in use (references > 0) or free. A free page keeps its hash, and may be
    taken back by `lookup` + `share`, until `allocate` hands it to somebody else. Free pages
    are, in order of reuse: freed ones without a hash, never-used ones, then the least
    recently freed. Page 0 is never handed out: padding writes go there.
    """

    def __init__(self, num_blocks: int) -> None:
        """num_blocks: pages of the pool, page 0 among them."""
        assert num_blocks >= 2
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._blank: list[int] = []  # free, content worthless
        self._next_unused = 1  # pages from here on were never handed out
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, hashed, oldest first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + self.num_blocks - self._next_unused + len(self._cached)

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` pages with one reference each; the caller has checked num_free."""
        assert count <= self.num_free
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._blank:
            block = self._blank.pop()
        elif self._next_unused < self.num_blocks:
            block = self._next_unused
            self._next_unused += 1
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._references[block] = 1
        return block

    def lookup(self, digest: bytes) -> int | None:
        """The page that holds this prefix, in use or free."""
        return self._block_of.get(digest)

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def share(self, block: int) -> None:
        """One more reference; takes a free page back from the pool."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def register(self, block: int, digest: bytes) -> None:
        """Name a full page by its prefix; a second page with the same content stays nameless."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def free(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each; give the tail first, so that prefixes outlive it."""
        for block in blocks:
            self._references[block] -= 1
            assert self._references[block] >= 0, f"page {block} freed twice"
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def forget_prefixes(self) -> None:
        """Drop every hash: no page can be found by content any more."""
        self._blank.extend(self._cached)
        self._cached.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def check_invariants(self) -> None:
        free = [*self._blank, *range(self._next_unused, self.num_blocks), *self._cached]
        assert len(free) == len(set(free)) == self.num_free, "a page is free twice"
        assert 0 not in free and self._references[0] == 0, "page 0 is in circulation"
        used = {b for b in range(1, self.num_blocks) if self._references[b] > 0}
        assert used.isdisjoint(free) and len(used) + len(free) == self.num_usable
        assert {b: d for d, b in self._block_of.items()} == self._hash_of
        assert set(self._cached) <= set(self._hash_of) and set(self._blank).isdisjoint(self._hash_of)
