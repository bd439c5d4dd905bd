"""Both tokenizers have to be there and to fit: without them a run would train on empty or on other text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import checkpoints
from tests.support.checkpoints import edit_json
from trainer.common.errors import ModelError
from trainer.mini import CHECKPOINT
from trainer.model import locate
from trainer.model.base import load_base

CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def no_qformer_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "qformer_tokenizer")


def empty_qformer_folder(folder: Path) -> None:
    (folder / "qformer_tokenizer" / "tokenizer.json").unlink()


MISSING: dict[Callable[[Path], None], str] = {
    no_tokenizer: "no tokenizer: it has none of tokenizer.json",
    no_qformer_tokenizer: "no tokenizer for the Q-Former: its folder qformer_tokenizer/ is missing",
    empty_qformer_folder: "no tokenizer for the Q-Former",
}


@pytest.mark.parametrize("remove", MISSING, ids=lambda each: each.__name__)
def test_missing_tokenizers_are_refused_before_anything_is_loaded(
    remove: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = checkpoints.write(tmp_path / "c")
    remove(folder)
    for check in (locate.check, lambda name: load_base(name, **CPU)):
        with pytest.raises(ModelError, match=MISSING[remove]):
            check(str(folder))


def the_language_models(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, folder / "qformer_tokenizer" / name)


def the_qformers(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "qformer_tokenizer" / name, folder / name)


def few_embeddings(part: str, rows: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit_json(folder / "config.json", lambda config: config[part].update(vocab_size=rows))

    change.__name__ = f"{part}_{rows}"
    return change


def no_words(folder: Path) -> None:
    """A vocabulary of special tokens alone, as Transformers makes one up."""

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"] = {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1, "<pad>": 2}, "unk_token": "<unk>"}
        tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
        tokenizer["post_processor"] = tokenizer["normalizer"] = tokenizer["decoder"] = None
        tokenizer["added_tokens"] = []

    edit_json(folder / "tokenizer.json", change)
    edit_json(
        folder / "tokenizer_config.json",
        lambda config: config.update(tokenizer_class="PreTrainedTokenizerFast"),
    )


UNFIT: dict[Callable[[Path], None], tuple[str, ...]] = {
    the_language_models: ("its Q-Former's tokenizer has no [CLS] and no [SEP]",),
    the_qformers: ("its tokenizer has no EOS token",),
    few_embeddings("qformer_config", 300): ("its Q-Former's tokenizer has ids up to 348", "300 embeddings"),
    few_embeddings("text_config", 300): ("its tokenizer has ids up to", "the language model has 300 embeddings"),
    no_words: ("its tokenizer knows none of the words",),
}


@pytest.mark.parametrize("change", UNFIT, ids=lambda each: each.__name__)
def test_tokenizers_that_do_not_fit_are_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c")
    change(folder)
    with pytest.raises(ModelError) as error:
        load_base(str(folder), **CPU)
    for part in UNFIT[change]:
        assert part in str(error.value)


def test_the_processors_own_image_token_needs_no_embedding(tmp_path: Path) -> None:
    """As in Vicuna's older checkpoints: the processor adds `<image>` behind the last embedding; no text has it."""
    folder = checkpoints.write(tmp_path / "c", "llama")
    tokenizer = load_base(str(folder), **CPU).processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert image == max(tokenizer.get_vocab().values())
    edit_json(folder / "config.json", lambda config: config["text_config"].update(vocab_size=image))
    checkpoints.edit_weights(
        folder, lambda ts: {k: v[:image].contiguous() if len(v) == 352 else v for k, v in ts.items()}
    )
    assert load_base(str(folder), **CPU).model.get_input_embeddings().weight.shape[0] == image


def test_the_embedded_models_fit() -> None:
    load_base(str(CHECKPOINT), **CPU)
