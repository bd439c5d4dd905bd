"""`python -m search.ui`: MLflow's pages and optuna-dashboard together, on this machine's loopback address.

Told to listen elsewhere (`--host`), both want a password and answer to the given names only.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any

import typer

from search.dashboards import access
from search.dashboards.access import Access
from search.errors import StorageError
from search.options import ARTIFACTS, STORAGE_VARIABLE, StorageOption, TrackingOption
from search.urls import masked_in, shown
from trainer.common import cli
from trainer.common.errors import UserError

START_S = 120
"""Longest wait for a page to answer; MLflow needs about ten seconds."""
STOP_S = 10
"""Time to end by itself, after which a server is killed."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Server:
    """One dashboard: a child process in a session of its own, so that its workers end with it."""

    name: str
    url: str
    health: str
    """Answered without a password."""
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def answers(self) -> bool:
        """Whether its page can be fetched."""
        try:
            with urllib.request.urlopen(self.health, timeout=5) as response:  # noqa: S310 - our own http URL
                return bool(response.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def check_alive(self) -> None:
        """Raise if the process has ended, with the end of what it printed."""
        code = self.process.poll()
        if code is None:
            return
        self.log.seek(0)
        tail = "\n".join(self.log.read().decode(errors="replace").splitlines()[-15:])
        raise ServerEnded(f"{self.name} ended by itself with exit code {code}:\n{masked_in(tail)}")

    def stop(self) -> None:
        """End the process and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class ServerEnded(Exception):
    """A dashboard's process ended although nobody asked it to."""


@app.command()
def main(
    runs_dir: Annotated[Path, typer.Option(help="Folder of the databases, as given to search.run.")] = Path("runs"),
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow.")] = 5000,
    optuna_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of optuna-dashboard.")] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine, set LORA_SEARCH_UI_PASSWORD too.")
    ] = access.LOOPBACK,
    allowed_hosts: Annotated[
        str | None, typer.Option(help="Further names that browsers may ask for, by commas; needed with --host.")
    ] = None,
) -> None:
    """Open the dashboards: MLflow for curves and runs, optuna-dashboard for the search. Ctrl-C ends both."""
    storage = storage or f"sqlite:///{runs_dir / 'optuna.db'}"
    tracking_uri = tracking_uri or f"sqlite:///{runs_dir / 'mlflow.db'}"
    remote = tracking_uri.startswith(("http://", "https://"))
    ports = {"--optuna-port": optuna_port} if remote else {"--mlflow-port": mlflow_port, "--optuna-port": optuna_port}
    granted = access.check(host, allowed_hosts)
    check(storage, tracking_uri, ports, granted)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with contextlib.ExitStack() as stack:
            artifacts = runs_dir / ARTIFACTS
            print("starting ...", file=sys.stderr, flush=True)
            servers = [] if remote else [stack.enter_context(mlflow_server(tracking_uri, mlflow_port, granted))]
            servers.append(stack.enter_context(optuna_dashboard(storage, optuna_port, artifacts, granted)))
            wait_until_ready(servers)
            show(servers, tracking_uri if remote else None, granted)
            while True:
                for server in servers:
                    server.check_alive()
                time.sleep(0.5)
    except KeyboardInterrupt:
        print("\nended.", file=sys.stderr)
    except ServerEnded as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def check(storage: str, tracking_uri: str, ports: dict[str, int], granted: Access | None = None) -> None:
    """Refuse databases that are not there, ports that are taken, and passwords that nothing would ask for.

    Raises:
        UserError: everything that is wrong, in one message.
    """
    problems = []
    if len(set(ports.values())) < len(ports):
        problems.append(f"--mlflow-port and --optuna-port are both {ports['--mlflow-port']}; choose two ports")
    else:
        problems += [
            f"port {port} is already in use, perhaps by another search.ui; choose a free one with {option}"
            for option, port in ports.items()
            if not _free(port, (granted or Access()).host)
        ]
    if granted and granted.password and "--mlflow-port" in ports and importlib.util.find_spec("flask_wtf") is None:
        problems.append("MLflow asks for a password with Flask-WTF only: pip install 'lora-search[server]'")
    for option, uri in (("--storage", storage), ("--tracking-uri", tracking_uri)):
        path = uri.removeprefix("sqlite:///")
        if path != uri and not Path(path).is_file():
            problems.append(
                f"there is no database {shown(path)!r}; run a study first (python -m search.run --study rsicap_mini), "
                f"or name another place with --runs-dir or {option}"
            )
    if not problems:
        problems += _unusable(storage, tracking_uri)
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems]))


