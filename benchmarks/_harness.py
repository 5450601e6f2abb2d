"""Contestants measured in alternation, so that what a noisy machine does to one it does to the
other.

Absolute times on a shared machine drift by tens of percent within a minute. A round here is short,
each round runs every contestant once, and only figures of the same round are divided by one
another; of those ratios the median and the quartiles are told.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from pgtoolset.testing import EmbeddedServer

R = TypeVar("R")


async def alternate(
    contestants: Mapping[str, Callable[[], Awaitable[R]]], *, rounds: int, warm_up: int = 2
) -> dict[str, list[R]]:
    """Run every contestant once per round and return what each gave, round by round, without the
    warm-up.

    The order is drawn anew for each round, the same in every run: a drift, or a neighbour who
    leaves the caches warm, then helps each as often as it harms it. (An order that is only reversed
    has whoever stands at its ends run twice in a row, which is worth some percent.) The garbage of
    one contestant is collected before the next one starts, and collection stays on while it runs.
    What has survived the warm-up is frozen, as in a server that has been up for a while, so that
    collecting is quick.
    """
    names = list(contestants)
    order = random.Random(0)
    results: dict[str, list[R]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        if number == warm_up:
            gc.collect()
            gc.freeze()
        for name in order.sample(names, len(names)):
            gc.collect()
            result = await contestants[name]()
            if number >= warm_up:
                results[name].append(result)
    gc.unfreeze()
    return results


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some figures and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread:
        return cls(*statistics.quantiles(figures, n=4, method="inclusive"))

    @classmethod
    def of_ratios(cls, ours: Sequence[float], theirs: Sequence[float]) -> Spread:
        """The ratios of figures that were measured in the same round."""
        return cls.of(one / other for one, other in zip(ours, theirs, strict=True))

    def __str__(self) -> str:
        return f"{self.median:7.3f}  ({self.low:.3f} to {self.high:.3f})"


def tell(
    what: str, figure: Spread, target: tuple[Literal["at most", "at least"], float] | None = None
) -> None:
    """Print one line: what was measured, the median, the quartiles, and whether the median meets
    the target."""
    verdict = ""
    if target is not None:
        bound, limit = target
        met = figure.median <= limit if bound == "at most" else figure.median >= limit
        verdict = f"   target {bound} {limit}: {'met' if met else 'NOT MET'}"
    print(f"{what:<62} {figure}{verdict}", flush=True)


@contextmanager
def database_url(**settings: str) -> Iterator[str]:
    """`DATABASE_URL` for SQLAlchemy, or a PostgreSQL of our own with these settings, over the
    driver that the environment variable `DRIVER` names, or asyncpg."""
    given = os.environ.get("DATABASE_URL")
    if given:
        yield given
    else:
        with EmbeddedServer(settings=settings) as server:
            yield server.url(driver=f"postgresql+{os.environ.get('DRIVER') or 'asyncpg'}")


def headline(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


def environment(*packages: str) -> None:
    """Print what the figures depend on."""
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(
        f"Python {sys.version.split()[0]}, {versions}; {os.cpu_count()} CPUs, load "
        f"{os.getloadavg()[0]:.1f}"
    )
