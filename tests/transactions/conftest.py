"""Fixtures of the room."""

from tests.transactions.resolving import lab, plain_role, server

__all__ = ["lab", "plain_role", "server"]
