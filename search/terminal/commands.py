"""`lora-search COMMAND ...`: the console script, with the commands of `python -m search.*` and `trainer.run`.

Unlike `python -m`, it does not look for modules in the current folder: a user's `trainer.py` does no harm.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial

from trainer.common import cli
from trainer.common.errors import UserError, nearest, shown

COMMANDS = {
    "run": ("search.run", "search hyperparameters; run again to continue a study"),
    "confirm": ("search.confirm", "train the leaders of a study again with other seeds, for a verdict"),
    "report": ("search.report.__main__", "write the tuning log from the records"),
    "compare": ("search.compare", "studies side by side: space, budget, verdicts, best, what they share"),
    "replay": ("search.replay", "train a trial again, and compare every loss"),
    "deliver": ("search.deliver", "deliver to MLflow what it did not take while it was away"),
    "evaluate": ("search.evaluate", "BLEU, ROUGE-L and CIDEr-D of a study's best trials and of the base"),
    "export": ("search.export", "the winner's adapter with a model card, for PEFT and the hub"),
    "diagnose": ("search.diagnose", "findings from recorded loss curves"),
    "clean": ("search.clean", "what checkpoints and old generations of a study take, and what could go"),
    "ui": ("search.ui", "MLflow's pages and optuna-dashboard together"),
    "dashboard": ("search.dashboard", "optuna-dashboard behind a check of names, origins and a password"),
    "check": ("trainer.data.check", "look at a data folder: what is wrong, cut, repeated, or there twice"),
    "caption": ("trainer.caption", "caption images with an adapter, or with the base alone"),
    "train": ("trainer.run", "one configuration, without a search"),
}
"""(module with a Typer `app`, what it does) by command."""


def main() -> None:
    """The console script's entrance."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        cli.run(_help)
        return
    if name not in COMMANDS:
        cli.run(partial(_unknown, name))
    module = importlib.import_module(COMMANDS[name][0])
    sys.argv[:2] = [f"lora-search {name}"]
    cli.run(partial(module.app, prog_name=sys.argv[0]), getattr(module, "log_file", lambda: None))


def _help() -> None:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    print("\n".join(["Usage: lora-search COMMAND [OPTIONS]", "", *lines, "", "lora-search COMMAND --help says more."]))


def _unknown(name: str) -> None:
    raise UserError(
        f"there is no command {shown(name)}{nearest(name, COMMANDS)}; known commands: {', '.join(COMMANDS)}"
    )
