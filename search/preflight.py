"""Model and data, checked once before the first trial and without loading torch."""

from __future__ import annotations

import logging
import re

from search.errors import StudyError
from search.space import Multiple
from search.study import Study
from trainer.common.errors import DataError, ModelError
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.dataset import Examined
from trainer.data.splits import SplitFacts
from trainer.model import locate

log = logging.getLogger("search.preflight")


def check(study: Study) -> Examined:
    """Check that the study's model and data can be used; returns the examined data folder.

    Raises:
        StudyError: everything that is missing or wrong, and how to get it, in one message.
    """
    wanted = _configurations(study)
    problems = []
    for model in dict.fromkeys(config.model for config in wanted):
        try:
            locate.check(model)
        except ModelError as error:
            problems.append(_problem("model", str(error), study.get_model))
    examined: dict[str, Examined] = {}
    for data in dict.fromkeys(config.data for config in wanted):
        try:
            examined[data] = dataset.examine(data)
            for config in wanted:
                if config.data == data:
                    dataset.split(examined[data], config)
        except DataError as error:
            problems.append(_problem("data", str(error), study.get_data))
    if problems:
        lines = "\n".join(problems)
        hint = "\n`--study rsicap_mini` needs neither: its model and data are embedded." if study.get_data else ""
        raise StudyError(f"the study {study.name!r} cannot start:\n{lines}{hint}")
    return examined[wanted[0].data]


def log_data(study: Study, examined: Examined) -> SplitFacts:
    """Write into the study's log what its data are and how its base configuration splits them."""
    facts = dataset.split(examined, study.base_config()).facts
    for line in (f"{examined.folder}: {examined.layout}", *facts.lines()):
        log.info("data: %s", line)
    return facts


def _configurations(study: Study) -> list[TrainConfig]:
    """The base, the trials given by hand, and the base with each model and choice of rows that the space can give.

    For a range of `max_samples` its edges suffice: fewer rows cover fewer scenes.
    """
    base = study.base_config()
    found = [base, *(TrainConfig.parse({**study.base, **fixed.config}) for fixed in study.enqueue)]
    for name in ("model", "data", "max_samples", "skip_bad_rows", "split"):
        param = study.space.get(name)
        if param is not None and not isinstance(param, Multiple):
            found += [TrainConfig.parse({**study.base, name: edge}) for edge in param.edges()]
    return found


def _problem(what: str, message: str, remedy: str) -> str:
    lines = [f"  - {what}: {message}".replace("\n", "\n    ")]
    if remedy and re.search("does not exist|is (no|not a) folder", message):
        lines.append(f"    to get it: {remedy}")
    return "\n".join(lines)
