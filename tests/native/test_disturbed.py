"""Arguments that change while they are read: any answer is allowed, a crash is not.

Without a GIL another thread can change them at any step. With one, the code of a value can do it in
the same thread, wherever that code is called.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

import pytest

from pgtoolset.protocols import AssociationRows, RowComparator

#: The errors that a changing argument can cause. A TypeError or a SystemError would be about a
#: value that was never given.
CONFUSED = (IndexError, KeyError, RuntimeError, ValueError)

ROWS = 200
READERS = 3
READS = 200


class State:
    def __init__(self, number: int) -> None:
        self.key: Any = (Instance, (number,), None)
        self._deleted = False


class Instance:
    def __init__(self, number: int) -> None:
        self._sa_instance_state = State(number)


@contextmanager
def meanwhile(*disturbances: Callable[[], object]) -> Iterator[None]:
    """Run each in a thread of its own, again and again, until the block ends."""
    over = threading.Event()
    failures: list[BaseException] = []

    def repeat(disturb: Callable[[], object]) -> None:
        try:
            while not over.is_set():
                disturb()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(each,)) for each in disturbances]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(switching)
    assert failures == []


def read(function: Callable[[], Any], check: Callable[[Any], object]) -> None:
    """Call it many times in several threads; answers pass the check, errors are in `CONFUSED`."""
    wrong: list[BaseException] = []
    barrier = threading.Barrier(READERS)

    def reader() -> None:
        barrier.wait()
        try:
            for _ in range(READS):
                try:
                    found = function()
                except CONFUSED:
                    continue
                check(found)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=reader) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@contextmanager
def no_reference_lost(objects: Sequence[Any]) -> Iterator[None]:
    """Each object has as many references at the end as at the start; with fewer it is freed too
    early."""
    gc.collect()
    gc.freeze()  # what has lived until now is not to be visited again
    counts = [sys.getrefcount(each) for each in objects]
    yield
    gc.collect()
    assert [sys.getrefcount(each) for each in objects] == counts


def shaken(values: list[Any], source: Sequence[Any]) -> Callable[[], None]:
    """Empty, fill, lengthen and shorten a list, so that its memory moves each time."""
    chance = random.Random(len(source))

    def shake() -> None:
        values.clear()
        values.extend(source)
        values.extend(source)
        del values[chance.randrange(len(values)) :]
        values[:] = source

    return shake


def numbers(start: int) -> list[int]:
    """Numbers with one reference each, so that a list that drops one frees it."""
    return [start + number for number in range(ROWS)]


def test_lists_of_instances_and_keys(associations: AssociationRows) -> None:
    """Instances and keys come and go, and so do the identities that the instances have."""
    kept, wanted = [Instance(number) for number in numbers(10**6)], numbers(2 * 10**6)
    known = {*numbers(10**6), *wanted, -(10**6)}
    instances, keys, positions = list(kept), list(wanted), [0]
    chance = random.Random(1)

    def expire() -> None:
        state = chance.choice(kept)._sa_instance_state
        before = state.key
        state.key = None
        state._deleted = True
        state.key = (Instance, (-(10**6),), None)
        state._deleted = False
        state.key = before

    def check(found: Any) -> None:
        assert isinstance(found, int) or all(known.issuperset(column) for column in found)

    with no_reference_lost([*kept, *wanted]):
        with meanwhile(
            shaken(instances, kept), shaken(keys, wanted), shaken(positions, [0]), expire
        ):
            read(lambda: associations.key_columns(Instance, instances, keys, 1, positions), check)
        instances[:], keys[:] = kept, wanted


def test_lists_of_pairs(associations: AssociationRows) -> None:
    """Pairs come and go, and so do the keys of many columns in them."""
    kept = [((number, str(number)), number) for number in numbers(10**6)]
    owners, firsts = {pair[0] for pair in kept}, {pair[1] for pair in kept}
    links, keys, positions = list(kept), [pair[0] for pair in kept], [0, 1]

    def check(found: Any) -> None:
        if not isinstance(found, int):
            assert len(found) in (1, 2, 3, 4, 5)
            assert firsts.issuperset(found[-1])

    def check_keys(found: Any) -> None:
        if len(found) == 2:
            assert owners.issuperset(zip(*found, strict=True))

    with no_reference_lost([part for pair in kept for part in (pair, *pair)]):
        with meanwhile(shaken(links, kept), shaken(keys, list(keys)), shaken(positions, [0, 1])):
            read(
                lambda: associations.pair_columns(
                    (Instance, Instance), links, (2, 1), (positions, (0,))
                ),
                check,
            )
            read(lambda: associations.key_columns(Instance, (), keys, 2, positions), check_keys)
        links[:], keys[:] = kept, [pair[0] for pair in kept]


def test_rows_and_what_is_known(comparator: RowComparator) -> None:
    """Rows come and go and change their length, and the last poll is forgotten and known again."""
    values = [float(number) for number in numbers(10**6)]
    texts = [b"%d" % number for number in numbers(10**6)]
    source = [
        [number, values[number], None if number % 2 else texts[number]] for number in range(ROWS)
    ]
    rows, before = [list(row) for row in source], {row[0]: list(row) for row in source}
    chance = random.Random(2)

    def shake_a_row() -> None:
        number = chance.randrange(ROWS)
        for side in (rows[number : number + 1], [before.get(number, [])]):
            for row in side:
                row.clear()
                row.extend(source[number])

    def forget() -> None:
        before.pop(chance.randrange(ROWS), None)
        before.update({row[0]: list(row) for row in source[:: chance.randrange(1, 9)]})
        if chance.random() < 0.1:
            before.clear()

    def check(found: Any) -> None:
        assert isinstance(found, list)
        assert all(0 <= position < 3 * ROWS for position in found)

    with no_reference_lost([*values, *texts]):
        with meanwhile(shaken(rows, [list(row) for row in source]), shake_a_row, forget):
            read(lambda: comparator.changed_rows(rows, before, 1), check)
        rows[:] = [list(row) for row in source]
        before.update({row[0]: list(row) for row in source})


@pytest.mark.parametrize("is_growing", [False, True], ids=["values only", "keys and values"])
def test_documents(comparator: RowComparator, is_growing: bool) -> None:
    """Documents get other values, other keys and lists of other lengths while being compared."""
    # Two NaNs are the same, but no `==` says so: everything is walked through, to the end.
    ours, theirs = ([float("nan") for _ in range(ROWS)] for _ in range(2))

    def document(nans: list[float]) -> dict[int, Any]:
        return {number: [nans[number], {"a": nans[number]}] for number in range(ROWS)}

    left, right = document(ours), document(theirs)
    chance = random.Random(3)

    def replace() -> None:
        for side, nans in ((left, ours), (right, theirs)):
            for number in range(ROWS):
                side[number] = [nans[number], {"a": nans[number]}]

    def grow() -> None:
        for side, nans in ((left, ours), (right, theirs)):
            number = chance.randrange(ROWS)
            side.pop(number, None)
            side[ROWS + number] = side[number] = [nans[number]]
            side.pop(ROWS + number, None)
            side.setdefault(number, []).clear()
            if number < 5:
                side.clear()
                side.update(document(nans))

    def check(found: Any) -> None:
        assert found if not is_growing else isinstance(found, bool)

    with no_reference_lost([*ours, *theirs]):
        with meanwhile(replace, replace, grow if is_growing else replace):
            read(lambda: comparator.same_value(left, right), check)
            read(lambda: comparator.same_value([*left.values()], [*right.values()]), bool)
        for side, nans in ((left, ours), (right, theirs)):
            side.clear()
            side.update(document(nans))


class Meddler:
    """An instance of `Instance`, equal to everything, that changes its container when asked."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle = meddle
        self._sa_instance_state = State(7)

    def __eq__(self, other: object) -> bool:
        self._meddle()
        return True

    __hash__ = None  # type: ignore[assignment]

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        self._meddle()
        return Instance


