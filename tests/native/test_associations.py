"""The builder of association rows: instances and keys in, columns out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import inspect
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, make_transient, mapped_column
from sqlalchemy.orm.attributes import instance_state

from pgtoolset._native import associations as interpreted
from pgtoolset.protocols import AssociationRows


class Base(DeclarativeBase):
    pass


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)


class SpecialTag(Tag):
    pass


class Seat(Base):
    __tablename__ = "seat"

    row: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)


class Color(IntEnum):
    RED = 1


class DriversUUID(UUID):
    """As asyncpg has one of its own."""


def known(class_: type[Any], **key: Any) -> Any:
    """An instance that has an identity."""
    instance = class_(**key)
    state: Any = instance_state(instance)
    state.key = inspect(class_).identity_key_from_primary_key(tuple(key.values()))
    return instance


def deleted(number: int) -> Tag:
    instance: Tag = known(Tag, id=number)
    state: Any = instance_state(instance)
    state._deleted = True
    return instance


def test_instances_then_keys(associations: AssociationRows) -> None:
    """The columns have the keys of the instances first, in order, and each key once."""
    tags = [known(Tag, id=3), known(SpecialTag, id=1), known(Tag, id=3)]
    assert associations.key_columns(Tag, tags, [1, (2,), 2], 1, (0,)) == [[3, 1, 2]]
    assert associations.key_columns(Tag, (), (), 1, (0,)) == [[]]
    assert associations.key_columns(Tag, (), ["a", "b", "a"], 1, (0,)) == [["a", "b"]]
    one, same = UUID(int=1), DriversUUID(int=1)
    assert associations.key_columns(Tag, (), [one, same, UUID(int=2)], 1, (0,)) == [
        [one, UUID(int=2)]
    ]


def test_composite(associations: AssociationRows) -> None:
    """There is a column for each wanted position, and only the wanted columns tell rows apart."""
    seats = [known(Seat, row=1, number=2), known(Seat, row=1, number=3)]
    keys = [(1, 2), (2, 2)]
    assert associations.key_columns(Seat, seats, keys, 2, (0, 1)) == [[1, 1, 2], [2, 3, 2]]
    assert associations.key_columns(Seat, seats, keys, 2, (1, 0)) == [[2, 3, 2], [1, 1, 2]]
    assert associations.key_columns(Seat, seats, keys, 2, (0,)) == [[1, 2]]
    assert associations.key_columns(Seat, seats, keys, 2, (1, 1)) == [[2, 3], [2, 3]]
    assert associations.key_columns(Seat, seats, [], 2, range(2)) == [[1, 1], [2, 3]]


def test_pairs(associations: AssociationRows) -> None:
    """The owners' columns come first; a pair that is given by instance and by key counts once."""
    tag, seat = known(Tag, id=1), known(Seat, row=5, number=6)
    links = [(tag, seat), (1, (5, 6)), ((1,), seat), (2, (5, 7))]
    both = (Tag, Seat)
    assert associations.pair_columns(both, links, (1, 2), ((0,), (0, 1))) == [
        [1, 2],
        [5, 5],
        [6, 7],
    ]
    assert associations.pair_columns(both, links, (1, 2), ((0,), (1,))) == [[1, 2], [6, 7]]
    assert associations.pair_columns(
        (Tag, Tag), [(tag, 2), (1, 2), (2, tag)], (1, 1), ((0,), (0,))
    ) == [[1, 2], [2, 1]]
    assert associations.pair_columns((Tag, Tag), [], (1, 1), ((0,), (0,))) == [[], []]


@pytest.mark.parametrize(
    "stranger",
    [
        pytest.param(lambda: None, id="None"),
        pytest.param(lambda: Tag(id=1), id="transient"),
        pytest.param(lambda: deleted(1), id="deleted"),
        pytest.param(lambda: known(Seat, row=1, number=1), id="another class"),
        pytest.param(lambda: [1], id="list"),
        pytest.param(lambda: {1: 1}, id="dict"),
        pytest.param(lambda: (), id="empty"),
        pytest.param(lambda: (1, 2), id="too long"),
        pytest.param(lambda: (None,), id="tuple of None"),
        pytest.param(lambda: ([1],), id="tuple of a list"),
        pytest.param(lambda: True, id="bool"),
        pytest.param(lambda: Color.RED, id="enum"),
        pytest.param(lambda: 1.0, id="float"),
        pytest.param(object, id="object"),
    ],
)
def test_doubtful_items(associations: AssociationRows, stranger: Callable[[], Any]) -> None:
    """The position of an item that needs a closer look is returned: an instance, key or link."""
    tags, odd = [known(Tag, id=1), known(Tag, id=2)], stranger()
    assert associations.key_columns(Tag, [*tags, odd, *tags], [], 1, (0,)) == 2
    assert associations.key_columns(Tag, tags, [7, odd, 8], 1, (0,)) == 3
    links = [(1, 2), (odd, 3), (4, 5)]
    assert associations.pair_columns((Tag, Tag), links, (1, 1), ((0,), (0,))) == 1
    links = [(1, 2), (tags[0], 3), (4, odd)]
    assert associations.pair_columns((Tag, Tag), links, (1, 1), ((0,), (0,))) == 2


