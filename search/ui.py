"""`python -m search.ui`: MLflow's pages and optuna-dashboard together, on this machine's loopback address.

On another address (`--host`) both require a password and answer only to the allowed host names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Annotated

import typer

from search.dashboards import access, listening
from search.dashboards.access import Access
from search.dashboards.servers import (
    Server,
    ServerEnded,
    add_views,
    experiments,
    mlflow_server,
    optuna_dashboard,
    wait_until_ready,
    watch,
)
from search.errors import StorageError
from search.options import RunsOption, StorageOption, TrackingOption
from search.places import RUNS, Places
from search.urls import PAGES_VARIABLE, shown
from trainer.common import cli
from trainer.common.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    runs_dir: RunsOption = RUNS,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow.")] = 5000,
    optuna_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of optuna-dashboard.")] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine, set LORA_SEARCH_UI_PASSWORD too.")
    ] = access.LOOPBACK,
    allowed_hosts: Annotated[
        str | None, typer.Option(help="Host names to answer to, separated by commas; required with --host.")
    ] = None,
) -> None:
    """Open the dashboards: MLflow for curves and runs, optuna-dashboard for the search. Ctrl-C ends both."""
    places = Places.of(runs_dir, storage, tracking_uri)
    storage, tracking_uri = places.storage_url, places.tracking_uri
    remote = tracking_uri.startswith(("http://", "https://"))
    ports = {"--optuna-port": optuna_port} if remote else {"--mlflow-port": mlflow_port, "--optuna-port": optuna_port}
    granted = access.check(host, allowed_hosts)
    check(places, ports, granted)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with contextlib.ExitStack() as stack:
            print("starting ...", file=sys.stderr, flush=True)
            servers = [] if remote else [stack.enter_context(mlflow_server(tracking_uri, mlflow_port, granted))]
            # Browsers may know MLflow by another name; its port they know in any case.
            mlflow = None if remote else os.environ.get(PAGES_VARIABLE) or servers[0].url
            servers.append(stack.enter_context(optuna_dashboard(storage, optuna_port, places.notes, granted, mlflow)))
            wait_until_ready(servers)
            show(servers, tracking_uri if remote else None, granted)
            watch(servers)
    except KeyboardInterrupt:
        print("\nended.", file=sys.stderr)
    except ServerEnded as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def check(places: Places, ports: dict[str, int], granted: Access | None = None) -> None:
    """Refuse missing databases, ports in use, and a password that MLflow could not ask for.

    Raises:
        UserError: everything that is wrong, in one message.
    """
    problems = []
    if len(set(ports.values())) < len(ports):
        problems.append(f"--mlflow-port and --optuna-port are both {ports['--mlflow-port']}; choose two ports")
    else:
        host = (granted or Access()).host
        found = (listening.problem(host, port, option) for option, port in ports.items())
        problems += dict.fromkeys(each for each in found if each is not None)
    if granted and granted.password and "--mlflow-port" in ports and importlib.util.find_spec("flask_wtf") is None:
        problems.append("MLflow needs Flask-WTF to ask for a password: pip install 'lora-search[server]'")
    problems += places.missing()
    if not problems:
        problems += _unusable(places)
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems]))


def _unusable(places: Places) -> Iterator[str]:
    """Databases that exist but cannot be opened. Imports SQLAlchemy and Optuna, which takes a second."""
    from search.storage.database import close_storage, open_storage
    from search.tracking import address
    from search.tracking.client import open_tracking

    try:
        if places.tracking_uri.startswith("http"):
            open_tracking(places.tracking_uri, places.artifacts)
        else:
            address.check(places.tracking_uri)
    except StorageError as error:
        yield str(error)
    try:
        close_storage(open_storage(places.storage_url))
    except StorageError as error:
        yield str(error)


def show(servers: list[Server], remote: str | None, granted: Access) -> None:
    """Print where to look: the studies' pages of curves first, newest on top."""
    from search.tracking.pages import runs_page

    urls = {server.name: server.url for server in servers}
    if remote is not None:
        urls = {"MLflow": shown(remote), **urls}
    for name, url in urls.items():
        print(f"{name:<17} {url}")
        if name == "MLflow" and remote is None:
            for experiment in experiments(url, granted):
                add_views(url, experiment, granted)
                print(f"  {experiment['name']:<15} {runs_page(url, experiment['experiment_id'])}")
    print("Ctrl-C ends both." if len(urls) == len(servers) else "Ctrl-C ends optuna-dashboard.", flush=True)


if __name__ == "__main__":
    cli.run(app)
