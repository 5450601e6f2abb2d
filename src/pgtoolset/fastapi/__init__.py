"""Answers of a FastAPI application to errors of the database: problem details (RFC 9457).

The application imports it by name: `import pgtoolset` alone imports no FastAPI.
"""

try:
    from pgtoolset.fastapi.handlers import install_error_handlers
    from pgtoolset.fastapi.responses import problem_responses
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] not in ("fastapi", "starlette"):
        raise
    raise ImportError(
        "FastAPI is not installed, and pgtoolset.fastapi needs it: run "
        'pip install "fastapi>=0.121" or pip install "pgtoolset[fastapi]"'
    ) from _error

__all__ = ["install_error_handlers", "problem_responses"]
