"""Problem details in the OpenAPI schema."""

import copy
import json
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.openapi.models import OpenAPI
from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset import ReadReplicas, create_db_dependency, create_read_dependency
from pgtoolset.fastapi import install_error_handlers, problem_responses
from pgtoolset.testing import create_test_client
from tests.fastapi.api import Maker

JSON, PROBLEM = "application/json", "application/problem+json"
REFERENCE = {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}


def references(part: Any) -> Iterator[str]:
    """Every reference in a part of a schema."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(part, list):
        for each in part:
            yield from references(each)


def check_valid(schema: dict[str, Any]) -> None:
    """The schema is one of OpenAPI 3.1, and each reference in it leads somewhere."""
    OpenAPI.model_validate(schema)
    for reference in references(schema):
        found: Any = schema
        assert reference.startswith("#/")
        for key in reference[2:].split("/"):
            found = found[key]
        assert isinstance(found, dict)


async def schema_of(app: FastAPI) -> dict[str, Any]:
    """The schema as it is served, checked."""
    async with create_test_client(app) as client:
        schema: dict[str, Any] = (await client.get("/openapi.json")).json()
    check_valid(schema)
    return schema


def responses(schema: dict[str, Any], path: str, method: str = "get") -> dict[str, Any]:
    found: dict[str, Any] = schema["paths"][path][method]["responses"]
    return found


@pytest.fixture
def app(session_maker: Maker) -> FastAPI:
    """An application with operations that take sessions in several ways, and one without."""
    app, router = FastAPI(), APIRouter()
    Session = Annotated[AsyncSession, Depends(create_db_dependency(session_maker))]

    async def repository(session: Session) -> AsyncSession:
        return session

    @app.get("/session")
    async def plain(session: Session) -> None: ...

    @app.post("/items/{id}")
    async def with_parameters(id: int, session: Session) -> None: ...

    @app.get("/indirect")
    async def indirect(found: Annotated[AsyncSession, Depends(repository)]) -> None: ...

    @app.get("/own", responses={409: {"description": "Mine", "model": dict[str, int]}})
    async def own(session: Session) -> None: ...

    @router.get("/routed")
    async def routed(session: Session) -> None: ...

    read = create_read_dependency(ReadReplicas(session_maker, [session_maker]))

    @app.get("/read")
    async def reading(session: Annotated[AsyncSession, Depends(read)]) -> None: ...

    @app.get("/none/{id}")
    async def none(id: int) -> None: ...

    @app.get("/hidden", include_in_schema=False)
    async def hidden(session: Session) -> None: ...

    app.include_router(router, prefix="/api")
    return app


PATHS = ["/session", "/indirect", "/api/routed", "/read"]


async def test_operations_with_sessions(app: FastAPI) -> None:
    """Each operation that takes a session shows 409, 422 and 503, however it takes it."""
    install_error_handlers(app)
    schema = await schema_of(app)
    for path in PATHS:
        found = responses(schema, path)
        assert set(found) == {"200", "409", "422", "503"}, path
        for status in ("409", "422", "503"):
            assert found[status]["content"] == {PROBLEM: REFERENCE}, path
        assert "Retry-After" in found["503"]["headers"]
    assert "/hidden" not in schema["paths"]


async def test_validation_of_requests_is_still_shown(app: FastAPI) -> None:
    """An operation with parameters has two kinds of 422: that of FastAPI, and a problem."""
    before = responses(copy.deepcopy(app.openapi()), "/items/{id}", "post")["422"]
    app.openapi_schema = None
    install_error_handlers(app)
    after = responses(await schema_of(app), "/items/{id}", "post")["422"]
    assert after["description"] == before["description"]
    assert after["content"] == before["content"] | {PROBLEM: REFERENCE}


async def test_other_operations_are_unchanged(app: FastAPI) -> None:
    """An operation without a session is as before, and so is a response of the application's."""
    before = copy.deepcopy(app.openapi())
    app.openapi_schema = None
    install_error_handlers(app)
    after = await schema_of(app)
    assert after["paths"]["/none/{id}"] == before["paths"]["/none/{id}"]
    mine, theirs = responses(after, "/own")["409"], responses(before, "/own")["409"]
    assert mine["description"] == "Mine"
    assert mine["content"] == theirs["content"] | {PROBLEM: REFERENCE}


