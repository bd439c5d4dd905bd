"""`python -m trainer.run --set learning_rate=2e-4 --set lora_r=16`: train one configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer import preload
from trainer.common import cli, progress
from trainer.common.errors import UserError
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.dataset import Examined
from trainer.data.problems import grouped
from trainer.data.text import Text, check_text
from trainer.model import locate

if TYPE_CHECKING:
    from trainer.events import Event

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field of the configuration.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints; a run found there is continued.")] = Path(
        "runs/train"
    ),
    show: Annotated[bool, typer.Option("--show", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train one configuration of LoRA on an InstructBLIP and print its losses by epoch.

    Exit codes: 0 all epochs done, 2 wrong input (one message, nothing written), 3 ended early: losses or gradients
    that were not finite, or out of memory.
    """
    config = TrainConfig.parse_settings(settings or [])
    if show:
        print(json.dumps(config.model_dump(mode="json"), indent=1))
        return
    with progress.bar("looking at images") as looked:
        examined, text = _check(config, looked)
    preload.import_libraries()
    from trainer import events
    from trainer.checkpoint import folder_of
    from trainer.loop import history_of, train
    from trainer.workbench import Workbench

    for line in text.lines() if text is not None else ():
        print(line)
    # Epochs of an earlier run in this folder come first.
    epochs = history_of(config, out)
    for epoch in epochs:
        print(f"{_line(epoch)}  (from the checkpoint)")
    ended_early = False
    for event in train(config, Workbench(examined, config.data), out):
        line = _line(event)
        if line:
            print(line, flush=True)
        if isinstance(event, events.EpochEnded):
            epochs.append(event)
        ended_early = isinstance(event, events.Diverged | events.OutOfMemory)
    best = min((e for e in epochs if math.isfinite(e.val_loss)), key=lambda e: e.val_loss, default=None)
    if best is not None:
        print(
            f"Best: epoch {best.epoch}, Val={best.val_loss:.4f}; adapter in {folder_of(out, best.epoch) / 'adapter'}"
        )
    if ended_early:
        raise typer.Exit(3)


def _check(config: TrainConfig, looked: Callable[[int, int], None]) -> tuple[Examined, Text | None]:
    """Examine model and data before torch is loaded: the data, and what the model's tokenizers make of their text.

    Raises:
        UserError: everything that is wrong with either, in one message.
    """
    problems: list[UserError] = []
    try:
        locate.check(config.model)
    except UserError as error:
        problems.append(error)
    text = None
    try:
        examined = dataset.examine(config.data, looked)
        dataset.split(examined, config)
        if not problems:
            text = check_text(examined.rows, config.model, config.max_target_length)
    except UserError as error:
        problems.append(error)
    if problems:
        raise UserError("\n".join(str(problem) for problem in problems))
    return examined, text


def _line(event: Event) -> str:
    """The line to print for an event; empty for a single step that was finite."""
    from trainer import events

    match event:
        case events.RunStarted():
            damaged = "".join(f"not used, damaged: {problem}\n" for problem in event.damaged_checkpoints)
            skipped = "".join(f"{line}\n" for line in grouped(event.skipped_rows, "skipped: "))
            split = "".join(f"{line}\n" for line in event.data_lines)
            return (
                damaged
                + skipped
                + split
                + (
                    f"{event.num_train_samples} training and {event.num_val_samples} validation samples, "
                    f"{event.total_steps} steps; LoRA on {len(event.adapted_modules)} modules, "
                    f"{event.trainable_parameters:,} parameters; {event.device}"
                )
            )
        case events.EpochEnded():
            return (
                f"Epoch {event.epoch}: Train={event.train_loss:.4f}, Val={event.val_loss:.4f}  "
                f"(rate {event.learning_rate:.2e}, gradient norm {event.grad_norm_mean:.3g}, "
                f"{event.timing.epoch_s:.1f} s)"
            )
        case events.StepEnded(nonfinite=bad) if bad is not None:
            return f"Step {event.step}: {bad.tensor} is {bad.value}; {bad.detail}"
        case events.Diverged():
            return f"Ended at step {event.step}: not finite since step {event.first_bad_step}"
        case events.MicroBatchReduced():
            return f"Step {event.step}: memory ran out; micro-batches of {event.micro_batch_size} from here"
        case events.OutOfMemory():
            return f"Ended at step {event.step}: memory ran out even with single samples ({event.detail})"
    return ""


if __name__ == "__main__":
    cli.run(app)
