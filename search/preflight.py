"""Model, data and devices, checked once before the first trial; torch is loaded by another process, if at all."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from search.errors import StudyError
from search.space import Multiple
from search.study import Study
from trainer.common.errors import DataError, ModelError, UserError, shown
from trainer.config import EMBEDDED, TrainConfig
from trainer.data import dataset
from trainer.data.dataset import Examined
from trainer.data.loading import check_shared_memory, run_need
from trainer.data.splits import SplitFacts
from trainer.data.text import Text, check_text
from trainer.model import files, locate
from trainer.model.probe import Probe, Question

log = logging.getLogger("search.preflight")
REACHED = ("model", "device", "data", "max_samples", "skip_bad_rows", "split")
"""Fields whose every value in the space is tried before the first trial."""
LOADING = ("num_workers", "prefetch_factor", "batch_size", "eval_batch_size")
"""Fields that decide how much shared memory a trial takes; the more of each, the more."""


@dataclass(frozen=True)
class Checked:
    """What the checks found, each once, for the dry run, the log and MLflow."""

    examined: Examined
    split: SplitFacts
    """Of the base configuration."""
    text: Text | None
    """The same; None where the model's tokenizer is not at hand."""

    def lines(self) -> list[str]:
        """What the data are, how they are split, what the text is like, and what is odd about all of this."""
        layout = f"{self.examined.folder}: {self.examined.layout}"
        return [layout, *self.split.lines(), *(self.text.lines() if self.text else ())]

    def warnings(self) -> list[str]:
        """What is odd, a sentence each."""
        return [*self.split.warnings, *(self.text.warnings() if self.text else ())]

    def tags(self) -> dict[str, str]:
        """For the study's run in MLflow."""
        text = self.text.tags() if self.text else {}
        return {"data_fingerprint": self.examined.fingerprint, **self.split.tags(), **text}


def check(
    study: Study,
    cuda: str | None = None,
    at_once: int | None = 1,
    progress: Callable[[int, int], None] = dataset.quiet,
) -> Checked:
    """Check that the study's model, data and devices can be used.

    Args:
        study: whose base, trials given by hand and space are looked at.
        cuda: CUDA_VISIBLE_DEVICES of its workers, "" where they have no GPU; None if that is not known here.
        at_once: trials that run on this machine at the same time, at the least; None if they run elsewhere.
        progress: called with (images looked at, all of them) for each data folder.

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
        examined, splits, wrong = _examine(study, wanted, progress)
        problems += [_problem("model", problem, study.get_model) for problem in probe.answer()]
    problems += wrong
    problems += _tokenizer_problems(found)
    texts, unreadable = _texts(wanted, {checkpoint.name for checkpoint in found}, examined)
    problems += unreadable
    if not problems and at_once is not None:
        problems += _room_problems(study, wanted[0], found[0], splits[wanted[0].data], at_once)
    if problems:
        lines = "\n".join(problems)
        hint = "\n`--study rsicap_mini` needs neither: its model and data are embedded." if study.get_data else ""
        raise StudyError(f"the study {study.name!r} cannot start:\n{lines}{hint}")
    base = wanted[0]
    return Checked(examined[base.data], splits[base.data], texts[base.model, base.data])


def log_data(checked: Checked) -> None:
    """Write into the study's log what its data are."""
    for line in checked.lines():
        log.info("data: %s", line)


def _examine(
    study: Study, wanted: Sequence[TrainConfig], progress: Callable[[int, int], None]
) -> tuple[dict[str, Examined], dict[str, SplitFacts], list[str]]:
    """The data folders by name, how the first configuration on each splits it, and what is wrong with them."""
    problems: list[str] = []
    examined: dict[str, Examined] = {}
    splits: dict[str, SplitFacts] = {}
    for data in dict.fromkeys(config.data for config in wanted):
        try:
            examined[data] = dataset.examine(data, progress)
            for config in wanted:
                if config.data == data:
                    splits.setdefault(data, dataset.split(examined[data], config).facts)
        except DataError as error:
            problems.append(_problem("data", str(error), study.get_data))
    return examined, splits, list(dict.fromkeys(problems))


