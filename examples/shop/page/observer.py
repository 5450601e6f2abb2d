"""Connections beside the pool, for those who look at the shop or stand in its way."""

from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.ext.asyncio import AsyncEngine


def get_observer(request: Request) -> AsyncEngine:
    """The engine of `db.observing`."""
    observer = request.app.state.observer
    assert isinstance(observer, AsyncEngine)
    return observer


Observer = Annotated[AsyncEngine, Depends(get_observer)]
