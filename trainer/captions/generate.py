"""Images and an instruction -> captions, by the library's own processor and `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL.Image import Image

from trainer import runtime
from trainer.common.errors import ConfigError
from trainer.data.words import IMAGE


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Options of Transformers' `generate`, under its names; None for the checkpoint's own value."""

    max_new_tokens: int = 256
    """Longest caption in tokens of the language model."""
    min_new_tokens: int | None = None
    num_beams: int = 1
    """1 is greedy decoding. Always set, since checkpoints of InstructBLIP come with 5 or with 1."""
    length_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    max_time: float | None = None
    """Seconds after which generation stops, with captions cut where they are; with `began` it stops before."""
    began: float | None = None
    """When these seconds began (`time.time()`); None for the first token."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`. Nothing is drawn at random: the same image has the same caption."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        began = given.pop("began", None)
        if began is not None:
            from transformers.generation import StoppingCriteriaList

            from trainer.captions.deadline import Deadline

            given["stopping_criteria"] = StoppingCriteriaList([Deadline(began + given.pop("max_time"))])
        return {**given, "do_sample": False}


@dataclass
class Captioner:
    """A model with its processor, for captioning."""

    model: Any
    """An InstructBlipForConditionalGeneration, PEFT's wrapper of one, or one that `Hooks` have changed."""
    processor: Any
    device: torch.device
    dtype: torch.dtype
    decoding: Decoding
    late: bool = field(default=False, init=False)
    """Whether the last captions were cut at the end of the time."""

    def __call__(self, images: Sequence[Image], instruction: str) -> list[str]:
        """A caption for each image. All have one instruction, so that a batch is not padded: the captions do not
        depend on which images are in a batch together, but for the rounding of sums. The Q-Former reads as much of
        it as in training.

        Raises:
            ConfigError: the instruction holds the token that stands for the picture.
        """
        if IMAGE in instruction:
            raise ConfigError(f"the instruction holds {IMAGE!r}, which the model itself puts before it; leave it out")
        text = [instruction] * len(images)
        inputs = self.processor(images=list(images), text=text, return_tensors="pt")
        room = int(self.model.config.qformer_config.max_position_embeddings)
        if inputs["qformer_input_ids"].shape[1] > room:
            cut = self.processor.qformer_tokenizer(text, truncation=True, max_length=room, return_tensors="pt")
            inputs["qformer_input_ids"] = cut["input_ids"]
            inputs["qformer_attention_mask"] = cut["attention_mask"]
        inputs = inputs.to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        arguments = self.decoding.arguments()
        with torch.no_grad():
            output = self.model.generate(**inputs, **arguments)
        self.late = any(limit.over for limit in arguments.get("stopping_criteria", ()))
        if self.model.config.use_decoder_only_language_model:
            output = output[:, inputs["input_ids"].shape[1] :]  # a Llama's output begins with what was asked
        texts = self.processor.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def in_batches(
    captioner: Captioner,
    items: Sequence[tuple[Callable[[], Image], str]],
    batch_size: int,
) -> Iterator[tuple[int, str | Exception]]:
    """(number of the item, its caption or the error of its image), images of one instruction together.

    Where memory runs out, batches are halved.

    Args:
        captioner: makes the captions.
        items: what opens the image, and the instruction.
        batch_size: most images at once.
    """
    from trainer.common.errors import DataError

    by_instruction: dict[str, list[int]] = {}
    for number, (_, instruction) in enumerate(items):
        by_instruction.setdefault(instruction, []).append(number)
    for instruction, numbers in by_instruction.items():
        for start in range(0, len(numbers), batch_size):
            opened: list[tuple[int, Image]] = []
            for number in numbers[start : start + batch_size]:
                try:
                    opened.append((number, items[number][0]()))
                except DataError as error:
                    yield number, error
            texts = _halving(captioner, [image for _, image in opened], instruction)
            yield from zip((number for number, _ in opened), texts, strict=True)


def _halving(captioner: Captioner, images: Sequence[Image], instruction: str) -> list[str]:
    if not images:
        return []
    try:
        return captioner(images, instruction)
    except (RuntimeError, MemoryError) as error:
        if len(images) == 1 or not runtime.is_out_of_memory(error):
            raise
    runtime.release_memory(captioner.device)
    half = (len(images) + 1) // 2
    return _halving(captioner, images[:half], instruction) + _halving(captioner, images[half:], instruction)
