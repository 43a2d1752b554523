"""CacheManager: which pages and which state slot each sequence holds."""

from __future__ import annotations

from nanovllm.engine.block_manager import BlockManager, block_hash, root_hash
from nanovllm.engine.sequence import Sequence


class CacheManager:
    """The host side of every cache: the page pool, the state slots, and who holds what.

    A sequence's pages cover tokens [0, allocated); the model fills [0, computed):

        |-- cached --|-- computed --|-- allocated --|
        shared pages   own pages      own, to be written in this step

    Slot 0 and page 0 are write sinks for padding and never handed out.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, num_slots: int = 0, enable_prefix_caching: bool = True
    ) -> None:
        """num_slots: state slots, slot 0 among them; 0 for models without recurrent state."""
        self.blocks = BlockManager(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.has_states = num_slots > 0
        self._free_slots = list(range(num_slots - 1, 0, -1))
        self._tables: dict[int, list[int]] = {}
        self._slots: dict[int, int] = {}
        self._hashes: dict[int, list[bytes]] = {}  # of a sequence's full pages, as far as needed

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits when it is alone."""
        return self.blocks.num_usable * self.block_size

    @property
    def usage(self) -> float:
        return 1.0 - self.blocks.num_free / self.blocks.num_usable

    def block_table(self, seq: Sequence) -> list[int]:
        return self._tables.get(seq.seq_id, [])

    def state_slot(self, seq: Sequence) -> int:
        return self._slots.get(seq.seq_id, 0)

    def admit(self, seq: Sequence, limit: int, spare: int = 0) -> int | None:
        """Give a waiting sequence the pages of its longest cached prefix and pages for up to
        `limit` tokens beyond; returns the tokens to compute, or None if there is no room.

        spare: pages that must stay free, so that those who run can grow.
        The last token is never taken from the cache: its logits have to be computed.
        """
        assert seq.seq_id not in self._tables and seq.num_computed == 0
        if self.has_states and not self._free_slots:
            return None
        hits = self._match(seq)
        num_cached = len(hits) * self.block_size
        num_new = min(seq.num_tokens - num_cached, limit)
        # free pages that the hits take back are no longer there to be allocated
        needed = self._pages(num_cached + num_new) - len(hits)
        if needed + sum(self.blocks.is_free(b) for b in hits) + spare > self.blocks.num_free:
            return None
        for block in hits:
            self.blocks.share(block)
        self._tables[seq.seq_id] = hits + self.blocks.allocate(needed)
        if self.has_states:
            self._slots[seq.seq_id] = self._free_slots.pop()
        seq.num_computed = num_cached
        return num_new

    def reserve(self, seq: Sequence, count: int) -> bool:
        """Extend a running sequence's pages by `count` tokens beyond the computed ones."""
        table = self._tables[seq.seq_id]
        needed = self._pages(seq.num_computed + count) - len(table)
        if needed > self.blocks.num_free:
            return False
        if needed > 0:
            table.extend(self.blocks.allocate(needed))
        return True

    def commit(self, seq: Sequence, count: int) -> None:
        """Name the pages that this step fills, so that later sequences find them.

        Done when the step is planned: sequences of the same step may already share them,
        because a layer stores all keys and values before any row attends.
        """
        if self._hash_key(seq) is None:
            return
        table = self._tables[seq.seq_id]
        first = seq.num_computed // self.block_size
        last = (seq.num_computed + count) // self.block_size
        if first < last:
            hashes = self._hash_chain(seq, last)
            for i in range(first, last):
                self.blocks.register(table[i], hashes[i])

    def free(self, seq: Sequence) -> None:
        """Give back everything the sequence holds; harmless if it holds nothing."""
        self.blocks.free(reversed(self._tables.pop(seq.seq_id, [])))
        slot = self._slots.pop(seq.seq_id, 0)
        if slot:
            self._free_slots.append(slot)

    def forget(self, seq: Sequence) -> None:
        """Free a sequence that will never come back."""
        self.free(seq)
        self._hashes.pop(seq.seq_id, None)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running sequences keep their pages."""
        self.blocks.forget_prefixes()

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _hash_key(self, seq: Sequence) -> str | None:
        """Who may share with whom; None for sequences that share with nobody."""
        if self.has_states:
            return None  # pages alone do not hold what a recurrent layer remembers
        if self.enable_prefix_caching:
            return "" if seq.cache_salt is None else "salt:" + seq.cache_salt
        return "request:" + seq.request_id if seq.params.n > 1 else None

    def _match(self, seq: Sequence) -> list[int]:
        """Pages of the longest cached prefix, at most num_tokens - 1 tokens."""
        if self._hash_key(seq) is None or seq.params.prompt_logprobs is not None:
            return []  # prompt logprobs need every prompt token's hidden state
        hits: list[int] = []
        for i in range((seq.num_tokens - 1) // self.block_size):
            block = self.blocks.lookup(self._hash_chain(seq, i + 1)[i])
            if block is None:
                break
            hits.append(block)
        return hits

    def _hash_chain(self, seq: Sequence, count: int) -> list[bytes]:
        """Digests of the sequence's first `count` full pages, or more."""
        hashes = self._hashes.setdefault(seq.seq_id, [])
        size = self.block_size
        for i in range(len(hashes), count):
            parent = hashes[-1] if hashes else root_hash(self._hash_key(seq) or "")
            hashes.append(block_hash(parent, seq.token_ids[i * size : (i + 1) * size]))
        return hashes

    def check_invariants(self, live: list[Sequence]) -> None:
        """live: every sequence that is waiting or running."""
        self.blocks.check_invariants()
        ids = {seq.seq_id for seq in live}
        assert set(self._tables) <= ids and set(self._slots) <= ids and set(self._hashes) <= ids
        references: dict[int, int] = {}
        for seq in live:
            table = self.block_table(seq)
            assert len(set(table)) == len(table), "a page twice in one table"
            assert seq.num_cached <= seq.num_tokens and seq.num_computed <= len(table) * self.block_size
            for block in table:
                references[block] = references.get(block, 0) + 1
        counted = {b: n for b, n in enumerate(self.blocks._references) if n}
        assert references == counted, "reference counts differ from the tables"
        assert len(set(self._slots.values()) | set(self._free_slots)) == len(self._slots) + len(self._free_slots)
