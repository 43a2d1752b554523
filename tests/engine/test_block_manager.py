"""The page pool: references, hashes, order of reuse."""

import numpy as np
import pytest

from nanovllm.engine.block_manager import BlockManager, block_hash, root_hash


def test_page_zero_is_never_handed_out():
    pool = BlockManager(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_freed_pages_are_found_by_content_until_reused():
    pool = BlockManager(3)
    (a,) = pool.allocate(1)
    pool.register(a, b"prefix")
    pool.free([a])
    assert pool.lookup(b"prefix") == a
    pool.share(a)
    assert pool.num_free == 1
    pool.free([a])
    pool.allocate(2)
    assert pool.lookup(b"prefix") is None


def test_eviction_takes_the_least_recently_freed():
    pool = BlockManager(4)
    blocks = pool.allocate(3)
    for i, block in enumerate(blocks):
        pool.register(block, bytes([i]))
    pool.free([blocks[1]])
    pool.free([blocks[0]])
    pool.free([blocks[2]])
    pool.share(blocks[1])  # used again: now the most recent
    pool.free([blocks[1]])
    assert [pool.allocate(1)[0] for _ in range(3)] == [blocks[0], blocks[2], blocks[1]]


def test_worthless_pages_are_reused_before_cached_ones():
    pool = BlockManager(3)
    cached, blank = pool.allocate(2)
    pool.register(cached, b"x")
    pool.free([cached])
    pool.free([blank])
    assert pool.allocate(1) == [blank]
    assert pool.lookup(b"x") == cached


def test_shared_page_survives_until_its_last_holder_leaves():
    pool = BlockManager(3)
    (a,) = pool.allocate(1)
    pool.share(a)
    pool.free([a])
    assert not pool.is_free(a)
    pool.free([a])
    assert pool.is_free(a)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([a])


def test_equal_content_is_registered_once():
    pool = BlockManager(4)
    a, b = pool.allocate(2)
    pool.register(a, b"same")
    pool.register(b, b"same")
    assert pool.lookup(b"same") == a
    pool.free([b])
    pool.free([a])
    pool.check_invariants()


def test_hash_depends_on_parent_tokens_and_key():
    tokens = np.arange(8, dtype=np.int32)
    base = block_hash(root_hash(""), tokens)
    assert len(base) == 16
    assert base == block_hash(root_hash(""), tokens.copy())
    assert base != block_hash(root_hash("salt:a"), tokens)
    assert base != block_hash(base, tokens)
    assert base != block_hash(root_hash(""), tokens[::-1].copy())