class Key(UUID):
    """A key that changes its container when it is looked up."""

    meddle: Callable[[], object] = staticmethod(lambda: None)

    def __hash__(self) -> int:
        type(self).meddle()
        return super().__hash__()


def emptied(values: list[Any], document: dict[Any, Any]) -> None:
    values.clear()
    document.clear()


def halved(values: list[Any], document: dict[Any, Any]) -> None:
    del values[len(values) // 2 :]
    for key in list(document)[::2]:
        del document[key]


def refilled(values: list[Any], document: dict[Any, Any]) -> None:
    values.extend(values[: ROWS // 2])
    del values[:ROWS]
    fresh = {key: [float("nan")] for key in document}
    document.clear()
    document.update(fresh)


@pytest.mark.parametrize("meddle", [emptied, halved, refilled])
def test_a_value_that_meddles(
    comparator: RowComparator,
    associations: AssociationRows,
    meddle: Callable[[list[Any], dict[Any, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The code of a value changes its container while that is read, with a GIL too."""
    values: list[Any] = []
    document: dict[Any, Any] = {}
    meddled: list[str] = []

    def run() -> None:
        meddled.append("")
        meddle(values, document)

    def filled(*, around: Callable[[Any], Any] = lambda each: each) -> list[Any]:
        each = (
            [float("nan") for _ in range(ROWS)],
            [Meddler(run)],
            [float("nan") for _ in range(ROWS)],
        )
        values[:] = [around(value) for part in each for value in part]
        document.clear()
        document.update(enumerate(values))
        return values

    def instances(*, around: Callable[[Any], Any] = lambda each: each) -> list[Any]:
        given = *map(Instance, numbers(10**6)), Meddler(run), *map(Instance, numbers(2 * 10**6))
        values[:] = map(around, given)
        return values

    def keys() -> list[Any]:
        values[:] = [Key(int=number) for number in numbers(10**6)]
        return values

    def rows() -> list[Any]:
        filled(around=lambda value: [len(values), value, None])
        for number, row in enumerate(values):
            row[0] = number
            document[number] = [number, float("nan"), None]
        return values

    both, positions = (Instance, Instance), ((0,), (0,))
    calls: dict[str, Callable[[], Any]] = {
        "instances": lambda: associations.key_columns(Instance, instances(), (), 1, (0,)),
        "keys": lambda: associations.key_columns(Instance, (), keys(), 1, (0,)),
        "pairs": lambda: associations.pair_columns(
            both, instances(around=lambda each: (each, 1)), (1, 1), positions
        ),
        "values": lambda: comparator.same_value(
            filled(), [float("nan") for _ in range(2 * ROWS + 1)]
        ),
        "document": lambda: comparator.same_value(
            filled() and document, {key: float("nan") for key in document}
        ),
        "rows": lambda: comparator.changed_rows(rows(), document, 1),
    }
    monkeypatch.setattr(Key, "meddle", staticmethod(run))
    for name, call in calls.items():
        for _ in range(10):
            meddled.clear()
            with suppress(*CONFUSED):
                call()
            assert meddled, name
