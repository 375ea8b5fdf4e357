"""The contents of files, checked: one schema for each kind of file, and one form of error.

    <file>: <place in it>: <what is expected> is expected, not <what is there>: <what to do>

Schemas are strict: a number is no text, true is no number, NaN and infinity are no numbers. Unknown keys are refused,
except where other programs or later versions may add some.
"""

from __future__ import annotations

import re
import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

MOST_LAYERS = 1000  # of any base model
_LARGEST = 1 << 24  # of any size or count in a model
LONGEST_NAME, _LONGEST_PATH = 200, 1000  # characters of a module's or tensor's name, and of a model's
_LONGEST_VALUE = 80  # characters of a wrong value in an error

Model = TypeVar("Model", bound=BaseModel)


# --------------------------------------------------------------------------------------------------------- the error
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_unicode": "a text of valid Unicode (without unpaired surrogates)",
    "string_too_short": "a text that is not empty",
    "string_too_long": "a text of at most {max_length} characters",
    "greater_than_equal": "a number of at least {ge}",
    "less_than_equal": "a number of at most {le}",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object of named values",
    "model_type": "an object of named values",
    "model_attributes_type": "an object of named values",
    "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values",
    "literal_error": "{expected}",
    "missing": "a value",
    "missing_argument": "a value",
    "extra_forbidden": "no such name",
}
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 3, _LONGEST_VALUE, _LONGEST_VALUE, _LONGEST_VALUE


def shown(value: Any) -> str:
    """A value of a file in an error: one line of printable ASCII, cut to _LONGEST_VALUE characters."""
    text = ascii(_repr.repr(value))[1:-1].replace("\\'", "'").replace("\\\\", "\\")
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def first_line(error: Exception) -> str:
    """The first line of a library's error in printable ASCII, at most 200 characters."""
    return ascii((str(error).splitlines() or [type(error).__name__])[0])[1:-1][:200]


def expected(file: object, place: str, what: str, value: str, advice: str) -> str:
    """The text of an error about a file's contents; value: from `shown`, or "missing"."""
    found = "and it is missing" if value == "missing" else f"not {value}"
    return f"{file}: {f'{place}: ' if place else ''}{what} is expected, {found}: {advice}"


def check(schema: type[Model], value: Any, file: object, advice: str, error: type[ValueError] = ValueError) -> Model:
    """`value` as an object of the schema; `error` names the first wrong place.

    value: JSON values, or an object with attributes.
    file, advice: for the error: the file's name and what to do.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as problem:
        wrong = problem.errors(include_url=False)[0]
        raise error(_message(wrong, file, advice)) from problem


def _message(wrong: dict[str, Any], file: object, advice: str) -> str:
    kind, context = wrong["type"], wrong.get("ctx", {})
    place = ".".join(shown(part).strip("'") for part in wrong["loc"])
    if kind == "value_error":
        what = str(context["error"])
    elif kind in _EXPECTED:
        what = _EXPECTED[kind].format(**context)
    else:
        what = wrong["msg"].removeprefix("Input should be ")
    return expected(file, place, what, "missing" if kind == "missing" else shown(wrong["input"]), advice)


# --------------------------------------------------------------------------------------------------------- the values
def _unicode(text: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(_EXPECTED["string_unicode"]) from error
    return text


def _template(text: str) -> str:
    plain = text.replace("{layer}", "", 1)
    if plain == text:  # rows: "model.layers.1,3.mlp.down_proj"
        plain = re.sub(r"\.\d+(,\d+)*\.", ".", text, count=1)
    if plain == text or not _is_path(plain):
        raise ValueError("a path with one {layer} (or numbers of layers) and else only letters, digits, _ and .")
    return text


def _is_path(text: str) -> bool:
    return text.isascii() and text.replace("_", "").replace(".", "").isalnum()


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name of printable characters")
    return text


def _file_name(text: str) -> str:
    if text in (".", "..") or "/" in text or "\\" in text or "\0" in text or len(text.encode("utf-8", "replace")) > 255:
        raise ValueError("the name of a file in this folder")
    return text


def _digest(text: str) -> str:
    if len(text) != 64 or text.strip("0123456789abcdef"):
        raise ValueError("64 hexadecimal digits")
    return text


def _patterns(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise ValueError("a pattern or a list of names")


_Text = Annotated[str, AfterValidator(_unicode)]
_Name = Annotated[str, Field(min_length=1), AfterValidator(_unicode)]
_ModelName = Annotated[str, Field(max_length=_LONGEST_PATH), AfterValidator(_printable)]
_ModuleName = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME), AfterValidator(_printable)]
_Factor = Annotated[float, Field(ge=-1e9, le=1e9)]  # of tensors; no product overflows
_Share = Annotated[float, Field(ge=0)]
_Whole = Annotated[int, Field(ge=0, le=1 << 48)]  # a position or a number of things
_Count = Annotated[int, Field(ge=1, le=_LARGEST)]  # a size
_Some = Annotated[int, Field(ge=0, le=_LARGEST)]  # a size that may be zero
_Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
_FirstVersion = Annotated[int, Field(ge=1, le=1)]
_Template = Annotated[str, Field(max_length=_LONGEST_PATH), AfterValidator(_template)]


def _in_order(span: tuple[int, int]) -> tuple[int, int]:
    if span[0] > span[1]:
        raise ValueError("a span [start, end] with start <= end")
    return span


# JSON has lists only, so a tuple may be one; its numbers stay strict.
_Span = Annotated[tuple[_Whole, _Whole], Strict(False), AfterValidator(_in_order)]
_Sizes = Annotated[tuple[_Count, _Count], Strict(False)]


class _Closed(BaseModel):
    """An object with these keys only."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class _Open(_Closed):
    """An object that may have other keys, which are ignored."""

    model_config = ConfigDict(extra="ignore")


