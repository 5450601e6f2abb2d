"""The picture of a run, in text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from examples.cluster.faults import Event
from examples.cluster.ledger import Ledger, Verdict
from examples.cluster.patroni import Reign

#: Characters of the time line, and from no write to many.
WIDTH = 72
SHADES = ".:-=+*#%@"


@dataclass(frozen=True)
class Run:
    """All that a run has seen.

    Attributes:
        began, ended: its time.
        events: the faults.
        reigns: the primaries.
        ledgers: what the application was told, by way, the library's first.
        verdicts: the comparisons with what is stored, in the same order.
    """

    began: float
    ended: float
    events: Sequence[Event]
    reigns: Sequence[Reign]
    ledgers: Sequence[Ledger]
    verdicts: Sequence[Verdict]

    def successions(self) -> list[tuple[Event, Reign]]:
        """Return each fault after which another node became the primary, and its reign."""
        found = []
        ends = [*(event.at for event in self.events[1:]), self.ended]
        for event, end in zip(self.events, ends, strict=True):
            before = [reign for reign in self.reigns if reign.since <= event.at]
            after = [
                reign
                for reign in self.reigns
                if event.at < reign.since <= end and reign.name != before[-1].name
            ]
            if after:
                found.append((event, after[0]))
        return found

    def without_primary(self) -> float:
        """Return the seconds in which no node was the primary, from each fault on."""
        return sum(reign.since - event.at for event, reign in self.successions())

    def lateness(self, ledger: Ledger) -> float:
        """Return the seconds that the watcher was late by at most."""
        return max(ledger.delays_of_watcher([each.since for each in self.reigns]), default=0.0)

    def resumed(self, ledger: Ledger, reign: Reign) -> float:
        """Return the seconds from a new primary to the first acknowledged write."""
        at = ledger.acknowledged_after(reign.since)
        return float("inf") if at is None else at - reign.since


def draw(run: Run) -> str:
    """Return the picture."""
    total = f"{run.without_primary():.1f} of {run.ended - run.began:.1f} s without a primary"
    return "\n".join(
        [*_time_lines(run), "", *_table_of_events(run), f"   {total}", "", *_table_of_ways(run)]
    )


def _time_lines(run: Run) -> list[str]:
    span = (run.ended - run.began) / WIDTH
    lines = [f"{'':12}{span:.1f} s a column; . no write  @ many  ! an error or an unknown outcome"]
    marks = [" "] * WIDTH
    for number, event in enumerate(run.events, start=1):
        marks[_column(run, event.at)] = str(number)
    lines.append(f"{'fault':<12}{''.join(marks)}")
    rulers = ["-"] * WIDTH
    for reign in run.reigns:
        end = run.ended if reign.until is None else min(reign.until, run.ended)
        for column in range(_column(run, reign.since), _column(run, end) + 1):
            rulers[column] = reign.name[-1]
    lines.append(f"{'primary':<12}{''.join(rulers)}")
    most = max((max(_per_column(run, each).values(), default=1) for each in run.ledgers), default=1)
    for ledger in run.ledgers:
        stored = _per_column(run, ledger)
        failed = {
            _column(run, write.ended)
            for write in ledger.writes
            if write.outcome in ("failed", "unknown")
        }
        line = "".join(
            "!"
            if column in failed and not stored[column]
            else SHADES[min(len(SHADES) - 1, -(-stored[column] * (len(SHADES) - 1) // most))]
            for column in range(WIDTH)
        )
        lines.append(f"{ledger.way:<12}{line}")
    return lines


def _per_column(run: Run, ledger: Ledger) -> Counter[int]:
    return Counter(
        _column(run, write.ended) for write in ledger.writes if write.outcome == "acknowledged"
    )


def _column(run: Run, moment: float) -> int:
    share = (moment - run.began) / (run.ended - run.began)
    return max(0, min(WIDTH - 1, int(share * WIDTH)))


def _table_of_events(run: Run) -> list[str]:
    successions = {id(event): reign for event, reign in run.successions()}
    lines = ["   at s  fault"]
    for number, event in enumerate(run.events, start=1):
        lines.append(f"{event.at - run.began:7.1f}  {number}  {event.title}")
        reign = successions.get(id(event))
        if reign is not None:
            resumed = ", ".join(
                f"{ledger.way} {run.resumed(ledger, reign):.1f}" for ledger in run.ledgers
            )
            lines.append(
                f"{'':12}{reign.name} is the primary after {reign.since - event.at:.1f} s; "
                f"first write after that, s: {resumed}"
            )
        if event.whole is not None:
            lines.append(f"{'':12}whole after {event.whole - event.at:.1f} s")
    return lines


def _table_of_ways(run: Run) -> list[str]:
    rows: list[tuple[str, list[str]]] = [("", [ledger.way for ledger in run.ledgers])]

    def row(name: str, values: list[object]) -> None:
        rows.append((name, [str(value) for value in values]))

    for outcome in ("acknowledged", "failed", "unknown"):
        row(
            f"writes {outcome}",
            [sum(w.outcome == outcome for w in ledger.writes) for ledger in run.ledgers],
        )
    row("  unknown: stored", [verdict.unknown_stored for verdict in run.verdicts])
    row("  unknown: not stored", [verdict.unknown_lost for verdict in run.verdicts])
    row("acknowledged and lost", [len(verdict.lost) for verdict in run.verdicts])
    row("done twice", [len(verdict.twice) for verdict in run.verdicts])
    row("wrong outcomes", [len(verdict.wrong) for verdict in run.verdicts])
    row("counters off by", [verdict.uncounted for verdict in run.verdicts])
    row("reads with a token", [sum(r.has_token for r in each.reads) for each in run.ledgers])
    row("  of them stale", [sum(r.has_token and r.is_stale for r in e.reads) for e in run.ledgers])
    row("reads without", [sum(not r.has_token for r in each.reads) for each in run.ledgers])
    row("  of them stale", [sum(r.is_stale > r.has_token for r in e.reads) for e in run.ledgers])
    for node in sorted({read.node for ledger in run.ledgers for read in ledger.reads}):
        row(f"reads on {node}", [sum(r.node == node for r in each.reads) for each in run.ledgers])
    row("reads that failed", [sum(ledger.failed_reads.values()) for ledger in run.ledgers])
    row("beats of a watched row", [len(ledger.beats) for ledger in run.ledgers])
    row(
        "  seen late by at most, s",
        [f"{run.lateness(each):.1f}" if each.beats else "-" for each in run.ledgers],
    )
    return [
        f"{name:<28}" + "".join(f"{value:>12}" for value in values).rstrip()
        for name, values in rows
    ]
