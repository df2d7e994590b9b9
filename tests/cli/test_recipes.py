"""The recipes of tests/recipes through the command line, on a small model: what each promises must be seen in what is
published. A test replaces model, data and output of its recipe, and shortens it where it says so; all else is as it is.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bare_model import save_bare_model
from hub_stand_in import OWNER, HubStandIn
from job_cli import ROOT, job_environment, run_job

from job.settings import load_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECIPES = sorted((ROOT / "tests" / "recipes").glob("*.env"))
SAMPLES = ROOT / "tests" / "data" / "recipes"
END = "<|im_end|>"


def read_recipe(path: Path) -> dict[str, str]:
    """Return the variables as `docker run --env-file` reads them: nothing is unquoted or expanded."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Published:
    """What a recipe's run left: its slot, the folder that it worked in, and its log."""

    slot: Path
    folder: Path
    output: str

    @cached_property
    def plan(self) -> dict[str, Any]:
        return self._read("plan.json")

    @cached_property
    def xray(self) -> dict[str, Any]:
        return self._read("xray.json")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = self._read("manifest.json")["metrics"]
        return metrics

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        return [event for event in read_rows(self.slot / "metrics.jsonl") if "loss" in event]

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.slot)

    def _read(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.slot / name).read_text())
        return content

    def decode_rows(self) -> Iterator[tuple[str, str]]:
        """Yield the text of each training row, and that of its supervised tokens."""
        import pyarrow as pa

        [tokens] = (self.folder / "work" / "tokens" / "URI").rglob("tokens.arrow")
        for row in pa.ipc.open_file(pa.memory_map(str(tokens))).read_all().to_pylist():
            supervised = [token for token in row["labels"] if token != -100]
            yield self.tokenizer.decode(row["input_ids"]), self.tokenizer.decode(supervised)


def run_recipe(name: str, folder: Path, model: Path, data: Path, **changes: object) -> Published:
    """Run a recipe to its end."""
    ended = run_job(make_environment(name, folder, model, data, **changes))
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output
    published = Published(folder / "slot", folder, ended.output)
    assert published.steps
    assert all(math.isfinite(event["loss"]) for event in published.steps)
    return published


def make_environment(name: str, folder: Path, model: Path, data: Path, **changes: object) -> dict[str, str]:
    recipe = read_recipe(ROOT / "tests" / "recipes" / f"{name}.env")
    own = {
        "SFT_MODEL__ID": str(model),
        "SFT_MODEL__DTYPE": "float32",  # so that losses can be compared, whatever this CPU can do
        "SFT_DATA__URI": str(data),
        "SFT_OUTPUT__URI": str(folder / "slot"),
    }
    return job_environment(folder) | recipe | own | {f"SFT_{key}": str(value) for key, value in changes.items()}


