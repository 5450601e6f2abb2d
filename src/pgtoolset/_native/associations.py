"""The rows of an association table: instances or keys in, one list of values per key column out.

Every row of every call passes through here once, so this is one pass. It checks that an instance is
of the class and has an identity, and that a key is of a plain type; it collects the values, and
takes each row once. The first item that fails a check ends the pass: the caller then looks closer
and raises the error. Keys come from the identity that SQLAlchemy keeps for each instance. An
attribute of the mapping is never read, because reading an expired one would load it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pgtoolset._native import _pure as cython

if TYPE_CHECKING:
    from pgtoolset._native._pure import PyObject_GenericGetDict, calloc, free
elif cython.compiled:  # never in Python; Cython reads it when it compiles, and then knows the name
    import cython
    from cython.cimports.cpython.object import PyObject_GenericGetDict
    from cython.cimports.libc.stdlib import calloc, free

__all__ = ["are_integers", "key_columns", "pair_columns"]

#: From so many instances on it is worth a look at their class.
_MANY = 50


def key_columns(
    class_: type[Any],
    instances: Sequence[Any],
    keys: Sequence[Any],
    width: int,
    positions: Sequence[int],
) -> list[list[Any]] | int:
    """Return the keys of `instances`, then `keys`, each once: a list for each of `positions`.

    Args:
        class_: the class of the instances.
        instances: each with an identity, and not deleted.
        keys: each a tuple of `width` values, or the value where `width` is 1. A value is an `int`,
            a `str` or a `UUID`.
        width: the number of columns of a key.
        positions: the columns that are wanted.

    Returns:
        The lists; or the number of items, first of `instances`, then of `keys`, before the first
        item that is neither such an instance nor such a key.
    """
    count: cython.Py_ssize_t = width
    at: cython.Py_ssize_t = positions[0]
    is_single: cython.bint = len(positions) == 1
    kind: Any = None
    rows: list[Any] = []
    is_plain: cython.bint = cython.compiled and len(instances) >= _MANY and _is_plain(class_)
    for instance in instances:
        is_exact = type(instance) is class_
        if not is_exact and not isinstance(instance, class_):
            return len(rows)
        state = _state_of(instance) if is_plain and is_exact else instance._sa_instance_state
        key = state.key
        if key is None or state._deleted:
            return len(rows)
        rows.append(key[1][at] if is_single else key[1])
    if is_single and count == 1:
        for key in keys:
            if type(key) is not kind:
                if type(key) is tuple:
                    if not _is_key(key, 1):
                        return len(rows)
                    key = key[0]
                elif _is_scalar(type(key)):
                    kind = type(key)
                else:
                    return len(rows)
            rows.append(key)
        return [_once(rows)]
    for key in keys:
        if not _is_key(key, count):
            return len(rows)
        rows.append(key[at] if is_single else key)
    if is_single:
        return [_once(rows)]
    if len(set(positions)) < count:
        rows = [tuple([row[position] for position in positions]) for row in rows]
        return _columns(_once(rows), range(len(positions)))
    return _columns(_once(rows), positions)


def pair_columns(
    classes: tuple[type[Any], type[Any]],
    links: Sequence[Any],
    widths: tuple[int, int],
    positions: tuple[Sequence[int], Sequence[int]],
) -> list[list[Any]] | int:
    """Return the pairs of owner and related, each once, as lists: the owners' columns come first.

    Args:
        classes: the classes of owners and of related.
        links: tuples of two, each an instance or a key as `key_columns` takes them.
        widths: the numbers of columns of their keys.
        positions: the columns of each that are wanted.

    Returns:
        The lists; or the number of links before the first that is not such a tuple.
    """
    owner_class, related_class = classes
    is_long: cython.bint = cython.compiled and len(links) >= _MANY
    owner_is_plain: cython.bint = is_long and _is_plain(owner_class)
    related_is_plain: cython.bint = is_long and _is_plain(related_class)
    owner_width: cython.Py_ssize_t = widths[0]
    related_width: cython.Py_ssize_t = widths[1]
    ones: list[Any] = []
    others: list[Any] = []
    for link in links:
        if type(link) is not tuple or len(link) != 2:
            return len(others)
        one = _key_of(link[0], owner_class, owner_width, owner_is_plain)
        other = _key_of(link[1], related_class, related_width, related_is_plain)
        if one is None or other is None:
            return len(others)
        ones.append(one)
        others.append(other)
    owner_positions, related_positions = positions
    columns = [_column(ones, position) for position in owner_positions]
    columns += [_column(others, position) for position in related_positions]
    for column in columns:
        if _is_distinct(column):
            return columns
    rows = list(zip(*columns, strict=True))
    return (
        columns
        if len(set(rows)) == len(rows)
        else _columns(list(dict.fromkeys(rows)), range(len(columns)))
    )


def are_integers(values: Collection[Any], lowest: int, highest: int) -> bool:
    """Whether each value is an `int`, of no subclass, from `lowest` to `highest`.

    Args:
        values: values of any types.
        lowest: a number of 64 bits.
        highest: another one.
    """
    if not cython.compiled:
        if not set(map(type, values)) <= {int}:
            return False
        return not values or (lowest <= min(values) and max(values) <= highest)
    low: cython.longlong = lowest
    high: cython.longlong = highest
    number: cython.longlong
    try:
        for value in values:
            if type(value) is not int:
                return False
            number = value
            if number < low or number > high:
                return False
    except OverflowError:
        return False
    return True


@cython.cfunc
def _column(keys: list[Any], position: cython.Py_ssize_t) -> list[Any]:
    return [key[position] if type(key) is tuple else key for key in keys]


@cython.cfunc
def _key_of(item: Any, class_: Any, width: cython.Py_ssize_t, is_plain: cython.bint) -> Any:
    """Return the key of an instance, or `item` where it is a key; `None` where it is neither."""
    kind = type(item)
    if kind is not class_:
        # `isinstance` with a mapped class calls its metaclass, so the quicker checks come first.
        if width == 1 and (kind is int or kind is str):
            return item
        if kind is tuple:
            return item if _is_key(item, width) else None
        if not isinstance(item, class_):
            return item if width == 1 and _is_scalar(kind) else None
    state = _state_of(item) if is_plain and kind is class_ else item._sa_instance_state
    key = state.key
    return None if key is None or state._deleted else key[1]


@cython.cfunc
def _is_plain(class_: Any) -> cython.bint:
    """Whether an attribute of an instance of exactly this class is what its dictionary has."""
    if class_.__getattribute__ is not object.__getattribute__ or not class_.__dictoffset__:
        return False
    for base in class_.__mro__:
        if "_sa_instance_state" in base.__dict__:
            return False
    return True


@cython.cfunc
def _state_of(instance: Any) -> Any:
    """Return the attribute out of the dictionary, compiled: it takes half as long.

    Interpreted, Python has adapted the access of an attribute to the class.
    """
    attributes = PyObject_GenericGetDict(instance, cython.NULL)
    if type(attributes) is dict:
        state = cython.cast(dict, attributes).get("_sa_instance_state")
        if state is not None:
            return state
    return instance._sa_instance_state


@cython.cfunc
def _is_key(key: Any, width: cython.Py_ssize_t) -> cython.bint:
    if type(key) is not tuple or len(key) != width:
        return False
    for value in key:
        if not _is_scalar(type(value)):
            return False
    return True


@cython.cfunc
def _is_scalar(kind: Any) -> cython.bint:
    """Whether a value of this type can be one column of a key."""
    return kind is int or kind is str or issubclass(kind, UUID)


@cython.cfunc
def _once(rows: list[Any]) -> list[Any]:
    # Nearly always there are no duplicates; to find that out takes less than to fill a dictionary.
    return rows if _is_distinct(rows) else list(dict.fromkeys(rows))


@cython.cfunc
def _is_distinct(rows: list[Any]) -> cython.bint:
    if cython.compiled and rows and type(rows[0]) is int:
        answer: cython.Py_ssize_t = _are_distinct_numbers(rows)
        if answer >= 0:
            return answer == 1
    return len(set(rows)) == len(rows)


@cython.cfunc
def _are_distinct_numbers(rows: list[Any]) -> cython.Py_ssize_t:
    """Return 1 for yes, 0 for no, and -1 where a set has to decide, which is slower."""
    count: cython.Py_ssize_t = len(rows)
    bits: cython.Py_ssize_t = 3
    while (cython.cast(cython.Py_ssize_t, 1) << bits) < 2 * count:
        bits += 1
    size: cython.Py_ssize_t = cython.cast(cython.Py_ssize_t, 1) << bits
    # A hash table with open addressing. Zero marks an empty place, so it is counted separately.
    table: cython.p_longlong = cython.cast(
        cython.p_longlong, calloc(size, cython.sizeof(cython.longlong))
    )
    if table is cython.NULL:
        return -1
    # 2 ** 64 / the golden ratio: neighbours get places that are far from one another.
    spread: cython.ulonglong = 0x9E3779B97F4A7C15
    number: cython.longlong
    place: cython.Py_ssize_t
    zeros: cython.Py_ssize_t = 0
    collisions: cython.Py_ssize_t = 0
    try:
        for row in rows:
            if type(row) is not int:
                return -1
            number = row
            if number == 0:
                zeros += 1
                continue
            place = (cython.cast(cython.ulonglong, number) * spread) >> (64 - bits)
            while table[place] != 0:
                if table[place] == number:
                    return 0
                place = (place + 1) & (size - 1)
                collisions += 1
            if collisions > 4 * count:
                return -1  # these numbers may have been chosen to collide
            table[place] = number
    except OverflowError:
        return -1
    finally:
        free(table)
    return zeros < 2


@cython.cfunc
def _columns(rows: list[Any], positions: Sequence[int]) -> list[list[Any]]:
    return [[row[position] for row in rows] for position in positions]
