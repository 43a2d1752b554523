"""CacheManager: which pages and which state slot each sequence holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from nanovllm.engine.block_manager import BlockManager, block_hash, root_hash
from nanovllm.engine.page_table import PageTable
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.state_slots import StateSlots


@dataclass(slots=True)
class _Holding:
    """What a sequence holds. table: its pages; page 0 stands for those behind the window. room: tokens that they
    have places for. The first num_named of them can be found by their content, unless other pages with the same
    content are; once name_at tokens are computed there are more to name (never, if nobody may share them).

    resume_from: slot of the snapshot that its state is copied from before its next step, or 0.
    junction: where its prompt leaves the pages that others computed, if a snapshot is missing there.
    """

    table: PageTable
    room: int
    num_named: int
    name_at: int
    slot: int = 0
    resume_from: int = 0
    junction: int | None = None
    num_released: int = 0


@dataclass(frozen=True, slots=True)
class _Hit:
    """A cached prefix: num_blocks pages long; its first pages are 0 if they lie behind the window."""

    table: list[int]
    digest: bytes | None = None  # of the snapshot, for models with state

    @property
    def num_blocks(self) -> int:
        return len(self.table)


class CacheManager:
    """The host side of every cache: the page pool, the state slots, and who holds what.

    A sequence's pages cover tokens [0, allocated); the model fills [0, computed):

        |-- released --|-- cached --|-- computed --|-- allocated --|
        behind the      shared pages   own pages      own, to be written in this step
        window

    Models with recurrent state resume a prefix only where a snapshot of it was captured: at the
    end of a prompt, where prompts part, and every snapshot_interval tokens, always at multiples of
    state_grid. Slot 0 and page 0 are write sinks for padding and never handed out.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_slots: int = 0,
        enable_prefix_caching: bool = True,
        window: int | None = None,
        state_grid: int = 1,
        chunk_grid: int = 1,
        snapshot_interval: int = 4096,
    ) -> None:
        """num_slots: state slots, slot 0 among them; 0 for models without recurrent state.
        window, state_grid, chunk_grid, snapshot_interval: see CachePlan. A prompt waits for a step
            whose budget reaches the chunk grid's next multiple.
        """
        self.blocks = BlockManager(num_blocks)
        self.states = StateSlots(num_slots) if num_slots else None
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.window = window
        self.state_grid = state_grid
        self.chunk_grid = chunk_grid
        self.snapshot_interval = snapshot_interval
        self._held: dict[int, _Holding] = {}
        self._hashes: dict[int, list[bytes]] = {}  # of a sequence's full pages, as far as needed

    def holds(self, seq: Sequence) -> bool:
        return seq.seq_id in self._held

    def admit(self, seq: Sequence, limit: int, spare: int = 0) -> int | None:
        """Give a waiting sequence the pages of its longest cached prefix and pages for up to
        `limit` tokens beyond; returns the tokens to compute, or None if there is no room.

        spare: pages that must stay free, so that those who run can grow.
        The last token is never taken from the cache: its logits have to be computed.
        """
        assert seq.seq_id not in self._held and seq.num_computed == seq.num_pending == 0
        hit, junction = self._match(seq)
        num_cached = hit.num_blocks * self.block_size
        num_new = self._cut(seq, num_cached, limit, junction)
        shared = [block for block in hit.table if block]
        # free pages that the hits take back are no longer there to be allocated
        needed = self._pages(num_cached + num_new) - hit.num_blocks
        if not num_new or needed + sum(map(self.blocks.is_free, shared)) + spare > self.blocks.num_free:
            return None
        resume_from = self.states.use(hit.digest) if self.states and hit.digest else 0
        slot = self.states.take() if self.states else 0
        if slot is None:
            return None
        for block in shared:
            self.blocks.share(block)
        table = PageTable(hit.table + self.blocks.allocate(needed))
        released = hit.num_blocks - len(shared)
        room, named = len(table) * self.block_size, hit.num_blocks
        name_at = sys.maxsize if self._hash_key(seq) is None else (named + 1) * self.block_size
        self._held[seq.seq_id] = _Holding(table, room, named, name_at, slot, resume_from, junction, released)
        seq.part.block_table, seq.part.state_slot = table.pages, slot
        seq.num_computed = num_cached
        return num_new

    def cut(self, seq: Sequence, limit: int) -> int:
        """How many of a running sequence's tokens the next step computes: at most `limit`, maybe 0."""
        return self._cut(seq, seq.num_computed, limit, self._held[seq.seq_id].junction)

    def advance(self, seq: Sequence, count: int) -> bool:
        """Find places for a running sequence's next `count` tokens, and write them into its part in the step; False,
        and none is computed, if there are too few pages.

        The pages that it fills are named at once: sequences of the same step may already share them,
        because a layer stores all keys and values before any row attends.
        """
        held = self._held[seq.seq_id]
        end = seq.num_computed + count
        if self.window is not None:
            self._release_behind_window(seq, held)
        if end > held.room and not self._extend(seq, held, end):
            return False
        if self.states is not None:
            seq.part.resume_from, held.resume_from = held.resume_from, 0  # told once
            seq.part.capture_to = self._capture(seq, held, count)
        seq.num_computed = end
        if end >= held.name_at:
            self._name_pages(seq, held)
        return True

    def commit(self, seq: Sequence) -> None:
        """Name the pages whose last token has become known since they were planned."""
        held = self._held[seq.seq_id]
        if seq.num_computed >= held.name_at:
            self._name_pages(seq, held)

    def _extend(self, seq: Sequence, held: _Holding, end: int) -> bool:
        """Find pages for the tokens up to `end`, if so many are free."""
        needed = self._pages(end) - len(held.table)
        if needed > self.blocks.num_free:
            return False
        held.table.extend(self.blocks.allocate(needed))
        held.room = len(held.table) * self.block_size
        seq.part.block_table = held.table.pages
        return True

    def _name_pages(self, seq: Sequence, held: _Holding) -> None:
        """So that later sequences find them."""
        first, last = held.num_named, min(seq.num_computed, seq.num_known) // self.block_size
        hashes = self._hash_chain(seq, last)
        for page, digest in zip(held.table.pages[first:last].tolist(), hashes[first:last], strict=True):
            self.blocks.register(page, digest)
        held.num_named, held.name_at = last, (last + 1) * self.block_size

    def begin_step(self) -> None:
        """What the last step captured is there now."""
        if self.states is not None:
            self.states.publish()

    def free(self, seq: Sequence) -> None:
        """Give back everything the sequence holds; harmless if it holds nothing."""
        held = self._held.pop(seq.seq_id, None)
        if held is None:
            return
        self.blocks.free(reversed(held.table.held()))
        if self.states is not None:
            self.states.give_back(held.slot)

    def forget(self, seq: Sequence) -> None:
        """Free a sequence that will never come back."""
        self.free(seq)
        self._hashes.pop(seq.seq_id, None)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running sequences keep their pages and states."""
        self.blocks.forget_prefixes()
        if self.states is not None:
            self.states.forget()

    def _capture(self, seq: Sequence, held: _Holding, count: int) -> int:
        assert self.states is not None
        end = seq.num_computed + count
        if self._next_stop(seq, seq.num_computed, held.junction) != end:
            return 0
        return self.states.capture(self._digest(seq, end))

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _first_visible(self, num_computed: int) -> int:
        """The first page that a token at position num_computed sees, or any token after it."""
        return 0 if self.window is None else max(0, num_computed - self.window + 1) // self.block_size

    def _release_behind_window(self, seq: Sequence, held: _Holding) -> None:
        first = self._first_visible(seq.num_computed)
        if first > held.num_released:
            behind = held.table.release(held.num_released, first)
            held.num_released = first
            self.blocks.free(reversed(behind))
            seq.part.block_table = held.table.pages

    def _hash_key(self, seq: Sequence) -> str | None:
        """Who may share with whom; None for sequences that share with nobody."""
        if self.enable_prefix_caching:
            return "" if seq.cache_salt is None else "salt:" + seq.cache_salt
        return "request:" + seq.request_id if seq.params.n > 1 else None

    def _match(self, seq: Sequence) -> tuple[_Hit, int | None]:
        """The longest cached prefix, at most num_tokens - 1 tokens, and where a snapshot would
        have made it longer."""
        if self._hash_key(seq) is None or seq.params.prompt_logprobs is not None:
            return _Hit([]), None  # prompt logprobs need every prompt token's hidden state
        pages = (seq.num_tokens - 1) // self.block_size
        hashes = self._hash_chain(seq, pages)
        found: list[int] = []
        usable = best = 0
        digest = None
        run_start = 0  # of the pages found in a row
        for i in range(pages):
            block = self.blocks.lookup(hashes[i])
            if block is None:
                if self.window is None:
                    break
                run_start = i + 1
            found.append(block or 0)
            end = i + 1
            if block is None or run_start > self._first_visible(end * self.block_size):
                continue  # a page within the window is gone
            usable = end
            if self.states is None:
                best = end
            elif end * self.block_size % self.state_grid == 0 and self.states.has(hashes[i]):
                best, digest = end, hashes[i]
        table = found[:best]
        behind = min(best, self._first_visible(best * self.block_size))
        table[:behind] = [0] * behind
        junction = usable * self.block_size // self.state_grid * self.state_grid
        return _Hit(table, digest), junction if self.states is not None else None

    def _cut(self, seq: Sequence, start: int, limit: int, junction: int | None) -> int:
        """Tokens from `start` to compute in one step: stateful sequences pause where their state is
        captured, and on the chunk grid while they are incomplete."""
        end = min(seq.num_tokens, start + limit)
        if self.states is None:
            return end - start
        stop = self._next_stop(seq, start, junction)
        if stop is not None and stop <= end:
            return stop - start
        if end < seq.num_tokens:
            end -= end % self.chunk_grid
        return max(0, end - start)

    def _next_stop(self, seq: Sequence, start: int, junction: int | None) -> int | None:
        """The next position after `start` where the state is to be captured.

        Prompts alone are captured: they will be asked for again, and a prompt's state is the one
        that a cold start would compute, bit for bit.
        """
        if self._hash_key(seq) is None:
            return None
        last = (seq.num_prompt_tokens - 1) // self.state_grid * self.state_grid
        interval = (start // self.snapshot_interval + 1) * self.snapshot_interval
        stops = [p for p in (last, interval, junction) if p is not None and start < p <= last]
        missing = [p for p in stops if self.states and not self.states.has(self._digest(seq, p))]
        return min(missing, default=None)

    def _digest(self, seq: Sequence, end: int) -> bytes:
        """Of the first `end` tokens, whole pages."""
        pages = end // self.block_size
        return self._hash_chain(seq, pages)[pages - 1]

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
        assert set(self._held) <= ids and set(self._hashes) <= ids
        references: dict[int, int] = {}
        for seq in live:
            if not self.holds(seq):
                continue
            table, pages = self._held[seq.seq_id].table.pages, self._held[seq.seq_id].table.held()
            assert len(set(pages)) == len(pages), "a page twice in one table"
            assert seq.num_cached <= seq.num_tokens and seq.num_computed <= len(table) * self.block_size
            visible = self._first_visible(seq.num_computed)
            assert 0 not in table[visible:], "a visible page was given back"
            for block in pages:
                references[block] = references.get(block, 0) + 1
        counted = {b: n for b, n in enumerate(self.blocks._references) if n}
        assert references == counted, "reference counts differ from the tables"
        if self.states is not None:
            self.states.check_invariants([held.slot for held in self._held.values()])
