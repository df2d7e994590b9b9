"""The environment becomes Settings, or one error that names every problem and no secret."""

import json
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from job.errors import ConfigError
from job.settings import RuntimeSettings, Settings, load_runtime_settings, settings_groups
from job.settings_problems import known_names

Load = Callable[..., Settings]


def problems(load: Load, **variables: object) -> str:
    with pytest.raises(ConfigError) as raised:
        load(**variables)
    assert raised.value.exit_code.code == 78
    return raised.value.message


def test_defaults_and_required_ones(load: Load) -> None:
    settings = load()
    assert settings.model.id == "org/model"
    assert (settings.lora.r, settings.lora.alpha, settings.train.global_batch_size) == (16, "auto", "auto")
    assert settings.model_fields_set == {"model", "data", "output"}


def test_fields_groups_and_their_precedence(load: Load) -> None:
    settings = load(LORA='{"r": 32, "alpha": 7}', LORA__R="8", TRAIN='{"packing": false, "epochs": 0.5}')
    assert (settings.lora.r, settings.lora.alpha) == (8, 7)
    assert (settings.train.packing, settings.train.epochs) == (False, 0.5)
    assert settings.lora.model_fields_set == {"r", "alpha"}


def test_a_group_alone_may_hold_the_required_fields(load: Load) -> None:
    assert load(MODEL__ID=None, MODEL='{"id": "a/b"}').model.id == "a/b"


def test_names_in_any_case(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    monkeypatch.setenv("sft_lora__r", "5")
    assert Settings().lora.r == 5


def test_empty_strings_are_not_set(load: Load) -> None:
    assert load(LORA__R="", TRAIN="", TRAIN__MAX_STEPS="").lora.r == 16
    assert problems(load, MODEL__ID="").startswith("SFT_MODEL__ID: must be set")


def test_everything_required_is_missed_at_once(load: Load) -> None:
    message = problems(load, MODEL__ID=None, DATA__URI=None, OUTPUT__URI=None)
    assert "3 settings are wrong" in message
    for name in ("SFT_MODEL__ID: must be set", "SFT_DATA__URI: must be set", "SFT_OUTPUT__URI: must be set"):
        assert name in message


def test_all_problems_at_once_beside_broken_groups(load: Load) -> None:
    message = problems(
        load, LORA="{", TRAIN="[1]", RUNTIME='"text"', MODEL__ID=None, TRAIN__EPOCHS="-1", LORA__ALPHAA="3"
    )
    assert message.splitlines()[0] == "6 settings are wrong:"
    for line in (
        "SFT_LORA: must be one JSON object: Expecting property name enclosed in double quotes at column 2",
        "SFT_TRAIN: must be one JSON object",
        "SFT_RUNTIME: must be one JSON object",
        "SFT_MODEL__ID: must be set",
        "SFT_TRAIN__EPOCHS=-1: must be auto or more than 0",
        "SFT_LORA__ALPHAA: unknown setting, did you mean SFT_LORA__ALPHA?",
    ):
        assert f"  {line}" in message


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("LORA__RANKS", "SFT_LORA__R"),
        ("LORA__DROPUOT", "SFT_LORA__DROPOUT"),
        ("LORRA__DROPOUT", "SFT_LORA__DROPOUT"),
        ("LEARNING_RATE", "SFT_TRAIN__LEARNING_RATE"),
        ("LORA__R__X", "SFT_LORA__R"),
        ("MODLE", "SFT_MODEL"),
        ("COMPLETELY_DIFFERENT", ""),
    ],
)
def test_unknown_names_at_any_depth(load: Load, name: str, suggestion: str) -> None:
    expected = f"SFT_{name}: unknown setting" + (f", did you mean {suggestion}?" if suggestion else "")
    assert problems(load, **{name: "8"}) == expected


def test_unknown_names_within_a_groups_json(load: Load) -> None:
    message = problems(load, LORA='{"dropuot": 0.1, "r": 8}')
    assert message == "SFT_LORA__DROPUOT: unknown setting, did you mean SFT_LORA__DROPOUT?"