class _Record(_Open):
    """An object with attributes, some of which are read."""

    model_config = ConfigDict(from_attributes=True)


# ------------------------------------------------------------------------------------------------------------ adapters
class _AdapterSides(_Closed):
    """{module: name of its tensor} for A and for B."""

    A: dict[_ModuleName, _Name]
    B: dict[_ModuleName, _Name]


class _SharedRows(_Closed):
    """Names of a table and of the numbers of its rows."""

    table: _Name
    rows: _Name


class _AdapterBlock(_Closed):
    """One block of an adapter file."""

    A: dict[_ModuleName, _Name]
    B: dict[_ModuleName, _Name | _SharedRows]
    document: _Name
    chunk: _Whole
    span: _Span | None
    weight: _Factor


class AdapterHeader(_Closed):
    """The labels in the header of an adapter file."""

    format: Literal["d2l-adapter"]
    version: Literal[1, 2]
    blocks: list[_AdapterBlock]
    bias: _AdapterSides | None
    scale: _Factor
    bias_weight: _Factor
    n_layers: _Layers
    layers: list[_Some] = []
    sizes: dict[_ModuleName, _Sizes]
    base_model: _Text
    base_key: _Text
    hypernetwork_key: _Text
    paths: dict[_ModuleName, _Template]
    bias_inside: bool


class PeftConfig(_Open):
    """The settings read from adapter_config.json of a PEFT folder."""

    peft_type: _Text | None = None
    base_model_name_or_path: _Text | None = None
    r: _Count | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[_Text, _Count] | None = None
    alpha_pattern: dict[_Text, float] | None = None
    use_rslora: bool | None = None
    target_modules: Annotated[Any, AfterValidator(_patterns)] = None

    @model_validator(mode="after")
    def _a_lora_has_both(self) -> PeftConfig:
        if self.peft_type == "LORA" and (self.r is None or self.lora_alpha is None):
            raise ValueError("a LoRA with r and lora_alpha")
        return self


class ExportRecord(_Open):
    """The facts about an export in the header of its weights."""

    version: _FirstVersion
    documents: list[_Text] = []
    bias: bool
    n_layers: _Layers
    base_key: _Text
    hypernetwork_key: _Text
    rank: _Count
    error: _Share
    errors: dict[_Text, list[_Share]]


# ------------------------------------------------------------------------------------------------------ hypernetworks
class HypernetworkSettings(_Closed):
    """The fields of a HypernetworkConfig."""

    n_layers: _Layers
    d_in: Annotated[dict[_ModuleName, _Count], Field(min_length=1)]
    d_out: Annotated[dict[_ModuleName, _Count], Field(min_length=1)]
    feature_size: _Count
    latent_size: _Count = 512
    rank: _Count = 8
    scale: float | None = None
    encoder_type: Literal["early_exit", "per_layer_activations", "embed_only", "hidden_states"] = "early_exit"
    encoder_layer: _Some | None = None
    n_latent_queries: _Count = 208
    n_blocks: _Layers = 8
    n_self_attention_per_block: _Some = 0
    shared_weights: bool = False
    per_layer_processing: bool = False
    n_pre_head_layers: _Some = 1
    use_bias: bool = True
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    n_heads: _Count = 16
    n_kv_heads: _Count = 4
    head_dim: _Count = 128
    base_model: _ModelName = ""
    encoder_model: _ModelName | None = None
    encoder_4bit: bool = False
    null_rows: _Some = 0
    writer: Literal["perceiver", "token_rows", "pooled_rows"] = "perceiver"
    encoder_layers: list[_Some] = []
    row_layers: list[_Some] = []
    reader_layers: list[_Some] = []
    reader_rank: _Some = 0
    reader_sizes: dict[_ModuleName, Annotated[list[_Count], Field(min_length=2, max_length=2)]] = {}
    written_layers: list[_Some] = []
    pooled_size: _Some = 0
    pooled_blocks: _Some = 0


