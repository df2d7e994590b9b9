"""After training: what is measured is of the base model and of the published weights, and nothing that goes wrong then
costs the adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import held_out_loss, load_trained, make_small_plan, read_metrics, save_llama, train_here
from torch import nn
from transformers import AutoModelForCausalLM

from job.errors import DivergedError
from job.evaluation import Evaluation, read_evaluation
from job.handover import PromptInput, RunFolder, SampleInputs, StopRequest
from job.plan import TrainPlan
from job.train import acceptance_rows, final_evaluation, run
from job.train.evaluate import evaluate_rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

PROMPTS = [[11, 25, 13], [14], [20, 21, 22, 23, 24]]
MAX_NEW_TOKENS = 5


@pytest.fixture
def plan(plan_for: Callable[..., TrainPlan]) -> Callable[..., TrainPlan]:
    def make(**settings: object) -> TrainPlan:
        return make_small_plan(plan_for, **({"LORA__DROPOUT": 0.2} | settings))

    return make


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "base", tied=True)


@pytest.fixture
def samples() -> SampleInputs:
    prompts = [
        PromptInput(ids=ids, text=f"prompt {ids}", messages=[{"role": "user", "content": str(ids)}], reference="17")
        for ids in PROMPTS
    ]
    return SampleInputs(prompts=prompts, stop_ids=[2], max_new_tokens=MAX_NEW_TOKENS)


def evaluation_of(root: Path) -> Evaluation:
    return read_evaluation(RunFolder(root).evaluation)


def generate(model: Any) -> list[str]:
    answers = []
    for ids in PROMPTS:
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        output = model.generate(input_ids=torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        answers.append(" ".join(str(token) for token in output if token != 2))
    return answers


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_the_best_weights_are_what_is_measured_and_asked(
    plan: Callable[..., TrainPlan], base: Path, samples: SampleInputs, tmp_path: Path, loss: str
) -> None:
    root = tmp_path / "run"
    settings = {"TRAIN__MAX_STEPS": 80, "TRAIN__SCHEDULER": "constant", "TRAIN__LEARNING_RATE": 3e-2}
    stops = plan(
        TRAIN__LOSS=loss,
        TRAIN__PACKING="true" if loss == "full" else "false",
        TRAIN__GRADIENT_CHECKPOINTING="true",
        TRAIN__EARLY_STOPPING_PATIENCE=2,
        **settings,
    )
    result = train_here(stops, base, root, samples=samples)
    assert result["best_step"] < result["steps"]
    found = evaluation_of(root)
    assert found.problems == []
    assert found.loss is not None
    assert [row.line for row in found.rows] == [f"rows.jsonl:{line}" for line in range(17, 25)]
    assert found.loss.rows == 8
    assert found.loss.supervised_tokens == sum(row.supervised_tokens for row in found.rows) == 8 * 11
    watched = {record["step"]: record["eval_loss"] for record in read_metrics(root) if "eval_loss" in record}
    assert found.loss.loss == pytest.approx(watched[result["best_step"]], rel=1e-6)
    assert found.loss.loss < watched[result["steps"]]
    expected = {
        "eval_loss_base": found.loss.loss_base,
        "eval_loss": found.loss.loss,
        "perplexity_base": found.loss.perplexity_base,
        "perplexity": found.loss.perplexity,
        "eval_loss_change_low": found.loss.change_low,
        "eval_loss_change_high": found.loss.change_high,
    }
    assert {name: result[name] for name in expected} == expected

    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.config.use_cache = False
    alone = stops.model_copy(update={"loss": "full"})
    assert held_out_loss(plain, alone, root) == pytest.approx(found.loss.loss_base, rel=1e-5)
    trained = load_trained(base, root / "adapter", vocabulary=100)
    assert held_out_loss(trained, alone, root) == pytest.approx(found.loss.loss, rel=1e-5)
    assert [sample.before for sample in found.samples] == generate(plain)
    assert [sample.after for sample in found.samples] == generate(trained)
    assert generate(plain) != generate(trained)
    first = found.samples[0]
    assert (first.prompt, first.messages, first.reference) == (
        samples.prompts[0].text,
        samples.prompts[0].messages,
        "17",
    )


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, root: Path, *, above: int) -> None:
    """Have memory end in forward passes over more than so many sequences, once the adapter is there."""
    embed = nn.Embedding.forward

    def forward(self: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > above and RunFolder(root).trained.exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")
        return embed(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", forward)


def test_out_of_memory_leads_to_one_row_at_a_time(
    plan: Callable[..., TrainPlan],
    base: Path,
    samples: SampleInputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = train_here(plan(), base, tmp_path / "expected", samples=samples)
    run_out_of_memory(monkeypatch, tmp_path / "run", above=1)
    result = train_here(plan(), base, tmp_path / "run", samples=samples)
    assert "out of GPU memory: CUDA out of memory" in caplog.text
    assert "out of memory while computing the held-out loss: one at a time" in caplog.text
    assert "out of memory while computing the answers to prompts: one at a time" in caplog.text
    found, wanted = evaluation_of(tmp_path / "run"), evaluation_of(tmp_path / "expected")
    assert found.problems == []
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found.samples == wanted.samples


def test_no_memory_at_all_costs_figures_only(
    plan: Callable[..., TrainPlan], base: Path, samples: SampleInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    run_out_of_memory(monkeypatch, root, above=0)
    result = train_here(plan(), base, root, samples=samples)
    assert "eval_loss" not in result
    assert result["eval_loss_base"] > 0  # known since before training
    found = evaluation_of(root)
    assert (found.loss, found.rows) == (None, [])
    assert [(sample.before, sample.after) for sample in found.samples] == [(None, None)] * 3
    assert found.problems == [
        "the loss on single rows: out of memory, even for one at a time",
        "the held-out loss: out of memory, even for one at a time",
        "the answers to prompts: out of memory, even for one at a time",
    ]
    assert load_trained(base, root / "adapter", vocabulary=100)


def test_a_wish_to_stop_ends_it(
    plan: Callable[..., TrainPlan], base: Path, samples: SampleInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes during the evaluation; one to finish was granted before, and is no reason to leave anything out."""
    folder = RunFolder(tmp_path / "run")

    def ask_to_stop(*arguments: Any, **options: Any) -> Any:
        found = evaluate_rows(*arguments, **options)
        if folder.trained.exists():
            folder.stop_request.write_text(StopRequest(reason="SIGTERM").model_dump_json())
        return found

    monkeypatch.setattr(run, "evaluate_rows", ask_to_stop)
    result = train_here(plan(), base, folder.root, samples=samples)
    assert result["eval_loss"] > 0
    found = evaluation_of(folder.root)
    assert found.problems == ["the answers to prompts: the run was told to stop before it was known"]
    assert folder.adapter.joinpath("adapter_model.safetensors").exists()

    finish = StopRequest(reason="SFT_RUNTIME__MAX_HOURS=1", finish=True)
    train_here(plan(), base, tmp_path / "finished", samples=samples, stop=finish)
    assert evaluation_of(tmp_path / "finished").problems == []
    assert evaluation_of(tmp_path / "finished").loss is not None


