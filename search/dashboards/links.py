"""Links to MLflow in notes, as optuna-dashboard's pages show them: to where MLflow's pages are served now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from search.dashboards.access import Application, Environ, StartResponse
from search.tracking.pages import LOCAL


class Links:
    """WSGI middleware that puts MLflow's address in place of the one that notes have.

    A note is written while its trial trains, with the address at which `search.ui` serves a database by default; the
    port on which MLflow is served is known only then.
    """

    def __init__(self, application: Application, mlflow: str) -> None:
        self._application = application
        self._written, self._served = f"{LOCAL}/#/".encode(), f"{mlflow.rstrip('/')}/#/".encode()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Pass a request on, and the answer back; answers of the API with the links changed."""
        if not str(environ.get("PATH_INFO", "")).startswith("/api/"):
            return self._application(environ, start_response)
        begun: list[Any] = []

        def hold(status: str, headers: list[tuple[str, str]], *error: Any) -> None:
            begun[:] = [status, headers, *error]

        answer = self._application(environ, hold)
        body = b"".join(answer)
        if callable(close := getattr(answer, "close", None)):
            close()
        body = body.replace(self._written, self._served)
        status, headers, *error = begun
        kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*kept, ("Content-Length", str(len(body)))], *error)
        return [body]
