"""`python -m search.dashboard`: optuna-dashboard behind a check of host names, origins and a password.

optuna-dashboard's own command has none of these. The database's URL comes from the environment, so that `ps` shows no
password.
"""

from __future__ import annotations

import signal
import socketserver
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import typer

from search.dashboards import access, listening
from search.errors import StorageError
from search.options import STORAGE_VARIABLE
from search.places import sqlite_file
from search.urls import PAGES_VARIABLE
from trainer.common import cli
from trainer.common.errors import UserError, shown

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """A handler that prints no line for a request and does not look up the client's name, which may take seconds."""

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def address_string(self) -> str:
        """The client's IP address."""
        return str(self.client_address[0])


@app.command()
def main(
    storage: Annotated[
        str, typer.Option(envvar=STORAGE_VARIABLE, show_envvar=True, help="Optuna's database URL.")
    ] = "sqlite:///runs/optuna.db",
    artifact_dir: Annotated[Path | None, typer.Option(help="Folder of the files shown in notes.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = access.LOOPBACK,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(envvar=access.HOSTS_VARIABLE, help="Further host names to answer to, separated by commas."),
    ] = None,
    mlflow_url: Annotated[
        str | None, typer.Option(envvar=PAGES_VARIABLE, help="Address of MLflow's pages, for the links in notes.")
    ] = None,
) -> None:
    """Serve optuna-dashboard. Beyond this machine it needs a password: LORA_SEARCH_UI_PASSWORD."""
    granted = access.check(host, allowed_hosts)
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import wsgi

    from search.dashboards.links import Links
    from search.storage.database import open_storage

    listening.check(host, port, "--port")
    file = sqlite_file(storage)
    if file is not None and not file.is_file():
        raise StorageError(f"there is no database {shown(str(file))}: run a study first, or name it with --storage")
    opened = open_storage(storage)
    store = None
    if artifact_dir is not None:
        try:
            artifact_dir.mkdir(parents=True, exist_ok=True)  # workers put files there later
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"--artifact-dir {shown(str(artifact_dir))} cannot be made: {why}") from None
        store = FileSystemArtifactStore(artifact_dir)
    opened.shows_all = False  # the pages would be as wide as the longest attribute
    pages = wsgi(opened, artifact_store=store)
    application = access.Gate(pages if mlflow_url is None else Links(pages, mlflow_url), granted, port)
    signal.signal(signal.SIGTERM, _end)
    with _serving(host, port, application) as server:
        print(f"optuna-dashboard on {access.url(host, port)}/dashboard/", file=sys.stderr, flush=True)
        server.serve_forever()


def _serving(host: str, port: int, application: WSGIApplication) -> WSGIServer:
    """The server, which listens.

    Raises:
        UserError: it cannot listen there, since another program was faster.
    """

    class Server(_Server):
        address_family = listening.family(host, port)

    try:
        return make_server(host, port, application, server_class=Server, handler_class=_Quiet)
    except OSError as error:
        raise UserError(listening.problem_of(error, host, port, "--port")) from None


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    cli.run(app)
