"""The checks of a checkpoint that need torch and Transformers, made in a process of their own.

A search makes them before it creates anything, while its data is examined: without that process, its own would have to
import both, half a gigabyte for as long as it runs. No weight is read; the headers of the files suffice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common.errors import UserError
from trainer.common.imports import own_path, without_collection, without_module
from trainer.model.locate import Found


@dataclass(frozen=True)
class Question:
    """A checkpoint, and the `target_modules` that it has to have."""

    found: Found
    targets: tuple[tuple[str, ...], ...]


class Probe:
    """The process with its questions; a context that ends it."""

    def __init__(self, questions: Sequence[Question], devices: Sequence[str] = (), cuda: str | None = None) -> None:
        """Start it, if there is anything to ask.

        Args:
            questions: about checkpoints.
            devices: names of `TrainConfig.device` that there have to be.
            cuda: CUDA_VISIBLE_DEVICES where they have to be; None to leave it as it is.
        """
        asked = json.dumps(as_asked(questions, devices))
        seen = {} if cuda is None else {"CUDA_VISIBLE_DEVICES": cuda}
        self._process: subprocess.Popen[str] | None = None
        if not questions and not devices:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from trainer.model.probe import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **own_path(), **seen, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        stdin, self._process.stdin = self._process.stdin, None  # written now, so that it works until `answer`
        assert stdin is not None
        with suppress(BrokenPipeError), stdin:
            stdin.write(asked)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def answer(self) -> list[str]:
        """Everything that is wrong, when the process has found it; empty if nothing is.

        Raises:
            RuntimeError: the process ended by a fault, of which it says the last.
        """
        if self._process is None:
            return []
        answered, said = self._process.communicate()
        if self._process.returncode != 0:
            raise RuntimeError(f"the check of the model ended with code {self._process.returncode}:\n{said[-2000:]}")
        found: list[str] = json.loads(answered.splitlines()[-1])
        return found


def as_asked(questions: Sequence[Question], devices: Sequence[str]) -> dict[str, Any]:
    """The questions as `answer_to` takes them, and as JSON has them."""
    models = [
        {"name": q.found.name, "folder": str(q.found.folder), "shapes": q.found.shapes, "targets": q.targets}
        for q in questions
    ]
    return {"models": models, "devices": list(devices)}


def main() -> None:
    """The process: questions from standard input as JSON, the answer as the last line of standard output."""
    print(json.dumps(answer_to(json.load(sys.stdin))), flush=True)
    os._exit(0)  # without a second of taking torch's modules apart


def answer_to(asked: dict[str, Any]) -> list[str]:
    """Everything that is wrong, found in this process."""
    problems: list[str] = []
    for model in asked["models"]:
        problems += _model_problems(**model)
    if asked["devices"]:
        from trainer.runtime import resolve_device

        for device in asked["devices"]:
            try:
                resolve_device(device)
            except UserError as error:
                problems.append(str(error))
    return problems


def _model_problems(name: str, folder: str, shapes: Any, targets: Sequence[Sequence[str]]) -> list[str]:
    with without_collection(), without_module("scipy"):  # as in trainer.preload
        from trainer.model import files, peft_format, tokens, weights
        from trainer.model.base import open_processor
    problems = []
    try:
        config, processor = open_processor(name, Path(folder))
    except UserError as error:
        return [str(error)]
    try:
        tokens.check(name, processor, config)
    except UserError as error:
        problems.append(str(error))
    try:
        if shapes is None:
            shapes = files.shapes(Path(folder))
        model = weights.check_headers(name, config, shapes, untied=files.has_own_head(Path(folder)))
    except UserError as error:
        return [*problems, str(error)]
    for each in targets:
        try:
            peft_format.resolve_targets(model, each)
        except UserError as error:
            problems.append(f"the model {name!r}: {error}")
    return problems
