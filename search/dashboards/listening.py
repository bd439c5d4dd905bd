"""Whether a server can listen on a host and port, and why not: found before anything is started."""

from __future__ import annotations

import errno
import socket
from typing import Any

from search.dashboards.access import url
from trainer.common.errors import UserError, shown


def family(host: str, port: int) -> socket.AddressFamily:
    """The family of a host's address: IPv4 where it has one, as of `localhost`, which MLflow's server takes for that.

    Raises:
        UserError: there is no such host.
    """
    return _resolved(host, port)[0]


def problem(host: str, port: int, option: str) -> str | None:
    """Why a server could not listen there, in a sentence; None if it could.

    Args:
        host: of `--host`.
        port: to listen on.
        option: by which the port is given.

    Raises:
        UserError: there is no such host.
    """
    kind, address = _resolved(host, port)
    try:
        with socket.socket(kind) as listener:
            # As servers do: a port whose last connections are only just closed is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return problem_of(error, host, port, option)
    return None


def check(host: str, port: int, option: str) -> None:
    """Raise UserError if a server could not listen there."""
    if (found := problem(host, port, option)) is not None:
        raise UserError(found)


def problem_of(error: OSError, host: str, port: int, option: str) -> str:
    """What an error of `bind` comes to, in a sentence."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is already in use, perhaps by another search.ui; choose a free one with {option}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: this machine has no such address"
    return f"{url(host, port)} cannot be listened on: {error.strerror or error}"


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # no name, or one that can be none
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--host {shown(host)} is no host that is known here: {why}") from None
    return next(((kind, to) for kind, *_, to in found if kind == socket.AF_INET), (found[0][0], found[0][4]))
