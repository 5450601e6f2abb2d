"""Collections that are loaded must not show what is not there any more.

What a call changes is expired. SQLAlchemy expires everything itself when a transaction rolls back,
but for a savepoint only what a flush has changed inside it; so each level remembers the
associations that were written in it.
https://docs.sqlalchemy.org/en/20/orm/session_state_management.html#refreshing-expiring
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state

from pgtoolset._record import innermost
from pgtoolset.m2m._arguments import Key
from pgtoolset.m2m._associations import Association, End

_KEY = "pgtoolset.m2m"
_listening = False


class Writes:
    """What was written in the savepoints of one session that are open now."""

    __slots__ = ("by_level", "committed")

    def __init__(self) -> None:
        self.by_level: list[tuple[SessionTransaction, Association]] = []
        self.committed: SessionTransaction | None = None


def remember(session: Session, association: Association) -> None:
    """Expire the collections of `association` again if the savepoint that is open now, if any, is
    rolled back."""
    level = session.get_nested_transaction()
    if level is None:
        return
    _listen()
    writes: Writes = session.info.setdefault(_KEY, Writes())
    if not any(level is known and association is written for known, written in writes.by_level):
        writes.by_level.append((level, association))


def expire(
    session: Session, end: End, instances: Sequence[Any], keys: Sequence[Any] | None
) -> None:
    """Expire the loaded collections of `instances`, and of those that have `keys`; `None` means of
    all.

    A key of one column may be the value or a tuple of it.
    """
    if not end.collections:
        return
    absent: list[Key] = []
    for instance in instances:
        state: Any = instance_state(instance)
        loaded = [name for name in end.collections if name in state.dict]
        if state.session is session:
            if loaded:
                session.expire(instance, loaded)
        else:
            absent.append(state.key[1])
            if state.session is None:
                # It cannot be loaded again, but it can be asked, and then says that it is detached.
                for name in loaded:
                    state.dict.pop(name)
                    state.committed_state.pop(name, None)
    if keys is None or keys or absent:
        wanted = (
            None
            if keys is None
            else [key if isinstance(key, tuple) else (key,) for key in keys] + absent
        )
        _expire_by_key(session, end, wanted)


def _expire_by_key(session: Session, end: End, keys: Sequence[Key] | None) -> None:
    candidates = []
    for state in session.identity_map.all_states():
        loaded = [name for name in end.collections if name in state.dict]
        if loaded and state.mapper.isa(end.mapper):
            candidates.append((state, loaded))
    if candidates and keys is not None:
        # A key that is of another type than the identity's may still mean the same row.
        identity: Any = candidates[0][0].key
        types = [type(value) for value in identity[1]]
        if all([type(value) for value in key] == types for key in keys):
            wanted = set(keys)
            candidates = [
                (state, loaded) for state, loaded in candidates if _identity(state) in wanted
            ]
    for state, loaded in candidates:
        instance = state.obj()
        if instance is not None:
            session.expire(instance, loaded)


def _identity(state: Any) -> Key:
    identity: Key = state.key[1]
    return identity


def _listen() -> None:
    global _listening
    if not _listening:
        _listening = True
        event.listen(Session, "after_commit", _after_commit)
        event.listen(Session, "after_transaction_end", _after_transaction_end)


def _after_commit(session: Session) -> None:
    writes: Writes | None = session.info.get(_KEY)
    if writes is not None:
        writes.committed = innermost(session)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    writes: Writes | None = session.info.get(_KEY)
    if writes is None or not writes.by_level:
        return
    ended = [association for level, association in writes.by_level if level is transaction]
    if transaction.parent is None:
        writes.by_level.clear()
        writes.committed = None
    elif ended:
        writes.by_level = [each for each in writes.by_level if each[0] is not transaction]
        if writes.committed is not transaction:
            for association in ended:
                _expire_by_key(session, association.owner, None)
                _expire_by_key(session, association.related, None)
        elif (parent := _savepoint(transaction.parent)) is not None:
            writes.by_level += [(parent, association) for association in ended]


def _savepoint(transaction: SessionTransaction | None) -> SessionTransaction | None:
    while transaction is not None and not transaction.nested:
        transaction = transaction.parent
    return transaction