async def test_body_is_of_the_schema(app: FastAPI) -> None:
    """Each member of a body is in the schema, and each that it requires is in a body."""
    install_error_handlers(app, constraints={"a": "Taken."})
    schema = (await schema_of(app))["components"]["schemas"]["ProblemDetails"]
    assert set(schema["required"]) == {"type", "title", "status", "detail"}
    assert set(schema["properties"]) == {*schema["required"], "constraint"}


@pytest.mark.parametrize("statuses", [(404,), (409, 422), (503, 504), (422,), ()])
async def test_declared_responses(app: FastAPI, statuses: tuple[int, ...]) -> None:
    """`problem_responses` declares the statuses at an operation, or all."""
    shown = {str(each) for each in statuses or (404, 409, 422, 503, 504)}

    @app.get("/declared", responses=problem_responses(*statuses))
    async def declared() -> None: ...

    @app.get("/declared/{id}", responses=problem_responses(*statuses))
    async def with_parameters(id: int) -> None: ...

    install_error_handlers(app)
    schema = await schema_of(app)
    found = responses(schema, "/declared")
    assert set(found) == {"200"} | shown
    for status in shown:
        assert found[status]["content"] == {PROBLEM: REFERENCE}
    validated = responses(schema, "/declared/{id}")
    assert set(validated) == {"200", "422"} | shown
    assert JSON in validated["422"]["content"]
    assert (PROBLEM in validated["422"]["content"]) is ("422" in shown)


async def test_declared_for_a_router(session_maker: Maker) -> None:
    """`responses=` of a router takes them too, in an application with no other schema."""
    app = FastAPI()
    router = APIRouter(responses=problem_responses(404, 422))

    @router.get("/routed/{id}", response_class=Response)
    async def routed(id: int) -> None: ...

    app.include_router(router)
    install_error_handlers(app)
    schema = await schema_of(app)
    assert set(responses(schema, "/routed/{id}")) == {"200", "404", "422"}
    assert {"HTTPValidationError", "ValidationError"} <= set(schema["components"]["schemas"])


async def test_without_openapi(app: FastAPI) -> None:
    """`openapi=False` leaves the schema as it is."""
    before = copy.deepcopy(app.openapi())
    app.openapi_schema = None
    install_error_handlers(app, openapi=False)
    assert await schema_of(app) == before


async def test_schema_of_the_application(app: FastAPI) -> None:
    """A function that the application has put in place of `app.openapi` before is called."""
    make = app.openapi

    def own() -> dict[str, Any]:
        return make() | {"x-mine": True}

    app.openapi = own  # type: ignore[method-assign]
    install_error_handlers(app)
    install_error_handlers(app)
    schema = await schema_of(app)
    assert schema["x-mine"] is True
    assert "503" in responses(schema, "/session")


async def test_a_component_of_the_application(app: FastAPI) -> None:
    """A schema of the application with the same name is kept."""
    make = app.openapi

    def own() -> dict[str, Any]:
        schema = make()
        schema["components"]["schemas"]["ProblemDetails"] = {"type": "object", "title": "Mine"}
        return schema

    app.openapi = own  # type: ignore[method-assign]
    install_error_handlers(app)
    assert (await schema_of(app))["components"]["schemas"]["ProblemDetails"]["title"] == "Mine"


async def test_a_route_that_comes_later(app: FastAPI, session_maker: Maker) -> None:
    """The schema is made once for the same routes, and each new one is a copy of its own."""
    install_error_handlers(app)
    first = app.openapi()
    text = json.dumps(first)
    assert json.dumps(app.openapi()) == text
    first["components"]["schemas"]["ProblemDetails"]["title"] = "changed"
    other = FastAPI()
    install_error_handlers(other)
    assert other.openapi()["components"]["schemas"]["ProblemDetails"]["title"] == "ProblemDetails"


@pytest.mark.parametrize(
    ("statuses", "error"),
    [((500,), ValueError), ((True,), TypeError), (("404",), TypeError), ((404, None), TypeError)],
)
def test_statuses_that_are_none(statuses: Any, error: type[Exception]) -> None:
    """Only statuses of problems can be declared."""
    with pytest.raises(error, match=r"^statuses must be"):
        problem_responses(*statuses)
