"""What the tests of commands share."""

import signal

import pytest


@pytest.fixture(autouse=True)
def children_can_be_interrupted():
    """A shell starts background jobs with Ctrl-C ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
