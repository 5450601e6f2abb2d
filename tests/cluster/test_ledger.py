"""The ledger of the cluster example finds every kind of lie: each is planted here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from examples.cluster.faults import Event
from examples.cluster.ledger import Ledger, Outcome, Read, Verdict, Write, judge
from examples.cluster.patroni import Reign
from examples.cluster.picture import Run
from examples.cluster.proof import BY_HAND, Options, complaints

#: It uses neither the library nor PostgreSQL.
pytestmark = pytest.mark.once


def written(ledger: Ledger, outcome: Outcome, counter: str | None = None) -> Write:
    write = ledger.open(counter)
    if outcome == "acknowledged":
        write.committed()
    write.end(outcome)
    return write


def honest() -> tuple[Ledger, dict[str, int], dict[str, int]]:
    """One write of each outcome, the unknown ones both stored and not; all is true."""
    ledger = Ledger("way")
    stored = {
        written(ledger, "acknowledged").id: 1,
        written(ledger, "acknowledged", "counter").id: 1,
        written(ledger, "failed").id: 0,
        written(ledger, "unknown", "counter").id: 1,
        written(ledger, "unknown", "counter").id: 0,
    }
    ledger.reads += [Read("node1", True, False, 0.0), Read("node2", False, True, 0.0)]
    return ledger, stored, {"counter": 2}


def test_truth() -> None:
    """What was told truly holds, whatever became of writes of unknown outcome."""
    verdict = judge(*honest())
    assert verdict.holds
    assert (verdict.unknown_stored, verdict.unknown_lost) == (1, 1)


def lost(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    stored["way-0"] = 0


def twice(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    stored["way-0"] = 2


def twice_in_doubt(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    stored["way-3"], counters["counter"] = 2, 3


def stored_after_all(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    stored["way-2"] = 1


def no_callback(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    ledger.writes[0].callbacks = 0


def callback_twice(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    ledger.writes[0].callbacks = 2


def callback_of_nothing(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    ledger.writes[3].callbacks = 1


def two_under_one_lock(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    counters["counter"] = 1


def stale_token(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    ledger.reads.append(Read("node2", True, True, 0.0))


def stale_without_tokens(ledger: Ledger, stored: dict[str, int], counters: dict[str, int]) -> None:
    ledger.has_tokens = False


@pytest.mark.parametrize(
    ("lie", "field"),
    [
        (lost, "lost"),
        (twice, "twice"),
        (twice_in_doubt, "twice"),
        (stored_after_all, "wrong"),
        (no_callback, "wrong"),
        (callback_twice, "wrong"),
        (callback_of_nothing, "wrong"),
        (two_under_one_lock, "uncounted"),
        (stale_token, "stale"),
        (stale_without_tokens, "stale"),
    ],
)
def test_lies(lie: Callable[[Ledger, dict[str, int], dict[str, int]], None], field: str) -> None:
    """Each lie is found, and called what it is."""
    ledger, stored, counters = honest()
    lie(ledger, stored, counters)
    verdict = judge(ledger, stored, counters)
    assert not verdict.holds
    found = {name for name in Verdict.__dataclass_fields__ if getattr(verdict, name)}
    assert found - {"unknown_stored", "unknown_lost"} == {field}


def test_first_word_counts() -> None:
    """An error after a write was acknowledged does not make it another outcome."""
    write = Ledger("way").open()
    write.end("acknowledged")
    write.end("failed", ValueError())
    assert (write.outcome, write.error) == ("acknowledged", None)


def test_watcher_that_is_late() -> None:
    """A watcher is late by the time since the write, or since there was a primary to see it on;
    one that never saw it is late for ever."""
    ledger = Ledger("way")
    ledger.beats = [(1.0, 1), (2.0, 2), (3.0, 3), (9.0, 4)]
    ledger.seen = [(1.5, 1), (8.0, 3)]
    assert ledger.delays_of_watcher([0.0, 7.0]) == [0.5, 1.0, 1.0, float("inf")]


@pytest.mark.parametrize(
    ("seconds", "by_hand", "is_late"),
    [
        (1.9, 0.3, False),
        (2.1, 0.3, True),
        (5.9, 2.0, False),  # the machine is busy
        (6.1, 2.0, True),
        (2.1, None, True),
        (None, 0.3, True),
        (None, None, True),
    ],
)
def test_writes_that_go_on_late(
    seconds: float | None, by_hand: float | None, is_late: bool
) -> None:
    """Writes must go on within the given time, or within three times that of SQLAlchemy by hand;
    where they never do, nothing excuses it."""
    ledgers = []
    for way, after in (("way", seconds), (BY_HAND, by_hand)):
        ledger = Ledger(way)
        for ended in (1.0, *([] if after is None else [10.0 + after])):
            written(ledger, "acknowledged").ended = ended
        ledgers.append(ledger)
    run = Run(
        0.0,
        60.0,
        [Event("a fault", 5.0)],
        [Reign("node1", 0.0), Reign("node2", 10.0)],
        ledgers,
        [judge(each, {write.id: 1 for write in each.writes}, {}) for each in ledgers],
    )
    found = complaints(run, Options(resume=2.0))
    assert [each.partition(" s late")[1] != "" for each in found] == [True] * is_late
    assert all(each.startswith("way: writes went on") for each in found)
