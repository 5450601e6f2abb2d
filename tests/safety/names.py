"""Names that try to be more than a name."""

from __future__ import annotations

NAMES = [
    "a$pgtoolset$b",
    "$pgtoolset",
    "pgtoolset$",
    "$pgtoolset_$ $pgtoolset$",
    ":name",
    "per%cent %s %%",
    "quo\"te's; --",
    "back\\slash\\'",
    "new\nline",
    "keys",
    "tg_op",
    "pgtoolset_new",
    "é" * 31,
    "x" * 63,
]
