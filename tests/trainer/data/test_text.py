"""What a tokenizer lacks, cuts or repeats is counted, refused above a tenth, before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import InstructBlipConfig, InstructBlipProcessor

from tests.support import checkpoints
from trainer.common.errors import DataError, ModelError
from trainer.data.batches import Tokenizer
from trainer.data.dataset import Row
from trainer.data.text import check_text, examine_text
from trainer.data.words import Words, words, words_of
from trainer.mini import CHECKPOINT
from trainer.model import locate
from trainer.model.base import open_processor


def rows(captions: Sequence[str], prompt: str = "Describe it.") -> list[Row]:
    return [Row(image=Path("a"), prompt=prompt, caption=caption, scene="s", where="row 1") for caption in captions]


ENGLISH = ["There are two ships in the harbor.", "A river flows through the town.", "Some trees stand near the road."]
CHINESE = ["机场旁边有三架飞机。", "港口里有两艘船。"]


@pytest.fixture(scope="module")
def mini() -> Words:
    found = words_of("mini")
    assert found is not None
    return found


def trained(model: Any, trainer: Any, *, byte_level: bool = False) -> Words:
    """A tokenizer of this kind that has seen English alone."""
    raw = RawTokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Whitespace()
    if byte_level:
        raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(ENGLISH * 3, trainer)
    return words(raw, json.loads(raw.to_str()), decoder_only=byte_level)


def kinds() -> dict[str, Words]:
    quiet: dict[str, Any] = {"show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return {
        "unigram": trained(
            models.Unigram(), trainers.UnigramTrainer(special_tokens=["<unk>"], unk_token="<unk>", **quiet)
        ),
        "bpe": trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(special_tokens=["<unk>"], **quiet)),
        "fused bpe": trained(
            models.BPE(unk_token="<unk>", fuse_unk=True), trainers.BpeTrainer(special_tokens=["<unk>"], **quiet)
        ),
        "bpe without unk": trained(models.BPE(), trainers.BpeTrainer(**quiet)),
        "wordpiece": trained(
            models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(special_tokens=["[UNK]"], **quiet)
        ),
        "wordlevel": trained(
            models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(special_tokens=["[UNK]"], **quiet)
        ),
        "byte level": trained(models.BPE(), trainers.BpeTrainer(initial_alphabet=alphabet, **quiet), byte_level=True),
    }


@pytest.mark.parametrize("kind", kinds())
def test_another_script_is_refused_where_the_tokenizer_lacks_it(kind: str) -> None:
    found = kinds()[kind]
    assert examine_text(ENGLISH, found, 256).unknown == 0
    text = examine_text(CHINESE, found, 256)
    if kind == "byte level":
        assert (text.unknown, text.problem()) == (0, None)
        return
    assert text.unknown > 0.5
    assert text.lacking.with_unknown == 2
    problem = text.problem()
    assert problem is not None
    assert "limit 10%, 2 of 2 captions" in problem
    assert any(shown in problem for shown in CHINESE)


def test_the_share_decides(mini: Words) -> None:
    many = [*ENGLISH] * 40
    few = examine_text([*many, CHINESE[0]], mini, 256)
    assert 0 < few.unknown < 0.01
    assert (few.problem(), few.warnings()) == (None, [])
    some = examine_text([*ENGLISH * 5, CHINESE[0]], mini, 256)
    assert some.problem() is None
    (warning,) = some.warnings()
    assert (
        warning.startswith("the model's tokenizer lacks ") and "'机场旁边有三架飞机。' is read as '<unk>'" in warning
    )
    assert examine_text([*ENGLISH, *CHINESE], mini, 256).problem() is not None


def test_a_fused_unknown_token_counts_by_its_characters(mini: Words) -> None:
    """Ten words and one `<unk>` for forty characters: a tenth of the tokens, and half of what is said."""
    text = examine_text(["There are two ships in the harbor and some trees " + CHINESE[0] * 4], mini, 256)
    assert text.unknown > 0.4


@pytest.mark.parametrize("longest", [5, 8, 256])
def test_captions_that_are_cut_are_those_that_training_cuts(mini: Words, longest: int) -> None:
    captions = [*ENGLISH, "A pier.", "Ships"]
    config = SimpleNamespace(
        use_decoder_only_language_model=False, qformer_config=SimpleNamespace(max_position_embeddings=64)
    )
    tokenizer = Tokenizer(InstructBlipProcessor.from_pretrained(CHECKPOINT), config, longest)
    targets = [
        tokenizer(Row(image=Path("a"), prompt="p", caption=caption, scene="s", where="")).target
        for caption in captions
    ]
    whole = [[*tokenizer.text(caption, add_special_tokens=False)["input_ids"], 1] for caption in captions]
    text = examine_text(captions, mini, longest)
    assert text.lengths == tuple(map(len, whole))
    assert text.cut == sum(len(w) > len(t) for w, t in zip(whole, targets, strict=True))
    assert any("are cut at max_target_length" in warning for warning in text.warnings()) == (text.cut > 0)


def test_empty_and_repeated_captions_are_counted(mini: Words) -> None:
    text = examine_text(["A pier.", "A pier.", "A pier.", "Ships.", ".", " - "], mini, 256)
    assert (text.captions, text.empty, text.repeated, text.most_repeated) == (6, 2, 2, ("A pier.", 3))
    assert "2 of 6 captions have no letter or digit" in text.warnings()
    assert "2 repeated (most: 'A pier.', 3 times)" in text.summary()
    assert text.counts()["captions_repeated"] == 2
    assert text.tags()["text.captions_empty"] == "2" and "no letter or digit" in text.tags()["text.warnings"]


def test_prompts_that_the_qformer_reads_in_part_are_a_warning() -> None:
    long = "Describe " + "the buildings and roads and trees and ships of this scene, " * 8
    found = check_text([*rows(ENGLISH), *rows(ENGLISH[:1], long)], "mini", 256)
    assert found is not None and found.prompts_cut == found.counts()["prompts_cut"] == 1
    (warning,) = found.warnings()
    longest = len(InstructBlipProcessor.from_pretrained(CHECKPOINT).qformer_tokenizer(long)["input_ids"])
    assert warning == f"1 prompts are cut at the 64 tokens that the model's Q-Former reads; the longest has {longest}"


def test_prompts_are_read_too_by_both_tokenizers(tmp_path: Path) -> None:
    """The Q-Former sees nothing of a row but its prompt."""
    with pytest.raises(
        DataError, match=r"the model's tokenizer lacks .* of the prompts' text .*translate the prompts"
    ):
        check_text(rows(ENGLISH, CHINESE[0]), "mini", 256)
    text = check_text(rows(ENGLISH * 2) + rows(ENGLISH[:1], "Describe it 机."), "mini", 256)
    assert text is not None and 0 < text.prompts.share < 0.1 and text.qformer.share > 0
    assert [line.partition(" lacks")[0] for line in text.warnings()] == [
        "the model's tokenizer",
        "the tokenizer of the model's Q-Former",
    ]


@pytest.mark.parametrize("model", ["mini", "llama"])
def test_an_image_token_in_the_text_is_refused_before_and_in_training(model: str, tmp_path: Path) -> None:
    """It would count as a picture's token, or lie beyond the embeddings of a Vicuna."""
    name = str(checkpoints.write(tmp_path, "llama")) if model == "llama" else model
    for captions, prompt in ((["A <image> of a pier."], "Say."), (["A pier."], "<image> Say.")):
        with pytest.raises(DataError, match=r"1 (captions|prompts) hold '<image>', .* take it out of them"):
            check_text(rows(captions, prompt), name, 256)
        _, processor = open_processor(name, locate.fetch(name))
        config = InstructBlipConfig.from_pretrained(locate.fetch(name))
        tokenizer = Tokenizer(processor, config, 256)
        with pytest.raises(DataError, match="row 1: the text holds '<image>'"):
            tokenizer(rows(captions, prompt)[0])


