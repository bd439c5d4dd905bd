"""Rows as model inputs: token ids, pixels, batches, and a loader whose order depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from trainer.common.errors import DataError, ModelError
from trainer.config import TrainConfig
from trainer.data.dataset import Row
from trainer.data.images import open_image
from trainer.data.loading import check_shared_memory, end_with_parent, shared_need
from trainer.data.words import IMAGE
from trainer.model.batch import IGNORE, Batch

PIXEL_CACHE_BYTES = 1 << 30
"""Most memory for decoded and resized images, of all DataLoader workers of a loader together; a data set that fits is
decoded once, not every epoch."""
CAPTION_STREAM = 0x63617074
"""Tells the seed of drawn captions from the seed of the order of rows."""


@dataclass(frozen=True)
class Tokens:
    """One row with one of its captions as token ids, unpadded."""

    qformer: tuple[int, ...]
    """The instruction alone: the caption must not leak into the Q-Former."""
    prompt: tuple[int, ...]
    """The instruction for the language model, special tokens included, image tokens not."""
    target: tuple[int, ...]
    """The caption and EOS."""


class Tokenizer:
    """Turns prompts and captions into token ids the way an InstructBLIP processor would.

    The image tokens are not added here: the forward puts the query outputs there itself.
    """

    def __init__(self, processor: Any, config: Any, max_target_length: int) -> None:
        self.text = processor.tokenizer
        self.qformer = processor.qformer_tokenizer
        self.decoder_only = bool(config.use_decoder_only_language_model)
        self.max_target_length = max_target_length
        self.max_instruction = int(config.qformer_config.max_position_embeddings)
        if self.text.eos_token_id is None:
            raise ModelError("the checkpoint's tokenizer has no EOS token, so captions would never end")
        self.image_id = self.text.get_vocab().get(IMAGE)
        # Tokenizers of SentencePiece put a space before a text by themselves, byte-level ones do not.
        joined = self.text.decode(self._ids("a") + self._ids("b"))
        self.separator = " " if self.decoder_only and "ab" in joined else ""

    def _ids(self, text: str) -> list[int]:
        return list(self.text(text, add_special_tokens=False)["input_ids"])

    def __call__(self, row: Row, caption: str | None = None) -> Tokens:
        """The row with this caption, or with its first.

        Raises:
            DataError: its text holds the image token.
        """
        instruction = self.qformer(row.prompt, truncation=True, max_length=self.max_instruction)["input_ids"]
        prompt = self.text(row.prompt)["input_ids"]
        # T5's tokenizer would add EOS by itself, Llama's would not: added by hand for both, after the cut.
        target = self._ids(self.separator + (row.caption if caption is None else caption))
        if self.image_id is not None and self.image_id in (*prompt, *target):
            # It would count as a picture's token, or lie beyond a Vicuna's embeddings.
            raise DataError(f"{row.where}: the text holds {IMAGE!r}, which the model itself puts before it; remove it")
        return Tokens(
            tuple(instruction), tuple(prompt), (*target[: self.max_target_length - 1], self.text.eos_token_id)
        )


def preprocessed(image_processor: Any, image: Image, path: Path) -> torch.Tensor:
    """(3, height, width), float: the image as the model takes it.

    Raises:
        DataError: a pixel is not finite. Every loss with this image would be NaN, and the learning rate be blamed.
    """
    pixels: torch.Tensor = image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    if not bool(torch.isfinite(pixels).all()):
        raise DataError(
            f"{path}: its pixels are not finite after preprocessing; check image_mean, image_std and rescale_factor "
            "in the model's preprocessor_config.json"
        )
    return pixels


class Pixels:
    """Images as the model takes them, kept while they fit in `PIXEL_CACHE_BYTES`. One store serves all data sets of a
    workbench, so that a study over `max_samples` does not keep a copy for each."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self._kept: dict[Path, torch.Tensor] = {}
        self._kept_bytes = 0

    def __call__(self, path: Path) -> torch.Tensor:
        """(3, height, width), float.

        Raises:
            DataError: the image went bad after the data folder was examined, or its pixels are not finite.
        """
        pixels = self._kept.get(path)
        if pixels is None:
            pixels = preprocessed(self.image_processor, open_image(path), path)
            size = pixels.numel() * pixels.element_size()
            worker = get_worker_info()
            if self._kept_bytes + size <= PIXEL_CACHE_BYTES // (worker.num_workers if worker else 1):
                self._kept[path] = pixels
                self._kept_bytes += size
        return pixels


