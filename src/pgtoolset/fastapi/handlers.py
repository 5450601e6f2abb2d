"""install_error_handlers: errors of the database as problem details, and all others as before."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool

from pgtoolset._arguments import (
    check_constraint_texts,
    check_flag,
    check_type_base,
    is_async,
    seconds,
    shown,
)
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset.fastapi._openapi import MEDIA_TYPE, document_problems
from pgtoolset.fastapi._problems import BY_CLASS, PHRASES, Finding, find_problem
from pgtoolset.types import Duration

__all__ = ["install_error_handlers"]

_logger = logging.getLogger("pgtoolset")

#: The classes for which a handler is registered. Starlette calls that of the first class in the
#: order of an error's bases, so those of SQLAlchemy stand here that PostgreSQL's answers have.
HANDLED: tuple[type[Exception], ...] = (
    *(DBAPIError, IntegrityError, DataError, OperationalError),
    *(class_ for class_, _ in BY_CLASS),
    ExceptionGroup,
)


def install_error_handlers(
    app: Starlette,
    *,
    constraints: Mapping[str, str] | None = None,
    retry_after: Duration = 1.0,
    type_base: str | None = None,
    openapi: bool = True,
) -> None:
    """Answer errors of the database with problem details (RFC 9457), wherever they are raised.

    An error may come from the endpoint, from a dependency, or from the commit before the response.

    - 404: `RowNotFoundError`
    - 409: unique, exclusion and foreign-key violations; serialization failures and deadlocks that
      nothing has tried again, or that have used up the attempts of `run_transaction`
    - 422: check and not-null violations, and data errors (SQLSTATE class 22)
    - 503 with `Retry-After`: `LockTimeoutError`, PostgreSQL's lock_not_available, a pool whose
      connections are all in use, and `DeadlineExceededError`
    - 504: `WaitTimeoutError`

    Any other error is handled as before: by another handler of the application, or as the server's
    500. So is an exception of the application that has one of these as its cause. A group is
    answered where all its members are the same problem. A body has nothing of the error in it: no
    SQL, no value, no name, but for what `constraints` allows.

    Call it once, before the application starts, and for each mounted application. As always in
    Starlette, a handler that is added later for one of the same classes takes the place of this
    one, and a handler of a subclass stands before it.

    Args:
        app: a FastAPI or Starlette application.
        constraints: a text for the client for each constraint that it may know of, by the name of
            the constraint. Such a body has the text as its `detail`, and the name as `constraint`.
        retry_after: the time after which a client may try again: seconds, a `timedelta` or a string
            such as `"5s"`. The header has whole seconds.
        type_base: the beginning of the types of problems: with `"https://example.com/problems/"` a
            unique violation has the type `https://example.com/problems/already-exists`. `None`
            leaves `about:blank`.
        openapi: show the problems in the OpenAPI schema of a FastAPI application: 409, 422 and 503
            at each operation that takes a session of `create_db_dependency`. Declare others with
            `problem_responses`.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: the application has started.

    Example:
        >>> from pgtoolset.fastapi import install_error_handlers
        >>> install_error_handlers(app, constraints={"uq_user_email": "This address is taken."})

    See https://www.rfc-editor.org/rfc/rfc9457 and docs/errors.md.
    """
    if not isinstance(app, Starlette):
        raise TypeError(f"app must be a FastAPI application, not {shown(app)}")
    texts = check_constraint_texts("constraints", constraints)
    delay = math.ceil(seconds("retry_after", retry_after))
    base = check_type_base("type_base", type_base)
    check_flag("openapi", openapi)
    if app.middleware_stack is not None:
        raise RuntimeError(
            "the application has started, and takes no handlers any more: call "
            "install_error_handlers(app) where the application is made"
        )
    handler = ErrorHandler(app, texts, delay, base)
    for class_ in HANDLED:
        app.add_exception_handler(class_, handler)
    if openapi:
        document_problems(app)


class ErrorHandler:
    """The handler of all the classes: answers problems, and passes other errors on.

    Args:
        app: the application.
        constraints: the text for each constraint that a client may know of.
        retry_after: in whole seconds.
        type_base: the beginning of the types; `None` for `about:blank`.
    """

    def __init__(
        self,
        app: Starlette,
        constraints: Mapping[str, str],
        retry_after: int,
        type_base: str | None,
    ) -> None:
        self._handlers = app.exception_handlers
        self._earlier = {
            class_: _without_ours(app.exception_handlers.get(class_), class_) for class_ in HANDLED
        }
        self._constraints = constraints
        self._retry_after = retry_after
        self._type_base = type_base

    async def __call__(self, connection: Any, error: Exception) -> Any:
        found = find_problem(error) if connection.scope["type"] == "http" else None
        if found is None:
            return await self._pass_on(connection, error)
        _log(connection, found)
        return self._answer(found)

    def earlier(self, class_: type) -> Any:
        """Return the handler that the application had for a class before."""
        return self._earlier.get(class_)

    def _answer(self, found: Finding) -> JSONResponse:
        problem = found.problem
        base = self._type_base
        body: dict[str, Any] = {
            "type": "about:blank" if base is None else f"{base}{problem.name}",
            "title": PHRASES[problem.status],
            "status": problem.status,
            "detail": problem.detail,
        }
        text = self._constraints.get(found.constraint or "")
        if text is not None:
            body |= {"detail": text, "constraint": found.constraint}
        headers = {"Retry-After": str(self._retry_after)} if problem.status == 503 else None
        return JSONResponse(body, problem.status, headers, MEDIA_TYPE)

    async def _pass_on(self, connection: Any, error: Exception) -> Any:
        """Call the handler that would have been called without this one; raise where none is."""
        for class_ in type(error).__mro__:
            if class_ is Exception:
                break  # its handler is called by the server's 500
            handler = _without_ours(self._handlers.get(class_), class_)
            if handler is not None:
                return await _called(handler, connection, error)
        raise error


def _without_ours(handler: Any, class_: type) -> Any:
    return handler.earlier(class_) if isinstance(handler, ErrorHandler) else handler


async def _called(handler: Any, connection: Any, error: Exception) -> Any:
    """Call a handler of the application as Starlette does: a plain function in a thread."""
    if is_async(handler):
        return await handler(connection, error)
    return await run_in_threadpool(handler, connection, error)


def _log(connection: Any, found: Finding) -> None:
    """Log a problem without its message, in which PostgreSQL quotes values.

    An overload matters to the operators of the service, the others to its client.
    """
    level = logging.WARNING if found.problem.status == 503 else logging.DEBUG
    _logger.log(
        level,
        "%s %s is answered with %d: %s, SQLSTATE %s, constraint %s",
        connection.scope.get("method"),
        getattr(connection.scope.get("route"), "path", "(no route)"),  # without its values
        found.problem.status,
        type(found.error).__name__,
        sqlstate_of(found.error),
        found.constraint,
    )
