"""What must be there before the first trial: model and data, checked once and without loading torch."""

from __future__ import annotations

from search.errors import StudyError
from search.study import Study
from trainer import dataset, locate
from trainer.config import TrainConfig
from trainer.dataset import Examined
from trainer.errors import DataError, ModelError


def check(study: Study) -> Examined:
    """Make sure the study's model and data can be used; returns the examined data folder.

    Raises:
        StudyError: everything that is missing, and how to get it, in one message.
    """
    config = study.base_config()
    problems = []
    try:
        locate.check(config.model)
    except ModelError as error:
        problems.append(_problem("model", str(error), study.get_model))
    examined = None
    try:
        examined = dataset.examine(config.data)
        for each in _configurations(study):
            if each.data == config.data:
                dataset.split(examined, each)
    except DataError as error:
        problems.append(_problem("data", str(error), study.get_data))
    if problems:
        lines = "\n".join(problems)
        hint = "\n`--study rsicap_mini` needs neither: its model and data are embedded." if study.get_data else ""
        raise StudyError(f"the study {study.name!r} cannot start:\n{lines}{hint}")
    assert examined is not None
    return examined


def _configurations(study: Study) -> list[TrainConfig]:
    """The base, and the trials given by hand: they may use other numbers of samples."""
    return [study.base_config(), *(TrainConfig.parse({**study.base, **fixed.config}) for fixed in study.enqueue)]


def _problem(what: str, message: str, remedy: str) -> str:
    lines = [f"  - {what}: {message}".replace("\n", "\n    ")]
    if remedy and ("does not exist" in message or "is no folder" in message):
        lines.append(f"    to get it: {remedy}")
    return "\n".join(lines)