def load_as_the_card_says(run: Published) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Run the Python of the published README.md, and return model and tokenizer."""
    card = (run.slot / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("this-folder", str(run.slot))
    loaded: dict[str, Any] = {}
    exec(code, loaded)
    return loaded["model"], loaded["tokenizer"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(path)
    assert all(name.startswith("SFT_") for name in recipe)
    assert not any(value[:1] in ("'", '"') or value != value.strip() for value in recipe.values())
    assert {"SFT_MODEL__ID", "SFT_DATA__URI", "SFT_OUTPUT__URI"} <= recipe.keys()
    for name, value in recipe.items():
        monkeypatch.setenv(name, value)
    assert load_settings().output.uri == recipe["SFT_OUTPUT__URI"]


# -- qa-small ----------------------------------------------------------------------------------------------------------


def test_qa_small(tiny_model: Path, tmp_path: Path) -> None:
    rows = read_rows(SAMPLES / "qa-small.jsonl")
    run = run_recipe("qa-small", tmp_path, tiny_model, SAMPLES / "qa-small.jsonl", TRAIN__EPOCHS=3)
    assert (run.xray["read"], run.xray["kept"], run.xray["skipped"]) == (36, 36, {})
    assert run.xray["train"] + run.xray["held_out"] == 36
    assert run.xray["held_out"] > 0
    for row, (text, supervised) in zip(rows, run.decode_rows(), strict=True):
        assert supervised == row["completion"] + END
        assert text.endswith(f"<|im_start|>user\n{row['prompt']}{END}\n<|im_start|>assistant\n{supervised}\n")
    completions = {row["completion"] + END for row in rows}
    for sample in run.xray["samples"]:
        [learned] = [piece["text"] for piece in sample if piece["supervised"]]
        assert learned in completions
    assert run.xray["turn_end"]["pad_token"] == END
    assert run.xray["turn_end"]["rows_that_stop"] == 36
    assert run.plan["learning_rate"] == 5e-6
    assert run.plan["global_batch_size"] == run.plan["micro_batch_size"] == 1
    assert run.plan["max_grad_norm"] == 1.0
    assert run.plan["early_stopping_patience"] == 2
    evaluations = [event for event in read_rows(run.slot / "metrics.jsonl") if "eval_loss" in event]
    assert [event["step"] for event in evaluations] == [run.xray["train"] * (index + 1) for index in range(3)]
    assert run.metrics["eval_loss"] == min(event["eval_loss"] for event in evaluations)


# -- plain-text --------------------------------------------------------------------------------------------------------


def test_plain_text(tiny_model: Path, tmp_path: Path) -> None:
    rows = read_rows(SAMPLES / "plain-text.jsonl")
    run = run_recipe("plain-text", tmp_path, tiny_model, SAMPLES / "plain-text.jsonl")
    eos = run.tokenizer.eos_token
    for row, (text, supervised) in zip(rows, run.decode_rows(), strict=True):
        assert text == row["text"] + eos
        assert text.endswith(supervised)
    # A row's first token is never predicted.
    assert run.xray["supervised_tokens"] == run.xray["tokens"] - run.xray["train"]
    assert run.xray["turn_end"]["rows_that_stop"] == len(rows)
    assert run.plan["max_length_tokens"] == 512
    assert (run.plan["micro_batch_size"], run.plan["gradient_accumulation_steps"]) == (4, 2)
    assert run.plan["learning_rate"] == 2e-4
    assert run.plan["steps"] == math.ceil(run.xray["train"] / 8)
    model, tokenizer = load_as_the_card_says(run)
    prompt = tokenizer("The film", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert written.shape[1] > prompt["input_ids"].shape[1]


# -- conversations -----------------------------------------------------------------------------------------------------


def test_conversations(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    rows = read_rows(SAMPLES / "conversations.jsonl")
    evaluation = write_rows(tmp_path / "eval.jsonl", [rows[0], rows[1], rows[-2], rows[-1]])
    run = run_recipe(
        "conversations",
        tmp_path,
        tiny_model,
        SAMPLES / "conversations.jsonl",
        DATA__EVAL_URI=evaluation,
        TRAIN__EPOCHS=2,
    )
    for row, (text, supervised) in zip(rows, run.decode_rows(), strict=True):
        turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}{END}\n" for turn in row["messages"])
        assert text.endswith(turns)
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert supervised == "".join(answer + END for answer in answers)
    assert (run.plan["lora_r"], run.plan["lora_alpha"], run.plan["lora_dropout"]) == (16, 32, 0.05)
    assert len(run.plan["target_modules"]) == 7
    adapter = load_file(run.slot / "adapter_model.safetensors")
    [embeddings] = [weight for name, weight in adapter.items() if name.endswith(".embed_tokens.weight")]
    [head] = [weight for name, weight in adapter.items() if name.endswith(".lm_head.weight")]
    assert embeddings.shape == (49_152, 64)
    assert embeddings.equal(head)  # one matrix in this model, and trained as one
    assert sum("lora_A" in name for name in adapter) == 7 * 2
    loss = answers_loss(*load_as_the_card_says(run), read_rows(evaluation))
    assert loss == pytest.approx(run.metrics["eval_loss"], rel=1e-5)
    assert loss < run.metrics["eval_loss_base"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def answers_loss(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[dict[str, Any]]) -> float:
    """The mean loss per token of all answers and their ends of turn in ChatML, computed independently of the job."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        ids: list[int] = []
        labels: list[int] = []
        for turn in row["messages"]:
            start = tokenizer.encode(f"<|im_start|>{turn['role']}\n", add_special_tokens=False)
            content = tokenizer.encode(turn["content"] + END, add_special_tokens=False)
            after = tokenizer.encode("\n", add_special_tokens=False)
            is_answer = turn["role"] == "assistant"
            ids += start + content + after
            labels += [-100] * len(start) + (content if is_answer else [-100] * len(content)) + [-100] * len(after)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
        count += sum(label != -100 for label in labels[1:])
    return total / count


# -- custom-format -----------------------------------------------------------------------------------------------------


