"""What a module of benchmarks declares: its contestants, and which figures of them are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from benchmarks._harness import Turn

#: Given the URL of a database, sets up what an experiment needs and yields its contestants.
SetUp: TypeAlias = Callable[[str], AbstractAsyncContextManager[Mapping[str, Turn]]]


@dataclass(frozen=True, slots=True)
class Target:
    """A limit that a median must keep."""

    bound: Literal["at most", "at least"]
    limit: float
    #: Where the limit comes from.
    source: str

    def is_met(self, figure: float) -> bool:
        """Say whether a figure keeps the limit."""
        return figure <= self.limit if self.bound == "at most" else figure >= self.limit

    def __str__(self) -> str:
        return f"{self.bound} {self.limit:g}"


#: Most limits were required before the code was written, and are not changed to fit it.
REQUIRED = "required before the code was written"


def at_most(limit: float, source: str = REQUIRED) -> Target:
    """Return a target: the smaller the better."""
    return Target("at most", limit, source)


def at_least(limit: float, source: str = REQUIRED) -> Target:
    """Return a target: the larger the better."""
    return Target("at least", limit, source)


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a contestant, or its ratio to that of another one in the same round.

    Attributes:
        name: unique in its module; lower case and hyphens.
        what: what is measured, as Markdown.
        ours: the contestant that it is about.
        beside: what it is compared with, as Markdown.
        theirs: that contestant; empty for a figure of its own.
        of: which figure of the contestants.
        unit: of a figure of its own: `ms`, `%`, ... A ratio has none.
        scale: what a figure of its own is multiplied with.
        inverse: divide theirs by ours: "so many times as long".
        target: the limit; a measure without one is for information.
    """

    name: str
    what: str
    ours: str
    beside: str = ""
    theirs: str = ""
    of: str = "wall"
    unit: str = ""
    scale: float = 1.0
    inverse: bool = False
    target: Target | None = None

    def __post_init__(self) -> None:
        if bool(self.theirs) != bool(self.beside) or bool(self.theirs) == bool(self.unit):
            raise ValueError(f"{self.name}: a ratio has theirs and beside, another figure a unit")


def with_cpu(measure: Measure, *, target: bool = False) -> tuple[Measure, Measure]:
    """Return a measure of wall time and the same of CPU time, which a loaded machine disturbs less.

    Args:
        measure: that of wall time.
        target: whether its target holds for the CPU time too.
    """
    cpu = dataclasses.replace(
        measure,
        name=f"{measure.name}-cpu",
        what=f"{measure.what}, CPU time",
        of="cpu",
        target=measure.target if target else None,
    )
    return measure, cpu


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure of several contestants over sizes.

    Attributes:
        name: unique among all curves; the name of its pictures.
        title: of the picture.
        x: the axis of sizes, in words.
        y: the axis of figures, in words.
        sizes: for each there is a contestant of each series, named by `at`.
        series: by contestant, how the picture names it.
        of: which figure of the contestants.
        scale: what the figures are multiplied with.
    """

    name: str
    title: str
    x: str
    y: str
    sizes: tuple[int, ...]
    series: Mapping[str, str]
    of: str = "wall"
    scale: float = 1.0


def at(contestant: str, size: int) -> str:
    """Return the name of a contestant at one size of a curve."""
    return f"{contestant} @ {size}"


@dataclass(frozen=True, slots=True)
class Experiment:
    """Contestants that take turns.

    Attributes:
        title: a headline.
        set_up: makes the contestants, and removes what it made.
        measures: in the order in which they are shown.
        curves: likewise.
        seconds: for how long rounds begin in a full run.
        rounds: no more than that many.
        least: rounds that are measured even where the time is over.
        warm_up: rounds before the first that counts.
        quick: whether a quick run has time for it.
        note: a paragraph of the page.
    """

    title: str
    set_up: SetUp
    measures: tuple[Measure, ...] = ()
    curves: tuple[Curve, ...] = ()
    seconds: float = 15.0
    rounds: int = 2_000
    least: int = 3
    warm_up: int = 2
    quick: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What one module measures, as its `BENCHMARK`.

    Attributes:
        title: a headline of the page.
        about: a paragraph below it.
        experiments: one after the other, on one server.
        settings: of the embedded server.
        packages: distributions whose versions the figures depend on.
    """

    title: str
    about: str
    experiments: tuple[Experiment, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()

    @property
    def measures(self) -> list[Measure]:
        """All measures, in order."""
        return [measure for each in self.experiments for measure in each.measures]

    @property
    def curves(self) -> list[Curve]:
        """All curves, in order."""
        return [curve for each in self.experiments for curve in each.curves]
