"""The checks of a checkpoint in this process, which has torch loaded: another one takes seconds to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from trainer.model import probe
from trainer.model.probe import Question


class NearProbe:
    """`Probe`, its questions through JSON as there, without the process."""

    def __init__(self, questions: Sequence[Question], devices: Sequence[str] = (), cuda: str | None = None) -> None:
        self._asked = json.loads(json.dumps(probe.as_asked(questions, devices)))

    def __enter__(self) -> NearProbe:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to end."""

    def answer(self) -> list[str]:
        return probe.answer_to(self._asked)
