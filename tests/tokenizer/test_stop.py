"""StopMatcher against an oracle that reads one character at a time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.tokenizer.stop import StopMatcher

# two letters: stops overlap, nest and repeat themselves all the time
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
PIECES = st.lists(st.text("abc", max_size=5), max_size=8)


def oracle(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The text to show and the stop that ended it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def feed(matcher: StopMatcher, pieces: list[str]) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + matcher.flush(), None


@settings(max_examples=500, deadline=None)
@given(stops=STOPS, pieces=PIECES, include_stop=st.booleans())
def test_same_as_reading_one_character_at_a_time(stops: list[str], pieces: list[str], include_stop: bool):
    expected = oracle("".join(pieces), stops, include_stop)
    assert feed(StopMatcher(stops, include_stop), pieces) == expected
    assert feed(StopMatcher(stops, include_stop), ["".join(pieces)]) == expected


@settings(max_examples=500, deadline=None)
@given(stops=STOPS, pieces=PIECES)
def test_holds_back_what_may_become_a_stop_and_no_more(stops: list[str], pieces: list[str]):
    matcher, text, shown = StopMatcher(stops), "", ""
    for piece in pieces:
        text += piece
        safe, stop = matcher.push(piece)
        shown += safe
        if stop is not None:
            return
        begun = [n for s in stops for n in range(len(s)) if text.endswith(s[:n])]
        assert shown == text[: len(text) - max(begun, default=0)]
    assert shown + matcher.flush() == text


def test_first_complete_wins_over_first_begun():
    """ "bc" is complete before "abcd", although "abcd" begins earlier."""
    assert StopMatcher(["abcd", "bc"]).push("xabcdx") == ("xa", "bc")


@pytest.mark.parametrize("stops", [["b", "aab", "ab"], ["aab", "ab", "b"]])
def test_longest_wins_on_ties_in_any_order(stops: list[str]):
    assert StopMatcher(stops).push("xaab") == ("x", "aab")


@pytest.mark.parametrize(("include_stop", "shown"), [(False, "yes"), (True, "yes</s>")])
def test_include_stop_shows_the_stop_but_nothing_after_it(include_stop: bool, shown: str):
    matcher = StopMatcher(["</s>"], include_stop)
    assert matcher.push("yes</") == ("yes", None)
    rest, stop = matcher.push("s> and more")
    assert ("yes" + rest, stop) == (shown, "</s>")
    assert matcher.flush() == ""


def test_a_prefix_that_comes_to_nothing_is_shown():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hi\n") == ("Hi", None)
    assert matcher.push("\nU") == ("", None)
    assert matcher.push("nless") == ("\n\nUnless", None)


def test_flush_gives_the_held_back_text_once():
    matcher = StopMatcher(["STOP"])
    assert matcher.push("go STO") == ("go ", None)
    assert matcher.flush() == "STO"
    assert matcher.flush() == ""


def test_without_stops_everything_passes():
    matcher = StopMatcher([])
    assert matcher.push("any text") == ("any text", None)
    assert matcher.flush() == ""
