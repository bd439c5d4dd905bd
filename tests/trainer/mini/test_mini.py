"""The embedded model and data: complete, small, seeded, in RSICap's format, and not blind."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

from tests.support import template
from trainer import mini
from trainer.mini import scenes
from trainer.mini.captions import SLOTS, Voice, caption
from trainer.mini.drawing import TILE_PIXELS
from trainer.mini.vocabulary import KINDS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mini") / "data"
    scenes.write_dataset(out, scenes=24, tiles_per_scene=3, seed=7, style=scenes.STUDY)
    return out


@pytest.fixture(scope="module")
def rows(data: Path) -> list[dict[str, str]]:
    return json.loads((data / "captions.json").read_text())["annotations"]


@pytest.fixture(scope="module")
def model() -> InstructBlipForConditionalGeneration:
    return InstructBlipForConditionalGeneration.from_pretrained(mini.CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> InstructBlipProcessor:
    return InstructBlipProcessor.from_pretrained(mini.CHECKPOINT)


def mode_of(data: Path, name: str) -> str:
    with Image.open(data / "images" / name) as image:
        return image.mode


def test_rows_are_rsicaps(data: Path, rows: list[dict[str, str]]) -> None:
    assert len(rows) == 24 * 3
    assert [row["image_id"] for row in rows] == [str(i) for i in range(len(rows))]
    for row in rows:
        assert list(row) == ["image_id", "filename", "text_input", "text_output"]
        assert len(row["text_output"].split(". ")) >= 2
        with Image.open(data / "images" / row["filename"]) as image:
            assert image.size == (TILE_PIXELS, TILE_PIXELS)
            assert image.mode in ("RGB", "L")


def test_tiles_of_a_scene_share_their_number_and_sensor(data: Path, rows: list[dict[str, str]]) -> None:
    modes = defaultdict(set)
    for row in rows:
        scene, tile = row["filename"].removesuffix(".png").split("_")
        assert scene.startswith("P") and len(scene) == 5 and tile in ("0001", "0002", "0003")
        modes[scene].add(mode_of(data, row["filename"]))
    assert len(modes) == 24
    assert all(len(found) == 1 for found in modes.values())


def test_the_quirks_of_the_real_set_are_there(data: Path, rows: list[dict[str, str]]) -> None:
    texts = [row["text_output"] for row in rows]
    assert any("  " in text for text in texts)
    assert any(text.endswith(" ") for text in texts)
    named = {row["filename"] for row in rows}
    present = {path.name for path in (data / "images").iterdir()}
    assert named < present
    assert ".DS_Store" in present
    assert any(name.endswith(".png") for name in present - named)
    assert {mode_of(data, name) for name in named} == {"RGB", "L"}


def test_same_seed_same_bytes_other_seed_others(data: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    for name, seed in (("same", 7), ("other", 8)):
        scenes.write_dataset(tmp_path / name, scenes=24, tiles_per_scene=3, seed=seed, style=scenes.STUDY)
    assert content(tmp_path / "same") == content(data)
    assert content(tmp_path / "other") != content(data)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_and_told(kind: str) -> None:
    rng = random.Random(0)
    for _ in range(10):
        scene = scenes.sample_scene(scenes.STUDY, rng, kind)
        tile = scenes.sample_tile(scene, scenes.STUDY, rng)
        assert tile.image.mode == ("L" if tile.facts.panchromatic else "RGB")
        assert len(tile.spots) == tile.facts.count
        words = tile.caption.lower()
        assert any(name in words for name in KINDS[kind].names)


def test_a_loyal_voice_always_chooses_its_wording_and_a_fickle_one_any() -> None:
    facts = scenes.sample_scene(scenes.STUDY, random.Random(0)).facts
    preferred = (0,) * len(SLOTS)
    rng = random.Random(0)
    assert len({caption(facts, Voice(preferred, 1.0), rng) for _ in range(20)}) == 1
    assert len({caption(facts, Voice(preferred, 0.0), rng) for _ in range(20)}) > 10


def test_the_studys_style_is_none_of_the_archives() -> None:
    assert scenes.STUDY.look not in [style.look for style in scenes.ARCHIVES]
    assert scenes.STUDY.voice.preferred not in [style.voice.preferred for style in scenes.ARCHIVES]
    # Every wording the study prefers is one the language model has met: it is frozen in the studies.
    for slot, wording in enumerate(scenes.STUDY.voice.preferred):
        assert wording in {style.voice.preferred[slot] for style in scenes.ARCHIVES}


def test_the_generator_needs_pillow_alone() -> None:
    heavy = ("torch", "transformers", "numpy")
    code = f"import sys, trainer.mini.scenes; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ensure_data_generates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    first = mini.ensure_data()
    assert first.parent == tmp_path / "cache"
    rows = json.loads((first / "captions.json").read_text())["annotations"]
    assert len(rows) == mini.STUDY_SCENES * mini.STUDY_TILES_PER_SCENE
    assert max(Counter(row["text_output"] for row in rows).values()) == 1
    before = (first / "captions.json").stat().st_mtime_ns
    assert mini.ensure_data() == first
    assert (first / "captions.json").stat().st_mtime_ns == before
    assert [path.name for path in first.parent.iterdir()] == [first.name]


@pytest.mark.long
def test_two_at_once_get_the_same_complete_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path))
    found = []
    threads = [threading.Thread(target=lambda: found.append(mini.ensure_data())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [found[0].name]


def test_a_failed_generation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path))

    def fail(out: Path, **_: object) -> None:
        (out / "images").mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "write_dataset", fail)
    with pytest.raises(OSError, match="disk full"):
        mini.ensure_data()
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_is_small_and_float16_on_disk() -> None:
    from safetensors import safe_open

    files = [path for path in mini.CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6 * 2**20
    with safe_open(mini.CHECKPOINT / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_the_model_is_an_instructblip_with_a_t5(model: InstructBlipForConditionalGeneration) -> None:
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 3e6
    assert model.config.text_config.model_type == "t5"
    assert model.config.vision_config.image_size == TILE_PIXELS
    assert model.config.qformer_config.cross_attention_frequency == 2
    assert model.config.qformer_config.hidden_dropout_prob == 0.1
    assert model.config.text_config.dropout_rate == 0.1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_processor_puts_the_image_tokens_first(
    model: InstructBlipForConditionalGeneration, processor: InstructBlipProcessor
) -> None:
    encoding = processor(
        images=Image.new("L", (64, 64)).convert("RGB"), text="Describe this image.", return_tensors="pt"
    )
    image_token = model.config.image_token_index
    count = model.config.num_query_tokens
    assert processor.num_query_tokens == count
    assert encoding["input_ids"][0, :count].tolist() == [image_token] * count
    assert image_token not in encoding["input_ids"][0, count:].tolist()
    assert encoding["pixel_values"].shape == (1, 3, TILE_PIXELS, TILE_PIXELS)
    assert int(encoding["input_ids"].max()) < model.config.text_config.vocab_size
    assert int(encoding["qformer_input_ids"].max()) < model.config.qformer_config.vocab_size


def test_the_tokenizer_gives_captions_back(processor: InstructBlipProcessor, rows: list[dict[str, str]]) -> None:
    tokenizer = processor.tokenizer
    for row in rows:
        ids = tokenizer(row["text_output"])["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(row["text_output"].split())
    assert tokenizer.unk_token_id not in tokenizer("Zebras & (quick) foxes, 99 %!")["input_ids"]


def test_the_captions_depend_on_the_image(
    model: InstructBlipForConditionalGeneration,
    processor: InstructBlipProcessor,
    data: Path,
    rows: list[dict[str, str]],
) -> None:
    images = []
    for row in rows:
        with Image.open(data / "images" / row["filename"]) as image:
            images.append(image.convert("RGB"))
    inputs = processor(images=images, text=[row["text_input"] for row in rows], padding=True, return_tensors="pt")
    labels = processor.tokenizer([row["text_output"] for row in rows], padding=True, return_tensors="pt")
    ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)

    def loss(pixel_values: torch.Tensor) -> float:
        with torch.no_grad():
            return float(model(**{**inputs, "pixel_values": pixel_values}, labels=ids).loss)

    pixels = inputs["pixel_values"]
    seen = loss(pixels)
    assert loss(torch.zeros_like(pixels)) > 1.15 * seen
    assert loss(pixels.roll(7, 0)) > 1.15 * seen


@pytest.mark.slow
def test_a_small_recipe_runs_and_repeats_itself(tmp_path: Path) -> None:
    from trainer.mini.recipe.build import build
    from trainer.mini.recipe.sizes import Recipe

    threads = torch.get_num_threads()
    for name in ("one", "two"):
        build(tmp_path / name, Recipe(tiles=128, vision_steps=3, caption_steps=3, batch_size=8))
    assert torch.get_num_threads() == threads
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_help_measures_nothing() -> None:
    command = [sys.executable, "-m", "trainer.mini.behaviour", "--help"]
    done = template.run(command)
    assert done.returncode == 0
    assert "behaves like the real one" in done.stdout and "## " not in done.stdout


def test_nothing_that_trains_imports_the_recipe() -> None:
    script = (
        "import sys; from trainer.preload import import_libraries; import_libraries(); import trainer.run; "
        "print([name for name in sys.modules if name.startswith(('trainer.mini.recipe', 'trainer.mini.behaviour'))])"
    )
    done = template.run([sys.executable, "-c", script])
    assert done.stdout.strip() == "[]", done.stderr
