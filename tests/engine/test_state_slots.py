"""StateSlots: running sequences first, snapshots in what is left."""

from nanovllm.engine.state_slots import StateSlots

A, B, C = b"a", b"b", b"c"


def test_slot_0_is_never_handed_out():
    slots = StateSlots(4)
    assert sorted([slots.take(), slots.take(), slots.take()]) == [1, 2, 3]
    assert slots.take() is None and slots.capture(A) == 0
    slots.check_invariants([1, 2, 3])


def test_a_snapshot_is_found_after_its_step():
    slots = StateSlots(3)
    captured = slots.capture(A)
    assert captured and not slots.has(A)
    assert slots.capture(A) == 0  # once is enough
    slots.publish()
    assert slots.has(A) and slots.use(A) == captured
    assert slots.capture(A) == 0
    slots.check_invariants([])


def test_the_least_recently_used_snapshot_gives_way():
    slots = StateSlots(3)
    for digest in (A, B):
        slots.capture(digest)
        slots.publish()
    slots.use(A)
    slots.capture(C)
    slots.publish()
    assert [slots.has(d) for d in (A, B, C)] == [True, False, True]
    owned = [slots.take()]
    assert [slots.has(d) for d in (A, C)] == [False, True]
    slots.check_invariants(owned)


def test_forgetting_frees_everything_that_nobody_owns():
    slots = StateSlots(4)
    owned = slots.take()
    slots.capture(A)
    slots.publish()
    slots.capture(B)
    slots.forget()
    slots.publish()
    assert not slots.has(A) and not slots.has(B)
    slots.check_invariants([owned])
    assert {slots.take(), slots.take(), owned} == {1, 2, 3}
