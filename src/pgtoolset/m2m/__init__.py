"""Many-to-many associations, written without loading a collection: one statement for any number."""

from pgtoolset.m2m.writes import m2m_add, m2m_add_many, m2m_remove, m2m_set

__all__ = ["m2m_add", "m2m_add_many", "m2m_remove", "m2m_set"]
