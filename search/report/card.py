"""The model card of an exported adapter, in the form of the Hugging Face hub: figures with their trial, run, epoch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.diagnosis import messages
from search.markdown import escape
from search.records import TrialRecord, score_of
from search.report.facts import Facts
from search.tracking.client import as_text
from search.verdict import text
from search.verdict.leaders import winner
from trainer.config import TrainConfig

TEMPLATE = Path(__file__).with_name("templates") / "model-card.md.jinja"
METRICS = {
    "bleu_1": ("bleu", "BLEU-1"),
    "bleu_2": ("bleu", "BLEU-2"),
    "bleu_3": ("bleu", "BLEU-3"),
    "bleu_4": ("bleu", "BLEU-4"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "cider_d": ("cider", "CIDEr-D"),
}
"""(the hub's type, name) of our metrics."""


@dataclass(frozen=True, kw_only=True)
class Handed:
    """What is exported, beside the study's own facts."""

    trial: TrialRecord
    base: str
    """The base as whoever loads the adapter names it: a hub id, or a folder."""
    revision: str | None
    """Commit of a hub id."""
    decoder_only: bool
    instruction: str
    max_new_tokens: int
    evaluations: Mapping[str, Mapping[str, Any]]
    """As `search.evaluation.candidates` records them, those of this trial."""
    curves: str | None
    """File of the plot of losses."""
    evaluate: str
    """Command that measures."""
    replay: str


def card(facts: Facts, handed: Handed) -> str:
    """The card: YAML for the hub, then Markdown."""
    from jinja2 import Environment

    trial = handed.trial
    title = f"{facts.record.name}: trial {trial.number}"
    environment = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    found = facts.experiment(trial.number).findings
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        study=facts.record.name,
        trial=trial,
        base=handed.base,
        revision=handed.revision,
        code=usage(handed),
        verdict=verdict(facts, trial),
        curves=handed.curves,
        findings=[escape(messages.sentence(finding)) for finding in found],
        evaluations=[_evaluation(each, trial) for each in handed.evaluations.values()],
        evaluate=handed.evaluate,
        replay=handed.replay,
        data=_data(facts, trial),
        config=json.dumps(trial.config, indent=1),
        train=command(trial),
    )
    return f"---\n{_metadata(facts, handed)}---\n\n{body}"


def usage(handed: Handed) -> str:
    """Code that captions an image with the exported adapter, without this project."""
    cut = ""
    if handed.decoder_only:
        cut = '\noutput = output[:, inputs["input_ids"].shape[1] :]  # without the instruction'
    asked = f'text={_quoted(handed.instruction)}, return_tensors="pt"'
    dtype = handed.trial.config["torch_dtype"]
    revision = f", revision={_quoted(handed.revision)}" if handed.revision else ""
    return f"""import torch
from peft import AutoPeftModel
from PIL import Image
from transformers import InstructBlipProcessor

model = AutoPeftModel.from_pretrained(".", dtype=torch.{dtype}).eval()
processor = InstructBlipProcessor.from_pretrained({_quoted(handed.base)}{revision})
image = Image.open("image.png").convert("RGB")
inputs = processor(images=image, {asked}).to(model.dtype)
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens={handed.max_new_tokens}, num_beams=1, do_sample=False){cut}
print(processor.tokenizer.decode(output[0], skip_special_tokens=True))"""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def verdict(facts: Facts, trial: TrialRecord) -> str:
    """Why this trial, with what is not known, and what the study's repeats say."""
    best, named = facts.best, winner(facts.record.trials, facts.verdict)
    if trial.value is None:
        return f"Trial {trial.number} was named by hand; it has no validation loss."
    told = f"Lowest validation loss {trial.value:.4f} at epoch {trial.best_epoch}"
    score = score_of(trial.attrs)
    if score is not None and named is not None and trial.number == named.number:
        return (
            f"CIDEr-D {score:.4f} of the validation captions (greedy): the highest of the study, which ranks its "
            f"trials by it. {told}."
        )
    if named is None or best is None or trial.number not in (named.number, best.best.number):
        return f"{told}. Trial {trial.number} was named by hand; it is not the study's best."
    if trial.number != best.best.number:
        lines = [
            f"{told}. That of trial {best.best.number} is the lowest of {best.compared} trials that completed on the "
            f"same rows ({best.best.value or 0:.4f}), but repeats decided for trial {trial.number}."
        ]
        return "\n".join([*lines, *_repeated(facts)])
    lines = [f"{told}: the lowest of {best.compared} trials that completed on the same rows."]
    if best.runner_up is not None and best.gap is not None:
        lines.append(
            f"The next is trial {best.runner_up.number} with {best.runner_up.value or 0:.4f}, {100 * best.gap:.1f} % "
            f"above; losses move by {100 * facts.noise.difference:.1f} % by chance."
        )
    if best.within_noise:
        listed = ", ".join(map(str, best.within_noise))
        lines.append(f"Not shown to be better than trial {listed}: the difference is within that noise.")
    return "\n".join([" ".join(lines), *_repeated(facts)])