def test_custom_format(tiny_model: Path, tmp_path: Path) -> None:
    rows = read_rows(SAMPLES / "custom-format.jsonl")
    run = run_recipe("custom-format", tmp_path, tiny_model, SAMPLES / "custom-format.jsonl", TRAIN__EPOCHS=1)
    eos = run.tokenizer.eos_token
    for row, (text, supervised) in zip(rows, run.decode_rows(), strict=True):
        assert text == f"### 指令: {row['question']}\n### 回應: {row['answer']}{eos}"
        # The blank before an answer may be in one token with the answer's beginning.
        assert supervised.removeprefix(" ") == row["answer"] + eos
    assert run.xray["kept"] == run.xray["turn_end"]["rows_that_stop"] == 30
    [file] = run.xray["files"]
    assert "template" in file["format"]


# -- chat-template -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "tied"), [("chatml", True), ("another model's", False)])
def test_chat_template(tokenizer_folder: Path, tmp_path: Path, source: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_bare_model(tmp_path / "base", tied=tied)
    before = AutoTokenizer.from_pretrained(base)
    assert before.chat_template is None
    rows = [row for row in read_rows(SAMPLES / "chat-template.jsonl") if row["messages"][0]["role"] == "system"]
    evaluation = write_rows(tmp_path / "eval.jsonl", rows[:5])
    run = run_recipe(
        "chat-template",
        tmp_path,
        base,
        SAMPLES / "chat-template.jsonl",
        DATA__EVAL_URI=evaluation,
        TRAIN__LEARNING_RATE=1e-2,  # of a model that knows nothing
        **({} if source == "chatml" else {"MODEL__CHAT_TEMPLATE": tokenizer_folder}),
    )
    model, after = load_as_the_card_says(run)
    assert run.plan["new_tokens"] == ["<|im_start|>", END]
    assert after.convert_tokens_to_ids(["<|im_start|>", END]) == [len(before), len(before) + 1]
    assert after.eos_token == END
    assert (run.slot / "chat_template.jinja").is_file()
    told = after.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert told.endswith(f"<|im_start|>assistant\n{rows[0]['messages'][-1]['content']}{END}\n")
    for row, (_, supervised) in zip(read_rows(SAMPLES / "chat-template.jsonl"), run.decode_rows(), strict=True):
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert supervised == "".join(answer + END for answer in answers)
    loss = answers_loss(model, after, read_rows(evaluation))
    assert loss == pytest.approx(run.metrics["eval_loss"], rel=1e-5)
    assert loss < run.metrics["eval_loss_base"]
    check_only_new_rows_changed(AutoModelForCausalLM.from_pretrained(base), model.merge_and_unload(), tied=tied)


def check_only_new_rows_changed(before: "PreTrainedModel", after: "PreTrainedModel", *, tied: bool) -> None:
    import torch

    known = before.get_input_embeddings().weight.shape[0]
    for old, new in (
        (before.get_input_embeddings(), after.get_input_embeddings()),
        (before.get_output_embeddings(), after.get_output_embeddings()),
    ):
        assert torch.equal(old.weight, new.weight[:known])
        assert new.weight.shape[0] == known + 2
        assert not torch.equal(new.weight[known], new.weight[known + 1])
    is_one = torch.equal(after.get_input_embeddings().weight, after.get_output_embeddings().weight)
    assert is_one == tied


# -- tiny-data-presets -------------------------------------------------------------------------------------------------

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def name_model(tiny_model: Path, folder: Path) -> Path:
    """Copy the small model under a name that has a preset, with as long a context as such models have."""
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 32_768}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check_tiny_plan(plan: dict[str, Any], preset: str, *, r: int, epochs: int, micro: int) -> None:
    assert (plan["lora_r"], plan["lora_alpha"], plan["lora_dropout"]) == (r, 2 * r, 0.05)
    assert set(plan["target_modules"]) == PROJECTIONS
    assert (plan["micro_batch_size"], plan["gradient_accumulation_steps"]) == (micro, 4)
    assert plan["learning_rate"] == 5e-5
    assert plan["steps"] == math.ceil(epochs * plan["train_rows"] / (micro * 4))
    assert plan["train_rows"] + plan["eval_rows"] == 78
    for name in ("lora_r", "lora_dropout", "target_modules", "epochs", "learning_rate", "global_batch_size"):
        assert f"preset {preset}" in plan["sources"][name], (name, plan["sources"][name])
    assert plan["optimizer"] == "adamw"  # the preset's needs a GPU
    assert "paged_adamw_8bit" in plan["sources"]["optimizer"]
    assert plan["warmup_steps"] <= plan["steps"] / 10
    assert plan["logging_steps"] == 1
    assert plan["max_length_tokens"] == 512  # of a context of 32,768
    assert "99 % of the rows" in plan["sources"]["max_length_tokens"]


