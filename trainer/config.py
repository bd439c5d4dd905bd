"""`TrainConfig`: one fully resolved, frozen training configuration. The only home of its defaults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from trainer.common.errors import MOST_SHOWN, ConfigError, nearest, shown

EMBEDDED = "mini"
"""The name under which the embedded model and data are found: `model="mini"`, `data="mini"`."""

DEVICE = r"(auto|cpu|cuda(:[0-9]{1,4})?)"
"""The devices that have a name here."""

MACHINE_FIELDS = ("device", "device_map", "gradient_checkpointing", "num_workers", "prefetch_factor")
"""Fields that decide where and how fast a run computes, not what it computes."""

LATER = ("split", "full_data", "base_dtype", "deterministic")
"""Fields that older versions did not have and whose defaults do what those did: at their default they are left out of
identities and of the definitions of studies, so that older checkpoints and studies go on."""

RETIRED = ("patience", "min_delta")
"""Fields of older versions. They say when a study stops a trial early and are fields of `search.study.Study` now;
configurations recorded with them are still read (`without_retired`)."""

MOST = 1_000_000_000
"""Largest number of samples, steps or epochs: anything larger is a typing error, and too large for floats."""


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("needs at least one module name")
    if len(set(names)) != len(names):
        raise ValueError("names a module twice")
    return names


OTHER_NAMES = {
    **dict.fromkeys(("lr", "peak_lr", "max_lr", "base_lr", "step_size"), "learning_rate"),
    **dict.fromkeys(("r", "rank", "lora_rank", "lora_dim"), "lora_r"),
    **dict.fromkeys(("alpha", "scaling"), "lora_alpha"),
    **dict.fromkeys(("dropout", "lora_drop"), "lora_dropout"),
    **dict.fromkeys(("targets", "modules", "lora_target_modules", "target"), "target_modules"),
    **dict.fromkeys(("epochs", "num_train_epochs", "n_epochs", "max_epochs", "epoch"), "num_epochs"),
    **dict.fromkeys(("bs", "batch", "per_device_train_batch_size", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_bs", "val_batch_size"), "eval_batch_size"),
    **dict.fromkeys(
        ("accumulate", "grad_accum", "grad_accumulation", "accumulate_grad_batches"), "gradient_accumulation_steps"
    ),
    **dict.fromkeys(("warmup", "num_warmup_steps", "warmup_ratio"), "warmup_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "schedule"), "lr_scheduler_type"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("clip", "grad_clip", "gradient_clip_val", "max_norm", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("eps", "epsilon"), "adam_epsilon"),
    **dict.fromkeys(("dtype", "precision", "fp16", "bf16", "half"), "torch_dtype"),
    **dict.fromkeys(("tf32", "allow_tf32"), "matmul_precision"),
    **dict.fromkeys(("model_name", "model_name_or_path", "base_model", "base", "checkpoint"), "model"),
    **dict.fromkeys(("dataset", "data_dir", "data_path", "images"), "data"),
    **dict.fromkeys(("samples", "max_train_samples", "limit", "n_samples"), "max_samples"),
    **dict.fromkeys(("val_split", "validation_split", "val_ratio", "val_size", "test_size"), "val_fraction"),
    **dict.fromkeys(("max_length", "max_len", "max_seq_length", "max_new_tokens"), "max_target_length"),
    **dict.fromkeys(("workers", "dataloader_num_workers"), "num_workers"),
    **dict.fromkeys(("gpu", "cuda"), "device"),
    **dict.fromkeys(("random_seed", "random_state", "manual_seed"), "seed"),
}
"""What other programs, or people in a hurry, call a field of TrainConfig: Transformers, PEFT, Lightning."""


class TrainConfig(BaseModel):
    """One training run of an InstructBLIP with LoRA, fully resolved.

    Build it with `TrainConfig.parse` to get one message for everything that is wrong.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    model: Annotated[str, Field(min_length=1)] = EMBEDDED
    """InstructBLIP checkpoint: a folder, a hub id, or `mini` for the embedded model."""
    data: Annotated[str, Field(min_length=1)] = EMBEDDED
    """Data folder in one of the layouts of docs/data.md (RSICap, RSICD, COCO, image folders, ...), or `mini`."""
    max_samples: Annotated[int, Field(ge=2, le=MOST)] | None = None
    """Number of rows used, training and validation together; None for all."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the rows held out for validation, by whole scenes where scenes are known."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the split and of the choice of `max_samples` rows: the same for every trial of a study."""
    split: Literal["auto", "given", "scenes", "random"] = "auto"
    """Who validates: rows as the data give it, whole scenes, or images one by one. `auto` takes the first of these
    that the data allow. A given test split is never used."""
    full_data: bool = False
    """Train on the validation rows too: for a last training with settings that a study has found. The validation loss
    is then of rows that were learnt, and says nothing."""
    skip_bad_rows: bool = False
    """Leave out rows whose image is missing, broken or unsafe; otherwise they are an error."""
    cache_features: bool = True
    """Compute the frozen vision tower's output once per image and keep it on disk for all epochs, trials and studies
    (1.45 MB an image at the real size in float32). It has no effect where an adapter sits in the vision tower."""
    max_target_length: Annotated[int, Field(ge=1, le=4096)] = 256
    """Longest caption in tokens of the language model, EOS included; longer ones are cut."""

    num_epochs: Annotated[int, Field(ge=1, le=MOST)] = 10
    """Passes over the training data."""
    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 4
    """Samples in a batch."""
    group_by_length: bool = False
    """Put captions of similar length into a batch, as Hugging Face's Trainer does under this name: there is less
    padding where a run trains alone, and batches are less of a random sample."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=MOST)] = 1
    """Batches per optimizer step."""
    micro_batch_size: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """Most samples in one forward pass, to save memory; the optimizer step stays the same. None for the batch."""
    eval_batch_size: Annotated[int, Field(ge=1, le=MOST)] = 16
    """Samples in a forward pass of the evaluation: the same for every trial, so that their losses are comparable."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-4
    """Peak rate of AdamW, reached after the warmup."""
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Schedule after the warmup."""
    warmup_steps: Annotated[int, Field(ge=0, le=MOST)] = 100
    """Optimizer steps of linear warmup."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    """AdamW's decoupled weight decay."""
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """AdamW's eps. In float16 anything below 6e-8 rounds to zero, see `torch_dtype`."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global L2 norm."""
    max_nonfinite_steps: Annotated[int, Field(ge=1, le=MOST)] = 3
    """The run ends after this many consecutive steps whose loss, query output or gradient is not finite."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of adapter initialisation, data order and dropout."""

    lora_r: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank of the LoRA update."""
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 16
    """LoRA's numerator: updates are scaled by alpha / r (Hu et al. 2021)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout before lora_A."""
    target_modules: Annotated[tuple[str, ...], AfterValidator(_distinct)] = ("query", "key", "value", "dense")
    """Module name endings that get an adapter. The default reaches the Q-Former only; language-model modules
    (`q`, `v` of a T5, `q_proj`, `v_proj` of a Llama) may be named too."""

    torch_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of base and adapters alike, as in the hand-run log."""
    base_dtype: Literal["bfloat16"] | None = None
    """`bfloat16` keeps the frozen base in that dtype; adapters, their gradients and moments, losses and the insides of
    norms and sums stay in float32, as PEFT has it by default. None for `torch_dtype`."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """PyTorch's float32 matmul precision on CUDA; `high` allows TF32."""
    deterministic: bool = True
    """The same bits whenever a run is repeated on the same machine. False lets a GPU take faster kernels whose sums
    come in any order, for attention first of all; on a CPU it changes nothing."""
    device: Annotated[str, Field(pattern=f"^{DEVICE}$")] = "auto"
    """`auto` is CUDA where there is a GPU, else the CPU."""
    device_map: Literal["single", "auto"] = "single"
    """`auto` spreads a base that is too large for one CUDA device over all that the process sees (Transformers' and
    Accelerate's device map); the adapted modules have to lie on one of them."""
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Compute the frozen language model's layers again in the backward pass instead of keeping their activations: the
    same bits, a third more arithmetic. `auto` does so where a batch would not fit otherwise. It has no effect where
    an adapter sits in the language model."""
    num_workers: Annotated[int, Field(ge=0, le=128)] = 0
    """DataLoader worker processes; 0 loads in the training process."""
    prefetch_factor: Annotated[int, Field(ge=1, le=MOST)] = 2
    """Batches each DataLoader worker holds ready."""

    @field_validator("micro_batch_size")
    @classmethod
    def _micro_batch_fits(cls, size: int | None, info: ValidationInfo) -> int | None:
        # A validator of the field, not of the model, which Pydantic would skip as long as any field is wrong.
        batch_size = info.data.get("batch_size")
        if size is not None and batch_size is not None and size > batch_size:
            raise ValueError(f"must not be larger than batch_size={batch_size}")
        return size

    @field_validator("base_dtype")
    @classmethod
    def _base_dtype_is_lower(cls, dtype: str | None, info: ValidationInfo) -> str | None:
        if dtype is not None and info.data.get("torch_dtype", "float32") != "float32":
            raise ValueError("is for adapters in float32: leave torch_dtype at float32")
        return dtype

    @property
    def dtype_of_base(self) -> str:
        """The dtype in which the frozen base is loaded."""
        return self.base_dtype or self.torch_dtype

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The defaults overridden by these values.

        Raises:
            ConfigError: everything that is wrong, in one message, unknown names with the nearest valid one.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(_listed("the configuration", _problems(error, cls.model_fields))) from None

    @classmethod
    def parse_settings(cls, settings: Iterable[str], base: Mapping[str, Any] | None = None) -> TrainConfig:
        """The defaults overridden by `base`, overridden by `key=value` strings.

        Raises:
            ConfigError: everything that is wrong, in one message: with the form of the settings and with the values.
        """
        values, errors = _scan(settings)
        try:
            config = cls(**{**(base or {}), **values})
        except ValidationError as error:
            errors += _problems(error, cls.model_fields)
        if errors:
            raise ConfigError(_listed("the configuration", errors))
        return config

    def identity(self) -> str:
        """Hash of all fields that can change the result: on one machine, runs of the same identity are equal."""
        return identity_of(self.model_dump(mode="json"))


def identity_of(values: Mapping[str, Any]) -> str:
    """`TrainConfig.identity` of a configuration as plain data, which an older version may have recorded."""
    told = without_later(without_retired(values))
    decisive = {name: value for name, value in told.items() if name not in MACHINE_FIELDS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration without the fields that only older versions have, for `TrainConfig.parse`."""
    return {name: value for name, value in values.items() if name not in RETIRED}


