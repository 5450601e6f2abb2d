"""The application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from examples.shop import customers, mail, orders, reports, status, stock, tags, till
from examples.shop.db import connected, watching
from examples.shop.settings import Settings
from pgtoolset import TransactionAbortedError


def create_app(settings: Settings) -> FastAPI:
    """The shop on the database that `settings` name. One at a time in a process: they share
    `db.session_maker`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with connected(settings) as engine, watching(settings) as watcher:
            app.state.engine = engine
            app.state.watcher = watcher
            app.state.mailer = mail.Mailer()
            yield

    app = FastAPI(title="A shop on pgtoolset", lifespan=lifespan)
    for module in (customers, orders, status, tags, stock, till, reports, mail):
        app.include_router(module.router)
    app.add_exception_handler(TransactionAbortedError, report_aborted_transaction)
    return app


async def report_aborted_transaction(request: Request, error: Exception) -> JSONResponse:
    """Tell the client what became of its request. This one tells all; in production the details go
    to the log."""
    return JSONResponse(
        {"detail": str(error), "sqlstate": getattr(error, "sqlstate", None)}, status_code=500
    )