@pytest.mark.parametrize(("size", "r", "epochs", "micro"), [("0.5B", 16, 5, 2), ("1.5B", 8, 4, 1), ("7B", 8, 3, 1)])
def test_tiny_data_presets_by_size(
    tiny_model: Path, tmp_path: Path, size: str, r: int, epochs: int, micro: int
) -> None:
    model = name_model(tiny_model, tmp_path / f"Qwen2.5-{size}-Instruct")
    ended = run_job(make_environment("tiny-data-presets", tmp_path, model, SAMPLES / "tiny-data.jsonl"), "check")
    assert ended.code == 0, ended.output
    plan = json.loads((tmp_path / "work" / "run" / "plan.json").read_text())
    check_tiny_plan(plan, f"qwen2.5-{size.lower()}", r=r, epochs=epochs, micro=micro)


def test_tiny_data_presets_train(tiny_model: Path, tmp_path: Path) -> None:
    model = name_model(tiny_model, tmp_path / "Qwen2.5-0.5B-Instruct")
    run = run_recipe("tiny-data-presets", tmp_path, model, SAMPLES / "tiny-data.jsonl", TRAIN__EPOCHS=2)
    assert run.plan["sources"]["epochs"] == "SFT_TRAIN__EPOCHS"  # it wins over the preset
    assert [event["step"] for event in run.steps] == list(range(1, run.plan["steps"] + 1))
    assert run.metrics["eval_loss"] < run.metrics["eval_loss_base"]


# -- int8-lora, qlora-support-bot --------------------------------------------------------------------------------------


