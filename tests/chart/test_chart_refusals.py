"""What can't be right is refused by Helm itself, with the value's path and never with a secret."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helm_chart import CHART, HELMS, refusal, run_helm, values_with

SECRET = "hf_abcdefghijklmnop"

# By the schema: --set what -> the path that Helm's message names.
WRONG: list[tuple[str, str]] = [
    ("settings.lora.rr=8", "/settings/lora"),
    ("settings.lorra.r=8", "/settings"),
    ("setings.lora.r=8", ""),
    ("image.tagg=1", "/image"),
    ("gpu.cuont=1", "/gpu"),
    ("workDir.sizes=1Gi", "/workDir"),
    ("cron.shedule=1", "/cron"),
    ("serviceAccount.crate=true", "/serviceAccount"),
    ("networkPolicy.enable=true", "/networkPolicy"),
    ("podMonitor.enable=true", "/podMonitor"),
    ("kueue.queue=a", "/kueue"),
    ("jobSet.restarts=1", "/jobSet"),
    ("settings.train.learning_rate=fast", "/settings/train/learning_rate"),
    ("settings.train.learning_rate=2", "/settings/train/learning_rate"),
    ("settings.train.learning_rate=0", "/settings/train/learning_rate"),
    ("settings.train.max_steps=0", "/settings/train/max_steps"),
    ("settings.train.max_steps=1.5", "/settings/train/max_steps"),
    ("settings.train.warmup=1.5", "/settings/train/warmup"),
    ("settings.train.packing=maybe", "/settings/train/packing"),
    ("settings.train.scheduler=cosin", "/settings/train/scheduler"),
    ("settings.lora.r=-1", "/settings/lora/r"),
    ("settings.lora.dropout=1", "/settings/lora/dropout"),
    ("settings.quantization=int4", "/settings/quantization"),
    ("settings.parallel.nodes=0", "/settings/parallel/nodes"),
    ("settings.data.uri=http://host/rows", "/settings/data/uri"),
    ("settings.data.uri=", "/settings/data/uri"),
    ("settings.output.uri=hf://datasets/org/name", "/settings/output/uri"),
    ("settings.output.uri=s3://bucket/*", "/settings/output/uri"),
    ("settings.model=null", "/settings"),
    ("settings.data.uri=null", "/settings/data"),
    ("settings.output.uri=null", "/settings/output"),
    ("settings.model.id=null", "/settings/model"),
    ("mode=tran", "/mode"),
    ("kind=CronJob", "/kind"),
    ("gpu.count=-1", "/gpu/count"),
    ("gpu.count=one", "/gpu/count"),
    ("workDir.type=hostPath", "/workDir/type"),
    ("workDir.size=lots", "/workDir/size"),
    ("shm.size=2GB", "/shm/size"),
    ("resources.requests.memory=16GB", "/resources/requests/memory"),
    ("backoffLimit=-1", "/backoffLimit"),
    ("terminationGracePeriodSeconds=0", "/terminationGracePeriodSeconds"),
    ("image.digest=sha256:abc", "/image/digest"),
    ("image.pullPolicy=always", "/image/pullPolicy"),
    ("cron.schedule=daily", "/cron/schedule"),
    # what the chart sets itself
    ("settings.runtime.work_dir=/data", "/settings/runtime"),
    ("settings.runtime.termination_log=/x", "/settings/runtime"),
    ("settings.runtime.grace_seconds=9", "/settings/runtime"),
    ("settings.parallel.node_rank=1", "/settings/parallel"),
    ("settings.parallel.host=node0", "/settings/parallel"),
    ("env.SFT_LORA__R=8", "/env"),
    ("env.sft_lora__r=8", "/env"),
    ("podLabels.app\\.kubernetes\\.io/name=x", "/podLabels"),
    ("env.1BAD=x", "/env"),
]
SECRET_NAMES = ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"]
SECRET_NAMES += ["MY_PASSWORD", "CLIENT_SECRET", "hf_token"]

# By the templates: values -> words of the message. Each `fail` of the templates has its case here.
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"kind": "JobSet"}, "kind=JobSet: this cluster has no jobset.x-k8s.io/v1alpha2"),
    (
        {"kind": "JobSet", "cron": {"schedule": "@daily"}, "settings": {"output": {"overwrite": True}}},
        "kind=JobSet: a schedule makes Jobs only",
    ),
    ({"kind": "JobSet", "backoffLimit": 2}, "backoffLimit=2: a JobSet starts all nodes again"),
    ({"cron": {"schedule": "@daily"}}, "cron.schedule=@daily: the second run would be refused"),
    (
        {"fullnameOverride": "1st", "settings": {"parallel": {"nodes": 2}}},
        "fullnameOverride: 1st would name a Service",
    ),
    ({"podMonitor": {"enabled": True}}, "podMonitor.enabled=true: the job serves no metrics"),
    ({"gpu": {"product": "MI300X", "resourceName": "amd.com/gpu"}}, "gpu.product=MI300X: the label"),
    ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "resources.limits: nvidia.com/gpu is asked for by gpu.count"),
    (
        {"settings": {"data": {"eval_uri": "s3://b/e", "eval_fraction": 0.1}}},
        "settings.data.eval_fraction: settings.data.eval_uri names the held-out rows already",
    ),
    (
        {"settings": {"train": {"max_steps": 9, "epochs": 1}}},
        "settings.train.epochs: settings.train.max_steps says how long to train already",
    ),
    (
        {"settings": {"checkpoint": {"every_steps": 9, "every_minutes": 1}}},
        "settings.checkpoint.every_minutes: settings.checkpoint.every_steps says how often already",
    ),
    (
        {"settings": {"output": {"uri": "s3://b/o", "pull_request": True}}},
        "settings.output.pull_request: there are pull requests on the Hub alone",
    ),
    ({"env": {"HF_HOME": "/x"}, "modelCache": {"type": "emptyDir"}}, "env.HF_HOME: modelCache sets it already"),
    (
        {"env": {"A": "1"}, "extraEnv": [{"name": "A", "value": "2"}]},
        "extraEnv[0]: A is set already",
    ),
    (
        {"workDir": {"type": "pvc"}, "settings": {"parallel": {"nodes": 2}}},
        "workDir.type=pvc: each of several nodes needs a work directory of its own",
    ),
    (
        {"modelCache": {"type": "pvc"}, "settings": {"parallel": {"nodes": 2}}},
        "modelCache.accessMode=ReadWriteOnce: several nodes can't mount such a claim",
    ),
]


def in_batches() -> list[list[str]]:
    """Return what to set in as few calls of Helm as it goes: nothing in a batch is within another part of it."""
    batches: list[list[str]] = []
    for what, _ in WRONG:
        key = what.partition("=")[0]
        free = [batch for batch in batches if not any(meet(key, other.partition("=")[0]) for other in batch)]
        if free:
            free[0].append(what)
        else:
            batches.append([what])
    return batches


def meet(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


@cache
def message_about(what: str) -> str:
    """Return the lines in which Helm refuses this with others of its batch."""
    [batch] = [batch for batch in in_batches() if what in batch]
    return message_of_batch(tuple(batch))


@cache
def message_of_batch(batch: tuple[str, ...]) -> str:
    return refusal(values_with(), *(word for what in batch for word in ("--set", what)))


@pytest.mark.parametrize(("what", "path"), WRONG)
def test_the_schema_refuses_it_by_its_path(what: str, path: str) -> None:
    parts = [part.replace("\n", ".") for part in what.partition("=")[0].replace("\\.", "\n").split(".")]
    # What is wrong within the path, or its own end; as a JSON pointer has it.
    name = [*parts, parts[-1]][path.count("/")].replace("/", "~1")
    pattern = rf"- at '{re.escape(path)}(/{re.escape(name)})?'.*"
    lines = [match[0] for match in re.finditer(pattern, message_about(what))]
    assert any(re.search(rf"\b{re.escape(name)}\b", line) for line in lines), message_about(what)


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("what", ["settings.lora.rr=8", "settings.train.learning_rate=fast", "env.HF_TOKEN=x"])
def test_both_helms_refuse_alike(what: str, helm: str) -> None:
    name = what.partition("=")[0].split(".")[1]
    assert name in refusal(values_with(), "--set", what, program=HELMS[helm]())


@cache
def message_about_secrets(how: str) -> str:
    if how == "env":
        return refusal(values_with(), *(word for name in SECRET_NAMES for word in ("--set", f"env.{name}={SECRET}")))
    return refusal(values_with(extraEnv=[{"name": name, "value": SECRET} for name in SECRET_NAMES]))


@pytest.mark.parametrize("name", SECRET_NAMES)
@pytest.mark.parametrize("how", ["env", "extraEnv"])
def test_a_literal_secret_is_refused_and_not_repeated(name: str, how: str) -> None:
    message = message_about_secrets(how)
    path = f"/env/{name}" if how == "env" else f"/extraEnv/{SECRET_NAMES.index(name)}"
    about = "\n".join(line for line in message.splitlines() if f"'{path}'" in line or f"'{path}/" in line)
    assert "existingSecret" in about or "valueFrom" in about  # where it belongs
    assert SECRET not in message


@pytest.mark.parametrize("where", ["model.id", "data.uri", "output.uri"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(where: str) -> None:
    message = refusal(values_with(), "--set", f"settings.{where}=s3://key:{SECRET}@host/bucket")
    assert f"/settings/{where.replace('.', '/')}" in message
    assert SECRET not in message


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_REGION", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "KEYS"])
def test_what_is_no_secret_is_taken(name: str) -> None:
    code, _, problems = run_helm("template", "demo", CHART, "--set", f"env.{name}=x", values=values_with())
    assert code == 0, problems


@cache
def message_of(case: int) -> str:
    values, words = IMPOSSIBLE[case]
    apis = [] if "this cluster has no" in words else ["--api-versions", "jobset.x-k8s.io/v1alpha2"]
    return refusal(values_with(**values), *apis)


@pytest.mark.parametrize("case", range(len(IMPOSSIBLE)), ids=[words[:40] for _, words in IMPOSSIBLE])
def test_the_templates_refuse_what_can_not_go_together(case: int) -> None:
    assert IMPOSSIBLE[case][1] in message_of(case)


def test_every_refusal_of_the_templates_has_a_case_here() -> None:
    texts = [text for path in (CHART / "templates").rglob("*.*") for text in refusals_in(path)]
    assert len(texts) >= len(IMPOSSIBLE)
    said = "\n".join(message_of(case) for case in range(len(IMPOSSIBLE)))
    missing = [text for text in texts if not re.search(re.sub(r"%[vsd]", ".*", re.escape(text)), said)]
    assert missing == []


def refusals_in(path: Path) -> list[str]:
    return re.findall(r'fail \(?(?:printf )?"((?:[^"\\]|\\.)*)"', path.read_text())


def test_a_release_without_any_values_is_told_what_it_needs() -> None:
    message = refusal(None)
    for path in ("/settings/model", "/settings/data", "/settings/output"):
        assert path in message
