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
from sqlalchemy.orm.attributes import instance_dict, instance_state

from pgtoolset._arguments import PrimaryKey
from pgtoolset._record import innermost
from pgtoolset.m2m._associations import Association, End
from pgtoolset.m2m._keys import identities
from pgtoolset.m2m._statements import is_system

#: In the `info` of a session: its `Writes`.
_INFO = "pgtoolset.m2m"
_is_listening = False
#: Values of `lazy` with which an expired collection is read as an empty one.
_WITHOUT_LOADER = ("noload", None)


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
    # Most of many instances show nothing, so only the others are looked at closely.
    here, absent = session.hash_key, []
    for instance in instances:
        if not instance_dict(instance).keys().isdisjoint(end.collections):
            _expire_instance(session, end, instance)
        if instance_state(instance).session_id != here:
            absent.append(instance)
    if keys is None or not end.has_one_spelling:
        # Where two spellings are one key, another instance may be the same row.
        _expire_by_key(session, end, None)
    elif keys or absent:
        _expire_by_key(session, end, [*keys, *absent])


def _expire_instance(session: Session, end: End, instance: Any) -> None:
    """Expire the loaded collections of one instance, unless they belong to another session."""
    state: Any = instance_state(instance)
    loaded = _loaded_collections(end.collections, state)
    if state.session is session:
        _expire_collections(session, state, loaded)
    elif state.session is None:
        # It cannot be loaded again: an access now raises `DetachedInstanceError`.
        for name in loaded:
            state.dict.pop(name)
            state.committed_state.pop(name, None)


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
        if wanted is None or state.key[1] in wanted:
            _expire_collections(session, state, names)


def expire_viewers(session: Session, association: Association) -> None:
    """Expire loaded collections of classes that are neither end and show rows of the table."""
    state: Any
    for state in session.identity_map.all_states():
        for mapper, collections in association.viewers:
            names = _loaded_collections(collections, state)
            if names and state.mapper.isa(mapper):
                _expire_collections(session, state, names)


def expire_objects(
    session: Session,
    association: Association,
    rows: tuple[Sequence[PrimaryKey], Sequence[PrimaryKey] | None] | None,
) -> None:
    """Expire the instances that are rows of the association table.

    Args:
        session: the session that has written.
        association: the relationship.
        rows: the keys of the owners, and of the related or `None` for all; `None` means every row.
    """
    if not association.objects:
        return
    owners = related = None
    if rows is not None and association.owner.has_one_spelling:
        owners = set(rows[0])
        if rows[1] is not None and association.related.has_one_spelling:
            related = set(rows[1])
    state: Any
    for state in session.identity_map.all_states():
        for each in association.objects:
            if state.mapper.isa(each.mapper):
                is_touched = _may_be(state, each.owner, owners)
                instance = state.obj()
                if is_touched and _may_be(state, each.related, related) and instance is not None:
                    session.expire(instance)


def _may_be(state: Any, attributes: Sequence[str], keys: set[PrimaryKey] | None) -> bool:
    """Whether the attributes may have the values of one of the keys."""
    loaded = state.dict
    if keys is None or not all(name in loaded for name in attributes):
        return True
    return tuple([loaded[name] for name in attributes]) in keys


def expire_owner(session: Session, end: End, instance: Any, *, has_triggers: bool) -> None:
    """Expire what an UPDATE of the owner's row to its own values has changed.

    Args:
        session: the session that has written.
        end: the owner's end.
        instance: the owner.
        has_triggers: whether triggers may have changed any column.
    """
    table = end.referenced[0].table
    state: Any = instance_state(instance)
    if state.session is not session:
        instance = session.identity_map.get(state.key)
        if instance is None:
            return
        state = instance_state(instance)
    changed = [
        attribute.key
        for attribute in state.mapper.column_attrs
        for column in attribute.columns[:1]
        if getattr(column, "table", None) is table
        and not column.primary_key
        and (has_triggers or is_system(column))
    ]
    if loaded := [name for name in changed if name in state.dict]:
        session.expire(instance, loaded)


def _expire_collections(session: Session, state: Any, names: list[str]) -> None:
    instance = state.obj()
    if instance is None:
        return
    session.expire(instance, names)
    for name in names:
        prop: Any = state.mapper.relationships[name]
        if prop.lazy in _WITHOUT_LOADER:
            # It would be read as empty. This loads it, as any other collection.
            loader = prop._get_strategy((("lazy", "select"),))
            state.callables = {**state.callables, name: loader._load_for_state}


def _loaded(session: Session, end: End) -> Iterator[tuple[Any, list[str]]]:
    """Yield the states of the session that have loaded collections, with the collections' names."""
    state: Any
    for state in session.identity_map.all_states():
        names = _loaded_collections(end.collections, state)
        if names and state.mapper.isa(end.mapper):
            yield state, names


def _comparable_keys(items: Sequence[Any], states: Iterable[Any]) -> set[PrimaryKey] | None:
    """Return the keys of `items`; `None` where those of `states` may be the same in other types."""
    keys = set(identities(items))
    known = [state.key[1] for state in states]
    types = {tuple([_type_of(value) for value in key]) for key in (*keys, *known)}
    return keys if len(types) == 1 else None


def _loaded_collections(collections: Sequence[str], state: Any) -> list[str]:
    return [name for name in collections if name in state.dict]


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
            expire_viewers(session, association)
            expire_objects(session, association, None)
    elif (outer := _savepoint(ended.parent)) is not None:
        writes.by_savepoint += [(outer, association) for association in written]


def _savepoint(transaction: SessionTransaction | None) -> SessionTransaction | None:
    """Return the transaction, or the innermost around it, that is a savepoint."""
    while transaction is not None and not transaction.nested:
        transaction = transaction.parent
    return transaction
