"""Checked by mypy and pyright, never run: what satisfies the protocols of associations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

import pgtoolset
from pgtoolset import M2MChange
from pgtoolset._native import associations
from pgtoolset.protocols import AssociationRows, AssociationWriter
from pgtoolset.types import ManyToMany, PrimaryKeys, Related

writer: AssociationWriter = pgtoolset
rows: AssociationRows = associations


class Double:
    """A double that imports nothing of ours but the value that it returns."""

    async def m2m_add(
        self,
        session: Any,
        instance: Any,
        rel_attr: Any,
        *related: Any,
        pks: Iterable[Any] = (),
        ignore_conflicts: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        return len(related)

    async def m2m_remove(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, pks: Iterable[Any] = ()
    ) -> int:
        return 0

    async def m2m_set(
        self,
        session: Any,
        instance: Any,
        rel_attr: Any,
        *related: Any,
        pks: Iterable[Any] = (),
        values: Mapping[str, Any] | None = None,
        keep_existing: bool = False,
    ) -> M2MChange:
        return M2MChange(0, 0)

    async def m2m_add_many(
        self,
        session: Any,
        rel_attr: Any,
        links: Iterable[tuple[Any, Any]],
        *,
        ignore_conflicts: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        return 0


class PreciseDouble(Double):
    """A double that has the types of the contract."""

    async def m2m_add(
        self,
        session: AsyncSession,
        instance: Any,
        rel_attr: ManyToMany[Related],
        *related: Related,
        pks: PrimaryKeys = (),
        ignore_conflicts: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        return len(related)


double: AssociationWriter = Double()
precise: AssociationWriter = PreciseDouble()