def _texts(
    wanted: Sequence[TrainConfig], models: set[str], examined: Mapping[str, Examined]
) -> tuple[dict[tuple[str, str], Text | None], list[str]]:
    """What the tokenizers make of the data, by (model, data), where both are there, and why some cannot be used."""
    found: dict[tuple[str, str], Text | None] = {}
    problems = []
    for config in wanted:
        key = (config.model, config.data)
        if key in found or config.data not in examined or config.model not in models:
            continue
        found[key] = None
        try:
            found[key] = check_text(examined[config.data].rows, config.model, config.max_target_length)
        except DataError as error:
            problems.append(_problem("data", f"{config.data}: {error}", ""))
        except ModelError as error:
            problems.append(_problem("model", str(error), ""))
    return found, problems


def _tokenizer_problems(found: Sequence[locate.Found]) -> Iterator[str]:
    """Losses are means over tokens: those of models that cut text into other tokens are not to be ranked together."""
    known = [(checkpoint.name, _vocabulary(checkpoint.folder / "tokenizer.json")) for checkpoint in found]
    known = [(name, vocabulary) for name, vocabulary in known if vocabulary is not None]
    for name, vocabulary in known[1:]:
        if vocabulary != known[0][1]:
            message = (
                f"{shown(known[0][0])} and {shown(name)} have different tokenizers, so that their losses, which are "
                "means over tokens, cannot be compared; make a study for each model"
            )
            yield _problem("model", message, "")


def _vocabulary(file: Path) -> object:
    """How a tokenizer cuts text; None if that is not in a file of this kind."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whoever reads the tokenizer says what is wrong with it


def _room_problems(
    study: Study, base: TrainConfig, checkpoint: locate.Found, split: SplitFacts, at_once: int
) -> Iterator[str]:
    """Too little shared memory for the DataLoader workers of the largest trial, or of the trials that run at once."""
    largest = _largest(study, base)
    try:
        size = files.pixel_bytes(checkpoint.folder)
        needs = [run_need(config, size, split.train, split.val_captions) for config in (largest, base)]
        check_shared_memory(needs[0], f"{2 * largest.num_workers} DataLoader workers of a trial")
        whose = f"{2 * base.num_workers * at_once} DataLoader workers of {at_once} trials at once"
        check_shared_memory(needs[1] * at_once, whose)
    except UserError as error:
        yield _problem("shared memory", str(error), "")


def _largest(study: Study, base: TrainConfig) -> TrainConfig:
    """The configuration of the study's space whose trial takes the most shared memory."""
    given = {**base.model_dump(), "micro_batch_size": None}
    values = dict(given)
    for name in LOADING:
        param = study.space.get(name)
        if param is not None and not isinstance(param, Multiple):
            read = (getattr(TrainConfig.parse({**given, name: edge}), name) for edge in param.edges())
            values[name] = max((value for value in read if value is not None), default=None)
    param = study.space.get("cache_features")
    if param is not None and not isinstance(param, Multiple) and False in param.edges():
        values["cache_features"] = False
    return TrainConfig.parse(values)


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


def _configurations(study: Study) -> list[TrainConfig]:
    """The base, the trials given by hand, and the base with each model, device and choice of rows that the space can
    give.

    For a range of `max_samples` its edges suffice: fewer rows cover fewer scenes.
    """
    base = study.base_config()
    found = [base, *(TrainConfig.parse({**study.base, **fixed.config}) for fixed in study.enqueue)]
    for name in REACHED:
        param = study.space.get(name)
        if param is not None and not isinstance(param, Multiple):
            found += [TrainConfig.parse({**study.base, name: edge}) for edge in param.edges()]
    return found


def _problem(what: str, message: str, remedy: str) -> str:
    lines = [f"  - {what}: {message}".replace("\n", "\n    ")]
    if remedy and re.search("does not exist|is (no|not a) folder", message):
        lines.append(f"    to get it: {remedy}")
    return "\n".join(lines)
