"""Model, data and devices, checked once before the first trial; torch is loaded by another process, if at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

from search.errors import StudyError
from search.space import Multiple
from search.study import Study
from trainer.common.errors import DataError, ModelError
from trainer.config import EMBEDDED, TrainConfig
from trainer.data import dataset
from trainer.data.dataset import Examined
from trainer.data.splits import SplitFacts
from trainer.data.text import Text, captions_of, check_text
from trainer.model import locate
from trainer.model.probe import Probe, Question

log = logging.getLogger("search.preflight")


def check(study: Study, cuda: str | None = None) -> Examined:
    """Check that the study's model, data and devices can be used; returns the examined data folder.

    Args:
        study: whose base, trials given by hand and space are looked at.
        cuda: CUDA_VISIBLE_DEVICES of its workers, "" where they have no GPU; None if that is not known here.

    Raises:
        StudyError: everything that is missing or wrong, and how to get it, in one message.
    """
    wanted = _configurations(study)
    found, problems = [], []
    for model in dict.fromkeys(config.model for config in wanted):
        try:
            found.append(locate.check(model))
        except ModelError as error:
            problems.append(_problem("model", str(error), study.get_model))
    with Probe(*_questions(wanted, found, cuda), cuda) as probe:  # it works while the data is examined
        examined, wrong = _examine(study, wanted)
        problems += [_problem("model", problem, study.get_model) for problem in probe.answer()]
    problems += wrong
    problems += _text_problems(wanted, {checkpoint.name for checkpoint in found}, examined)
    if problems:
        lines = "\n".join(problems)
        hint = "\n`--study rsicap_mini` needs neither: its model and data are embedded." if study.get_data else ""
        raise StudyError(f"the study {study.name!r} cannot start:\n{lines}{hint}")
    return examined[wanted[0].data]


def _examine(study: Study, wanted: Sequence[TrainConfig]) -> tuple[dict[str, Examined], list[str]]:
    """The data folders by name, and what is wrong with them."""
    problems = []
    examined: dict[str, Examined] = {}
    for data in dict.fromkeys(config.data for config in wanted):
        try:
            examined[data] = dataset.examine(data)
            for config in wanted:
                if config.data == data:
                    dataset.split(examined[data], config)
        except DataError as error:
            problems.append(_problem("data", str(error), study.get_data))
    return examined, problems


def _text_problems(wanted: Sequence[TrainConfig], models: set[str], examined: Mapping[str, Examined]) -> Iterator[str]:
    """What the tokenizers of the models that are there make of the data that is there, where it cannot be used."""
    for config in _readings(wanted):
        if config.data in examined and config.model in models:
            try:
                _text(config, examined[config.data])
            except DataError as error:
                yield _problem("data", f"{config.data}: {error}", "")
            except ModelError as error:
                yield _problem("model", str(error), "")


def _questions(
    wanted: Sequence[TrainConfig], found: Sequence[locate.Found], cuda: str | None
) -> tuple[list[Question], list[str]]:
    """What has to be asked of torch and Transformers: (about checkpoints, devices that have to be there).

    Not about the embedded model with the usual modules: its files are this program's own.
    """
    questions = []
    for checkpoint in found:
        targets = tuple(dict.fromkeys(c.target_modules for c in wanted if c.model == checkpoint.name))
        if checkpoint.name != EMBEDDED or targets != (TrainConfig().target_modules,):
            questions.append(Question(checkpoint, targets))
    devices = dict.fromkeys(c.device for c in wanted if c.device.startswith("cuda"))
    return questions, [] if cuda is None else list(devices)


def text_of(study: Study, examined: Examined) -> Text | None:
    """What the base configuration's tokenizer makes of the captions; None where it has no tokenizer.json at hand."""
    return _text(study.base_config(), examined)


def _text(config: TrainConfig, examined: Examined) -> Text | None:
    return check_text(captions_of(examined.rows), config.model, config.max_target_length)


def _readings(wanted: Sequence[TrainConfig]) -> list[TrainConfig]:
    """One configuration for each pair of model and data."""
    return list({(config.model, config.data): config for config in wanted}.values())


def log_data(study: Study, examined: Examined) -> SplitFacts:
    """Write into the study's log what its data are and how its base configuration splits them."""
    facts = dataset.split(examined, study.base_config()).facts
    for line in (f"{examined.folder}: {examined.layout}", *facts.lines()):
        log.info("data: %s", line)
    return facts


def _configurations(study: Study) -> list[TrainConfig]:
    """The base, the trials given by hand, and the base with each model, device and choice of rows that the space can
    give.

    For a range of `max_samples` its edges suffice: fewer rows cover fewer scenes.
    """
    base = study.base_config()
    found = [base, *(TrainConfig.parse({**study.base, **fixed.config}) for fixed in study.enqueue)]
    for name in ("model", "device", "data", "max_samples", "skip_bad_rows", "split"):
        param = study.space.get(name)
        if param is not None and not isinstance(param, Multiple):
            found += [TrainConfig.parse({**study.base, name: edge}) for edge in param.edges()]
    return found


def _problem(what: str, message: str, remedy: str) -> str:
    lines = [f"  - {what}: {message}".replace("\n", "\n    ")]
    if remedy and re.search("does not exist|is (no|not a) folder", message):
        lines.append(f"    to get it: {remedy}")
    return "\n".join(lines)
