"""What single settings take: their types, and the words in which a wrong value is refused."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic_settings import NoDecode


class Group(BaseModel):
    """A group of settings: frozen, strict about names, silent about values in its own errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


def unit_of(unit: str) -> dict[str, Any]:
    """Return what the README's table shows as a setting's unit."""
    return {"unit": unit}


def _refuse_credentials(uri: str) -> str:
    # The value is kept out of the message by whoever prints it: see `settings_problems`. A secret key may hold slashes,
    # so the @ may stand anywhere.
    rest = uri.split("://", 1)[1] if "://" in uri else ""
    if ":" in rest.split("/", 1)[0] and "@" in rest:
        raise ValueError("credentials don't belong in a URI; use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return uri


def _require_scheme(uri: str) -> str:
    scheme = uri.split("://", 1)[0] if "://" in uri else ""
    if scheme not in ("", "s3", "hf"):
        raise ValueError(f"no store is known for {scheme}://; use s3://bucket/key, hf://datasets/org/name or a path")
    return uri


def _require_one_place(uri: str) -> str:
    if any(character in uri for character in "*?["):
        raise ValueError("an output is one place; it can't hold wildcards")
    return uri


def _require_repository(uri: str) -> str:
    if uri.startswith("hf://") and (re.search(_NO_MODEL, uri) or not re.search(_REPOSITORY, uri)):
        raise ValueError(
            "on the Hub, an output is a model's whole repository; use hf://org/name or hf://org/name@branch"
        )
    return uri


def _refuse_hub(uri: str) -> str:
    if uri.startswith("hf://"):
        raise ValueError("the Hub has no place for checkpoints; use s3://bucket/prefix or a path")
    return uri


def _require_license(name: str) -> str:
    if not re.search(_LICENSE, name):
        raise ValueError("must be the identifier of a license, such as apache-2.0 or other")
    return name


Auto = Literal["auto"]

_REPOSITORY = r"^hf://[^/@]+/[^/@]+(@(refs/pr/[0-9]+|[^/@]+))?$"
_NO_MODEL = "^hf://(datasets|spaces|buckets|models)/"
_LICENSE = r"^[A-Za-z0-9][A-Za-z0-9.+_-]*$"

# The same rules for those who check settings by their JSON Schema. As `not`, because validators quote a value that
# fails a pattern, and it may hold credentials.
_WRONG_URI: list[JsonDict] = [
    {"pattern": "://", "not": {"pattern": "^(s3|hf)?://"}},
    {"pattern": r"://([^/]*:[\s\S]*@|[^/]*@[^/]*:)"},
]
_WRONG_PLACE: list[JsonDict] = [*_WRONG_URI, {"pattern": r"[*?\[]"}]
_WRONG_OUTPUT: list[JsonDict] = [
    *_WRONG_PLACE,
    {"pattern": _NO_MODEL},
    {"pattern": "^hf://", "not": {"pattern": _REPOSITORY}},
]
_WRONG_CHECKPOINTS: list[JsonDict] = [*_WRONG_PLACE, {"pattern": "^hf://"}]

_PlainUri = Annotated[str, Field(min_length=1), AfterValidator(_refuse_credentials), AfterValidator(_require_scheme)]
Uri = Annotated[_PlainUri, Field(json_schema_extra={"not": {"anyOf": [*_WRONG_URI]}})]
OutputUri = Annotated[
    _PlainUri,
    AfterValidator(_require_one_place),
    AfterValidator(_require_repository),
    Field(json_schema_extra={"not": {"anyOf": [*_WRONG_OUTPUT]}}),
]
CheckpointUri = Annotated[
    _PlainUri,
    AfterValidator(_require_one_place),
    AfterValidator(_refuse_hub),
    Field(json_schema_extra={"not": {"anyOf": [*_WRONG_CHECKPOINTS]}}),
]
License = Annotated[str, AfterValidator(_require_license), Field(json_schema_extra={"pattern": _LICENSE})]


class Source(Group):
    """One place of training rows, and how many times each of its rows occurs in one pass."""

    uri: Uri
    weight: float = Field(1.0, gt=0, le=1000)


def _parse_sources(value: object) -> object:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"must be a URI, or a JSON list of URIs: {error}") from error
    sources = value if isinstance(value, list) else [value]
    return [{"uri": source} if isinstance(source, str) else source for source in sources]