@pytest.mark.parametrize("link", [None, 1, "ab", (), (1,), (1, 2, 3), [1, 2], {1: 2, 3: 4}])
def test_no_pair(associations: AssociationRows, link: Any) -> None:
    """The position of a link that is not a tuple of two is returned."""
    assert associations.pair_columns((Tag, Tag), [(1, 2), link], (1, 1), ((0,), (0,))) == 1


def test_reads_no_attribute(associations: AssociationRows) -> None:
    """No attribute of an expired or detached instance is read, so nothing is loaded."""
    tag = known(Tag, id=1)
    with Session() as session:
        session.add(tag)
        session.expire(tag)
        assert associations.key_columns(Tag, [tag], [], 1, (0,)) == [[1]]
    assert "id" not in tag.__dict__
    assert associations.pair_columns((Tag, Tag), [(tag, tag)], (1, 1), ((0,), (0,))) == [[1], [1]]
    make_transient(tag)
    assert associations.key_columns(Tag, [tag], [], 1, (0,)) == 0


class State:
    """The part of SQLAlchemy's state that is read, with arbitrary values."""

    def __init__(self, key: Any, deleted: bool) -> None:
        self.key = key
        self._deleted = deleted


class Instance:
    def __init__(self, state: State | None) -> None:
        if state is not None:
            self._sa_instance_state = state


scalars = (
    st.none()
    | st.booleans()
    | st.integers(0, 3)
    | st.sampled_from(
        ["", "a", 1.0, float("nan"), b"a", Color.RED, UUID(int=1), DriversUUID(int=1)]
    )
    | st.builds(list)
)
tuples = st.lists(scalars, max_size=3).map(tuple)
instances = st.builds(
    Instance,
    st.none() | st.builds(State, st.none() | st.tuples(st.just(Instance), tuples), st.booleans()),
)
good = st.builds(
    lambda *parts: Instance(State((Instance, parts), False)), st.integers(0, 2), st.integers(0, 2)
)
items = good | instances | scalars | tuples | st.tuples(st.integers(0, 2), st.integers(0, 2))
positions = st.lists(st.integers(0, 2), min_size=1, max_size=3)


def outcome(call: Callable[[], Any]) -> tuple[Any, ...]:
    """The answer of a call with the types and identities of its values, or the error."""
    try:
        result = call()
    except Exception as error:
        return type(error), str(error)
    return repr(result), [[id(value) for value in column] for column in result] if isinstance(
        result, list
    ) else None


@given(
    st.lists(good | instances | scalars, max_size=5),
    st.lists(items, max_size=5),
    st.integers(1, 3),
    positions,
)
def test_key_columns_alike(
    associations: AssociationRows,
    some: list[Any],
    keys: list[Any],
    width: int,
    wanted: Sequence[int],
) -> None:
    """Compiled and interpreted give the same objects and the same errors for any arguments."""
    arguments = (Instance, some, keys, width, wanted)
    assert outcome(lambda: associations.key_columns(*arguments)) == outcome(
        lambda: interpreted.key_columns(*arguments)
    )


@given(
    st.lists(st.tuples(items, items) | items, max_size=5),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(positions, positions),
)
def test_pair_columns_alike(
    associations: AssociationRows,
    links: list[Any],
    widths: tuple[int, int],
    wanted: tuple[Sequence[int], Sequence[int]],
) -> None:
    """Compiled and interpreted agree on pairs."""
    arguments = ((Instance, Instance), links, widths, wanted)
    theirs = outcome(lambda: interpreted.pair_columns(*arguments))
    assert outcome(lambda: associations.pair_columns(*arguments)) == theirs


EDGES = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**64, 2**64 + 1, 10**30]


class Hidden(Instance):
    """Its attribute is not what its dictionary has."""

    _sa_instance_state = property(lambda self: State((Hidden, (7,)), False), lambda self, _: None)


class Computed(Instance):
    """Likewise, by a method that reads every attribute."""

    def __getattribute__(self, name: str) -> Any:
        is_state = name == "_sa_instance_state"
        return State((Computed, (8,)), False) if is_state else super().__getattribute__(name)


class Late(Instance):
    """Its attribute is computed where its dictionary lacks it."""

    def __getattr__(self, name: str) -> Any:
        if name != "_sa_instance_state":
            raise AttributeError(name)
        return State((Late, (9,)), False)


