"""Which tags MLflow's pages show. All are kept in its database; those that only programs read are kept out of sight.

MLflow shows every tag of a run that does not begin with `mlflow.`, and a trial has about fifty: machine, versions,
fingerprints, split. What explains a run is shown, `MOST` at most; the rest is stored under `HIDDEN`, read back under
its own name, and is for people one file of the run, `FACTS`. Records of earlier versions have all tags by their names.
"""

from __future__ import annotations

from collections.abc import Mapping

RECORD_ID = "record_id"
"""The run's id by `outbox.local_id`, under which it is found again if its creation was not answered."""
HIDDEN = "mlflow.lora_search."
"""Before the name of a tag that is not shown."""
FACTS = "facts.json"
"""The run's file with the tags that are not shown."""
MOST = 15
"""Tags of a trial that are shown, at most."""

OF_A_RUN = (
    *("kind", "study", "trial", "label", "state", "reason", "detail", "finding", "findings", "best_epoch"),
    *("stage", "repeat_of", "block", "resumes", "attempt", "from_trial", "full_data"),
)
OF_A_STUDY = ("summary", "best_trial", "verdict", "verdict.sentence", "verdict.trial")
SHOWN = frozenset((*OF_A_RUN, *OF_A_STUDY, RECORD_ID, "study_id"))
"""The last two are searched for by their names."""
SHOWN_PREFIX = "caption."
"""Tags of `search.evaluate`: which images its metrics are of."""


def outward(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as MLflow stores them."""
    return {key if _shown(key) else HIDDEN + key: value for key, value in tags.items()}


def inward(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as they were given to `outward`; of a run that an earlier version began, the later value counts."""
    plain = {key: value for key, value in tags.items() if not key.startswith(HIDDEN)}
    return {**plain, **{key.removeprefix(HIDDEN): value for key, value in hidden(tags).items()}}


def hidden(tags: Mapping[str, str]) -> dict[str, str]:
    """Those of MLflow's tags that are ours and not shown."""
    return {key: value for key, value in tags.items() if key.startswith(HIDDEN)}


def _shown(key: str) -> bool:
    return key in SHOWN or key.startswith((SHOWN_PREFIX, "mlflow."))