def test_an_unknown_name_is_not_hidden_by_a_longer_variable_that_is_right(load: Load) -> None:
    assert problems(load, LORA='{"alph": 3}', LORA__ALPHA="4").startswith("SFT_LORA__ALPH: unknown setting")
    assert problems(load, LORA='{"": 3}', LORA__ALPHA="4").startswith("SFT_LORA__: unknown setting")


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"DATA__EVAL_URI": "/eval", "DATA__EVAL_FRACTION": "0.1"}, ("SFT_DATA__EVAL_URI", "SFT_DATA__EVAL_FRACTION")),
        ({"TRAIN__MAX_STEPS": "9", "TRAIN": '{"epochs": 3}'}, ("SFT_TRAIN__MAX_STEPS", "SFT_TRAIN__EPOCHS")),
    ],
)
def test_settings_of_which_one_would_be_ignored(load: Load, variables: dict[str, str], names: tuple[str, str]) -> None:
    message = problems(load, **variables)
    assert all(name in message for name in names)
    for name, value in variables.items():
        load(**{name: value})  # each alone is fine


@pytest.mark.parametrize(
    "variables",
    [
        {"MODEL__TOKEN": "hunter2"},
        {"TOKEN": "hunter2"},
        {"LORA__R__TOKEN": "hunter2"},
        {"MODEL": '{"token": "hunter2"}'},
        {"LORA": '{"r": {"token": "hunter2"}}'},
        {"MODEL": "hunter2"},
        {"MODEL": '"hunter2"'},
        {"DATA__URI": "s3://KEY:hunter2@bucket/x"},
        {"DATA__URI": "s3://KEY:hunt/er2hunter2@bucket/x"},
        {"MODEL__ID": "https://user:hunter2@host/x"},
        {"OUTPUT__URI": "s3://KEY:hunter2@bucket/*"},
        {"DATA__URI": "https://bucket.s3.amazonaws.com/key?X-Amz-Signature=hunter2"},
    ],
    ids=str,
)
def test_no_secret_comes_out(load: Load, variables: dict[str, str]) -> None:
    assert "hunter2" not in problems(load, **variables)


def test_an_at_sign_alone_is_no_credential(load: Load) -> None:
    assert load(DATA__URI="s3://bucket/a@b:c.jsonl").data.uri[0].uri == "s3://bucket/a@b:c.jsonl"


