"""The settings of a run as the file that starts it again: a line for each that was given, for
`docker run --env-file`, which takes all behind the first = as it stands."""

import json
from collections.abc import Iterator
from typing import Any

from job.accept import name_base_model
from job.record import RunRecord
from job.settings_problems import DELIMITER, PREFIX

# What tells a shell to take such a file: sourced, its quotes and dollar signs would mean something.
SHELL_LOADER = 'while IFS= read -r line; do case $line in SFT_*) export "$line";; esac; done < run.env'


_LISTS_OF_TEXTS = {"prompts"}


def make_env_lines(record: RunRecord) -> list[str]:
    """Return the variables that give a run's settings again; a Hub model is pinned to the commit that it had.

    Text of several lines, which an env file can't hold, comes in its group's JSON.
    """
    given = dict(record.given)
    if record.hub_revision is not None:
        name, _ = name_base_model(record.plan.model_id, record.plan.model_revision)
        given["model"] = given["model"] | {"id": name, "revision": record.hub_revision}
    lines: list[str] = []
    for name, value in given.items():
        variable = f"{PREFIX}{name}".upper()
        lines += _write_group(variable, value) if isinstance(value, dict) else [f"{variable}={_write(value)}"]
    return lines


def list_credentials(record: RunRecord) -> list[str]:
    """Say which credentials a run with these settings needs; their values are nowhere in the record."""
    settings = record.settings
    sources = [source["uri"] for source in settings["data"]["uri"]]
    inputs = [settings["model"]["id"], settings["data"]["eval_uri"] or "", *sources]
    outputs = [settings["output"]["uri"], settings["checkpoint"]["uri"] or ""]
    needed = []
    if any(uri.startswith("s3://") for uri in [*inputs, *outputs]):
        needed.append(
            "S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or any other way of the AWS default chain; "
            "AWS_ENDPOINT_URL_S3 for a server that isn't AWS"
        )
    if any(uri.startswith("hf://") for uri in outputs):
        needed.append("Hugging Face Hub: HF_TOKEN that may write")
    elif record.hub_revision is not None or any(uri.startswith("hf://") for uri in inputs):
        needed.append("Hugging Face Hub: HF_TOKEN, where the model or the data are private or gated")
    return needed


def _write_group(variable: str, given: dict[str, Any]) -> Iterator[str]:
    several_lines = {}
    for field, value in given.items():
        is_texts = field in _LISTS_OF_TEXTS and isinstance(value, list)
        text = json.dumps(value, ensure_ascii=False) if is_texts else _write(value)
        if text.splitlines() == [text]:
            yield f"{variable}{DELIMITER}{field.upper()}={text}"
        elif text:
            several_lines[field] = value
    if several_lines:
        yield f"{variable}={json.dumps(several_lines)}"


def _write(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""  # an empty variable is as good as none
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)  # names, none of which has a comma
    if isinstance(value, list) and len(value) == 1 and value[0].keys() == {"uri"}:
        return str(value[0]["uri"])  # the one source
    return json.dumps(value, ensure_ascii=False)
