"""The application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError

from examples.shop import customers, mail, mistakes, orders, reports, status, stock, tags, till
from examples.shop.db import connected, observing, watching
from examples.shop.page import provocations, site
from examples.shop.page.counters import Counters, Counting
from examples.shop.page.holds import TillHolds
from examples.shop.page.live import Live
from examples.shop.page.visitors import Limiting, Visitors
from examples.shop.settings import Settings
from pgtoolset import TransactionAbortedError
from pgtoolset.fastapi import install_error_handlers


def create_app(settings: Settings) -> FastAPI:
    """The shop on the database that `settings` name. One at a time in a process: they share
    `db.session_maker`."""
    counters, visitors = Counters(), Visitors()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with (
            connected(settings) as engine,
            observing(settings) as observer,
            watching(settings) as watcher,
        ):
            counters.watch_engine(engine)
            holds = TillHolds(observer)
            app.state.engine = engine
            app.state.observer = observer
            app.state.watcher = watcher
            app.state.mailer = mail.Mailer()
            app.state.holds = holds
            live = Live(settings, observer, watcher, counters, visitors, holds)
            app.state.live = live
            yield
            live.close()
            await live.wait_closed()
            await holds.close()

    app = FastAPI(title="A shop on pgtoolset", lifespan=lifespan)
    app.state.settings = settings
    app.state.counters = counters
    app.state.visitors = visitors
    app.state.waiters_at_work = False
    for module in (customers, orders, mistakes, status, tags, stock, till, reports, mail):
        app.include_router(module.router)
    add_page(app, counters, visitors)
    app.add_exception_handler(TransactionAbortedError, report_aborted_transaction)
    app.add_exception_handler(RequestValidationError, report_nonsense)
    app.add_exception_handler(DBAPIError, report_lost_connection)
    app.add_exception_handler(OSError, report_lost_connection)
    install_error_handlers(app)
    return app


def add_page(app: FastAPI, counters: Counters, visitors: Visitors) -> None:
    """The page at `/`, its files, its events and what its buttons need."""

    def announce() -> None:
        live = getattr(app.state, "live", None)
        if live is not None:
            live.touch()

    files = site.PageFiles()
    app.include_router(site.router)
    app.include_router(provocations.router)
    app.add_api_route("/", files.index, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/page", files, name="page")
    app.add_middleware(Limiting, visitors=visitors)
    app.add_middleware(Counting, counters=counters, announce=announce)


async def end_streams(app: FastAPI) -> None:
    """End what is sent without an end, so that the server can stop: the windows of the page, and
    the followers of orders."""
    app.state.live.close()
    await app.state.watcher.close()


async def report_aborted_transaction(request: Request, error: Exception) -> JSONResponse:
    """Tell the client what became of its request. This one tells all; in production the details go
    to the log."""
    return JSONResponse(
        {"detail": str(error), "sqlstate": getattr(error, "sqlstate", None)}, status_code=500
    )


async def report_nonsense(request: Request, error: Exception) -> JSONResponse:
    """422 with one line, which repeats nothing of the request."""
    assert isinstance(error, RequestValidationError)
    faults = [
        f"{'.'.join(str(part) for part in fault['loc'][:2])}: {fault['msg']}"
        for fault in error.errors()[:3]
    ]
    return JSONResponse({"detail": "; ".join(faults)}, status_code=422)


async def report_lost_connection(request: Request, error: Exception) -> JSONResponse:
    """503 for a connection that was lost before the COMMIT, or could not be made: nothing is
    stored. Any other error of the driver is a fault of the shop."""
    if isinstance(error, OSError) or is_refused(error):
        detail = "PostgreSQL cannot be reached; nothing was stored. Send the request again later."
    elif isinstance(error, DBAPIError) and error.connection_invalidated:
        detail = (
            "The connection to PostgreSQL was lost; nothing was stored. Send the request again."
        )
    else:
        raise error
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "1"})


def is_refused(error: Exception) -> bool:
    """Whether PostgreSQL starts or stops, and so takes no connection (cannot_connect_now)."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == "57P03"