def test_other_special_tokens_in_the_text_are_a_warning(mini: Words) -> None:
    text = examine_text(["A pier.</s>", "A pier."], mini, 256)
    assert text.problem() is None
    (warning,) = text.warnings()
    assert warning.startswith("1 captions hold '</s>', which the model's tokenizer reads as a token of its own")


def test_check_text_refuses_and_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model's tokenizer lacks"):
        check_text(rows(CHINESE), "mini", 256)
    assert check_text(rows(ENGLISH), "mini", 256) is not None
    assert check_text(rows([]), "mini", 256) is None
    (tmp_path / "config.json").write_text("{}")
    assert check_text(rows(CHINESE), str(tmp_path), 256) is None, (
        "whether there must be a tokenizer is checked elsewhere"
    )
    for content in ("{", "[]", '{"model": 3}', "\xff"):
        (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
        with pytest.raises(ModelError, match=r"its tokenizer\.json cannot be read"):
            check_text(rows(CHINESE), str(tmp_path), 256)


def test_torch_is_not_loaded() -> None:
    code = (
        "import sys; from trainer.data.text import check_text; from trainer.data.dataset import Row; "
        "print(check_text([Row('a', 'Say.', 'A pier.', 's', '')], 'mini', 256).tokens); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_study_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    from PIL import Image

    from tests.bad_input.harness import search

    (tmp_path / "images").mkdir()
    rows = []
    for i in range(6):
        Image.new("RGB", (20, 16), (i, 20, 30)).save(tmp_path / "images" / f"P{i}_1.png")
        rows.append({"filename": f"P{i}_1.png", "text_input": "Describe it.", "text_output": CHINESE[i % 2]})
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    arguments = ["--study", "rsicap_mini", "--runs-dir", str(tmp_path / "runs"), "--set", f"data={tmp_path}"]
    for dry in (["--dry-run", "--no-measure"], []):
        outcome = search([*arguments, *dry])
        outcome.check_refused("the model's tokenizer lacks", "6 of 6 captions")
        assert not (tmp_path / "runs").exists()
