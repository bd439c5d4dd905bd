"""What MLflow's own client reaches, the search reaches: by its certificates, tokens and proxies."""

from __future__ import annotations

import base64
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from search.errors import StorageError, Unavailable
from search.places import Places
from search.tracking.client import open_tracking
from search.tracking.runs import StudyRuns


class Server:
    """Answers as an MLflow without any experiment would, and notes what it was asked."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.asked: list[tuple[str, str | None]] = []
        """(path as it was sent, authorization)."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("Authorization")))
                body = json.dumps({"experiments": []}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "MLFLOW_TRACKING_TOKEN", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def plain() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def test_a_certificate_of_a_private_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = Server((certificate, key))
    uri = f"https://localhost:{server.port}"
    with pytest.raises(StorageError, match=r"is not trusted.*MLFLOW_TRACKING_SERVER_CERT_PATH") as refused:
        open_tracking(uri, tmp_path)
    assert not isinstance(refused.value, Unavailable), "it will not pass by itself: the search must not go on"
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    runs = StudyRuns(Places.of(tmp_path, tracking=uri), "rsicap")
    assert runs.connect().uri == uri
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    open_tracking(uri, tmp_path)
    server.close()


def test_tokens_and_passwords_come_with_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Server
) -> None:
    uri = f"http://127.0.0.1:{plain.port}"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "T0KEN")
    open_tracking(uri, tmp_path)
    assert {authorization for _, authorization in plain.asked} == {"Bearer T0KEN"}
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    plain.asked.clear()
    open_tracking(uri, tmp_path)
    assert {authorization for _, authorization in plain.asked} == {"Basic " + base64.b64encode(b"me:secret").decode()}


def test_a_proxy_is_asked_and_knows_names_that_this_host_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Server
) -> None:
    uri = "http://mlflow.behind-the-proxy.invalid:5000"
    with pytest.raises(StorageError, match=r"no MLflow server answers at .*is the name right"):
        open_tracking(uri, tmp_path)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{plain.port}")
    open_tracking(uri, tmp_path)
    assert plain.asked and all(path.startswith(f"{uri}/") for path, _ in plain.asked)


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no MLflow server answers at http://127\.0\.0\.1:9: .*is it running\?"):
        open_tracking("http://127.0.0.1:9", tmp_path)
