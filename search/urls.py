"""URLs as they may be shown: without the passwords that they may hold."""

from __future__ import annotations

import re

import sqlalchemy
from sqlalchemy.engine import URL

_SECRET = re.compile(r"pass|pwd|secret|token|key", re.IGNORECASE)
"""Names of query parameters that are not shown: drivers take `?password=...` as well as `user:password@`."""


def shown(url: URL) -> str:
    """The URL with `***` for its password and for each query parameter that may be one."""
    hidden = {name: "***" for name in url.query if _SECRET.search(name)}
    return url.update_query_dict(hidden).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")


def secrets(url: URL) -> tuple[str, ...]:
    """What `shown` leaves out, to be taken out of a driver's messages too."""
    values = [str(url.password or "")]
    for name, value in url.query.items():
        if _SECRET.search(name):
            values += [value] if isinstance(value, str) else value
    return tuple(value for value in values if value)


def has_secret(url: str) -> bool:
    """Whether the URL may hold a password, in its user part or in its query."""
    try:
        return bool(secrets(sqlalchemy.make_url(url)))
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return "@" in url
