"""Token ids equal the processor's own; captions never reach the Q-Former; batches depend on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import InstructBlipProcessor, PreTrainedTokenizerFast

from trainer.common.errors import DataError, ModelError
from trainer.config import TrainConfig
from trainer.data import batches as data
from trainer.data.batches import CaptionDataset, Collator, EpochSampler, Pixels, Tokenizer, batches
from trainer.data.dataset import Row
from trainer.mini import CHECKPOINT
from trainer.model.batch import IGNORE, Batch

PROMPT = "Describe this image in detail."
CAPTION = "An aerial image of a harbor. Two piers lie on the left."
QUERIES = 12


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 3's: byte-level BPE, BOS before every text, no EOS by itself, no padding token of its own."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([PROMPT, CAPTION] * 5, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def processor_of(kind: str) -> Any:
    whole = InstructBlipProcessor.from_pretrained(CHECKPOINT)
    if kind == "t5":
        return whole
    return InstructBlipProcessor(
        image_processor=whole.image_processor,
        tokenizer=byte_level_tokenizer(),
        qformer_tokenizer=whole.qformer_tokenizer,
        num_query_tokens=QUERIES,
    )


def tokenizer_of(kind: str, max_target_length: int = 256) -> Tokenizer:
    config = SimpleNamespace(
        use_decoder_only_language_model=kind == "llama", qformer_config=SimpleNamespace(max_position_embeddings=64)
    )
    return Tokenizer(processor_of(kind), config, max_target_length)


def row(caption: str = CAPTION, prompt: str = PROMPT, image: Path = Path("none.png")) -> Row:
    return Row(image=image, prompt=prompt, caption=caption, scene="s", where="here")


KINDS = ("t5", "llama")


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_tokenized_as_the_processor_does(kind: str) -> None:
    theirs = processor_of(kind)(images=Image.new("RGB", (64, 64)), text=PROMPT)
    ours = tokenizer_of(kind)(row())
    image_token = theirs["input_ids"][0][0]
    ids = theirs["input_ids"][0]
    assert list(ids) == [image_token] * QUERIES + list(ours.prompt)
    assert list(theirs["qformer_input_ids"][0]) == list(ours.qformer)
    assert all(theirs["attention_mask"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_qformer_never_sees_the_caption(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    assert tokenizer(row("Something else entirely.")).qformer == tokenizer(row()).qformer
    assert tokenizer(row(prompt="Count the piers.")).qformer != tokenizer(row()).qformer
    assert tokenizer.qformer.decode(tokenizer(row()).qformer, skip_special_tokens=True) == PROMPT.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_ends_with_eos_even_if_it_is_cut(kind: str) -> None:
    eos = tokenizer_of(kind).text.eos_token_id
    whole = tokenizer_of(kind)(row()).target
    assert whole.count(eos) == 1
    assert whole[-1] == eos
    cut = tokenizer_of(kind, max_target_length=5)(row()).target
    assert cut == (*whole[:4], eos)
    fits = tokenizer_of(kind, max_target_length=len(whole))(row()).target
    assert fits == whole


def test_t5_targets_are_the_librarys_labels() -> None:
    tokenizer = tokenizer_of("t5")
    assert list(tokenizer(row()).target) == tokenizer.text(CAPTION)["input_ids"]


def test_llama_reads_prompt_and_caption_as_one_text() -> None:
    tokenizer = tokenizer_of("llama")
    tokens = tokenizer(row())
    assert tokens.prompt[0] == tokenizer.text.bos_token_id
    assert tokens.target.count(tokenizer.text.bos_token_id) == 0
    text = tokenizer.text.decode(tokens.prompt + tokens.target, skip_special_tokens=True)
    assert text == f"{PROMPT} {CAPTION}"


def test_a_tokenizer_that_writes_spaces_itself_gets_none() -> None:
    """T5's SentencePiece kind, used for a decoder-only model."""
    config = SimpleNamespace(
        use_decoder_only_language_model=True, qformer_config=SimpleNamespace(max_position_embeddings=64)
    )
    tokenizer = Tokenizer(processor_of("t5"), config, 256)
    assert tokenizer.separator == ""
    assert tokenizer_of("llama").separator == " "


def test_an_instruction_longer_than_the_qformer_is_cut() -> None:
    tokens = tokenizer_of("t5")(row(prompt="pier " * 200))
    assert len(tokens.qformer) == 64


def test_a_tokenizer_without_eos_is_refused() -> None:
    processor = processor_of("llama")
    processor.tokenizer.eos_token = None
    config = SimpleNamespace(
        use_decoder_only_language_model=True, qformer_config=SimpleNamespace(max_position_embeddings=64)
    )
    with pytest.raises(ModelError, match="no EOS"):
        Tokenizer(processor, config, 256)


def collate(kind: str, rows: list[Row]) -> Batch:
    tokenizer = tokenizer_of(kind)
    batch = Collator(tokenizer)([(torch.zeros(3, 64, 64), tokenizer(r)) for r in rows])
    assert isinstance(batch, Batch)
    return batch


ROWS = [row(), row("A field.", "What?"), row("A pier and a ship in the harbor.", "Describe the image, please.")]


def test_t5_labels_are_the_caption_alone() -> None:
    batch = collate("t5", ROWS)
    tokenizer = tokenizer_of("t5")
    for i, r in enumerate(ROWS):
        tokens = tokenizer(r)
        labels = batch.labels[i]
        assert labels[labels != IGNORE].tolist() == list(tokens.target)
        assert labels[: len(tokens.target)].tolist() == list(tokens.target)
        assert batch.text_ids[i][batch.text_mask[i].bool()].tolist() == list(tokens.prompt)