_NO_REPOSITORY = "on the Hub, an output is a model's whole repository; use hf://org/name or hf://org/name@branch"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("LORA__R", "0", "must be at least 1"),
        ("LORA__R", "8.5", "must be a whole number"),
        ("LORA__DROPOUT", "1", "must be less than 1"),
        ("TRAIN__EPOCHS", "nan", "must be a number or auto"),
        ("TRAIN__LEARNING_RATE", "inf", "must be a number"),
        ("TRAIN__SEED", "4294967296", "must be at most 4,294,967,295"),
        ("TRAIN__MAX_STEPS", "0", "must be at least 1"),
        ("TRAIN__WARMUP", "1.5", "must be a ratio below 1 or a whole number of steps"),
        ("TRAIN__GLOBAL_BATCH_SIZE", "0", "must be at least 1 or auto"),
        ("TRAIN__GLOBAL_BATCH_SIZE", "many", "must be a whole number or auto"),
        ("TRAIN__PACKING", "maybe", "must be auto or true or false"),
        ("DATA__EVAL_FRACTION", "0.6", "must be at most 0.5 or auto"),
        ("DATA__MAX_LENGTH", "7", "must be at least 8 or auto"),
        ("MODEL__DTYPE", "bf16", "must be auto, float32, bfloat16 or float16"),
        ("OUTPUT__OVERWRITE", "perhaps", "must be true or false"),
        ("DATA__URI", "gs://b/k", "no store is known for gs://; use s3://bucket/key, hf://datasets/org/name or a path"),
        ("OUTPUT__URI", "hf://datasets/a/b", _NO_REPOSITORY),
        ("OUTPUT__URI", "hf://datasets/a", _NO_REPOSITORY),
        ("OUTPUT__URI", "hf://a/b/c", _NO_REPOSITORY),
        ("OUTPUT__URI", "hf://a", _NO_REPOSITORY),
        ("OUTPUT__LICENSE", "my own", "must be the identifier of a license, such as apache-2.0 or other"),
        ("CHECKPOINT__URI", "hf://a/b", "the Hub has no place for checkpoints; use s3://bucket/prefix or a path"),
        ("OUTPUT__URI", "/o/*", "an output is one place; it can't hold wildcards"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(load: Load, name: str, value: str, reason: str) -> None:
    assert problems(load, **{name: value}) == f"SFT_{name}={value}: {reason}"


@pytest.mark.parametrize(
    ("name", "value", "loaded"),
    [
        ("TRAIN__GLOBAL_BATCH_SIZE", "auto", "auto"),
        ("TRAIN__GLOBAL_BATCH_SIZE", "64", 64),
        ("TRAIN__PACKING", "auto", "auto"),
        ("TRAIN__PACKING", "1", True),
        ("TRAIN__WARMUP", "10", 10),
        ("DATA__EVAL_FRACTION", "0", 0),
        ("DATA__EVAL_FRACTION", "auto", "auto"),
    ],
)
def test_auto_or_a_value(load: Load, name: str, value: str, loaded: object) -> None:
    group, field = name.lower().split("__")
    assert load(**{name: value}).model_dump()[group][field] == loaded


@pytest.mark.parametrize(
    ("variables", "loaded"),
    [
        ({"LORA__TARGET_MODULES": "all-linear"}, "all-linear"),
        ({"LORA__TARGET_MODULES": "q_proj, v_proj,"}, ["q_proj", "v_proj"]),
        ({"LORA__TARGET_MODULES": '["q_proj"]'}, ["q_proj"]),
        ({"LORA": '{"target_modules": ["q_proj", "v_proj"]}'}, ["q_proj", "v_proj"]),
        ({"LORA": '{"target_modules": "q_proj,v_proj"}'}, ["q_proj", "v_proj"]),
        ({"LORA": '{"target_modules": ["all-linear"]}'}, "all-linear"),
    ],
    ids=str,
)
def test_forms_of_target_modules(load: Load, variables: dict[str, str], loaded: object) -> None:
    assert load(**variables).lora.target_modules == loaded


@pytest.mark.parametrize("value", [",", "[]", "[1, 2]", '[""]'])
def test_target_modules_that_name_nothing(load: Load, value: str) -> None:
    message = problems(load, LORA__TARGET_MODULES=value)
    assert message.endswith(": must be all-linear, or names of modules such as q_proj,v_proj")
    assert "\n" not in message  # one problem, however many names are wrong


def test_known_names_are_every_group_and_field() -> None:
    names = known_names(settings_groups())
    assert {"SFT_LORA", "SFT_LORA__R", "SFT_RUNTIME__TERMINATION_LOG"} <= set(names)
    schema = Settings.model_json_schema()
    groups = {
        group: schema["$defs"][ref["$ref"].rsplit("/", 1)[-1]]
        for group, ref in schema["properties"].items()
        if "$ref" in ref
    }
    assert set(names) == {f"SFT_{name}".upper() for name in schema["properties"]} | {
        f"SFT_{group}__{field}".upper() for group, about in groups.items() for field in about["properties"]
    }


def test_runtime_settings_are_there_whatever_else_is_wrong(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    problems(load, MODEL__ID=None, LORA="{", NONSENSE="1", RUNTIME__LOG_FORMAT="json")
    assert load_runtime_settings().log_format == "json"
    monkeypatch.setenv("SFT_RUNTIME__LOG_LEVEL", "shout")
    assert load_runtime_settings() == RuntimeSettings(log_format="json")
    monkeypatch.setenv("SFT_RUNTIME", "{")
    assert load_runtime_settings() == RuntimeSettings()


def test_settings_are_frozen(load: Load) -> None:
    settings = load()
    with pytest.raises(ValidationError, match="frozen"):
        settings.lora.r = 8  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.lora = settings.lora  # type: ignore[misc]


def test_the_schema_is_json_and_forbids_unknown_names() -> None:
    schema = json.loads(json.dumps(Settings.model_json_schema()))
    assert all(group["additionalProperties"] is False for group in schema["$defs"].values())
    assert set(schema["required"]) == {"model", "data", "output"}


@pytest.mark.parametrize(
    "uri", ["hf://a/b", "hf://a/b-{run_id}", "hf://a/b@v2", "hf://a/b@{run_id}", "hf://a/b@refs/pr/3"]
)
def test_an_output_on_the_hub(load: Load, uri: str) -> None:
    assert load(OUTPUT__URI=uri).output.uri == uri


def test_a_pull_request_is_one_on_the_hub_into_main(load: Load) -> None:
    assert load(OUTPUT__URI="hf://a/b", OUTPUT__PULL_REQUEST="true").output.pull_request
    assert "leave it out" in problems(load, OUTPUT__PULL_REQUEST="true")
    assert "leave the revision out" in problems(load, OUTPUT__URI="hf://a/b@v2", OUTPUT__PULL_REQUEST="true")
