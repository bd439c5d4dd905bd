"""Whether a checkpoint's two tokenizers fit its language model and its Q-Former.

Where tokenizer files are missing, Transformers makes up an empty tokenizer, or takes the language model's for the
Q-Former: such a run trains on empty text, or on embeddings of other words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.common.errors import ModelError

PROBE = "Describe this image in detail."
"""A sentence that every tokenizer of English cuts into as many tokens as it has words, at least."""


def check(name: str, processor: Any, config: Any) -> None:
    """Refuse a processor whose tokenizers do not fit the model of this config.

    Raises:
        ModelError: everything that is wrong with them.
    """
    found = [
        *(f"its tokenizer {problem}" for problem in _text_problems(processor, config)),
        *(f"its Q-Former's tokenizer {problem}" for problem in _qformer_problems(processor, config.qformer_config)),
    ]
    if found:
        lines = "".join(f"\n  - {problem}" for problem in found)
        raise ModelError(f"the model {name!r}: its tokenizers do not fit:{lines}")


def _text_problems(processor: Any, config: Any) -> Iterator[str]:
    tokenizer, rows = processor.tokenizer, int(config.text_config.vocab_size)
    if tokenizer.eos_token_id is None:
        yield "has no EOS token, so captions would never end"
    # The processor adds an image token by itself, which text does not have: it may have no embedding.
    image = str(getattr(processor, "image_token", "<image>"))
    yield from _vocabulary_problems(tokenizer, rows, "the language model", without=image)
    yield from _probe_problems(tokenizer)


def _qformer_problems(processor: Any, config: Any) -> Iterator[str]:
    tokenizer = processor.qformer_tokenizer
    lacking = [
        token
        for token, found in (("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id))
        if found is None
    ]
    if lacking:
        yield f"has no {' and no '.join(lacking)}: it is not the tokenizer of a Q-Former, which is a BERT's"
    yield from _vocabulary_problems(tokenizer, int(config.vocab_size), "the Q-Former")
    yield from _probe_problems(tokenizer)


def _vocabulary_problems(tokenizer: Any, rows: int, whose: str, without: str = "") -> Iterator[str]:
    ids = {token: place for token, place in tokenizer.get_vocab().items() if token != without}
    largest = max(ids, key=lambda token: ids[token], default=None)
    if largest is None:
        yield "is empty"
    elif ids[largest] >= rows:
        yield f"has ids up to {ids[largest]} ({largest!r}), but {whose} has {rows} embeddings"


def _probe_problems(tokenizer: Any) -> Iterator[str]:
    ids = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    words = len(PROBE.split())
    if len(ids) < words:
        yield f"makes {len(ids)} tokens of the {words} words {PROBE!r}"
    elif all(each == tokenizer.unk_token_id for each in ids):
        yield f"knows none of the words {PROBE!r}"