def test_llama_labels_are_masked_up_to_the_caption() -> None:
    batch = collate("llama", ROWS)
    tokenizer = tokenizer_of("llama")
    assert tokenizer.text.pad_token_id == tokenizer.text.eos_token_id
    for i, r in enumerate(ROWS):
        tokens = tokenizer(r)
        n = len(tokens.prompt)
        assert batch.labels[i, :n].tolist() == [IGNORE] * n
        assert batch.labels[i, n : n + len(tokens.target)].tolist() == list(tokens.target)
        assert batch.labels[i, n + len(tokens.target) :].eq(IGNORE).all()
        # The EOS is read and predicted although padding has the same id: the mask tells them apart, not the id.
        assert batch.text_mask[i].tolist() == [1] * (n + len(tokens.target)) + [0] * (
            batch.text_mask.shape[1] - n - len(tokens.target)
        )
        assert batch.text_ids[i][batch.text_mask[i].bool()][-1] == tokenizer.text.eos_token_id
        assert batch.labels[i][batch.labels[i] != IGNORE][-1] == tokenizer.text.eos_token_id
    assert batch.num_tokens() == sum(len(tokenizer(r).target) for r in ROWS)


def test_batches_are_padded_to_their_longest() -> None:
    tokenizer = tokenizer_of("t5")
    longest = max(len(tokenizer(r).target) for r in ROWS)
    assert collate("t5", ROWS).labels.shape == (3, longest)
    assert collate("t5", ROWS[1:2]).labels.shape == (1, len(tokenizer(ROWS[1]).target))


TENSORS = ("pixel_values", "qformer_ids", "qformer_mask", "text_ids", "text_mask", "labels")


def test_micro_batches_are_slices() -> None:
    batch = collate("t5", ROWS)
    parts = list(batch.micro(2))
    assert [len(part) for part in parts] == [2, 1]
    for name in TENSORS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(one, other, strict=True) for name in TENSORS
    )


def test_workers_give_the_same_batches_as_none(bench: Any, small: Callable[..., TrainConfig]) -> None:
    plain, parallel = small(), small(num_workers=2)
    train_set, val_set = bench.datasets(plain)
    tokenizer = bench.tokenizer(plain)
    passes = []
    for config in (plain, parallel):
        loader, sampler = data.train_loader(train_set, tokenizer, config, pin=False)
        seen = []
        for epoch in (1, 2):
            sampler.epoch = epoch
            seen += list(batches(loader))
        seen += list(batches(data.eval_loader(val_set, tokenizer, config, pin=False)))
        passes.append(seen)
        loader._iterator = None  # ends the persistent workers
    assert same(*passes)
    assert not same(passes[0][:4], passes[0][4:8])


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(50, seed)
        sampler.epoch = epoch
        return list(sampler)

    first = order(1, 3)
    torch.manual_seed(5)
    torch.rand(7)
    assert order(1, 3) == first
    assert sorted(first) == list(range(50))
    orders = {tuple(order(seed, epoch)) for seed in (0, 1, 2**32 - 1) for epoch in (1, 2, 3)}
    assert len(orders) == 9


def test_grouped_by_length_a_batch_holds_captions_of_about_the_same_length() -> None:
    lengths = [5 + (i * 37) % 60 for i in range(64)]

    def order(group: bool, epoch: int = 1) -> list[int]:
        sampler = EpochSampler(64, 3, (lengths, 4) if group else None)
        sampler.epoch = epoch
        return list(sampler)

    def padding(indices: list[int]) -> int:
        parts = [[lengths[i] for i in indices[at : at + 4]] for at in range(0, 64, 4)]
        return sum(4 * max(part) - sum(part) for part in parts)

    assert sorted(order(True)) == sorted(order(False)) == list(range(64))
    assert order(True) == order(True) and order(True) != order(True, epoch=2)
    assert padding(order(True)) < 0.5 * padding(order(False))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_gone_bad_is_named(tmp_path: Path, small: Callable[..., TrainConfig], workers: int) -> None:
    rows = []
    for i in range(6):
        Image.new("RGB", (64, 64), (i, i, i)).save(tmp_path / f"{i}.png")
        rows.append(row(image=tmp_path / f"{i}.png"))
    (tmp_path / "4.png").unlink()
    tokenizer = tokenizer_of("t5")
    dataset = CaptionDataset(rows, tokenizer, Pixels(processor_of("t5").image_processor))
    loader = data.eval_loader(dataset, tokenizer, small(num_workers=workers, eval_batch_size=2), pin=False)
    passing = batches(loader)
    assert len(next(passing)) == 2
    with pytest.raises(DataError) as caught:
        list(passing)
    assert str(caught.value) == f"{tmp_path / '4.png'}: the image is missing"  # no worker's traceback in it


def test_pixels_are_the_processors_and_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (100, 80), (40 * i, 9, 200)).save(paths[-1])
    processor = processor_of("t5").image_processor
    one_image = 3 * 64 * 64 * 4
    monkeypatch.setattr(data, "PIXEL_CACHE_BYTES", 2 * one_image)
    pixels = Pixels(processor)
    first = [pixels(path) for path in paths]
    for path, value in zip(paths, first, strict=True):
        assert torch.equal(value, processor(images=Image.open(path), return_tensors="pt")["pixel_values"][0])
    again = [pixels(path) for path in paths]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False]


def test_loaders_leave_no_process(bench: Any, small: Callable[..., TrainConfig]) -> None:
    before = set(psutil.Process().children())
    config = small(num_workers=1)
    loader, _ = data.train_loader(bench.datasets(config)[0], bench.tokenizer(config), config, pin=False)
    next(batches(loader))
    assert set(psutil.Process().children()) - before
    del loader
    assert not set(psutil.Process().children()) - before
