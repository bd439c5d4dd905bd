"""The embedded model before its pretraining: two tokenizers, processor, architecture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from torch import nn
from transformers import (
    BertTokenizerFast,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    T5Tokenizer,
)

from trainer.mini.drawing import TILE_PIXELS

NUM_QUERY_TOKENS = 12
PATCH_PIXELS = 8
ASCII = [chr(code) for code in range(33, 127)]


def make_t5_tokenizer(texts: Sequence[str]) -> T5Tokenizer:
    """A Unigram tokenizer with a piece for every word of the texts and every printable ASCII character.

    Trained pieces would cut these few hundred words into syllables: captions twice as long, epochs twice as slow.
    """
    words = Counter(word.strip(".,?") for text in texts for word in text.split())
    total = sum(words.values())
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -12.0, **dict.fromkeys(ASCII, -12.0)}
    pieces |= {f"▁{word}": math.log(count / total) for word, count in sorted(words.items())}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=512)


def make_qformer_tokenizer(texts: Sequence[str]) -> BertTokenizerFast:
    """A lower-casing WordPiece tokenizer with a piece for every word of the texts and every printable ASCII character.

    Written out, not trained: the tokenizers library breaks ties at random, and the recipe must be reproducible.
    """
    words = sorted({word.strip(".,?").lower() for text in texts for word in text.split()})
    letters = [character for character in ASCII if not character.isupper()]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, *words]))}
    return BertTokenizerFast(vocab=vocab, model_max_length=64)


def make_processor(texts: Sequence[str]) -> InstructBlipProcessor:
    """The processor with both tokenizers, whose image processor leaves a 64-pixel tile its size."""
    size = {"height": TILE_PIXELS, "width": TILE_PIXELS}
    return InstructBlipProcessor(
        BlipImageProcessorPil(size=size),
        make_t5_tokenizer(texts),
        make_qformer_tokenizer(texts),
        num_query_tokens=NUM_QUERY_TOKENS,
    )


def make_model(processor: InstructBlipProcessor) -> InstructBlipForConditionalGeneration:
    """InstructBLIP with a T5, randomly initialised so that it can see.

    By default the vision tower's `initializer_range` is 1e-10 and `query_tokens` are 0: such a model is blind.
    """
    vocabulary = math.ceil(len(processor.tokenizer) / 8) * 8
    config = InstructBlipConfig(
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": TILE_PIXELS,
            "patch_size": PATCH_PIXELS,
            "initializer_range": 0.08,
        },
        qformer_config={
            "vocab_size": len(processor.qformer_tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.05,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
        },
        text_config={
            "model_type": "t5",
            "vocab_size": vocabulary,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 256,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.1,
            "decoder_start_token_id": 0,
        },
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.1)
    # As large as the patches' own embeddings: half of the facts in the captions are positions.
    nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.4)
    return model
