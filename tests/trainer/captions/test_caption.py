"""`trainer.caption`: equal to plain PEFT and Transformers; what it takes; bad images and bad adapters."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support import adapters, called, checkpoints
from trainer import caption
from trainer.captions.adapter import use_of
from trainer.captions.generate import Captioner, Decoding
from trainer.common.errors import CheckpointError
from trainer.data import dataset
from trainer.mini import CHECKPOINT
from trainer.model.base import load_base
from trainer.model.lora import Hooks

MODULES = {
    **dict.fromkeys(("mini", "t5"), ("query", "value", "q", "v")),
    "llama": ("query", "value", "q_proj", "v_proj"),
}
Call = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def call() -> Call:
    """`call(*arguments)`: (exit code, lines of standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        done = called.call(caption.app, [*map(str, arguments)])
        return done.code, done.out.splitlines(), done.err

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "below/c.png")):
        Image.effect_noise((70, 50), 40 + 30 * number).convert("RGB").save(folder / name)
    return folder


@pytest.fixture(scope="module", params=["mini", "t5", "llama"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(kind, checkpoint, adapter) of a small model with random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    model = CHECKPOINT if request.param == "mini" else checkpoints.write(folder / "model", request.param)
    base = load_base(str(model), dtype=torch.float32, device=torch.device("cpu"))
    adapter = adapters.write(base, folder / "adapter", target_modules=MODULES[request.param])
    return request.param, model, adapter


def plain(model: Path, adapter: Path | None, images: list[Path], instruction: str, **options: Any) -> list[str]:
    """Captions by Transformers and PEFT alone, one image at a time."""
    from peft import PeftModel
    from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

    processor = InstructBlipProcessor.from_pretrained(model)
    loaded: Any = InstructBlipForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(loaded, adapter).eval()
    found = []
    for image in images:
        inputs = processor(images=Image.open(image).convert("RGB"), text=instruction, return_tensors="pt")
        output = loaded.generate(**inputs, do_sample=False, **options)
        if loaded.config.use_decoder_only_language_model:
            assert output[0, : inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"][0].tolist()
            output = output[:, inputs["input_ids"].shape[1] :]
        found.append(" ".join(processor.tokenizer.decode(output[0], skip_special_tokens=True).split()))
    return found


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_plain_peft_and_transformers(
    call: Call, adapted: tuple[str, Path, Path], pictures: Path, beams: int
) -> None:
    kind, model, adapter = adapted
    images = [pictures / "a.png", pictures / "b.jpg"]
    options = ("--num-beams", beams, "--max-new-tokens", 12, "--instruction", "What is seen?")
    code, lines, errors = call(*images, "--adapter", adapter, *options)
    assert (code, errors) == (0, "")
    expected = plain(model, adapter, images, "What is seen?", num_beams=beams, max_new_tokens=12)
    assert lines == [f"{image}\t{text}" for image, text in zip(images, expected, strict=True)]
    assert len(set(expected)) == 2 or kind != "mini"  # random weights say the same of every image
    base = plain(model, None, images, "What is seen?", num_beams=beams, max_new_tokens=12)
    assert base != expected
    _, lines, _ = call(*images, "--model", model, *options)
    assert [line.partition("\t")[2] for line in lines] == base


def test_an_adapter_applied_by_hooks_captions_as_peft_does(adapted: tuple[str, Path, Path], pictures: Path) -> None:
    """The way in which a worker captions during a study, on the base that other trials are training on."""
    from trainer.captions.generate import Decoding
    from trainer.captions.hooked import hooked_captioner
    from trainer.config import TrainConfig
    from trainer.data.images import open_image

    kind, model, adapter = adapted
    images = [pictures / "a.png", pictures / "b.jpg"]
    expected = plain(model, adapter, images, "What is seen?", max_new_tokens=12, num_beams=1)
    base = load_base(str(model), dtype=torch.float32, device=torch.device("cpu"))
    config = TrainConfig.parse({"model": str(model), "lora_r": 4, "lora_alpha": 16, "target_modules": MODULES[kind]})
    others = Hooks(base.model)
    others.cover(name for name, _ in base.model.named_modules() if name.endswith(".query"))
    before = {name: vars(module).get("forward") for name, module in base.model.named_modules()}
    with hooked_captioner(base, config, adapter, Decoding(max_new_tokens=12)) as captioner:
        assert captioner([open_image(image) for image in images], "What is seen?") == expected
    assert {name: vars(module).get("forward") for name, module in base.model.named_modules()} == before
    others.remove()


def test_the_qformer_reads_as_much_of_an_instruction_as_in_training(
    call: Call, adapted: tuple[str, Path, Path], pictures: Path
) -> None:
    """Transformers ends with an IndexError where an instruction is longer than its position embeddings."""
    from transformers import InstructBlipConfig, InstructBlipProcessor

    _, model, adapter = adapted
    long = "Describe " + "the buildings and roads and trees and ships of this scene, " * 60
    code, lines, errors = call(pictures / "a.png", "--adapter", adapter, "--max-new-tokens", 3, "--instruction", long)
    assert (code, errors, len(lines)) == (0, "", 1)
    base = load_base(str(model), dtype=torch.float32, device=torch.device("cpu"))
    seen: list[torch.Tensor] = []
    base.model.qformer.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["input_ids"]), with_kwargs=True
    )
    captioner = Captioner(base.model, base.processor, torch.device("cpu"), torch.float32, Decoding(max_new_tokens=2))
    captioner([Image.open(pictures / "a.png").convert("RGB")], long)
    room = InstructBlipConfig.from_pretrained(model).qformer_config.max_position_embeddings
    tokens = InstructBlipProcessor.from_pretrained(model).qformer_tokenizer(long, truncation=True, max_length=room)
    assert seen[0].tolist() == [tokens["input_ids"]] and seen[0].shape[1] == room


def test_data_without_prompts_are_asked_what_the_adapter_learnt(
    call: Call, adapted: tuple[str, Path, Path], pictures: Path, tmp_path: Path
) -> None:
    _, _, adapter = adapted
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (own / "captioning.json").write_text(json.dumps({"instruction": "Which ground is it?"}))
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(pictures)
    (data / "rows.jsonl").write_text(
        '{"image": "a.png", "caption": "One."}\n{"image": "b.jpg", "caption": "Two.", "prompt": "What is it?"}\n'
    )
    code, lines, _ = call(data, "--adapter", own, "--max-new-tokens", 2, "--json")
    assert code == 0
    asked = {Path(found["image"]).name: found["instruction"] for found in map(json.loads, lines)}
    assert asked == {"a.png": "Which ground is it?", "b.jpg": "What is it?"}


def test_folders_patterns_and_data_folders_are_taken(
    call: Call, adapted: tuple[str, Path, Path], pictures: Path, tmp_path: Path
) -> None:
    _, model, _ = adapted
    short = ("--model", model, "--max-new-tokens", 2, "--batch-size", 2)
    for arguments in ([pictures], [f"{pictures}/**/*.*g"], [pictures / "a.png", pictures, f"{pictures}/*.png"]):
        code, lines, _ = call(*arguments, *short)
        assert code == 0
        assert sorted(line.partition("\t")[0] for line in lines) == sorted(str(f) for f in pictures.rglob("*.*g"))
    rows = [
        {"filename": "a.png", "text_input": "Describe it.", "text_output": "one"},
        {"filename": "b.jpg", "text_input": "What is it?", "text_output": "two", "split": "test"},
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    (tmp_path / "images").symlink_to(pictures)
    code, lines, _ = call(tmp_path, *short, "--json")
    assert code == 0
    found = [json.loads(line) for line in lines]
    assert [(each["instruction"], each["references"]) for each in found] == [
        ("Describe it.", ["one"]),
        ("What is it?", ["two"]),
    ]


def test_a_bad_image_is_named_and_the_others_are_captioned(
    call: Call, adapted: tuple[str, Path, Path], pictures: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "a.png").read_bytes()[:200])
    images = [pictures / "a.png", broken, pictures / "b.jpg"]
    code, lines, errors = call(*images, "--model", adapted[1], "--max-new-tokens", 2)
    assert code == 2
    assert [line.partition("\t")[0] for line in lines] == [str(images[0]), str(images[2])]
    assert errors.splitlines() == [
        f"error: {broken}: the image is truncated",
        "error: 1 of 3 images could not be captioned",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.png", "--model", "mini"], "there is no image, folder or pattern 'no.png'"),
        (["no*.png", "--model", "mini"], "no file matches 'no*.png'"),
        (["{pictures}"], "name an adapter (--adapter), or a model"),
        (["{pictures}", "--adapter", "nowhere"], "the adapter 'nowhere' has no adapter_config.json"),
        (["{pictures}", "--adapter", "{adapter}", "--model", "{other}"], "does not fit the model"),
        (
            ["{pictures}", "--model", "mini", "--repetition-penalty", "0"],
            "--repetition-penalty must be",
        ),
        (["{pictures}", "--model", "mini", "--repetition-penalty", "nan"], "--repetition-penalty must be"),
        (["{pictures}", "--model", "mini", "--length-penalty", "inf"], "--length-penalty must be finite"),
        (["{pictures}", "--model", "mini", "--instruction", " "], "--instruction is empty"),
        (["{pictures}", "--model", "mini", "--instruction", "<image> Describe"], "the instruction holds '<image>'"),
        (
            ["{pictures}", "--model", "mini", "--min-new-tokens", "9", "--max-new-tokens", "8"],
            "--min-new-tokens is 9, more than the longest caption has: 8",
        ),
    ],
)
def test_wrong_input_is_one_message(
    call: Call,
    adapted: tuple[str, Path, Path],
    pictures: Path,
    tiny_checkpoint: Path,
    arguments: list[str],
    message: str,
) -> None:
    given = [each.format(pictures=pictures, adapter=adapted[2], other=tiny_checkpoint) for each in arguments]
    code, lines, errors = call(*given)
    assert (code, lines) == (2, [])
    assert errors.startswith("error: ")
    assert message in errors


def test_a_checkpoints_adapter_says_how_to_use_it(bench: Any, small: Callable[..., Any], tmp_path: Path) -> None:
    from trainer.loop import train

    list(train(small(num_epochs=1, max_target_length=64), bench, tmp_path))
    folder = tmp_path / "checkpoints" / "epoch-0001"
    use = use_of(folder / "adapter")
    assert (use.max_new_tokens, use.torch_dtype) == (64, "float32")
    assert use.instruction in {row.prompt for row in dataset.examine("mini").rows}
    with pytest.raises(CheckpointError, match=r"did you mean '.*epoch-0001/adapter'"):
        use_of(folder)
