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
from typing import Annotated, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import typer

from search.dashboards import access
from search.options import STORAGE_VARIABLE
from search.urls import PAGES_VARIABLE
from trainer.common import cli

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

    store = None
    if artifact_dir is not None:
        artifact_dir.mkdir(parents=True, exist_ok=True)  # workers put files there later
        store = FileSystemArtifactStore(artifact_dir)
    opened = open_storage(storage)
    opened.shows_all = False  # the pages would be as wide as the longest attribute
    pages = wsgi(opened, artifact_store=store)
    application = access.Gate(pages if mlflow_url is None else Links(pages, mlflow_url), granted, port)
    signal.signal(signal.SIGTERM, _end)
    with make_server(host, port, application, server_class=_Server, handler_class=_Quiet) as server:
        print(f"optuna-dashboard on http://{host}:{port}/dashboard/", file=sys.stderr, flush=True)
        server.serve_forever()


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    cli.run(app)