def _unusable(storage: str, tracking_uri: str) -> Iterator[str]:
    """What is wrong with databases that seem to be there. Imports SQLAlchemy and Optuna, which takes a second."""
    from search.storage.database import close_storage, open_storage
    from search.tracking import address

    try:
        address.check(tracking_uri)
    except StorageError as error:
        yield str(error)
    try:
        close_storage(open_storage(storage))
    except StorageError as error:
        yield str(error)


def _free(port: int, host: str) -> bool:
    with socket.socket() as listener:
        # As servers do: a port whose last connections are only just closed is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def mlflow_server(tracking_uri: str, port: int, granted: Access) -> Iterator[Server]:
    """MLflow's server on a database, with its own authentication if there is a password."""
    env = {
        "MLFLOW_BACKEND_STORE_URI": tracking_uri,  # not as an argument: other users can read those
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # three more processes, for nothing we use
        # The middleware against DNS rebinding compares the Host header, port included. Notice here, so that an
        # environment variable meant for another server does not shut out the URL that we print.
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(granted.allowed_hosts(port)),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(granted.allowed_origins(port)),
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", granted.host, "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryDirectory() as folder:
        if granted.password is not None:
            # Users are kept as long as the server runs: the password is always the one that the environment says.
            config = Path(folder) / "basic_auth.ini"
            config.write_text(
                f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/users.db\n"
                "auth_cache_ttl_seconds = 60\n"  # else each request costs a slow hash of the password
            )
            command += ["--app-name", "basic-auth"]
            env |= {
                "MLFLOW_AUTH_CONFIG_PATH": str(config),
                "MLFLOW_AUTH_ADMIN_USERNAME": granted.user,
                "MLFLOW_AUTH_ADMIN_PASSWORD": granted.password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            }
        with _started("MLflow", granted, port, "", command, env) as server:
            yield server


@contextlib.contextmanager
def optuna_dashboard(storage: str, port: int, artifacts: Path, granted: Access) -> Iterator[Server]:
    """optuna-dashboard on a database."""
    command = [sys.executable, "-m", "search.dashboard", "--host", granted.host, "--port", str(port)]
    if artifacts.is_dir():
        command += ["--artifact-dir", str(artifacts.resolve())]
    env = {STORAGE_VARIABLE: storage, "LORA_SEARCH_ALLOWED_HOSTS": ",".join(granted.names)}
    with _started("optuna-dashboard", granted, port, "/dashboard/", command, env) as server:
        yield server


@contextlib.contextmanager
def _started(
    name: str, granted: Access, port: int, path: str, command: list[str], env: dict[str, str]
) -> Iterator[Server]:
    address = granted.address(port)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
        )
        server = Server(name, address + path, address + access.HEALTH, process, log)
        try:
            yield server
        finally:
            server.stop()


def wait_until_ready(servers: list[Server]) -> None:
    """Return when every page answers.

    Raises:
        ServerEnded: a server ended, or did not answer in time.
    """
    deadline = time.monotonic() + START_S
    waiting = list(servers)
    while waiting:
        for server in waiting:
            server.check_alive()
        waiting = [server for server in waiting if not server.answers()]
        if waiting and time.monotonic() > deadline:
            raise ServerEnded(f"{waiting[0].name} did not answer at {waiting[0].url} within {START_S} s")
        time.sleep(0.2)


def show(servers: list[Server], remote: str | None, granted: Access) -> None:
    """Print where to look: the studies' pages of curves first, newest on top."""
    from search.tracking.pages import runs_page

    urls = {server.name: server.url for server in servers}
    if remote is not None:
        urls = {"MLflow": shown(remote), **urls}
    for name, url in urls.items():
        print(f"{name:<17} {url}")
        if name == "MLflow" and remote is None:
            for experiment in _experiments(url, granted):
                print(f"  {experiment['name']:<15} {runs_page(url, experiment['experiment_id'])}")
    print("Ctrl-C ends both." if len(urls) == len(servers) else "Ctrl-C ends optuna-dashboard.", flush=True)


def _experiments(url: str, granted: Access) -> list[dict[str, Any]]:
    """MLflow's experiments, the last used first, without the empty one it makes for itself."""
    headers = {"Content-Type": "application/json"}
    if authorization := granted.authorization():
        headers["Authorization"] = authorization
    request = urllib.request.Request(  # noqa: S310 - our own http URL
        f"{url}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 10, "order_by": ["last_update_time DESC"]}).encode(),
        headers=headers,
    )
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - our own http URL
        found = json.load(response).get("experiments", [])
    return [experiment for experiment in found if experiment["experiment_id"] != "0"]


if __name__ == "__main__":
    cli.run(app)
