"""The row comparator: which differences are changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtoolset._native import comparator as interpreted
from pgtoolset.protocols import RowComparator


class Array:
    """Compares to another array, as NumPy's arrays do."""

    def __init__(self, *items: float) -> None:
        self.items = items

    def __eq__(self, other: object) -> Any:
        assert isinstance(other, Array)
        return Array(
            *(one == another for one, another in zip(self.items, other.items, strict=True))
        )

    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    def __repr__(self) -> str:
        return "Array(...)"  # leaves out the middle

    def tobytes(self) -> bytes:
        return repr(self.items).encode()

    __hash__ = None  # type: ignore[assignment]


class Raises:
    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compare me not")

    def __repr__(self) -> str:
        return f"Raises({self.value})"

    __hash__ = None  # type: ignore[assignment]


nan = float("nan")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (None, None),
        (nan, float("nan")),
        (Decimal("NaN"), Decimal("NaN")),
        (Decimal("sNaN"), Decimal("sNaN")),
        ([1.0, nan], [1.0, float("nan")]),
        ({"a": [nan]}, {"a": [float("nan")]}),
        ((1, (nan,)), (1, (float("nan"),))),
        (Array(1, nan, 3), Array(1, nan, 3)),
        (Raises(1), Raises(1)),
        (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)),
        (Decimal("1.0"), Decimal("1.00")),
        (1, 1.0),
        (0, -0.0),
        (True, True),
        ({"a": [1, True]}, {"a": [1.0, True]}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ],
)
def test_same(comparator: RowComparator, left: Any, right: Any) -> None:
    """Equal values are the same, and so are unchanged values whose `==` does not say so."""
    assert comparator.same_value(left, right)
    assert comparator.same_value(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (None, 0),
        (nan, 1.0),
        (nan, None),
        ("", None),
        ([1.0, nan], [nan, 1.0]),
        ([1], [1, 2]),
        ({"a": nan}, {"b": nan}),
        ({"a": 1}, {"a": nan}),
        (Array(1, 2, 3), Array(1, 5, 3)),
        (Raises(1), Raises(2)),
        (Raises(1), None),
        (b"a", memoryview(b"b")),
        (1, True),
        (0.0, False),
        (Decimal(1), True),
        ([1], [True]),
        ((1, (0,)), (1, (False,))),
        ({"a": 1}, {"a": True}),
        ({"a": [{"b": 0}]}, {"a": [{"b": False}]}),
        ([True, 1], [1, True]),
    ],
)
def test_different(comparator: RowComparator, left: Any, right: Any) -> None:
    """A change is found even where the values refuse to be compared."""
    assert not comparator.same_value(left, right)
    assert not comparator.same_value(right, left)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.decimals(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(values)
def test_a_copy_is_the_same(comparator: RowComparator, value: Any) -> None:
    """A value that is sent again is not a change."""

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(each) for each in value]
        if isinstance(value, dict):
            return {key: copy(each) for key, each in value.items()}
        if isinstance(value, float):
            return math.ldexp(*math.frexp(value)) if math.isfinite(value) else float(str(value))
        return Decimal(str(value)) if isinstance(value, Decimal) else value

    assert comparator.same_value(value, copy(value))


@given(
    st.lists(values, min_size=1, max_size=4),
    st.lists(values, min_size=1, max_size=4),
    st.integers(1, 2),
)
def test_changed_rows(
    comparator: RowComparator, one: list[Any], other: list[Any], width: int
) -> None:
    """Rows are matched by their keys and, without texts, compared by their values alone."""
    keys: list[tuple[int, ...]] = [(number,) * width for number in range(4)]
    before = [(*key, *one, None) for key in keys]
    known = {key if width == 2 else key[0]: row for key, row in zip(keys, before, strict=True)}
    after = [
        (*keys[0], *one, None),
        (*keys[1], *other, None),
        (*keys[3], *one, None),
        (*(9,) * width, *one, None),
    ]
    same = len(one) == len(other) and all(
        comparator.same_value(*pair) for pair in zip(one, other, strict=True)
    )
    assert comparator.changed_rows(after, known, width) == ([3] if same else [1, 3])
    assert comparator.changed_rows(before, {}, width) == [0, 1, 2, 3]
    assert comparator.changed_rows([], known, width) == []


