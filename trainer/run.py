"""`python -m trainer.run --set learning_rate=2e-4 --set lora_r=16`: train one configuration."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer import preload
from trainer.common import cli, progress
from trainer.common.errors import ConfigError, UserError
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
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints; a run found there is continued. [runs/train]")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved configuration and stop.")] = False,
    from_study: Annotated[
        str | None, typer.Option(help="Begin from the configuration of a study's winner; recorded in MLflow.")
    ] = None,
    trial: Annotated[int | None, typer.Option(min=0, help="With --from-study: another trial than the winner.")] = None,
    full_data: Annotated[
        bool, typer.Option("--full-data", help="With --from-study: all rows, for the epochs that the study found.")
    ] = False,
    storage: Annotated[str | None, typer.Option(envvar="LORA_SEARCH_STORAGE", help="With --from-study.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="LORA_SEARCH_TRACKING_URI", help="With --from-study.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="With --from-study: the runs folder.")] = Path("runs"),
) -> None:
    """Train one configuration of LoRA on an InstructBLIP and print its losses by epoch.

    Exit codes: 0 all epochs done, 2 wrong input (one message, nothing written), 3 ended early: losses or gradients
    that were not finite, or out of memory.
    """
    if from_study is not None:
        # By name: the search needs the trainer, which works without it.
        retrain = importlib.import_module("search.retrain")
        ended_early = retrain.run(
            from_study,
            trial,
            full_data=full_data,
            settings=settings or [],
            out=out,
            show=show,
            places=retrain.Places.of(runs_dir, storage, tracking_uri),
        )
        raise typer.Exit(3 if ended_early else 0)
    if trial is not None or full_data:
        raise ConfigError("--trial and --full-data belong to a study; name it with --from-study")
    config = TrainConfig.parse_settings(settings or [])
    if show:
        print(json.dumps(config.model_dump(mode="json"), indent=1))
        return
    examined, text = check(config)
    if follow(config, out or Path("runs/train"), examined, text=text):
        raise typer.Exit(3)


def follow(
    config: TrainConfig,
    out: Path,
    examined: Examined,
    record: Callable[[Event], None] = lambda event: None,
    text: Text | None = None,
) -> bool:
    """Train a configuration to its end and print its losses; whether it ended early.

    Args:
        config: to train.
        out: folder for checkpoints.
        examined: the data folder, see `check`.
        record: called with each event, those of a checkpoint's epochs included.
        text: what the tokenizers make of the captions, printed once training begins.

    Raises:
        UserError: model, data or checkpoint cannot be used.
    """
    preload.import_libraries()
    from trainer import events
    from trainer.checkpoint import folder_of
    from trainer.loop import history_of, train
    from trainer.workbench import Workbench

    # Epochs of an earlier run in this folder come first.
    epochs = history_of(config, out)
    for epoch in epochs:
        record(epoch)
        print(f"{_line(epoch)}  (from the checkpoint)")
    ended_early = False
    for event in train(config, Workbench(examined, config.data), out):
        record(event)
        line = _line(event)
        if line:
            print(line, flush=True)
        if isinstance(event, events.RunStarted) and text is not None:
            print("\n".join(text.lines()), flush=True)
        if isinstance(event, events.EpochEnded):
            epochs.append(event)
        ended_early = isinstance(event, events.Diverged | events.OutOfMemory)
    if config.full_data and epochs:
        print(
            f"Trained on all rows: the adapter of the last epoch is in {folder_of(out, epochs[-1].epoch) / 'adapter'}"
        )
        return ended_early
    best = min((e for e in epochs if math.isfinite(e.val_loss)), key=lambda e: e.val_loss, default=None)
    if best is not None:
        print(
            f"Best: epoch {best.epoch}, Val={best.val_loss:.4f}; adapter in {folder_of(out, best.epoch) / 'adapter'}"
        )
    return ended_early


def check(config: TrainConfig) -> tuple[Examined, Text | None]:
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
        with progress.bar("looking at images") as looked:
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
