"""Long attributes of trials, kept where optuna-dashboard does not show them.

It shows every user attribute of a trial on one line that does not break, and makes the page as wide as the longest:
7,293 pixels with a configuration as JSON (0.21). Our storage therefore writes them as system attributes, and shows
them as user attributes to whoever reads through it. Records of earlier versions have them as user attributes, and are
read as they are.
"""

from __future__ import annotations

import copy

from optuna.trial import FrozenTrial

from search import captions, records

PREFIX = "lora_search:"
"""Before the name of a system attribute that stands for a user attribute."""
LONG = frozenset(
    (
        *(records.CONFIG, records.FINDINGS, records.TRAIN_LOSSES, records.WORKER, records.OVERRIDES),
        *(records.DETAIL, records.NOTE, records.GIVEN_UP, captions.CAPTIONS),
    )
)
"""User attributes whose values are longer than a page is wide. A trial's note has what they say."""


def is_long(key: str) -> bool:
    """Whether a user attribute is kept out of sight."""
    return key in LONG


def shown(trial: FrozenTrial) -> None:
    """Give a trial that was read its long attributes as user attributes, and only as such."""
    for key in [key for key in trial.system_attrs if key.startswith(PREFIX)]:
        trial.user_attrs[key.removeprefix(PREFIX)] = trial.system_attrs.pop(key)


def hidden(trial: FrozenTrial) -> FrozenTrial:
    """A copy of a trial as it is stored."""
    stored = copy.copy(trial)
    stored.user_attrs = {key: value for key, value in trial.user_attrs.items() if not is_long(key)}
    long = {PREFIX + key: value for key, value in trial.user_attrs.items() if is_long(key)}
    stored.system_attrs = {**trial.system_attrs, **long}
    return stored
