"""The two dashboards as child processes: started, watched until they answer, ended with all that they started.

MLflow has its own authentication and its own check of the Host header, which are configured here; optuna-dashboard has
neither, and runs behind `search.dashboards.access.Gate`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from search.dashboards import access
from search.dashboards.access import Access
from search.options import STORAGE_VARIABLE
from search.urls import masked_in
from trainer.common.imports import own_path

START_S = 120
"""Longest wait for a page to answer; MLflow needs about ten seconds."""
STOP_S = 10
"""Time to end by itself, after which a server is killed."""


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
        """Raise `ServerEnded` with the last lines of output if the process has ended."""
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
    """A dashboard's process ended without having been asked to, or never answered."""


@contextlib.contextmanager
def mlflow_server(tracking_uri: str, port: int, granted: Access) -> Iterator[Server]:
    """MLflow's server on a database, with its own authentication if there is a password."""
    env = {
        "MLFLOW_BACKEND_STORE_URI": tracking_uri,  # not as an argument: other users can read those
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # three more processes, for nothing we use
        # The middleware against DNS rebinding compares the Host header, port included. Set here, so that an
        # environment variable meant for another server does not shut out the URL that we print.
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(granted.allowed_hosts(port)),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(granted.allowed_origins(port)),
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", granted.host, "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryDirectory() as folder:
        if granted.password is not None:
            # Users are kept as long as the server runs: the password is always the one in the environment.
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
def optuna_dashboard(
    storage: str, port: int, artifacts: Path, granted: Access, mlflow: str | None = None
) -> Iterator[Server]:
    """optuna-dashboard on a database; its notes link to MLflow at `mlflow`, by default to where they say."""
    command = [sys.executable, "-m", "search.dashboard", "--host", granted.host, "--port", str(port)]
    if artifacts.parent.is_dir():  # the folder itself comes with the first trial that ends
        command += ["--artifact-dir", str(artifacts.resolve())]
    if mlflow is not None:
        command += ["--mlflow-url", mlflow]
    env = {STORAGE_VARIABLE: storage, access.HOSTS_VARIABLE: ",".join(granted.names)}
    with _started("optuna-dashboard", granted, port, "/dashboard/", command, env) as server:
        yield server


@contextlib.contextmanager
def _started(
    name: str, granted: Access, port: int, path: str, command: list[str], env: dict[str, str]
) -> Iterator[Server]:
    """A server's process, ended when the block is left."""
    address = granted.address(port)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own_path(), **env},
            start_new_session=True,
        )
        server = Server(name, address + path, address + access.HEALTH, process, log)
        try:
            yield server
        finally:
            server.stop()


def wait_until_ready(servers: Sequence[Server]) -> None:
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


def watch(servers: Sequence[Server]) -> None:
    """Return only by raising: wait until one of the servers ends.

    Raises:
        ServerEnded: a server ended.
    """
    while True:
        for server in servers:
            server.check_alive()
        time.sleep(0.5)


def experiments(url: str, granted: Access) -> list[dict[str, Any]]:
    """Experiments of a running MLflow server, the last used first, without the empty one it makes for itself."""
    asked = {"max_results": 10, "order_by": ["last_update_time DESC"]}
    found = _ask(f"{url}/api/2.0/mlflow/experiments/search", asked, granted).get("experiments", [])
    return [experiment for experiment in found if experiment["experiment_id"] != "0"]


def add_views(url: str, experiment: Mapping[str, Any], granted: Access) -> None:
    """Give an experiment of an earlier version the views of its runs; one that has them is left alone."""
    from search.tracking import views  # imports SQLAlchemy

    known = {tag["key"] for tag in experiment.get("tags", ())}
    for key, value in views.tags().items():
        if key not in known:
            tag = {"experiment_id": experiment["experiment_id"], "key": key, "value": value}
            _ask(f"{url}/api/2.0/mlflow/experiments/set-experiment-tag", tag, granted)


def _ask(address: str, asked: Mapping[str, Any], granted: Access) -> dict[str, Any]:
    """The answer of our MLflow server's API."""
    headers = {"Content-Type": "application/json"}
    if authorization := granted.authorization():
        headers["Authorization"] = authorization
    request = urllib.request.Request(  # noqa: S310 - our own http URL
        address, data=json.dumps(asked).encode(), headers=headers
    )
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - our own http URL
        answer: dict[str, Any] = json.load(response)
    return answer
