"""problem_responses: the responses of install_error_handlers, declared at an operation."""

from __future__ import annotations

from typing import Any

from pgtoolset._arguments import check_problem_statuses
from pgtoolset.fastapi._openapi import response_of
from pgtoolset.fastapi._problems import PHRASES

__all__ = ["problem_responses"]


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return problem details as responses for the OpenAPI schema, in the form of `responses=`.

    `install_error_handlers` must be called for the application, for it adds the schema to which
    these responses refer.

    Args:
        statuses: of 404, 409, 422, 503 and 504; all of them where none is given.

    Returns:
        A new mapping, for `responses=` of an endpoint, a router or an application.

    Raises:
        ValueError, TypeError: a status is another one.

    Example:
        >>> from pgtoolset.fastapi import problem_responses
        >>> @app.get("/orders/{order_id}", responses=problem_responses(404))
        ... async def read_order(order_id: int) -> OrderOut: ...

    See https://fastapi.tiangolo.com/advanced/additional-responses/
    """
    chosen = check_problem_statuses("statuses", statuses, PHRASES)
    return {status: response_of(status) for status in chosen}