# A list in a variable of its own arrives as text; within a group's JSON it is a list.
_OneUri = Annotated[_PlainUri, Field(json_schema_extra={"not": {"anyOf": [*_WRONG_URI, {"pattern": r"^\s*[\[{]"}]}})]
_SourcesInput = _OneUri | Annotated[list[Uri | Source], Field(min_length=1)]

# NoDecode: a single URI is no JSON, so the library must not try to read it as such.
Sources = Annotated[
    list[Source],
    Field(min_length=1),
    NoDecode,
    BeforeValidator(_parse_sources, json_schema_input_type=_SourcesInput),
]


def _parse_names(value: object) -> object:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if not (isinstance(value, list) and all(isinstance(name, str) and name for name in value)):
        raise ValueError("must be names of modules such as q_proj,v_proj")
    return sorted(set(value))


def _parse_target_modules(value: object) -> object:
    if value in ("all-linear", ["all-linear"]):
        return "all-linear"
    try:
        names = _parse_names(value)
    except ValueError:
        names = []
    if not names:
        raise ValueError("must be all-linear, or names of modules such as q_proj,v_proj")
    return names


def _parse_trackers(value: object) -> object:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    return list(dict.fromkeys(value)) if isinstance(value, list) else value


_Name = Annotated[str, Field(min_length=1)]
_Names = Annotated[str, Field(pattern="[A-Za-z0-9_]")] | Annotated[list[_Name], Field(min_length=1)]

TargetModules = Annotated[
    Literal["all-linear"] | list[str], BeforeValidator(_parse_target_modules, json_schema_input_type=_Names)
]
Modules = Annotated[list[str], NoDecode, BeforeValidator(_parse_names, json_schema_input_type=str | list[_Name])]


def _parse_columns(value: object) -> object:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"must be a JSON object of names: {error}") from error
    if not (isinstance(value, dict) and all(isinstance(name, str) and name for name in value.values())):
        raise ValueError('must be a JSON object of names, such as {"review": "text"}')
    return value


# NoDecode: the library would end the job at the first value that is no JSON.
Columns = Annotated[dict[str, str], NoDecode, BeforeValidator(_parse_columns, json_schema_input_type=dict[str, _Name])]


def _require_whole_steps(warmup: float) -> float:
    if warmup >= 1 and warmup != int(warmup):
        raise ValueError("must be a ratio below 1 or a whole number of steps")
    return warmup


Warmup = Annotated[
    float,
    AfterValidator(_require_whole_steps),
    Field(json_schema_extra={"not": {"minimum": 1, "not": {"multipleOf": 1}}}),
]

_Tracker = Literal["tensorboard", "mlflow", "wandb"]
_TRACKER = "(tensorboard|mlflow|wandb)"
_TrackerNames = Annotated[str, Field(pattern=f"^{_TRACKER}(, *{_TRACKER})*$")] | list[_Tracker]
Trackers = Annotated[list[_Tracker], NoDecode, BeforeValidator(_parse_trackers, json_schema_input_type=_TrackerNames)]

_Message = dict[str, Any]
_PROMPT_FILES = (".jsonl", ".txt")


def _parse_prompts(value: object) -> object:
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"must be a JSON list of prompts, or a file of them: {error}") from error
    if isinstance(value, str):
        _require_scheme(_refuse_credentials(value))  # here, for a union would hide which of its members refuses it
        if not value.endswith(_PROMPT_FILES):
            raise ValueError(f"must be a JSON list of prompts, or a file that ends in {' or '.join(_PROMPT_FILES)}")
    elif not (isinstance(value, list) and value and all(map(_is_prompt, value))):
        raise ValueError('must be prompts, each of them text or a list of messages such as {"role", "content"}')
    return value


def _is_prompt(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(message, dict) for message in value)
    return isinstance(value, str) and bool(value.strip())


_WRONG_PROMPT_FILE: list[JsonDict] = [*_WRONG_URI, {"pattern": r"^\s*\["}, {"pattern": r"\s$"}]
_PromptFile = Annotated[
    Uri, Field(json_schema_extra={"pattern": r"\.(jsonl|txt)$", "not": {"anyOf": [*_WRONG_PROMPT_FILE]}})
]
_Prompt = Annotated[str, Field(pattern=r"\S")] | Annotated[list[_Message], Field(min_length=1)]
_PromptsInput = _PromptFile | Annotated[list[_Prompt], Field(min_length=1)]

# NoDecode: a file's name is no JSON.
Prompts = Annotated[
    str | list[str | list[_Message]], NoDecode, BeforeValidator(_parse_prompts, json_schema_input_type=_PromptsInput)
]
