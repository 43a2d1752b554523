"""StateSlots: the pool of recurrent states, and which token prefixes some of them hold."""

from __future__ import annotations

from collections import OrderedDict


class StateSlots:
    """Each running sequence owns a slot; slots that nobody owns may hold snapshots.

    A snapshot is the state after a token prefix, found by the prefix's digest. Running sequences
    come first: when no slot is free, the least recently used snapshot gives way. Slot 0 is never
    handed out: padding writes go there.
    """

    def __init__(self, num_slots: int) -> None:
        """num_slots: slots of the pool, slot 0 among them."""
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, 0, -1))
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._pending: dict[bytes, int] = {}  # being captured in the step that is planned

    def take(self) -> int | None:
        """A slot for a running sequence; None if running sequences hold them all."""
        if self._free:
            return self._free.pop()
        if self._snapshots:
            return self._snapshots.popitem(last=False)[1]
        return None

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def has(self, digest: bytes) -> bool:
        return digest in self._snapshots

    def use(self, digest: bytes) -> int:
        """The slot of a snapshot that exists; it counts as used now."""
        self._snapshots.move_to_end(digest)
        return self._snapshots[digest]

    def capture(self, digest: bytes) -> int:
        """A slot for a new snapshot, which can be found after `publish`; 0 if there is none to be
        had, or the prefix is being captured already."""
        slot = 0 if digest in self._snapshots or digest in self._pending else self.take() or 0
        if slot:
            self._pending[digest] = slot
        return slot

    def publish(self) -> None:
        """The step has run: what it captured can be found from now on."""
        self._snapshots |= self._pending
        self._pending.clear()

    def forget(self) -> None:
        """Drop every snapshot."""
        self._free += [*self._snapshots.values(), *self._pending.values()]
        self._snapshots.clear()
        self._pending.clear()

    def check_invariants(self, owned: list[int]) -> None:
        """owned: the slots of the running sequences."""
        slots = [*owned, *self._free, *self._snapshots.values(), *self._pending.values()]
        assert sorted(slots) == list(range(1, self.num_slots)), "a slot is lost or in use twice"
