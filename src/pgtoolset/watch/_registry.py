"""The groups of a watcher."""

from __future__ import annotations

from collections import deque
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._postgres.notifications import keys_in
from pgtoolset.watch._groups import Group
from pgtoolset.watch._subscriptions import Stream, Subscription
from pgtoolset.watch.targets import Target

__all__ = ["Groups"]


class Groups:
    """The groups of a watcher, by model and columns."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._active: dict[Any, Group] = {}
        self._dropped: deque[Stream[Any]] = deque()

    def __bool__(self) -> bool:
        return bool(self._active)

    def all(self) -> list[Group]:
        """Return the groups that have subscriptions."""
        return list(self._active.values())

    def of(self, subscription: Subscription[Any]) -> Group | None:
        """Return the group that serves a subscription, if there is one."""
        return self._active.get(_id(subscription.target))

    def subscribe(self, subscription: Subscription[Any]) -> None:
        id_ = _id(subscription.target)
        group = self._active.get(id_)
        if group is None:
            group = self._active[id_] = Group(self._engine, subscription.target)
        group.add(subscription)

    def unsubscribe(self, subscription: Subscription[Any]) -> None:
        id_ = _id(subscription.target)
        group = self._active.get(id_)
        if group is not None:
            group.remove(subscription)
            if not group:
                del self._active[id_]

    def drop_later(self, stream: Stream[Any]) -> None:
        """Unsubscribe a stream at the next tick. Safe to call in any thread."""
        self._dropped.append(stream)

    def unsubscribe_dropped(self) -> None:
        while self._dropped:
            self.unsubscribe(self._dropped.popleft())

    def discard(self, group: Group) -> None:
        """Forget a group that cannot be ticked; the next subscription gets a new one."""
        id_ = _id(group.target)
        if self._active.get(id_) is group:
            del self._active[id_]

    def clear(self) -> list[Group]:
        """Forget and return the groups that have subscriptions."""
        groups = self.all()
        self._active.clear()
        return groups

    def mark_all_due(self) -> None:
        """Have the next tick poll everything."""
        for group in self._active.values():
            group.mark_all_due()

    def forget_channels(self) -> None:
        """Have each group ask again for its channels: a new connection may be to another server."""
        for group in self._active.values():
            group.channels = ()

    def mark_announced(self, channel: str, payload: str) -> bool:
        """Have the next tick poll what a notification names; return whether it is watched."""
        keys = keys_in(payload)
        found = False
        for group in self._active.values():
            if channel not in group.channels:
                continue
            if keys is None:
                group.mark_all_due()
                found = True
            else:
                found = group.mark_due(keys) or found
        return found


def _id(target: Target[Any]) -> tuple[Any, ...]:
    return target.mapper, target.columns