def default(field: str) -> Any:
    """What a configuration that does not name the field has."""
    return TrainConfig.model_fields[field].default


def without_later(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain data without the fields of `LATER` that have their default."""
    defaults = {name: default(name) for name in LATER}
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def _listed(what: str, errors: Iterable[str]) -> str:
    lines = list(dict.fromkeys(errors))
    head = f"{what} has one error:" if len(lines) == 1 else f"{what} has {len(lines)} errors:"
    return "\n".join([head, *(f"  - {line}" for line in lines)])


def field_hint(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a name that TrainConfig does not have: what others call it, or the nearest."""
    valid = list(valid)
    plain = name.lower().replace("-", "_").replace(".", "_")
    other = OTHER_NAMES.get(plain)
    return f"; did you mean {other!r}?" if other in valid else nearest(plain, valid)


def _problems(error: ValidationError, valid: Iterable[str]) -> list[str]:
    """One line for each thing wrong with a configuration: the field, the rule and the value."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])[:MOST_SHOWN] or "configuration"
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden" and name in RETIRED:
            lines.append(
                f"{name} is not a field of a training run but of a study: write Study({name}=...) in the study file, "
                f"or --set {name}=... for search.run"
            )
            continue
        if problem["type"] == "extra_forbidden":
            lines.append(f"TrainConfig has no {shown(name)}{field_hint(name, valid)}")
            continue
        message = problem["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        given = "" if where == "configuration" else f", but got {name}={shown(problem['input'])}"
        lines.append(f"{where}: {message}{given}")
    return lines


def read_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`["learning_rate=2e-4", "target_modules=query,value"]` as field values.

    Raises:
        ConfigError: entries without `=` and keys set twice, all in one message. `TrainConfig.parse`
            checks names and values.
    """
    values, errors = _scan(settings)
    if errors:
        raise ConfigError(_listed("the list of settings", errors))
    return values


def _scan(settings: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """(values by key, errors in the form of the settings)."""
    values: dict[str, Any] = {}
    errors = []
    for setting in settings:
        key, separator, text = setting.partition("=")
        key = key.strip()
        if not separator or not key:
            errors.append(f"{shown(setting)} is not of the form key=value")
            continue
        if key in values:
            errors.append(f"{shown(key)} is set twice")
        values[key] = _read_value(key, text.strip())
    return values, errors


def _read_value(key: str, text: str) -> Any:
    """The text as a value for Pydantic, which reads numbers itself: lists split at commas, `none` as None."""
    if key == "target_modules":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    field = TrainConfig.model_fields.get(key)
    if text.lower() in ("none", "null") and field is not None and type(None) in get_args(field.annotation):
        return None
    return text
