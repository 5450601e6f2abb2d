"""Rounds: contestants take turns, and one that fails takes none of the others with it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmarks._declared import Benchmark, Curve, Experiment, Measure, at, at_most
from benchmarks._harness import Alternation, Described, Figures, Turn, described, output_of
from benchmarks._run import Effort, Lines, alone, run_experiment

from benchmarks import _harness, _peers, _run, _worker

pytestmark = pytest.mark.once

Peer = Callable[..., Awaitable[Figures]]


class Silent(Lines):
    """Prints nothing."""

    def begin(self, experiment: Experiment, seconds: float) -> None:
        pass

    def line(self, text: str) -> None:
        pass


async def test_alternation() -> None:
    """Every contestant runs once per round, and the warm-up does not count."""
    seen: list[str] = []

    def turn(name: str) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            seen.append(name)
            return len(seen)

        return run

    results = await Alternation(rounds=4, warm_up=2).run({name: turn(name) for name in "abc"})
    rounds = [set(seen[at : at + 3]) for at in range(0, 18, 3)]
    assert rounds == [set("abc")] * 6
    assert [len(figures) for figures in results.values()] == [4, 4, 4]
    assert min(min(figures) for figures in results.values()) > 6


async def test_time_is_over() -> None:
    """No round begins after the time, once the least number is measured."""
    alternation = Alternation(rounds=100, warm_up=0, seconds=0, least=3)

    async def turn() -> float:
        return await asyncio.sleep(0.001, 1.0)

    assert await alternation.run({"a": turn}) == {"a": [1.0] * 3}


async def test_failed_contestant() -> None:
    """A contestant that fails is shown with its error; the others, and later ones, go on."""
    calls = 0

    async def works() -> Figures:
        return {"wall": 2.0}

    async def breaks() -> Figures:
        nonlocal calls
        calls += 1
        raise ValueError("16,384 associations are\ntoo many")

    @asynccontextmanager
    async def set_up(url: str) -> AsyncIterator[Mapping[str, Turn]]:
        yield {
            "ours": works,
            "theirs": breaks,
            "again": works,
            at("ours", 1): works,
            at("ours", 10): breaks,
        }

    experiment = Experiment(
        "e",
        set_up,
        (
            Measure("peer", "ours", "ours", "theirs", "theirs", target=at_most(1)),
            Measure("control", "ours", "ours", "again", "again", target=at_most(1)),
        ),
        (Curve("c", "c", "rows", "ms", (1, 10, 100), {"ours": "ours"}),),
        rounds=3,
    )
    measures, curves = await run_experiment(experiment, "", Effort(), Silent())
    error = "ValueError: 16,384 associations are"
    assert measures["peer"] == {"fails": error, "contestant": "theirs"}
    assert measures["control"]["met"] is True
    assert curves["c"]["ours"] == [
        {"size": 1, "median": 2.0, "low": 2.0, "high": 2.0, "n": 3},
        {"size": 10, "fails": error},
    ]
    assert calls == 2


async def test_turn_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contestant that does not end is a failure after a minute, and the others go on."""
    cancelled = []

    async def hangs() -> Figures:
        try:
            return await asyncio.Event().wait() or {}
        finally:
            cancelled.append(True)

    async def works() -> Figures:
        return {"wall": 1.0}

    monkeypatch.setattr(_harness, "TURN_LIMIT", 0.01)
    alternation = Alternation(rounds=2, warm_up=0)
    results = await alternation.run({"hangs": hangs, "works": works})
    assert alternation.failures == {"hangs": "no result within 0.01 s"}
    assert cancelled == [True]
    assert len(results["works"]) == 2


