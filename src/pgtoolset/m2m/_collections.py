"""Loaded collections never show what the table does not have.

What a call changes is expired. SQLAlchemy expires everything itself when a transaction rolls back,
but for a savepoint only what a flush has changed inside it; so each savepoint remembers the
associations that were written in it.

See https://docs.sqlalchemy.org/en/20/orm/session_state_management.html#refreshing-expiring
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state

from pgtoolset._arguments import PrimaryKey
from pgtoolset._record import innermost
from pgtoolset.m2m._associations import Association, End
from pgtoolset.m2m._keys import identities

#: In the `info` of a session: what was written in its open savepoints.
_INFO = "pgtoolset.m2m"
_is_listening = False


class Writes:
    """What was written in the open savepoints of one session.

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
        _expire_by_key(session, end, identities([*keys, *absent]))


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


def _expire_by_key(session: Session, end: End, keys: Sequence[PrimaryKey] | None) -> None:
    """Expire the loaded collections of the session's instances that have `keys`; `None`: of all."""
    states = [state for state in session.identity_map.all_states() if state.mapper.isa(end.mapper)]
    loaded = {state: names for state in states if (names := _loaded_collections(end, state))}
    wanted = None if keys is None else set(keys)
    if keys is not None and not _are_comparable([*keys, *map(_identity, loaded)]):
        wanted = None
    for state, names in loaded.items():
        instance = state.obj()
        if instance is not None and (wanted is None or _identity(state) in wanted):
            session.expire(instance, names)


def _loaded_collections(end: End, state: Any) -> list[str]:
    return [name for name in end.collections if name in state.dict]


def _identity(state: Any) -> PrimaryKey:
    identity: PrimaryKey = state.key[1]
    return identity


def _are_comparable(keys: Sequence[PrimaryKey]) -> bool:
    """Whether all keys have values of the same types; `"1"` may be the same row as `1`."""
    return len({tuple([_type_of(value) for value in key]) for key in keys}) <= 1


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