def _repeated(facts: Facts) -> list[str]:
    """The verdict, with each candidate's interval of how far it lies behind the one that is named."""
    found = facts.verdict
    if found is None or not found.standings:
        return []
    about = f"The leaders were trained again with other seeds and splits. Verdict: {text.sentence(found)}."
    tested = [] if facts.tested is None else ["", f"{facts.tested.sentence()}."]
    return ["", about, "", *(f"- {line}" for line in text.table(found)), *tested]


def command(trial: TrialRecord) -> str:
    """`trainer.run` with every field that differs from its default."""
    defaults = TrainConfig.model_fields
    config = TrainConfig.parse(trial.config)
    words = ["python", "-m", "trainer.run"]
    for name, value in config.model_dump().items():
        if value != defaults[name].default:
            words += ["--set", f"{name}={as_text(value)}"]
    return shlex.join(words)


def _data(facts: Facts, trial: TrialRecord) -> str:
    tags = trial.tags
    sizes = (
        f"{tags['num_train_samples']} training and {tags['num_val_samples']} validation samples, "
        if "num_train_samples" in tags
        else ""
    )
    prints = facts.record.attrs.get("fingerprints") or {}
    names = Path(str(trial.config.get("data"))).name
    listed = "".join(f"; fingerprint of the {what} `{value}`" for what, value in sorted(prints.items()))
    rule = tags.get("split.rule") or trial.config.get("split", "auto")
    return f"Data `{escape(names)}`: {sizes}split by {rule}, seed {trial.config.get('split_seed')}{listed}."


def _evaluation(found: Mapping[str, Any], trial: TrialRecord) -> dict[str, Any]:
    rows = []
    for name in ("base", str(trial.number)):
        values = found["candidates"].get(name)
        if values is not None:
            cells = [f"{values[m]['value']:.3f} ({values[m]['low']:.3f} to {values[m]['high']:.3f})" for m in METRICS]
            rows.append(["base" if name == "base" else f"trial {name}", *cells])
    lines = [
        f"Against the base: CIDEr-D {d['cider_d']['value']:+.3f} ({d['cider_d']['low']:+.3f} to "
        f"{d['cider_d']['high']:+.3f}), p = {d['cider_d']['p']:.3f}."
        for d in found["differences"]
        if d["of"] == str(trial.number) and d["against"] == "base"
    ]
    lines += [f"Note: {found['disagreement']}." for _ in range(1) if found.get("disagreement")]
    lines += [f"Beware: {warning}." for warning in found["warnings"]]
    names = [name for _, name in METRICS.values()]
    where = {"where": escape(found["where"]), "fingerprint": found["fingerprint"]}
    return {**where, "names": names, "table": rows, "lines": lines}


def _metadata(facts: Facts, handed: Handed) -> str:
    """The card's YAML as the hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-to-text",
            task_name="Image captioning",
            dataset_type="image-captions",
            dataset_name=f"{Path(str(handed.trial.config.get('data'))).name}, {found['where'].rpartition(' of ')[0]}",
            dataset_split=found["rows"],
            metric_type=kind,
            metric_name=name,
            metric_value=round(found["candidates"][str(handed.trial.number)][metric]["value"], 4),
        )
        for found in handed.evaluations.values()
        for metric, (kind, name) in METRICS.items()
    ]
    data = ModelCardData(
        base_model=handed.base,
        library_name="peft",
        pipeline_tag="image-to-text",
        tags=["lora", "instructblip", "image-captioning"],
        model_name=f"{facts.record.name}-{handed.trial.number}",
        eval_results=results or None,
    )
    return f"{data.to_yaml()}\n# To fill in:\n# license: apache-2.0\n# datasets: [ORGANISATION/NAME]\n"
