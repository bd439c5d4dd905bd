"""A real MLflow server that can be stopped and started, and a proxy before it that is slow, answers 500, or hangs."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.search_process import PATIENCE_S


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class MlflowServer:
    """`mlflow server` on SQLite, on a port of its own that it keeps over restarts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.database = f"sqlite:///{folder / 'server.db'}"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        arguments = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.database]
        arguments += ["--artifacts-destination", str(self._folder / "artifacts"), "--host", "127.0.0.1"]
        arguments += ["--port", str(self.port), "--workers", "1"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                arguments, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "DO_NOT_TRACK": "true"}
            )
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        raise AssertionError(f"no MLflow server:\n{(self._folder / 'server.log').read_text()}")

    def stop(self) -> None:
        """Kill it, as a crash or a power cut would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Proxy:
    """Passes requests on to a server, unless told otherwise.

    `mode` is `pass`, `error` (answers 500), `lose` (passes on, but answers 500), `hang` (never answers) or `slow`
    (waits `delay_s` before it passes on).
    """

    def __init__(self, target_port: int) -> None:
        self.mode = "pass"
        self.delay_s = 0.0
        self.requests = 0
        self.judge: Callable[[int], str] | None = None
        """Says the mode by the number of the request, instead of `mode`."""
        self._released = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _pass(self) -> None:
                proxy.requests += 1
                mode = proxy.judge(proxy.requests) if proxy.judge is not None else proxy.mode
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if mode == "hang":
                    proxy._released.wait(120)
                    self.close_connection = True
                    return
                if mode == "slow":
                    time.sleep(proxy.delay_s)
                if mode == "error":
                    self._answer(500, b"<html>Internal Server Error</html>", "text/html")
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
                try:
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    content = answer.read()
                except OSError:
                    self._answer(502, b"bad gateway", "text/plain")
                    return
                finally:
                    upstream.close()
                if mode == "lose":
                    self._answer(500, b"<html>Internal Server Error</html>", "text/html")
                else:
                    self._answer(answer.status, content, answer.getheader("Content-Type") or "text/plain")

            def _answer(self, status: int, content: bytes, kind: str) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass

            def log_message(self, *_: Any) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