@pytest.mark.parametrize("when", ["not set up", "not removed"])
async def test_set_up_that_hangs(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment that is not set up, or not removed, in time fails, and the next one begins."""

    @asynccontextmanager
    async def set_up(url: str) -> AsyncIterator[Mapping[str, Turn]]:
        if when == "not set up":
            await asyncio.Event().wait()
        yield {}
        await asyncio.Event().wait()

    monkeypatch.setattr(_run, "SET_UP_LIMIT", 0.01)
    experiment = Experiment("e", set_up, (Measure("m", "m", "ours", "b", "theirs"),), rounds=1)
    measures, _ = await run_experiment(experiment, "", Effort(), Silent())
    assert measures["m"]["fails"] == f"{when} within 0.01 s"


async def test_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the limit of an experiment passes before its first round, that is its result."""

    async def works() -> Figures:
        return {"wall": 1.0}

    @asynccontextmanager
    async def set_up(url: str) -> AsyncIterator[Mapping[str, Turn]]:
        yield {"ours": works}

    monkeypatch.setattr(_run, "LIMIT", -1.0)
    experiment = Experiment("e", set_up, (Measure("m", "m", "ours", unit="s"),), seconds=0)
    measures, _ = await run_experiment(experiment, "", Effort(), Silent())
    assert measures["m"]["fails"] == "no round in time"


async def test_process_of_a_turn() -> None:
    """A process that fails raises its last line, and one of a cancelled turn is ended."""
    command = [sys.executable, "-c", "import sys; print(7); sys.exit('first\\nlast line')"]
    with pytest.raises(Described, match=r"^last line$"):
        await output_of(command, {})
    assert await output_of([sys.executable, "-c", "print(7)"], {}) == b"7\n"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await output_of([sys.executable, "-c", "import time; time.sleep(600)"], {})


async def test_failed_set_up() -> None:
    """An experiment that cannot be set up fails with all its measures, and raises nothing."""

    @asynccontextmanager
    async def set_up(url: str) -> AsyncIterator[Mapping[str, Turn]]:
        raise ImportError("no compiled modules")
        yield {}

    measure = Measure("m", "m", "ours", "b", "theirs")
    curve = Curve("c", "c", "rows", "ms", (1,), {"s": "s"})
    experiment = Experiment("e", set_up, (measure,), (curve,))
    measures, curves = await run_experiment(experiment, "", Effort(), Silent())
    assert measures["m"]["fails"] == "ImportError: no compiled modules"
    assert curves["c"]["s"] == [{"size": 1, "fails": "ImportError: no compiled modules"}]


def test_driver_errors() -> None:
    """A driver's error inside of SQLAlchemy's is shown as the driver's, without the statement."""
    from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi as adapter
    from sqlalchemy.exc import InterfaceError

    try:
        try:
            raise TypeError("32767 are too many")
        except TypeError as cause:
            raise adapter.InterfaceError("<class 'X'>: 32767 are too many") from cause
    except adapter.InterfaceError as error:
        shown = described(InterfaceError("INSERT secret", {}, error))
    assert shown == "TypeError: 32767 are too many"


@asynccontextmanager
async def peer(url: str) -> AsyncIterator[dict[str, Peer]]:
    """What the process of a worker runs in these tests."""

    async def double(number: float) -> Figures:
        sys.stdout.write("a library that prints\n")
        return {"wall": 2 * number}

    async def fails() -> Figures:
        raise LookupError(url)

    async def hangs() -> Figures:
        await asyncio.Event().wait()
        return {}

    yield {"double": double, "fails": fails, "hangs": hangs}


async def test_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process answers turn for turn, an error with an error, and ends with its starter."""
    monkeypatch.setattr(_worker, "folder_of", lambda peer: tmp_path)
    function = f"{__name__}:peer"
    async with _worker.workers(["one"], function, "the url") as workers:
        worker = workers["one"]
        assert await worker.turn("double", 4)() == {"wall": 8}
        with pytest.raises(_worker.WorkerError, match=r"^LookupError: the url$"):
            await worker.turn("fails")()
        assert await worker.turn("double", 5)() == {"wall": 10}
        process = worker._process
    assert process is not None
    assert process.returncode is not None


async def test_worker_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that is stopped is the failure of that turn: a new process takes the next one."""
    monkeypatch.setattr(_worker, "folder_of", lambda peer: tmp_path)
    async with _worker.workers(["one"], f"{__name__}:peer", "the url") as workers:
        worker = workers["one"]
        assert await worker.turn("double", 4)() == {"wall": 8}
        first = worker._process
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await worker.turn("hangs")()
        assert await worker.turn("double", 5)() == {"wall": 10}
        assert first is not None and first.returncode is not None


async def test_peer_that_cannot_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that pip does not find fails with pip's last line, each time without another try."""
    calls = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        return type("Done", (), {"returncode": 1, "stderr": "a\nERROR: No matching distribution\n"})

    monkeypatch.setattr(_peers, "CACHE", tmp_path)
    monkeypatch.setattr(_peers.subprocess, "run", run)
    monkeypatch.setitem(_peers.PEERS, "gone", ("gone 1", "gone-test==1"))
    async with _worker.workers(["gone"], f"{__name__}:peer", "") as workers:
        turn = workers["gone"].turn("double", 1)
        for _ in range(2):
            with pytest.raises(Exception, match=r"gone-test==1 cannot be installed: ERROR: No mat"):
                await turn()
    assert len(calls) == 1


def test_alone(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module runs by its name alone, measures on a real server, and prints its figures."""
    monkeypatch.setenv("DATABASE_URL", database_url.replace("+psycopg", "+asyncpg"))
    monkeypatch.setattr(_run, "QUICK", Effort(seconds=0, rounds=0, least=1, warm_up=0))
    monkeypatch.setattr("sys.argv", ["units", "--quick", "--only", "unit of work"])
    alone("units")
    output = capsys.readouterr().out
    [first, *_] = _run.load("units").experiments
    assert output.count(", n 1") == len(first.measures)
    assert "fails" not in output
    assert "PostgreSQL 1" in output


def test_alone_with_a_wrong_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An experiment that does not exist is an error of usage that lists those that do."""
    monkeypatch.setattr("sys.argv", ["units", "--only", "nonsense"])
    with pytest.raises(SystemExit) as exit:
        alone("units")
    assert exit.value.code == 2
    assert "there are 'One SELECT in a unit of work'" in capsys.readouterr().err


@pytest.mark.parametrize("quick", [True, False])
async def test_quick(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick run leaves out what it has no time for, and says that it is quick."""

    async def environment(url: str, packages: object, *, quick: bool) -> dict[str, Any]:
        return {"load": "0", "quick": quick}

    async def turn() -> Figures:
        return {"wall": 1.0}

    @asynccontextmanager
    async def set_up(url: str) -> AsyncIterator[Mapping[str, Turn]]:
        yield {"ours": turn}

    def experiment(name: str, *, quick: bool) -> Experiment:
        measure = Measure(name, name, "ours", unit="s")
        return Experiment(name, set_up, (measure,), rounds=1, quick=quick)

    monkeypatch.setattr(_run, "environment", environment)
    monkeypatch.setenv("DATABASE_URL", "postgresql://unused")
    benchmark = Benchmark("b", "b", (experiment("a", quick=True), experiment("b", quick=False)))
    results = await _run.run_benchmark(benchmark, Effort(), Silent(), quick=quick)
    assert list(results["measures"]) == (["a"] if quick else ["a", "b"])
    assert results["environment"]["quick"] is quick
