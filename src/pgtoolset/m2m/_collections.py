"""Loaded collections never show what the table does not have.

What a call changes is expired. SQLAlchemy expires everything itself when a transaction rolls back,
but for a savepoint only what a flush has changed inside it; so each savepoint remembers the
associations that were written in it.

See https://docs.sqlalchemy.org/en/20/orm/session_state_management.html#refreshing-expiring
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state

from pgtoolset._arguments import PrimaryKey
from pgtoolset._record import innermost
from pgtoolset.m2m._associations import Association, End
from pgtoolset.m2m._keys import identities

#: In the `info` of a session: its `Writes`.
_INFO = "pgtoolset.m2m"
_is_listening = False


class Writes:
    """The associations written in the open savepoints of one session.

    Attributes:
        by_savepoint: each savepoint with an association that was written in it.
        committed: the transaction or savepoint that has been committed and has not ended yet.
    """

    __slots__ = ("by_savepoint", "committed")

    def __init__(self) -> None:
        self.by_savepoint: list[tuple[SessionTransaction, Association]] = []
        self.committed: SessionTransaction | None = None


def remember(session: Session, association: Association) -> None:
    """Expire the collections of `association` again if the innermost savepoint is rolled back."""
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        return
    _listen()
    writes: Writes = session.info.setdefault(_INFO, Writes())
    known = writes.by_savepoint
    if not any(each is savepoint and written is association for each, written in known):
        known.append((savepoint, association))


def expire(
    session: Session, end: End, instances: Sequence[Any], keys: Sequence[Any] | None
) -> None:
    """Expire the loaded collections of `instances`, and of the instances that have `keys`.

    Args:
        session: the session that has written.
        end: which end of the relationship the instances are.
        instances: of any session, or detached.
        keys: a key of one column may be the value or a tuple of it; `None` means every key.
    """
    if not end.collections:
        return
    absent = [each for each in instances if not _expire_instance(session, end, each)]
    if keys is None or not end.has_one_spelling:
        # Where two spellings are one key, another instance may be the same row.
        _expire_by_key(session, end, None)
    elif keys or absent:
        _expire_by_key(session, end, [*keys, *absent])


def _expire_instance(session: Session, end: End, instance: Any) -> bool:
    """Expire the loaded collections of one instance; whether it is in the session."""
    state: Any = instance_state(instance)
    loaded = _loaded_collections(end, state)
    if state.session is session:
        if loaded:
            session.expire(instance, loaded)
        return True
    if state.session is None:
        # It cannot be loaded again: an access now raises `DetachedInstanceError`.
        for name in loaded:
            state.dict.pop(name)
            state.committed_state.pop(name, None)
    return False


def _expire_by_key(session: Session, end: End, items: Sequence[Any] | None) -> None:
    """Expire the loaded collections of the session's instances that are the rows of `items`.

    Args:
        session: the session that has written.
        end: which end of the relationship the instances are.
        items: keys, or instances that have them; `None` means every row.
    """
    loaded = list(_loaded(session, end))
    if not loaded:
        return
    wanted = None if items is None else _comparable_keys(items, [state for state, _ in loaded])
    for state, names in loaded:
        instance = state.obj()
        if instance is not None and (wanted is None or state.key[1] in wanted):
            session.expire(instance, names)


def _loaded(session: Session, end: End) -> Iterator[tuple[Any, list[str]]]:
    """Yield the states of the session that have loaded collections, with the collections' names."""
    state: Any
    for state in session.identity_map.all_states():
        names = _loaded_collections(end, state)
        if names and state.mapper.isa(end.mapper):
            yield state, names


def _comparable_keys(items: Sequence[Any], states: Iterable[Any]) -> set[PrimaryKey] | None:
    """Return the keys of `items`; `None` where those of `states` may be the same in other types."""
    keys = set(identities(items))
    known = [state.key[1] for state in states]
    types = {tuple([_type_of(value) for value in key]) for key in (*keys, *known)}
    return keys if len(types) == 1 else None


def _loaded_collections(end: End, state: Any) -> list[str]:
    return [name for name in end.collections if name in state.dict]


def _type_of(value: Any) -> type[Any]:
    # asyncpg has a UUID of its own, which equals the standard one.
    return UUID if isinstance(value, UUID) else type(value)


def _listen() -> None:
    global _is_listening
    if not _is_listening:
        _is_listening = True
        event.listen(Session, "after_commit", _after_commit)
        event.listen(Session, "after_transaction_end", _after_transaction_end)


def _after_commit(session: Session) -> None:
    writes: Writes | None = session.info.get(_INFO)
    if writes is not None:
        writes.committed = innermost(session)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    writes: Writes | None = session.info.get(_INFO)
    if writes is None or not writes.by_savepoint:
        return
    if transaction.parent is None:
        writes.by_savepoint.clear()
        writes.committed = None
    else:
        _end_savepoint(session, writes, transaction)


def _end_savepoint(session: Session, writes: Writes, ended: SessionTransaction) -> None:
    """Expire what a rolled back savepoint has written, or hand it to the savepoint around it."""
    written = [association for level, association in writes.by_savepoint if level is ended]
    writes.by_savepoint = [each for each in writes.by_savepoint if each[0] is not ended]
    if writes.committed is not ended:
        for association in written:
            _expire_by_key(session, association.owner, None)
            _expire_by_key(session, association.related, None)
    elif (outer := _savepoint(ended.parent)) is not None:
        writes.by_savepoint += [(outer, association) for association in written]


def _savepoint(transaction: SessionTransaction | None) -> SessionTransaction | None:
    """Return the transaction, or the innermost around it, that is a savepoint."""
    while transaction is not None and not transaction.nested:
        transaction = transaction.parent
    return transaction
