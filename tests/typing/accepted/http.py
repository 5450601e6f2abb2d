"""Checked by mypy and pyright, never run: the HTTP answers to errors of the database."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, assert_type

from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette

from pgtoolset.fastapi import install_error_handlers, problem_responses


def use(app: FastAPI, starlette: Starlette) -> None:
    install_error_handlers(app)
    install_error_handlers(starlette, openapi=False)
    install_error_handlers(
        app,
        constraints={"uq_user_email": "This address is taken."},
        retry_after=timedelta(seconds=2),
        type_base="https://example.com/problems/",
    )
    install_error_handlers(app, retry_after="500ms")
    assert_type(problem_responses(404, 409), dict[int | str, dict[str, Any]])
    router = APIRouter(responses=problem_responses(404))

    @router.get("/", responses=problem_responses() | {410: {"description": "Gone"}})
    async def endpoint() -> None: ...

    app.include_router(router)