class GateSettings(_Closed):
    """The gate in a checkpoint: two numbers in nats and a sentence."""

    known: float
    growth: float
    refusal: _Name


class RouterSettings(_Closed):
    """The sizes of a router and what the base model says (see `router.RouterConfig`); its weights are in a file."""

    n_layers: _Count
    rank: _Count
    d_out: _Count
    width: _Count
    refusal: _Name
    verdicts: Annotated[list[_Name], Field(min_length=2, max_length=2)]


class ReadingSettings(_Closed):
    """The sparse reading of blocks in a checkpoint (see `reading.Reading`)."""

    layers: list[_Some] | None = None
    decay: Annotated[float, Field(ge=0, le=1)] = 0.5
    thresholds: list[float] = []
    gate_weights: list[float] = []
    prompt: bool = False
    null_threshold: float = 0.0


class RowReadingSettings(_Closed):
    """How rows are read (see `row_reading.RowReading`)."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    null_logit: float = 0.0
    chunks: _Count | None = 1


class _CheckpointMeta(_Open):
    """A checkpoint's facts beside its sizes; callers may save others."""

    chunk_tokens: _Count | None = None
    base_model: _ModelName | None = None
    encoder_model: _ModelName | None = None
    least_relevance: float = 0.0
    block_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    gate: GateSettings | None = None
    router: RouterSettings | None = None
    reading: ReadingSettings | None = None
    row_reading: RowReadingSettings | None = None
    files: list[str] = []


class CheckpointSettings(_Closed):
    """config.json of a checkpoint folder."""

    format: Literal["doc-to-lora hypernetwork"]
    version: _FirstVersion
    hypernetwork: HypernetworkSettings
    meta: _CheckpointMeta = _CheckpointMeta()


class TrainingFacts(_Closed):
    """hypernetwork.json of a training."""

    hypernetwork: HypernetworkSettings
    chunk_tokens: _Count | None


class _PublishedAggregator(_Record):
    """The fields read from a published checkpoint's AggregatorConfig."""

    aggregator_type: _ModelName
    num_layers: _Layers
    feature_size: _Count
    n_latent_queries: _Count
    num_blocks: _Count
    num_self_attn_per_block: _Some
    shared_weights: bool


class _PublishedLora(_Record):
    """The fields read from a published checkpoint's LoraConfig."""

    r: _Count
    lora_alpha: float


class _PublishedHypernet(_Record):
    """The fields read from a published checkpoint's HypernetConfig; older files lack those that may be None."""

    latent_size: _Count
    per_rank_gen: bool
    per_layer_processing: bool
    num_pre_head_layers: _Some | None = None
    use_bias: bool | None = None
    dropout_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    extra_modules: list[Any] | None = None
    feature_sizes: tuple[dict[_ModuleName, _Count], dict[_ModuleName, _Count]]
    aggregator_config: _PublishedAggregator
    lora_config: _PublishedLora


class PublishedEncoder(_Record):
    """The fields read from a published checkpoint's CtxEncoderArguments."""

    ctx_encoder_model_name_or_path: _ModelName | None = None
    ctx_encoder_type: Literal["early_exit", "per_layer_activations", "embed_only"] | None = None
    layer_idx: _Some | None = None
    ctx_encoder_last_layer: _Some | None = None
    quantize_ctx_encoder: bool | None = None


class PublishedCheckpoint(_Record):
    """The settings in a published checkpoint."""

    base_model_name_or_path: _ModelName
    hypernet_config: _PublishedHypernet
    ctx_encoder_args: PublishedEncoder | None = None


# ------------------------------------------------------------------------------------------------- trainings and data
class TrainerState(_Open):
    """The fields read from trainer_state.json of a training checkpoint."""

    global_step: _Whole


class LogLine(_Open):
    """One line of a training's log.jsonl."""

    step: _Whole
    seconds: float


class ScoreLine(_Open):
    """One line of a run's scores.jsonl."""

    checkpoint: _Name


class TextLine(_Open):
    """One line of a file of texts."""

    text: _Text


class ShardRecord(_Open):
    """The .json file beside a shard."""

    file: Annotated[_Name, AfterValidator(_file_name)]
    run: Annotated[str, AfterValidator(_digest)]
    sha256: Annotated[str, AfterValidator(_digest)]
    counts: dict[_Text, _Whole]


class _ManifestShard(_Open):
    """One shard in a manifest."""

    file: Annotated[_Name, AfterValidator(_file_name)]
    sha256: Annotated[str, AfterValidator(_digest)]
    counts: dict[_Text, _Whole] = {}


class Manifest(_Open):
    """The fields read from manifest.json of self-generated data."""

    complete: bool
    n_shards: _Some
    shards: list[_ManifestShard] = []

    @model_validator(mode="after")
    def _complete_means_all(self) -> Manifest:
        if self.complete and len({shard.file for shard in self.shards}) != self.n_shards:
            raise ValueError(f"the {self.n_shards} different shards of n_shards in a complete manifest")
        return self
