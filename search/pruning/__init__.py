"""When a trial stops before its last epoch.

rules     on its own curve: a rising loss, both losses jumping up
pruners   the outcome: PRUNED, COMPLETE with the best value reached, or WAITING where a plan pauses it
choice    what `--pruner` can name
"""

from search.pruning.choice import (
    PRUNERS,
    Kind,
    check_name,
    default_pruner,
    help_text,
    make_pruner,
    pruner_for,
)
from search.pruning.pruners import (
    MIN_PEERS,
    HalvingPruner,
    PausingPruner,
    RisingLossPruner,
    best_value,
    plan_of,
    settled,
    verdict,
)
from search.pruning.rules import diverged, rising

__all__ = [
    "MIN_PEERS",
    "PRUNERS",
    "HalvingPruner",
    "Kind",
    "PausingPruner",
    "RisingLossPruner",
    "best_value",
    "check_name",
    "default_pruner",
    "diverged",
    "help_text",
    "make_pruner",
    "plan_of",
    "pruner_for",
    "rising",
    "settled",
    "verdict",
]
