"""The chart as its users see it: rendered by a real Helm into Kubernetes objects, or refused with a message.

Nothing here needs a cluster. What the kubelet does with a container's variables is done here, too, so that a test can
go from a values file to the Settings that the job would load.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml
from tools import helm, helm3

CHART = Path(__file__).parents[2] / "charts" / "sft-job"
CI_FILES = sorted((CHART / "ci").glob("*-values.yaml"))
HELMS = {"helm 4": helm, "helm 3": helm3}
# What a cluster with these controllers says that it has; without a cluster, Helm knows the APIs of Kubernetes alone.
EXTRA_APIS = ("jobset.x-k8s.io/v1alpha2", "monitoring.coreos.com/v1", "kueue.x-k8s.io/v1beta1")

Values = dict[str, Any]
Object = dict[str, Any]


class _NoDuplicates(yaml.CSafeLoader):
    """YAML in which a key that stands there twice is an error: the API server would take one of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=True)
        assert len(mapping) == len(node.value), f"a key stands there twice: {node.start_mark}"
        return mapping


_NoDuplicates.add_constructor("tag:yaml.org,2002:map", _NoDuplicates.construct_mapping)


class _Quoting(yaml.SafeDumper):
    """YAML in which each text is quoted: what needs no quotes here may be a number to Helm, such as 1e3."""


_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def values_with(**changes: Any) -> Values:
    """Return the least values that the chart takes, with these on top: `settings` by group, all else as it is."""
    settings: Values = {
        "model": {"id": "org/model"},
        "data": {"uri": "s3://bucket/rows.jsonl"},
        "output": {"uri": "s3://bucket/adapter"},
    }
    for group, fields in changes.pop("settings", {}).items():
        both_are_groups = isinstance(fields, dict) and isinstance(settings.get(group), dict)
        settings[group] = settings[group] | fields if both_are_groups else fields
    return {"settings": settings, **changes}


def run_helm(*arguments: str | Path, program: Path | None = None, values: Values | None = None) -> tuple[int, str, str]:
    """Run Helm, the values given on stdin; return its exit status, stdout and stderr."""
    command = [str(program or helm()), *map(str, arguments)]
    text = None if values is None else yaml.dump(values, Dumper=_Quoting, allow_unicode=True)
    if text is not None:
        command += ["--values", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def template(
    values: Values | Path | None = None,
    *arguments: str,
    program: Path | None = None,
    release: str = "demo",
    chart: Path = CHART,
) -> str:
    """Return what `helm template` writes for values, or for a file of them."""
    command = ["template", release, chart, "--namespace", "space"]
    command += [word for api in EXTRA_APIS for word in ("--api-versions", api)]
    command += ["--values", values] if isinstance(values, Path) else []
    code, out, problems = run_helm(
        *command, *arguments, program=program, values=values if isinstance(values, dict) else None
    )
    assert code == 0, problems
    return out


def render(values: Values | Path | None = None, *arguments: str, **how: Any) -> list[Object]:
    """Return the objects that the release consists of, without its tests; arguments as of `template`."""
    return [found for found in parse(template(values, *arguments, **how)) if not is_hook(found)]


def parse(text: str) -> list[Object]:
    """Return the objects in what Helm wrote."""
    return [found for found in yaml.load_all(text, _NoDuplicates) if found]


def refusal(values: Values | Path | None, *arguments: str, program: Path | None = None) -> str:
    """Return the words in which Helm refuses to render values."""
    command = ["template", "demo", CHART, *(["--values", values] if isinstance(values, Path) else [])]
    code, _, problems = run_helm(
        *command, *arguments, program=program, values=values if isinstance(values, dict) else None
    )
    assert code != 0, "these values should be refused"
    return problems


def is_hook(found: Object) -> bool:
    """Return whether this is no part of the release, but what `helm test` starts."""
    return "helm.sh/hook" in (found["metadata"].get("annotations") or {})


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def only(objects: list[Object], kind: str) -> Object:
    [found] = of_kind(objects, kind)
    return found


def job_spec(found: Object) -> Object:
    """Return the spec of the Job that a Job, a CronJob or a JobSet describes."""
    spec: Object = found["spec"]
    if found["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    elif found["kind"] == "JobSet":
        [replicated] = spec["replicatedJobs"]
        spec = replicated["template"]["spec"]
    return spec


def run_of(objects: list[Object]) -> Object:
    """Return the one object of the release that runs the job."""
    [found] = [found for found in objects if found["kind"] in ("Job", "CronJob", "JobSet")]
    return found


def pod_of(objects: list[Object]) -> Object:
    """Return the spec of the pods that train, or check."""
    spec: Object = job_spec(run_of(objects))["template"]["spec"]
    return spec


def container_of(objects: list[Object]) -> Object:
    """Return the job's own container."""
    [found] = [found for found in pod_of(objects)["containers"] if found["name"] == "sft-job"]
    return found


def environment_of(container: Object) -> dict[str, str]:
    """Return the variables with a plain value, as the process in the container sees them."""
    known: dict[str, str] = {}
    for variable in container["env"]:
        if "value" in variable:
            known[variable["name"]] = expand(variable["value"], known)
    return known


def expand(text: str, known: dict[str, str]) -> str:
    """Return a value as the kubelet hands it over: $(NAME) of a variable above it becomes that one's value, $$ a $.

    k8s.io/kubernetes/third_party/forked/golang/expansion; what refers to nothing stays as it is.
    """

    def replace(match: re.Match[str]) -> str:
        return "$" if match["name"] is None else known.get(match["name"], match[0])

    return re.sub(r"\$(?:\$|\((?P<name>[^)]*)\))", replace, text)