Sample = tuple[torch.Tensor, Tokens]
"""Pixels (3, height, width), or a row number of a feature store (), and tokens."""
Images = Callable[[Path], torch.Tensor]
"""An image's file -> the tensor of its sample."""


class CaptionDataset(Dataset["Sample | DataError"]):
    """Rows with their tokens and pixels: a sample for each caption, those of one row one after another.

    Passing over all samples therefore evaluates every caption; `EpochSampler` draws one sample a row for training.
    The error of an image that went bad is returned as a value: raised in a DataLoader worker, it would come back with
    the worker's traceback in its message. `batches` raises it.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, images: Images) -> None:
        self.rows = tuple(rows)
        self.tokens = tuple(tokenizer(row, caption) for row in rows for caption in row.captions)
        self.row_of = tuple(number for number, row in enumerate(rows) for _ in row.captions)
        """The row of each sample."""
        self.images = images

    def seen_through(self, images: Images) -> CaptionDataset:
        """The same rows and tokens with other tensors for their images."""
        other = copy(self)
        other.images = images
        return other

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample | DataError:
        try:
            return self.images(self.rows[self.row_of[index]].image), self.tokens[index]
        except DataError as error:
            return error.with_traceback(None)


class EpochSampler(Sampler[int]):
    """A permutation that depends on (seed, epoch) alone: any epoch can be repeated after an interruption.

    Of a row with several captions one is drawn an epoch, by (seed, epoch, row) alone, whatever the order of the rows.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        group: tuple[Sequence[int], int] | None = None,
        captions: Sequence[int] | None = None,
    ) -> None:
        """An order for `size` rows.

        Args:
            size: number of rows.
            seed: of the run.
            group: (length of each sample, batch size), to put samples of similar length into a batch.
            captions: number of captions of each row; None where each has one, so that a row is a sample.
        """
        self.size = size
        self.seed = seed
        self.group = group
        self.epoch = 1
        self.captions = None if captions is None or all(n == 1 for n in captions) else torch.tensor(captions)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        samples = self._drawn()
        if self.group is not None:
            from transformers.trainer_pt_utils import get_length_grouped_indices

            lengths, batch_size = self.group
            if samples is not None:
                lengths = [lengths[sample] for sample in samples]
            order = get_length_grouped_indices(lengths, batch_size, generator=generator)
        else:
            order = torch.randperm(self.size, generator=generator).tolist()
        return iter(order if samples is None else [samples[row] for row in order])

    def _drawn(self) -> list[int] | None:
        """The number of the sample drawn for each row, None where a row is a sample."""
        if self.captions is None:
            return None
        # Its own generator, so that the order of rows is the same however many captions they have.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) ^ CAPTION_STREAM)
        drawn = (torch.rand(self.size, generator=generator, dtype=torch.float64) * self.captions).long()
        first = self.captions.cumsum(0) - self.captions
        return list((first + drawn).tolist())


