"""What the application believes of each write and read, and what is really stored.

The ledger is kept outside of the database. At the end it is compared with the final primary.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, TypeAlias

#: What the application was told: stored, certainly not stored, or that nobody knows.
Outcome: TypeAlias = Literal["acknowledged", "failed", "unknown"]


@dataclass
class Write:
    """One write, as the application sees it.

    Attributes:
        id: its id, which is in the row.
        counter: the counter that it has raised, if it has.
        outcome: what the application was told; `None` while it waits.
        error: the class of the error that told it.
        ended: when it was told.
        callbacks: how often the callback after its commit has run.
    """

    id: str
    counter: str | None = None
    outcome: Outcome | None = None
    error: str | None = None
    ended: float = 0.0
    callbacks: int = 0

    def end(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Note what the application was told. Its first word counts."""
        if self.outcome is not None:
            return
        self.outcome = outcome
        self.error = None if error is None else type(error).__name__
        self.ended = time.monotonic()

    def committed(self) -> None:
        """Note that the callback after the commit has run."""
        self.callbacks += 1


@dataclass(frozen=True)
class Read:
    """One read of a write that was acknowledged before it.

    Attributes:
        node: the node that answered.
        has_token: whether it asked for what the writer has seen.
        is_stale: whether the write was missing.
        at: when it was answered.
    """

    node: str
    has_token: bool
    is_stale: bool
    at: float


@dataclass
class Ledger:
    """The writes and reads of one way to the cluster.

    Attributes:
        way: its name.
        has_tokens: whether readers can ask for what a writer has seen; where they cannot, each
            read that does not see it counts as stale.
        beats: for each value of the watched row, when its write was acknowledged.
        seen: for each value that the watcher reported, when.
        failed_reads: the errors of reads.
        watcher_error: what ended the watcher, which survives lost connections.
    """

    way: str
    has_tokens: bool = True
    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    failed_reads: Counter[str] = field(default_factory=Counter)
    watcher_error: str | None = None
    beats: list[tuple[float, int]] = field(default_factory=list)
    seen: list[tuple[float, int]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)

    def open(self, counter: str | None = None) -> Write:
        """Note that a write begins."""
        write = Write(f"{self.way}-{next(self._numbers)}", counter)
        self.writes.append(write)
        return write

    def acknowledged_after(self, moment: float) -> float | None:
        """Return when the first write after a moment was acknowledged."""
        times = [w.ended for w in self.writes if w.outcome == "acknowledged" and w.ended >= moment]
        return min(times, default=None)

    def delays_of_watcher(self, primaries: Sequence[float]) -> list[float]:
        """Return, for each acknowledged beat, the seconds until the watcher has seen it or a later
        one; infinite where it never has.

        Args:
            primaries: when there was a new primary. Before it nothing could be seen.
        """
        delays, position = [], 0
        for acknowledged, value in self.beats:
            while position < len(self.seen) and self.seen[position][1] < value:
                position += 1
            seen = self.seen[position][0] if position < len(self.seen) else float("inf")
            since = max(acknowledged, *(each for each in primaries if each <= seen), 0.0)
            delays.append(max(0.0, seen - since))
        return delays


@dataclass(frozen=True)
class Verdict:
    """What the comparison found.

    Attributes:
        lost: writes that were acknowledged and are not stored.
        twice: writes that are stored more than once.
        wrong: writes that are stored though the application was told that they are not, and writes
            whose callback did not run exactly when they were acknowledged.
        uncounted: how far the counters are from the writes that raised them: two writers were
            under one lock.
        stale: reads that did not see the write, and had asked for it with a token if they could.
        unknown_stored: writes of unknown outcome that are stored.
        unknown_lost: writes of unknown outcome that are not.
    """

    lost: list[str]
    twice: list[str]
    wrong: list[str]
    uncounted: int
    stale: int
    unknown_stored: int
    unknown_lost: int

    @property
    def holds(self) -> bool:
        """Whether nothing that the application was told is false."""
        return not (self.lost or self.twice or self.wrong or self.uncounted or self.stale)


def judge(ledger: Ledger, stored: Mapping[str, int], counters: Mapping[str, int]) -> Verdict:
    """Compare a ledger with what the final primary has.

    Args:
        ledger: what the application was told.
        stored: how many rows there are of each write.
        counters: the values of the counters.
    """
    by_outcome: dict[str, list[Write]] = {"acknowledged": [], "failed": [], "unknown": []}
    for write in ledger.writes:
        by_outcome[write.outcome or "unknown"].append(write)
    raised = Counter(
        write.counter for write in ledger.writes for _ in range(stored.get(write.id, 0))
    )
    unknown = by_outcome["unknown"]
    return Verdict(
        lost=[write.id for write in by_outcome["acknowledged"] if not stored.get(write.id)],
        twice=[write.id for write in ledger.writes if stored.get(write.id, 0) > 1],
        wrong=[
            *(write.id for write in by_outcome["failed"] if stored.get(write.id)),
            *(
                write.id
                for write in ledger.writes
                if write.callbacks != (write.outcome == "acknowledged")
            ),
        ],
        uncounted=sum(
            abs(counters.get(name, 0) - number) for name, number in raised.items() if name
        ),
        stale=sum(
            read.is_stale for read in ledger.reads if read.has_token or not ledger.has_tokens
        ),
        unknown_stored=sum(bool(stored.get(write.id)) for write in unknown),
        unknown_lost=sum(not stored.get(write.id) for write in unknown),
    )
