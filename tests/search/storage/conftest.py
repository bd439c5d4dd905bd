"""Each test of the storage runs on SQLite and on PostgreSQL."""

from tests.search.storage.databases import postgres, storage, url

__all__ = ["postgres", "storage", "url"]
