"""docker-compose.yml as an engine reads it: variables filled in, and its services started as processes without one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


class Missing(Exception):
    """A variable that must be set is not."""


def fill_in(text: str, env: Mapping[str, str]) -> str:
    """The text with `${A}`, `${A:-default}` and `${A:?error}` replaced, as Compose does."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if env.get(name):
            return env[name]
        if kind == ":?":
            raise Missing(f"{name}: {rest}")
        return rest or ""

    return _VARIABLE.sub(value, text)


def load(env: Mapping[str, str], file: Path = ROOT / "docker-compose.yml") -> dict[str, Any]:
    """The file, parsed and filled in."""

    def filled(value: Any) -> Any:
        match value:
            case str():
                return fill_in(value, env)
            case list():
                return [filled(item) for item in value]
            case dict():
                return {key: filled(item) for key, item in value.items()}
        return value

    parsed: dict[str, Any] = filled(yaml.safe_load(file.read_text(encoding="utf-8")))
    return parsed


def example() -> dict[str, str]:
    """`.env.example` as a dictionary; secrets are empty there."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))  # type: ignore[misc]


@dataclass
class Deployment:
    """Services of the file as processes: their own commands and environments, with hosts, ports and folders replaced.

    Nothing of the caller's environment reaches them but what a process needs to run at all.
    """

    services: dict[str, Any]
    replace: dict[str, str]
    """What stands in commands and environments -> what stands for it outside containers."""
    folder: Path
    started: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)

    def start(self, service: str, number: int = 1) -> subprocess.Popen[bytes]:
        """Start a service's command. Its output goes to a file, see `output`."""
        log = self.log(service, number)
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(service),
                env=self.environment(service),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append((service, process))
        return process

    def command(self, service: str) -> list[str]:
        """The service's command on this machine."""
        program, *arguments = map(self._replaced, self.services[service]["command"])
        if program == "python":
            return [sys.executable, *arguments]
        found = shutil.which(program, path=Path(sys.executable).parent)
        assert found is not None, program
        return [found, *arguments]

    def environment(self, service: str) -> dict[str, str]:
        """The service's environment on this machine, and what Python and the shared cores need."""
        kept = ("PATH", "PYTHONPATH", "HOME", "LORA_SEARCH_CACHE", "LANG", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
        own = {key: self._replaced(value) for key, value in self.services[service]["environment"].items()}
        return {**{key: os.environ[key] for key in kept if key in os.environ}, "PYTHONUNBUFFERED": "1", **own}

    def wait_healthy(self, service: str, timeout_s: float = 600) -> None:
        """Until the service's own health check says so."""
        program, *arguments = map(self._replaced, self.services[service]["healthcheck"]["test"][1:])
        assert program == "python"
        deadline = time.monotonic() + timeout_s
        while subprocess.run([sys.executable, *arguments], capture_output=True, check=False).returncode:
            ended = [process.poll() for name, process in self.started if name == service]
            assert ended == [None] and time.monotonic() < deadline, self.output(service)
            time.sleep(0.5)

    def log(self, service: str, number: int = 1) -> Path:
        """Where a service's output goes."""
        return self.folder / f"{service}-{number}.log"

    def output(self, service: str, number: int = 1) -> str:
        """What the service printed."""
        return self.log(service, number).read_text(encoding="utf-8", errors="replace")

    def arguments(self) -> str:
        """What `ps` shows to everybody of all processes that were started, and of what they started."""
        lines = []
        for _, process in self.started:
            if process.poll() is None:
                root = psutil.Process(process.pid)
                for one in (root, *root.children(recursive=True)):
                    try:
                        lines.append(" ".join(one.cmdline()))
                    except psutil.NoSuchProcess:
                        continue
        return "\n".join(lines)

    def stop(self) -> None:
        """End what is left."""
        for _, process in reversed(self.started):
            if process.poll() is None:
                process.terminate()
        for _, process in reversed(self.started):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()

    def _replaced(self, text: str) -> str:
        for old, new in self.replace.items():
            text = text.replace(old, new)
        return text
