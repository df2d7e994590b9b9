"""What must be the same on every node of a run, and in which words it is said when it isn't.

Settings, data and versions are compared first. The plan follows from them and from the machine, so that it is looked at
only when they agree.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import job
from job.errors import ConfigError, DataError
from job.inputs import InputFile
from job.manifest import package_versions, training_settings
from job.plan import TrainPlan
from job.prepared import Prepared
from job.settings import Settings
from job.settings_problems import DELIMITER, PREFIX

_NOTHING = "nothing"
_MOST_SHOWN = 10
_PROMPTS = f"{PREFIX}EVAL{DELIMITER}PROMPTS"
_NAMES_NO_RUN = (f"{PREFIX}OUTPUT{DELIMITER}", f"{PREFIX}PARALLEL{DELIMITER}", _PROMPTS, "the version of ")
# Cores and memory may differ from node to node, and with them the notes.
_NOT_SHARED = {"threads_per_process", "memory", "sources", "warnings"}


def describe_run(prepared: Prepared) -> dict[str, Any]:
    """Return what a node is about to do, as JSON without secrets: values by name, and the data files in their order."""
    settings, inputs = prepared.settings, prepared.inputs
    template, samples = inputs.chat_template, prepared.dataset.samples
    return {
        "values": {
            **_name_settings(settings),
            _PROMPTS: _NOTHING if samples is None else f"sha256 {_digest(samples.model_dump_json())}",
            "the base model's revision": inputs.base_model.revision,
            "the chat template": _NOTHING if template is None else f"sha256 {_digest(template.text)}",
            "the version of sft-job": job.__version__,
            **{f"the version of {name}": version for name, version in package_versions().items()},
        },
        "data": [
            *(_describe_file("SFT_DATA__URI", file) for file in inputs.train),
            *(_describe_file("SFT_DATA__EVAL_URI", file) for file in inputs.evaluation),
        ],
        "plan": _name_plan(prepared.plan),
    }


def _name_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that decide what is learned, how many take part and what is published, by their variables."""
    tree = training_settings(settings)
    tree["output"] = settings.output.model_dump(mode="json")
    tree["parallel"] = {"nodes": settings.parallel.nodes}
    named = {}
    for group, values in tree.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            variable = f"{PREFIX}{group}{DELIMITER}{name}" if name else f"{PREFIX}{group}"
            named[variable.upper()] = value
    return named


def _describe_file(setting: str, file: InputFile) -> dict[str, Any]:
    return {"setting": setting, "uri": file.uri, "sha256": file.sha256, "weight": file.weight}


def _name_plan(plan: TrainPlan) -> dict[str, Any]:
    return {f"the plan's {name}": value for name, value in plan.model_dump(mode="json", exclude=_NOT_SHARED).items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def refuse_differences(runs: Sequence[dict[str, Any]]) -> None:
    """Compare what the nodes are about to do, by rank, with node 0's; every node finds the same.

    Raises DataError when only the data differ, ConfigError when anything else does, naming node and both values.
    """
    first = runs[0]
    data = [line for rank, run in enumerate(runs) for line in _compare_data(rank, run["data"], first["data"])]
    others = [line for rank, run in enumerate(runs) for line in _compare(rank, run["values"], first["values"])]
    if not data and not others:
        others = [line for rank, run in enumerate(runs) for line in _compare(rank, run["plan"], first["plan"])]
    lines = others + data
    if not lines:
        return
    shown = lines[:_MOST_SHOWN] + ([f"... and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else [])
    message = shown[0] if len(shown) == 1 else "the nodes differ:\n  " + "\n  ".join(shown)
    if others:
        raise ConfigError(message, hint="start every node with the same settings, from one image, on alike machines")
    raise DataError(message, hint="every node must read the same data; if it was being written, start all nodes again")


def name_differences(run: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Say of what names a run (`make_run_id`) what it has, and what another one had in its place; both as
    `describe_run` returns them."""
    named = [
        f"{name} is {run['values'].get(name, _NOTHING)}, and was {other['values'].get(name, _NOTHING)}"
        for name in sorted(run["values"] | other["values"])
        if run["values"].get(name) != other["values"].get(name) and not name.startswith(_NAMES_NO_RUN)
    ]
    if _contents(run["data"]) == _contents(other["data"]):
        return named
    known = {(file["setting"], file["uri"]): file for file in other["data"]}
    for file in run["data"]:
        before = known.pop((file["setting"], file["uri"]), None)
        if before is None or _contents([before]) != _contents([file]):
            named.append(f"{_name(file)}, and had {_NOTHING if before is None else _show(before)}")
    named += [f"{file['setting']}={file['uri']} is no more among the data" for file in known.values()]
    return named or ["the data come in another order"]


def _compare(rank: int, run: dict[str, Any], first: dict[str, Any]) -> Iterator[str]:
    for name in sorted(run | first):
        value, firsts = run.get(name, _NOTHING), first.get(name, _NOTHING)
        if value != firsts:
            yield f"node {rank} differs from node 0: {name} is {value}, node 0's is {firsts}"


def _compare_data(rank: int, files: list[dict[str, Any]], firsts: list[dict[str, Any]]) -> Iterator[str]:
    """Compare contents; where they lie may differ, such as where a disk is mounted."""
    if _contents(files) == _contents(firsts):
        return
    known = {(file["setting"], file["uri"]): file for file in firsts}
    for file in files:
        first = known.pop((file["setting"], file["uri"]), None)
        if first is None:
            yield f"node {rank} differs from node 0: {_name(file)}, and node 0's data hold no such file"
        elif _contents([file]) != _contents([first]):
            yield f"node {rank} differs from node 0: {_name(file)}, node 0's {_show(first)}"
    for first in known.values():
        yield f"node {rank} differs from node 0: its data lack {first['uri']}, node 0's {_show(first)}"
    if [file["uri"] for file in files] != [first["uri"] for first in firsts] and not known:
        yield f"node {rank} differs from node 0: its data come in another order"


def _contents(files: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    return [(file["setting"], file["sha256"], file["weight"]) for file in files]


def _name(file: dict[str, Any]) -> str:
    return f"{file['setting']}={file['uri']} has {_show(file)}"


def _show(file: dict[str, Any]) -> str:
    weight = "" if file["weight"] == 1 else f" and weight {file['weight']:g}"
    return f"sha256 {file['sha256'][:16]}...{weight}"