class Slotted:
    """Without a dictionary."""

    __slots__ = ("_sa_instance_state",)

    def __init__(self, state: State | None) -> None:
        if state is not None:
            self._sa_instance_state = state


class Attributes(dict[str, Any]):
    """A dictionary of an instance that is none of Python's own."""


def with_attributes(instance: Instance) -> Instance:
    instance.__dict__ = Attributes(instance.__dict__)
    return instance


kinds = st.sampled_from([Instance, Hidden, Computed, Late, Slotted])
states = st.none() | st.builds(
    State, st.none() | st.tuples(st.just(0), tuples.filter(len)), st.booleans()
)


@given(kinds, st.lists(st.tuples(kinds, states, st.booleans()), max_size=3), st.integers(0, 70))
def test_many_instances_alike(
    associations: AssociationRows,
    class_: Any,
    some: list[tuple[Any, State | None, bool]],
    before: int,
) -> None:
    """However a class gives the state of its instances, and however many there are, it is read as
    an attribute."""
    given_: list[Any] = [class_(State((class_, (number,)), False)) for number in range(before)]
    for kind, state, is_odd in some:
        instance = kind(state)
        given_.append(with_attributes(instance) if is_odd and kind is not Slotted else instance)
    given_ += [class_(State((class_, (number,)), False)) for number in range(60)]
    theirs = outcome(lambda: interpreted.key_columns(class_, given_, (), 1, (0,)))
    ours = outcome(lambda: associations.key_columns(class_, given_, (), 1, (0,)))
    assert ours[0] == theirs[0]
    links = [(number, each) for number, each in enumerate(given_)]
    arguments = ((Instance, class_), links, (1, 1), ((0,), (0,)))
    theirs = outcome(lambda: interpreted.pair_columns(*arguments))
    assert outcome(lambda: associations.pair_columns(*arguments))[0] == theirs[0]


@given(
    st.lists(
        st.sampled_from(EDGES) | st.integers(-3, 3) | st.sampled_from([True, 1.0, "1", Color.RED])
    ),
    st.sampled_from([-(2**63), -(2**31), -3, 0]),
    st.sampled_from([2**63 - 1, 2**31 - 1, 3, 0]),
)
def test_are_integers(
    associations: AssociationRows, values: list[Any], lowest: int, highest: int
) -> None:
    """Only integers within the bounds are, and neither a boolean nor a member of an enum."""
    wanted = all(type(each) is int and lowest <= each <= highest for each in values)
    assert associations.are_integers(values, lowest, highest) is wanted
    assert associations.are_integers(tuple(values), lowest, highest) is wanted


@given(st.lists(st.integers(0, 9) | st.text("ab", max_size=2), max_size=9))
def test_each_once(associations: AssociationRows, keys: list[Any]) -> None:
    """Each key comes out once, in the order of first occurrence, as from a dictionary."""
    assert associations.key_columns(Tag, (), keys, 1, (0,)) == [list(dict.fromkeys(keys))]
    links = [(key, 0) for key in keys]
    found = list(dict.fromkeys(keys))
    assert associations.pair_columns((Tag, Tag), links, (1, 1), ((0,), (0,))) == [
        found,
        [0] * len(found),
    ]


@given(st.lists(st.sampled_from(EDGES) | st.integers(-(2**65), 2**65), max_size=20))
def test_numbers_of_any_size_once(associations: AssociationRows, keys: list[int]) -> None:
    """Numbers that are equal modulo 2 ** 64 are different keys, and zero is a key."""
    assert associations.key_columns(Tag, (), keys, 1, (0,)) == [list(dict.fromkeys(keys))]
    assert associations.key_columns(Tag, (), [*keys, *keys], 1, (0,)) == [list(dict.fromkeys(keys))]


@pytest.mark.parametrize("repeat", [None, 0, 5_000, 9_999])
@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(lambda: list(range(10_000)), id="neighbours"),
        pytest.param(lambda: [-number for number in range(10_000)], id="negative"),
        pytest.param(lambda: [number << 40 for number in range(10_000)], id="far apart"),
        # Multiples of the inverse of the factor in the compiled module's hash: one place for all.
        pytest.param(
            lambda: [number * 0xF1DE83E19937733D % 2**63 for number in range(10_000)],
            id="colliding",
        ),
    ],
)
def test_many_numbers_once(
    associations: AssociationRows, numbers: Callable[[], list[int]], repeat: int | None
) -> None:
    """One duplicate among very many is found at any place and for any distribution."""
    keys = numbers()
    assert associations.key_columns(Tag, (), keys, 1, (0,)) == [keys]
    if repeat is not None:
        assert associations.key_columns(Tag, (), [*keys, keys[repeat]], 1, (0,)) == [keys]
