"""What serving engines will take: a table of adapters with what each engine makes of them, and vLLM's command."""

from typing import Any

import pytest

from job.serving import AdapterFacts, judge_engines, read_facts, vllm_command

PLAIN: dict[str, Any] = {
    "r": 16,
    "target_modules": ["q_proj", "model.layers.0.mlp.down_proj"],
    "modules_to_save": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}
ALL = {"Transformers with PEFT", "vLLM", "SGLang", "TGI", "LoRAX", "TensorRT-LLM", "llama.cpp (GGUF)"}


def facts(*, vocabulary_size: int = 50_000, stored: Any = "none", **changes: Any) -> AdapterFacts:
    return read_facts(PLAIN | changes, vocabulary_size=vocabulary_size, stored=stored)


@pytest.mark.parametrize(
    ("adapter", "refused_by"),
    [
        (facts(), set()),
        (facts(r=512), set()),
        (facts(r=513), {"vLLM"}),
        (facts(vocabulary_size=262_144), {"vLLM"}),
        (facts(use_dora=True), {"vLLM", "SGLang", "TGI", "LoRAX", "llama.cpp (GGUF)"}),
        (facts(use_rslora=True), {"SGLang", "llama.cpp (GGUF)"}),
        (facts(modules_to_save=["lm_head"]), ALL - {"Transformers with PEFT"}),
        (facts(trainable_token_indices={"embed_tokens": [1, 2]}), ALL - {"Transformers with PEFT"}),
        (facts(target_modules=["q_proj", "lm_head"]), {"TensorRT-LLM", "llama.cpp (GGUF)"}),
        (facts(target_modules=["c_attn"]), {"TGI", "LoRAX", "TensorRT-LLM"}),
    ],
    ids=["plain", "r512", "r513", "vocabulary", "dora", "rslora", "whole", "rows", "head", "gpt2"],
)
def test_who_takes_it(adapter: AdapterFacts, refused_by: set[str]) -> None:
    verdicts = judge_engines(adapter)
    assert {verdict.engine for verdict in verdicts} == ALL
    assert {verdict.engine for verdict in verdicts if verdict.takes is False} == refused_by
    assert all(bool(verdict.reason) == (verdict.takes is not True) for verdict in verdicts)


def test_every_reason_is_said() -> None:
    adapter = facts(use_dora=True, modules_to_save=["model.embed_tokens", "lm_head"])
    reasons = {verdict.engine: verdict.reason for verdict in judge_engines(adapter)}
    assert reasons["vLLM"] == (
        "it can't compute DoRA; it takes no modules that were trained whole (embed_tokens, lm_head)"
    )
    assert reasons["TensorRT-LLM"] == "it takes no modules that were trained whole (embed_tokens, lm_head)"


def test_a_base_model_that_is_stored_quantised_is_not_promised() -> None:
    verdicts = {verdict.engine: verdict for verdict in judge_engines(facts(stored="nf4"))}
    assert verdicts["Transformers with PEFT"].takes is True
    assert verdicts["vLLM"].takes is None
    assert "stored in nf4" in verdicts["vLLM"].reason
    assert {verdict.engine for verdict in judge_engines(facts(stored="nf4", use_dora=True)) if verdict.takes is False}


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        (
            {"base": "org/model", "revision": "abc", "slot": "s3://bucket/runs/faq"},
            "aws s3 cp --recursive s3://bucket/runs/faq faq\n"
            "vllm serve org/model --revision abc --enable-lora --max-lora-rank 16 --lora-modules faq=faq",
        ),
        (
            {"slot": "/out/my run", "own_template": True, "own_tokenizer": True},
            "vllm serve /models/base --enable-lora --max-lora-rank 16 --lora-modules 'my-run=/out/my run' "
            "--tokenizer '/out/my run' --chat-template '/out/my run/chat_template.jinja'",
        ),
        (
            {"base": "s3://bucket/base", "slot": "hf://org/adapter"},
            "aws s3 cp --recursive s3://bucket/base base-model\n"
            "vllm serve base-model --enable-lora --max-lora-rank 16 --lora-modules adapter=org/adapter",
        ),
        (
            {"slot": "hf://org/adapter@v1", "own_template": True},
            "hf download org/adapter --revision v1 --local-dir adapter-v1\n"
            "vllm serve /models/base --enable-lora --max-lora-rank 16 --lora-modules adapter-v1=adapter-v1 "
            "--chat-template adapter-v1/chat_template.jinja",
        ),
        (
            {"facts": facts(use_dora=True), "slot": "s3://bucket/out", "is_merged": True},
            "aws s3 cp --recursive s3://bucket/out out\nvllm serve out/merged --served-model-name out",
        ),
        ({"facts": facts(use_dora=True), "slot": "/out"}, None),
    ],
)
def test_vllm_is_told_all_it_needs(changes: dict[str, Any], command: str | None) -> None:
    given = {
        "facts": facts(),
        "base": "/models/base",
        "revision": None,
        "own_tokenizer": False,
        "own_template": False,
        "is_merged": False,
    } | changes
    assert vllm_command(given.pop("facts"), **given) == command


@pytest.mark.parametrize(("rank", "most"), [(1, 1), (2, 8), (8, 8), (24, 32), (257, 320), (512, 512)])
def test_vllm_has_ranks_of_its_own(rank: int, most: int) -> None:
    command = vllm_command(
        facts(r=rank),
        base="org/model",
        revision=None,
        slot="/out",
        own_tokenizer=False,
        own_template=False,
        is_merged=False,
    )
    assert command is not None
    assert f"--max-lora-rank {most} " in command