def test_no_time_and_no_numbers(
    plan: Callable[..., TrainPlan], base: Path, samples: SampleInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(final_evaluation, "_ANSWERS_S", 0.0)
    train_here(plan(), base, tmp_path / "run", samples=samples)
    assert evaluation_of(tmp_path / "run").problems == [
        "answering took longer than 0 s: some answers are cut off, or missing"
    ]

    def lose(*arguments: Any, **options: Any) -> Any:
        found = evaluate_rows(*arguments, **options)
        return found * (float("nan") if (tmp_path / "broken" / "trained").exists() else 1)

    monkeypatch.setattr(run, "evaluate_rows", lose)
    with pytest.raises(DivergedError, match="the held-out loss of the adapter is nan"):
        train_here(plan(), base, tmp_path / "broken")


def test_an_adapter_without_a_loss_is_not_published(
    plan: Callable[..., TrainPlan], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance_rows, "evaluate_rows", lambda *_, **__: np.array([[np.nan, 3.0]]))
    with pytest.raises(DivergedError, match="the loss of the trained adapter is no number"):
        train_here(plan(), base, tmp_path / "run")
    assert not (tmp_path / "run" / "acceptance_rows.json").exists()


def test_the_verdict_is_logged(
    plan: Callable[..., TrainPlan], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    train_here(plan(), base, tmp_path / "run")
    assert "held-out loss: " in caplog.text
    assert "(95 % interval " in caplog.text
    assert "8 held-out rows are too few" in caplog.text
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["samples"] == []