def check_trainable_summary(run: Published, *, by_layer: int) -> None:
    """Compare what log and card say with a count of our own: two layers, `by_layer` numbers in each."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run.plan["model_id"])
    total = sum(weight.numel() for weight in base.parameters()) + 2 * by_layer
    assert (run.metrics["trainable_parameters"], run.metrics["total_parameters"]) == (2 * by_layer, total)
    assert f"adapter: {2 * by_layer:,} of {total:,} parameters are trained" in run.output
    assert f"| trained parameters | {2 * by_layer:,} of {total:,} |" in (run.slot / "README.md").read_text()


def check_losses_fall(run: Published) -> None:
    third = len(run.steps) // 3
    assert sum(event["loss"] for event in run.steps[:third]) > sum(event["loss"] for event in run.steps[-third:])
    assert run.metrics["eval_loss"] < run.metrics["eval_loss_base"]


def test_int8_lora(tiny_model: Path, tmp_path: Path) -> None:
    rows = read_rows(SAMPLES / "int8-lora.jsonl")
    evaluation = write_rows(tmp_path / "eval.jsonl", rows[:6])
    run = run_recipe(
        "int8-lora",
        tmp_path,
        tiny_model,
        SAMPLES / "int8-lora.jsonl",
        DATA__EVAL_URI=evaluation,
        TRAIN__MAX_STEPS=6,
        TRAIN__LEARNING_RATE=1e-2,  # of a model that knows nothing
    )
    assert (run.plan["quantization"], run.plan["sources"]["quantization"]) == ("int8", "SFT_QUANTIZATION")
    assert run.plan["target_modules"] == ["q_proj", "v_proj"]
    assert any("quantization int8" in warning for warning in run.plan["warnings"])  # it is slow on a CPU
    check_losses_fall(run)
    check_trainable_summary(run, by_layer=16 * (64 + 64) + 16 * (64 + 32))
    config = json.loads((run.slot / "adapter_config.json").read_text())
    assert (config["r"], config["bias"], config["base_model_name_or_path"]) == (16, "none", str(tiny_model))
    assert "in 8 bits (LLM.int8)" in (run.slot / "README.md").read_text()
    model, tokenizer = load_as_the_card_says(run)  # the base model as it was published
    texts = [tokenizer(row["text"] + tokenizer.eos_token, return_tensors="pt")["input_ids"] for row in rows[:6]]
    losses = [model(ids, labels=ids).loss.item() for ids in texts]
    weights = [ids.shape[1] - 1 for ids in texts]
    loss = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    assert loss == pytest.approx(run.metrics["eval_loss"], abs=0.01)
    assert loss < run.metrics["eval_loss_base"] - 0.05


def test_qlora_support_bot(tiny_model: Path, tmp_path: Path) -> None:
    rows = read_rows(SAMPLES / "qlora-support-bot.jsonl")
    run = run_recipe(
        "qlora-support-bot",
        tmp_path,
        tiny_model,
        SAMPLES / "qlora-support-bot.jsonl",
        DATA__EVAL_FRACTION=0.25,
        TRAIN__LEARNING_RATE=1e-2,  # of a model that knows nothing
        EVAL__MAX_NEW_TOKENS=6,
    )
    assert [supervised for _, supervised in run.decode_rows()] == [row["output"] + END for row in rows]
    assert (run.plan["quantization"], run.plan["lora_r"], run.plan["lora_alpha"]) == ("nf4", 16, 32)
    assert set(run.plan["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (run.plan["micro_batch_size"], run.plan["gradient_accumulation_steps"]) == (1, 4)
    assert run.plan["steps"] == math.ceil(3 * run.plan["train_rows"] / 4)
    check_losses_fall(run)
    check_trainable_summary(run, by_layer=16 * 2 * (64 + 64) + 16 * 2 * (64 + 32))
    assert "in 4 bits (NF4, double quantisation)" in (run.slot / "README.md").read_text()
    model, tokenizer = load_as_the_card_says(run)  # the base model as it was published
    samples = json.loads((run.slot / "evaluation.json").read_text())["samples"]
    recipe = read_recipe(ROOT / "tests" / "recipes" / "qlora-support-bot.env")
    questions = json.loads(recipe["SFT_EVAL__PROMPTS"])
    assert [sample["messages"] for sample in samples] == [[{"role": "user", "content": one}] for one in questions]
    for question, sample in zip(questions, samples, strict=True):
        assert sample["before"] != sample["after"]
        after = answer(model, tokenizer, question)
        with model.disable_adapter():
            assert answer(model, tokenizer, question) != after


def answer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", question: str) -> str:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text: str = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    return text


# -- merge -------------------------------------------------------------------------------------------------------------


def test_merge(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run = run_recipe(
        "merge", tmp_path, tiny_model, SAMPLES / "qa-small.jsonl", TRAIN__MAX_STEPS=5, TRAIN__LEARNING_RATE=1e-2
    )
    adapted, tokenizer = load_as_the_card_says(run)
    merged = AutoModelForCausalLM.from_pretrained(run.slot / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM"
    ids = tokenizer("How long may I keep a borrowed book?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = adapted(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, expected, atol=0.05)


# -- hub ---------------------------------------------------------------------------------------------------------------


def test_hub(hub: HubStandIn, tiny_model: Path, tmp_path: Path) -> None:
    hub.reset()
    environment = make_environment(
        "hub",
        tmp_path,
        tiny_model,
        SAMPLES / "qa-small.jsonl",
        OUTPUT__URI=read_recipe(ROOT / "tests" / "recipes" / "hub.env")["SFT_OUTPUT__URI"],
        CHECKPOINT__URI=tmp_path / "checkpoints",
        TRAIN__MAX_STEPS=5,
    )
    environment |= hub.environment(tmp_path / "hf") | {"HF_TOKEN": "hf_secretsecretsecret"}
    hub.who = OWNER | {"orgs": [{"name": "my-org", "roleInOrg": "contributor"}]}
    ended = run_job(environment)
    assert ended.code == 0, ended.output
    assert environment["HF_TOKEN"] not in ended.output + json.dumps(ended.outcome)
    run_id = ended.outcome["run_id"]
    assert hub.repository("my-org/qa-adapter").is_private
    [published, first] = hub.head("my-org/qa-adapter").history()
    assert published.title.startswith(f"Run {run_id} of sft-job: LoRA adapter of ")
    assert list(first.files) == [".gitattributes"]

    from huggingface_hub import snapshot_download

    slot = tmp_path / "downloaded"
    snapshot_download("my-org/qa-adapter", endpoint=hub.endpoint, token=environment["HF_TOKEN"], local_dir=slot)
    run = Published(slot, tmp_path, ended.output)
    assert '\nlicense: "apache-2.0"\n' in (slot / "README.md").read_text()
    listed = {file["path"]: file["sha256"] for file in json.loads((slot / "manifest.json").read_text())["files"]}
    assert listed == {
        name: hashlib.sha256(blob.content).hexdigest()
        for name, blob in published.files.items()
        if name not in ("manifest.json", ".gitattributes")
    }
    load_as_the_card_says(run)
    # Nothing of the run is left but what was published: no lease, no checkpoints.
    assert [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()] == []

    ended = run_job(environment)
    assert (ended.code, ended.outcome["run_id"]) == (0, run_id), ended.output
    assert "is already published" in ended.outcome["message"]
    assert hub.head("my-org/qa-adapter") is published