@given(values, values)
def test_texts_decide(comparator: RowComparator, one: Any, other: Any) -> None:
    """Where both rows have a text only that is compared, and no value is."""
    known = {1: (1, one, b"a"), 2: (2, one, b"a"), 3: (3, one, None)}
    assert comparator.changed_rows(
        [(1, other, b"a"), (2, one, b"b"), (3, one, b"a")], known, 1
    ) in ([1], [1, 2])


lines = st.lists(
    st.binary(min_size=1, max_size=3).filter(lambda line: b"\n" not in line), unique=True
)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return type(error)  # the words of Python's own errors are not Cython's


@given(lines, st.data())
def test_changed_lines(comparator: RowComparator, before: list[bytes], data: st.DataObject) -> None:
    """Lines of one side alone are found in order, after any changes, additions, removals, moves."""
    after = data.draw(st.permutations(before) | st.just(before))
    after = [
        line
        for line in after
        if line not in data.draw(st.sets(st.sampled_from(before)) if before else st.just({}))
    ]
    for at, line in data.draw(
        st.lists(st.tuples(st.integers(0, 9), st.binary(min_size=4, max_size=5)), max_size=4)
    ):
        if line not in after and b"\n" not in line:
            after.insert(at, line)
    gone, added = comparator.changed_lines(b"\n".join(before), b"\n".join(after))
    assert gone == [line for line in before if line not in after]
    assert added == [line for line in after if line not in before]


def test_changed_lines_of_many(comparator: RowComparator) -> None:
    """Many lines are compared too: with some moved to the end, reversed, with none in common."""
    before = [b"(%d,new)" % number for number in range(3000)]
    moved = [line for line in before if not line.endswith(b"7,new)")]
    moved += [line.replace(b"new", b"paid") for line in before if line.endswith(b"7,new)")]
    for after in (
        before,
        moved,
        before[::-1],
        moved[::-1],
        [line + b"!" for line in before],
        before[1:],
        [],
    ):
        for one, other in ((before, after), (after, before)):
            gone, added = comparator.changed_lines(b"\n".join(one), b"\n".join(other))
            known, wanted = set(one), set(other)
            assert gone == [line for line in one if line not in wanted]
            assert added == [line for line in other if line not in known]


anything = st.recursive(
    values
    | st.dates()
    | st.datetimes()
    | st.builds(Array, st.floats(), st.floats())
    | st.builds(Raises, st.integers(0, 2))
    | st.sets(st.integers(0, 2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=1), inner)
    ),
    max_leaves=5,
)


@given(anything, anything)
def test_same_value_alike(comparator: RowComparator, one: Any, other: Any) -> None:
    """Compiled and interpreted agree on arbitrary values, odd ones included."""
    for right in (other, one, copy.deepcopy(one)):
        theirs = outcome(interpreted.same_value, one, right)
        assert outcome(comparator.same_value, one, right) == theirs


@given(
    st.lists(st.lists(anything, max_size=3) | anything, max_size=4),
    st.dictionaries(st.none() | st.integers(0, 2), st.lists(anything, max_size=3)),
    st.integers(1, 2),
)
def test_changed_rows_alike(
    comparator: RowComparator, rows: list[Any], known: dict[Any, Any], width: int
) -> None:
    """Compiled and interpreted agree on any rows: empty, odd values, unhashable keys, errors."""
    theirs = outcome(interpreted.changed_rows, rows, known, width)
    assert outcome(comparator.changed_rows, rows, known, width) == theirs


@pytest.mark.parametrize(
    "arguments", [("a", b"b"), (b"a", "b"), (None, b""), (b"", 1), (bytearray(b"a"), b"b")]
)
def test_no_bytes(comparator: RowComparator, arguments: tuple[Any, Any]) -> None:
    """Lines that are not bytes are a TypeError in both implementations."""
    with pytest.raises(TypeError):
        comparator.changed_lines(*arguments)
