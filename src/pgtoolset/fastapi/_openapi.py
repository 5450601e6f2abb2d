"""Problem details in the OpenAPI schema of an application."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import fastapi.routing
from fastapi import FastAPI
from fastapi.openapi.utils import validation_error_definition, validation_error_response_definition

from pgtoolset.fastapi._problems import PHRASES

__all__ = ["MEDIA_TYPE", "document_problems", "response_of"]

MEDIA_TYPE = "application/problem+json"

_JSON = "application/json"
_SCHEMAS = "#/components/schemas/"

#: What any operation with a session may answer.
_OF_SESSIONS = (409, 422, 503)

_PROBLEM_DETAILS = {
    "title": "ProblemDetails",
    "description": "Problem details, https://www.rfc-editor.org/rfc/rfc9457",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {
            "type": "string",
            "format": "uri-reference",
            "title": "Type",
            "description": "The kind of the problem.",
        },
        "title": {
            "type": "string",
            "title": "Title",
            "description": "The phrase of the status.",
        },
        "status": {
            "type": "integer",
            "title": "Status",
            "description": "The status of the response.",
        },
        "detail": {
            "type": "string",
            "title": "Detail",
            "description": "A text for people.",
        },
        "constraint": {
            "type": "string",
            "title": "Constraint",
            "description": "The name of the violated constraint, where it is public.",
        },
    },
}


def response_of(status: int) -> dict[str, Any]:
    """Return the response of a status.

    FastAPI leaves out its own 422, of the validation of the request, where an operation declares
    one, so that of a problem has both.
    """
    response: dict[str, Any] = {
        "description": PHRASES[status],
        "content": {MEDIA_TYPE: {"schema": {"$ref": f"{_SCHEMAS}ProblemDetails"}}},
    }
    if status == 422:
        response["content"][_JSON] = {"schema": {"$ref": f"{_SCHEMAS}HTTPValidationError"}}
    if status == 503:
        response["headers"] = {
            "Retry-After": {
                "description": "Seconds after which the request may be sent again.",
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    return response


def document_problems(app: Any) -> None:
    """Add problem details to what `app.openapi()` returns; nothing to an application of Starlette.

    An `openapi` that the application has put in the place of FastAPI's before is called.
    """
    if not isinstance(app, FastAPI):
        return
    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make_schema()  # FastAPI keeps it, and makes another one for a new route
        _document(schema, app)
        return schema

    vars(app)["openapi"] = openapi


def _document(schema: dict[str, Any], app: FastAPI) -> None:
    paths: dict[str, dict[str, Any]] = schema.get("paths", {})
    for path, method in _operations_with_session(app):
        operation = paths.get(path, {}).get(method)
        if operation is not None:
            for status in _OF_SESSIONS:
                _add(operation.setdefault("responses", {}), status)
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    schemas.setdefault("ProblemDetails", deepcopy(_PROBLEM_DETAILS))
    validated = [
        operation
        for item in paths.values()
        for operation in item.values()
        if isinstance(operation, dict) and _is_validated(operation)
    ]
    if validated:
        schemas.setdefault("HTTPValidationError", deepcopy(validation_error_response_definition))
        schemas.setdefault("ValidationError", deepcopy(validation_error_definition))


def _operations_with_session(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Yield the path and the method of each operation that takes a session of the library."""
    # Newer versions of FastAPI keep the routes of an included router together.
    flat: Any = getattr(fastapi.routing, "iter_route_contexts", iter)
    for route in flat(app.routes):
        if _takes_session(getattr(route, "dependant", None)):
            for method in route.methods or ():
                yield route.path_format, method.lower()


def _takes_session(dependant: Any) -> bool:
    if dependant is None:
        return False
    module = getattr(dependant.call, "__module__", None) or ""
    return module.startswith("pgtoolset.") or any(map(_takes_session, dependant.dependencies))


def _add(responses: dict[str, Any], status: int) -> None:
    """Add the response of a status, as a further type of content where there is one."""
    mine = response_of(status)
    present = responses.get(str(status))
    if present is None:
        mine["content"].pop(_JSON, None)  # FastAPI would have declared its own
        responses[str(status)] = mine
    elif "$ref" not in present:
        present.setdefault("content", {}).setdefault(MEDIA_TYPE, mine["content"][MEDIA_TYPE])


def _is_validated(operation: dict[str, Any]) -> bool:
    """Whether an operation has two kinds of 422; the one of FastAPI is taken from one that has
    nothing to be validated."""
    content = operation.get("responses", {}).get("422", {}).get("content", {})
    if MEDIA_TYPE not in content or _JSON not in content:
        return False
    if not operation.get("parameters") and not operation.get("requestBody"):
        del content[_JSON]
    return _JSON in content