class Collator:
    """Pads samples to a Batch; if there are errors among them, the first is returned instead."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pad = tokenizer.text.pad_token_id
        # Padding is masked by attention, never by its id, so any id will do where a tokenizer has none.
        self.text_pad = tokenizer.text.eos_token_id if pad is None else pad
        self.qformer_pad = tokenizer.qformer.pad_token_id or 0
        self.decoder_only = tokenizer.decoder_only

    def __call__(self, items: Sequence[Sample | DataError]) -> Batch | DataError:
        samples: list[Sample] = []
        for item in items:
            if isinstance(item, DataError):
                return item
            samples.append(item)
        tokens = [t for _, t in samples]
        if self.decoder_only:
            text = [t.prompt + t.target for t in tokens]
            labels = [(IGNORE,) * len(t.prompt) + t.target for t in tokens]
        else:
            text = [t.prompt for t in tokens]
            labels = [t.target for t in tokens]
        qformer_ids, qformer_mask = _pad([t.qformer for t in tokens], self.qformer_pad)
        text_ids, text_mask = _pad(text, self.text_pad)
        images = torch.stack([image for image, _ in samples])
        return Batch(
            pixel_values=images if images.dim() > 1 else None,
            image_rows=images if images.dim() == 1 else None,
            qformer_ids=qformer_ids,
            qformer_mask=qformer_mask,
            text_ids=text_ids,
            text_mask=text_mask,
            labels=_pad(labels, IGNORE)[0],
        )


def _pad(sequences: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (len(sequences), longest)."""
    ids = _padded(sequences, value)
    lengths = np.array([len(s) for s in sequences])
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _padded(sequences: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """(len(sequences), longest); NumPy: for so few numbers, PyTorch takes five times as long."""
    padded = np.full((len(sequences), max(len(s) for s in sequences)), value, dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def batches(loader: DataLoader[Any]) -> Iterator[Batch]:
    """One pass over a loader.

    Raises:
        DataError: an image went bad after the data folder was examined; names it.
    """
    for item in loader:
        if isinstance(item, DataError):
            raise item
        yield item


def _check_room(dataset: CaptionDataset, config: TrainConfig, batch_size: int) -> None:
    if config.num_workers and len(dataset):
        first = dataset[0]
        if not isinstance(first, DataError):  # `batches` raises it
            size = first[0].numel() * first[0].element_size()
            size = min(batch_size, len(dataset)) * size
            need = shared_need(config.num_workers, config.prefetch_factor, 1, size)
            check_shared_memory(need, f"{config.num_workers} DataLoader workers")


def train_loader(
    dataset: CaptionDataset, tokenizer: Tokenizer, config: TrainConfig, *, pin: bool
) -> tuple[DataLoader[Any], EpochSampler]:
    """Shuffled batches of `batch_size`; set the sampler's `epoch` before each pass.

    Raises:
        UserError: the workers' batches do not fit into shared memory.
    """
    group = ([len(t.prompt) + len(t.target) for t in dataset.tokens], config.batch_size)
    captions = [len(row.captions) for row in dataset.rows]
    sampler = EpochSampler(len(dataset.rows), config.seed, group if config.group_by_length else None, captions)
    _check_room(dataset, config, config.batch_size)
    loader = DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=sampler,
        collate_fn=Collator(tokenizer),
        pin_memory=pin,
        num_workers=config.num_workers,
        # Experiment 5b of the hand-run log: workers persist between epochs and hold batches ready.
        persistent_workers=config.num_workers > 0,
        prefetch_factor=config.prefetch_factor if config.num_workers else None,
        worker_init_fn=end_with_parent,
    )
    return loader, sampler


def eval_loader(dataset: CaptionDataset, tokenizer: Tokenizer, config: TrainConfig, *, pin: bool) -> DataLoader[Any]:
    """Batches of `eval_batch_size` in order, every caption of every row: the loss is the mean over all of them.

    Raises:
        DataError: shared memory is too small for the processes that load them.
    """
    _check_room(dataset, config, config.eval_batch_size)
    return DataLoader(
        dataset,
        batch_size=config.eval_batch_size,
        shuffle=False,
        collate_fn=Collator(tokenizer),
        pin_memory=pin,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        prefetch_factor=config.prefetch_factor if config.num_workers else None,
        worker_init_fn=end_with_parent,
    )
