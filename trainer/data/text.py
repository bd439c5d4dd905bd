"""Captions as the language model reads them: what its tokenizer lacks, what is cut, what is empty or repeated.

A tokenizer of SentencePiece's kind makes one `<unk>` of all characters that it has not seen: with Chinese captions in
a T5 the loss falls as usual, and `<unk>` is what is learnt. Needs `tokenizers` alone: this is checked before torch is
loaded (0.1 s for the 640 captions of the embedded data, 1.1 s for 10,000).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import DataError, ModelError, shown
from trainer.config import EMBEDDED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from trainer.data.dataset import Row

REFUSED_ABOVE = 0.1
"""Share of unknown text with which nothing is trained."""
WARNED_ABOVE = 0.01
EXAMPLE = 60
"""Most characters of an example."""


@dataclass(frozen=True)
class Words:
    """A language model's tokenizer, as `batches.Tokenizer` uses it for captions."""

    tokenizer: Tokenizer
    unknown: int | None
    """Id of `<unk>`; None where every byte has a token."""
    separator: str = ""
    """What stands between prompt and caption."""


@dataclass(frozen=True)
class Text:
    """Counts of a set of captions under one tokenizer and `max_target_length`."""

    captions: int
    empty: int
    """Captions without a letter or digit."""
    repeated: int
    """Captions that another row has too, the first of each not counted."""
    most_repeated: tuple[str, int]
    """(caption, how many rows have it)."""
    tokens: int
    """Tokens of all captions, EOS and the cut not counted."""
    unknown: float
    """Share of the text that the tokenizer lacks: of the tokens or of the characters, whichever is more. Several
    unknown characters may be one token, and where there is no such token they vanish."""
    with_unknown: int
    """Captions with at least one unknown token or character."""
    example: str
    """The beginning of the caption that has most of it."""
    example_read: str
    """What the language model reads in its place."""
    cut: int
    """Captions that are longer than `max_target_length`."""
    max_target_length: int
    lengths: tuple[int, ...] = field(repr=False)
    """Tokens of each caption, EOS included, before the cut."""

    def problem(self) -> str | None:
        """Why these captions must not be trained on, if so."""
        if self.unknown <= REFUSED_ABOVE:
            return None
        return (
            f"the model's tokenizer lacks {self.unknown:.0%} of the captions' text (limit {REFUSED_ABOVE:.0%}, "
            f"{self.with_unknown} of {self.captions} captions): {shown(self.example)} is read as "
            f"{shown(self.example_read)}; use a model whose tokenizer has this script, or translate the captions"
        )

    def warnings(self) -> list[str]:
        """What is odd about these captions, a sentence each."""
        found = []
        if WARNED_ABOVE < self.unknown <= REFUSED_ABOVE:
            found.append(
                f"the model's tokenizer lacks {self.unknown:.1%} of the captions' text ({self.with_unknown} of "
                f"{self.captions} captions): {shown(self.example)} is read as {shown(self.example_read)}"
            )
        if self.cut:
            found.append(
                f"{self.cut} of {self.captions} captions are cut at max_target_length={self.max_target_length} "
                f"tokens; the longest has {max(self.lengths)}"
            )
        if self.empty:
            found.append(f"{self.empty} of {self.captions} captions have no letter or digit")
        return found

    def summary(self) -> str:
        """One line on lengths and repetitions."""
        ordered = sorted(self.lengths)
        middle = ordered[len(ordered) // 2]
        caption, times = self.most_repeated
        repeated = f"{self.repeated} repeated" + (f" (most: {shown(caption, 60)}, {times} times)" if times > 1 else "")
        return (
            f"captions: {self.captions}, {middle} tokens in the middle, {ordered[-1]} at most, {self.cut} cut at "
            f"{self.max_target_length}; {self.unknown:.2%} unknown; {self.empty} empty; {repeated}"
        )

    def counts(self) -> dict[str, str]:
        """The counts by name, for MLflow's tags and records."""
        return {
            "captions": str(self.captions),
            "captions_cut": str(self.cut),
            "captions_empty": str(self.empty),
            "captions_repeated": str(self.repeated),
            "captions_unknown": f"{self.unknown:.4f}",
        }


def examine_text(captions: Sequence[str], words: Words, max_target_length: int) -> Text:
    """Count what the tokenizer makes of these captions, of which there is at least one."""
    assert captions
    times = Counter(captions)
    tokens = unknown_tokens = characters = lost = with_unknown = 0
    lengths: dict[str, int] = {}
    worst, example = 0.0, ("", "")
    for caption, rows in times.items():
        encoding = words.tokenizer.encode(words.separator + caption, add_special_tokens=False)
        ids = encoding.ids
        lengths[caption] = len(ids) + 1  # EOS
        visible = len(caption) - caption.count(" ")
        unknown = 0 if words.unknown is None else ids.count(words.unknown)
        missing = 0
        if unknown or words.unknown is None:
            missing = _not_read(words.separator + caption, encoding, words.unknown)
        tokens, unknown_tokens = tokens + rows * len(ids), unknown_tokens + rows * unknown
        characters, lost = characters + rows * visible, lost + rows * missing
        if unknown or missing:
            with_unknown += rows
            share = max(unknown / max(1, len(ids)), missing / max(1, visible))
            if share > worst:
                worst = share
                read = words.tokenizer.decode(ids, skip_special_tokens=False)
                example = (_beginning(caption), _beginning(read))
    most = times.most_common(1)[0]
    return Text(
        captions=len(captions),
        empty=sum(rows for caption, rows in times.items() if not any(map(str.isalnum, caption))),
        repeated=len(captions) - len(times),
        most_repeated=most,
        tokens=tokens,
        unknown=max(unknown_tokens / max(1, tokens), lost / max(1, characters)),
        with_unknown=with_unknown,
        example=example[0],
        example_read=example[1],
        cut=sum(rows for caption, rows in times.items() if lengths[caption] > max_target_length),
        max_target_length=max_target_length,
        lengths=tuple(lengths[caption] for caption in captions),
    )


def words_of(model: str) -> Words | None:
    """The tokenizer of a checkpoint's language model, None where it has no tokenizer.json at hand.

    Raises:
        ModelError: the file cannot be read.
    """
    from tokenizers import Tokenizer

    file, config = _file_of(model, "tokenizer.json"), _file_of(model, "config.json")
    if file is None:
        return None
    try:
        content = file.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(content)
        model_part = json.loads(content)["model"]
        whole = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself for a file that it cannot read
        raise ModelError(f"the model {shown(model)}: its tokenizer.json cannot be read ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return words(tokenizer, model_part, decoder_only=bool(whole.get("use_decoder_only_language_model")))


def words(tokenizer: Tokenizer, model: dict[str, Any], *, decoder_only: bool) -> Words:
    """A tokenizer with what `examine_text` needs; `model` is the entry of that name in its tokenizer.json."""
    unknown = None
    if isinstance(model.get("unk_id"), int):  # Unigram
        unknown = model["unk_id"]
    elif isinstance(model.get("unk_token"), str):
        unknown = tokenizer.token_to_id(model["unk_token"])
    # As batches.Tokenizer: SentencePiece's kind puts a space before a text by itself, a byte-level one does not.
    pair = [*tokenizer.encode("a", add_special_tokens=False).ids, *tokenizer.encode("b", add_special_tokens=False).ids]
    separator = " " if decoder_only and "ab" in tokenizer.decode(pair) else ""
    return Words(tokenizer, unknown, separator)


def captions_of(rows: Sequence[Row]) -> list[str]:
    """All captions of these rows."""
    return [caption for row in rows for caption in row.captions]


def check_text(captions: Sequence[str], model: str, max_target_length: int) -> Text | None:
    """The counts, None where the checkpoint's tokenizer is not at hand.

    Raises:
        DataError: more than `REFUSED_ABOVE` of the text is unknown.
        ModelError: the tokenizer cannot be read.
    """
    found = words_of(model)
    if found is None or not captions:
        return None
    text = examine_text(captions, found, max_target_length)
    problem = text.problem()
    if problem is not None:
        raise DataError(problem)
    return text


def _file_of(model: str, name: str) -> Path | None:
    """A file of a checkpoint that is a folder or lies in the hub's cache."""
    from trainer.model.locate import locate

    place = Path(locate(model))
    if place.is_dir() or model == EMBEDDED:
        return place / name if (place / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, name)
    return Path(cached) if isinstance(cached, str) else None


def _not_read(text: str, encoding: Any, unknown: int | None) -> int:
    """Visible characters that no known token stands for."""
    read = bytearray(len(text))
    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if number != unknown:
            read[start:end] = b"\1" * (end - start)
    return sum(not seen and not character.isspace() for seen, character in zip(read, text, strict=True))


def _beginning(text: str) -> str:
    return text if len(text) <= EXAMPLE else f"{text[:EXAMPLE]}..."
