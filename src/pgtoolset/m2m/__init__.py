"""Many-to-many associations, written directly: no collection is loaded, and any number goes in one
statement."""

from pgtoolset.m2m.writes import m2m_add, m2m_add_many, m2m_remove, m2m_set

__all__ = ["m2m_add", "m2m_add_many", "m2m_remove", "m2m_set"]
