"""The subscriptions of a group, by the keys of their rows."""

from __future__ import annotations

from typing import Any

from pgtoolset._postgres.notifications import payload_key
from pgtoolset.watch._subscriptions import Subscription

__all__ = ["Members"]


class Members:
    """The subscriptions of a group.

    Attributes:
        by_key: the subscriptions of each key that is watched, in order.
        joining: subscriptions that wait for their first row.
        expiring: subscriptions whose time is up, with one tick left.
    """

    def __init__(self, width: int) -> None:
        self.by_key: dict[Any, dict[Subscription[Any], None]] = {}
        self.joining: dict[Subscription[Any], None] = {}
        self.expiring: set[Subscription[Any]] = set()
        self._width = width
        self._by_payload_key: dict[tuple[Any, ...], Any] = {}
        self._keys: list[Any] | None = None

    @property
    def keys(self) -> list[Any]:
        """All keys; the same list while they are the same."""
        if self._keys is None:
            self._keys = list(self.by_key)
        return self._keys

    def __len__(self) -> int:
        return sum(map(len, self.by_key.values()))

    def all(self) -> list[Subscription[Any]]:
        return [each for served in self.by_key.values() for each in served]

    def key_of(self, payload: tuple[Any, ...]) -> Any:
        """Return the watched key that a notification names; `None` where it is not watched."""
        return self._by_payload_key.get(payload)

    def add(self, subscription: Subscription[Any]) -> None:
        self._of(subscription.key)[subscription] = None
        self.joining[subscription] = None

    def remove(self, subscription: Subscription[Any]) -> bool:
        """Remove a subscription; return whether its key is not watched any more."""
        self.joining.pop(subscription, None)
        self.expiring.discard(subscription)
        served = self.by_key.get(subscription.key, {})
        if subscription not in served:
            return False
        del served[subscription]
        return not served

    def remove_key(self, key: Any) -> None:
        self.by_key.pop(key, None)
        self._by_payload_key.pop(payload_key(self._parts(key)), None)
        self._keys = None

    def move(self, key: Any, to: Any) -> None:
        """Give the subscriptions of a key another one."""
        moved = self.by_key.get(key, {})
        self.remove_key(key)
        for subscription in moved:
            subscription.key = to
        self._of(to).update(moved)

    def _of(self, key: Any) -> dict[Subscription[Any], None]:
        if key not in self.by_key:
            self.by_key[key] = {}
            self._by_payload_key[payload_key(self._parts(key))] = key
            self._keys = None
        return self.by_key[key]

    def _parts(self, key: Any) -> tuple[Any, ...]:
        parts: tuple[Any, ...] = (key,) if self._width == 1 else key
        return parts
