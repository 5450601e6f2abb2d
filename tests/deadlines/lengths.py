"""Deadlines of tests that a busy machine may miss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pgtoolset import DeadlineExceededError

Test = Callable[..., Coroutine[Any, Any, None]]

#: What a test raises that was too late: its deadline was over before anything was sent.
LATE = (AssertionError, DeadlineExceededError, pytest.fail.Exception)


def in_time(*lengths: float) -> Callable[[Test], Test]:
    """Run a test with a deadline of some `seconds`, and with the next length where it fails.

    A busy machine may be late with a short one; a fault is there with each.
    """

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        async def run(**fixtures: Any) -> None:
            for seconds in lengths[:-1]:
                try:
                    return await test(**fixtures, seconds=seconds)
                except LATE:
                    pass
            return await test(**fixtures, seconds=lengths[-1])

        signature = inspect.signature(test)
        others = [each for name, each in signature.parameters.items() if name != "seconds"]
        vars(run)["__signature__"] = signature.replace(parameters=others)
        return run

    return decorate


#: For a test that waits for the end of the deadline.
growing = in_time(0.3, 1.2, 5.0, 20.0)
