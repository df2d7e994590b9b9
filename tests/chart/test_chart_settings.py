"""What is put into `settings:` is what the job loads: through Helm, YAML, JSON and the kubelet, unchanged.

The values are drawn from the chart's own schema, so that this also shows that the job takes whatever the schema lets
pass.
"""

import json
import os
from typing import Any

import kubernetes_validate
import pytest
from helm_chart import CHART, Object, container_of, environment_of, only, render, values_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from values_strategy import ODD, values_of

from job.settings import Settings, load_settings, settings_groups

EXAMPLES = 100  # a Helm is started for each


def settings_schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]
    return schema


def load_from(container: Object) -> Settings:
    """Return what the job would load in this container."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.upper().startswith("SFT_")]:
            patch.delenv(name)
        for name, value in environment_of(container).items():
            patch.setenv(name, value)
        return load_settings()


def without_contradictions(drawn: dict[str, Any]) -> dict[str, Any]:
    """Leave out one of two settings of which one would be ignored: job and chart refuse them together."""
    pairs = [("data", "eval_uri", "eval_fraction"), ("train", "max_steps", "epochs")]
    pairs += [("checkpoint", "every_steps", "every_minutes")]
    for group, field, other in pairs:
        fields = drawn.get(group) or {}
        if fields.get(field) is not None:
            fields.pop(other, None)
    output = drawn["output"]
    if not output["uri"].startswith("hf://") or "@" in output["uri"]:
        output.pop("pull_request", None)
    uri = drawn["data"]["uri"]
    if isinstance(uri, str) and uri.lstrip()[:1] in ("[", "{"):  # the job reads it as JSON, which the schema can't
        drawn["data"]["uri"] = [uri]
    return drawn


def assert_unchanged(given_settings: dict[str, Any], loaded: Settings, grace_seconds: int) -> None:
    for name, group in settings_groups().items():
        value, found = given_settings.get(name), getattr(loaded, name)
        if group is None:
            assert found == (value if value is not None else Settings.model_fields[name].default)
            continue
        fields = {field: part for field, part in (value or {}).items() if part is not None}
        if name == "runtime":
            fields["grace_seconds"] = grace_seconds
        assert found == group.model_validate(fields)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(values_of(settings_schema()).map(without_contradictions), st.integers(1, 86_400))
def test_whatever_the_schema_accepts_reaches_the_job_unchanged(drawn: dict[str, Any], grace_seconds: int) -> None:
    parallel = drawn.get("parallel") or {}
    objects = render({"settings": drawn, "terminationGracePeriodSeconds": grace_seconds})
    run = only(objects, "Job")
    kubernetes_validate.validate(run, "1.37", strict=True)
    assert run["spec"].get("parallelism", 1) == (parallel.get("nodes") or 1)
    assert_unchanged(drawn, load_from(container_of(objects)), grace_seconds)


@pytest.mark.parametrize("text", [*ODD, "".join(ODD), "$" * 7 + "(X)", "{{", "}}", "'", '"', "\\", "x" * 5000])
def test_odd_texts_arrive_as_they_are(text: str) -> None:
    given_settings = values_with(settings={"data": {"template": text, "columns": {text: "text"}}})
    loaded = load_from(container_of(render(given_settings)))
    assert loaded.data.template == text
    assert loaded.data.columns == {text: "text"}


@pytest.mark.parametrize(
    ("option", "written", "group", "field", "expected"),
    [
        ("--set", "settings.train.max_steps=1000000", "train", "max_steps", 1_000_000),
        ("--set", "settings.train.seed=4294967295", "train", "seed", 4_294_967_295),
        ("--set", "settings.train.packing=false", "train", "packing", False),
        # With --set, Helm takes a fraction for a text.
        ("--set-json", "settings.train.learning_rate=0.00002", "train", "learning_rate", 0.00002),
    ],
)
def test_numbers_from_the_command_line_arrive_as_they_are(
    option: str, written: str, group: str, field: str, expected: float
) -> None:
    objects = render(values_with(), option, written)
    found = getattr(getattr(load_from(container_of(objects)), group), field)
    assert (found, type(found)) == (expected, type(expected))


def test_numbers_in_a_file_arrive_as_they_are(tmp_path: Any) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(
        """
settings:
  model: {id: org/model}
  data:
    uri: ["s3://a/b", {uri: s3://c/d, weight: 0.5}]
    template: |
      ### 問題: "{{ q }}"
      {% generation %}{{ a }}{% endgeneration %} costs $(PRICE), $$5
  output: {uri: "s3://bucket/{run_id}"}
  train: {learning_rate: 0.00002, max_steps: 1000000, warmup: 100, max_grad_norm: 1e-9}
  lora: {r: 8, alpha: null, target_modules: [q_proj, v_proj]}
"""
    )
    loaded = load_from(container_of(render(path)))
    assert (loaded.train.learning_rate, loaded.train.max_steps, loaded.train.warmup) == (0.00002, 1_000_000, 100)
    assert loaded.train.max_grad_norm == 1e-9
    assert (loaded.lora.r, loaded.lora.alpha, loaded.lora.target_modules) == (8, "auto", ["q_proj", "v_proj"])
    assert [(source.uri, source.weight) for source in loaded.data.uri] == [("s3://a/b", 1), ("s3://c/d", 0.5)]
    assert loaded.data.template == (
        '### 問題: "{{ q }}"\n{% generation %}{{ a }}{% endgeneration %} costs $(PRICE), $$5\n'
    )
    assert loaded.output.uri == "s3://bucket/{run_id}"


@pytest.mark.parametrize("text", ["$(HOME) $$ 100%", '"quoted"', "多久\n", "yes", "1e3"])
def test_plain_variables_arrive_as_they_are_and_extra_ones_as_kubernetes_reads_them(text: str) -> None:
    extra = [{"name": "COPY", "value": "$(PLAIN)"}]
    environment = environment_of(container_of(render(values_with(env={"PLAIN": text}, extraEnv=extra))))
    assert environment["PLAIN"] == text
    assert environment["COPY"] == text


def test_only_what_is_set_is_passed_on() -> None:
    loaded = load_from(container_of(render(values_with())))
    assert loaded.model_fields_set == {"model", "data", "output", "runtime"}
    assert loaded.runtime.model_fields_set == {"grace_seconds"}  # presets yield to what is set, and to nothing else


def test_a_check_judges_the_run_that_will_be_trained() -> None:
    chosen = {"parallel": {"nodes": 2, "engine": "zero3"}, "lora": {"r": 8}, "quantization": "nf4"}
    run, check = (
        load_from(container_of(render(values_with(mode=mode, gpu={"count": 4}, settings=chosen))))
        for mode in ("train", "check")
    )
    assert check.parallel.engine == run.parallel.engine == "zero3"
    assert check.model_dump(exclude={"parallel"}) == run.model_dump(exclude={"parallel"})
    assert (check.parallel.nodes, check.parallel.node_rank) == (2, 0)
    assert (run.parallel.nodes, run.parallel.node_rank) == (2, "auto")
