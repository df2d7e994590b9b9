"""Greedy answers to prompts, many at a time, by whatever engine has split the model.

transformers' own `generate` calls the model beneath the engine's wrapper, whose weights may lie on other processes; and
it takes what it isn't told from the base model's generation_config.json, where some have a repetition penalty. So the
loop over tokens is here, and every forward pass is one that training makes, too.
"""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from job.handover import SampleInputs
from job.plan import TrainPlan
from job.train.collective import find_maximum


@dataclass(frozen=True)
class Answerer:
    """What answers: `model` as the engine has wrapped it, the architecture's `base` model within, and the id that
    stands for no token. All processes work through their prompts in step."""

    model: nn.Module
    base: PreTrainedModel
    pad_token_id: int
    plan: TrainPlan
    rank: int
    beat: Callable[[], None]

    @torch.no_grad()
    def answer(self, samples: SampleInputs, *, batch_size: int, until_s: float) -> list[list[int] | None]:
        """Return each answer's token ids, the same on all processes; `batch_size` prompts at a time on each.

        When it is `until_s`, by the monotonic clock, answers end where they are, and None stands for the others. Each
        process must call it; `beat` is called after each token.
        """
        plan, prompts = self.plan, [prompt.ids for prompt in samples.prompts]
        found = torch.zeros((len(prompts), 1 + samples.max_new_tokens), dtype=torch.int64)  # 1 + length, tokens
        mine = range(self.rank, len(prompts), plan.world_size)
        if self._is_recurrent():
            batch_size = 1  # padding in front would be part of the state
        was_training = self.model.training
        self.model.eval()
        for turn in range(math.ceil(len(prompts) / (batch_size * plan.world_size))):  # as often on every process
            if not self._is_wanted(time.monotonic() < until_s):
                break
            indices = mine[turn * batch_size : (turn + 1) * batch_size]
            # Around all tokens: what it has rounded of the adapter's weights is kept to its end.
            with torch.autocast(plan.device, dtype=getattr(torch, plan.dtype), enabled=plan.dtype != "float32"):
                answers = self._answer_batch([prompts[index] for index in indices or [0]], samples, until_s)
            for index, answer in zip(indices, answers, strict=False):
                found[index, : 1 + len(answer)] = torch.tensor([1 + len(answer), *answer])
        self.model.train(was_training)
        if plan.world_size > 1:
            found = found.to(plan.device)
            dist.all_reduce(found)
        return [answer[1 : answer[0]] if answer[0] else None for answer in found.tolist()]

    def _answer_batch(self, prompts: Sequence[Sequence[int]], samples: SampleInputs, until_s: float) -> list[list[int]]:
        device, pad = self.plan.device, self.pad_token_id
        width = max(map(len, prompts))
        ids = torch.tensor(
            [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
        )  # (B, T)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()  # (B, T), 1 = a token
        stops = torch.tensor(samples.stop_ids, dtype=torch.int64, device=device)
        is_open = torch.ones(len(prompts), dtype=torch.bool, device=device)
        answers: list[list[int]] = [[] for _ in prompts]
        cache = None
        for position in range(1, samples.max_new_tokens + 1):
            logits, cache = self._predict(ids, mask, cache)
            tokens = logits.argmax(dim=-1)  # (B,)
            is_open &= ~torch.isin(tokens, stops)
            for answer, token, goes_on in zip(answers, tokens.tolist(), is_open.tolist(), strict=True):
                if goes_on:
                    answer.append(token)
            self.beat()
            is_more = position < samples.max_new_tokens and bool(is_open.any()) and time.monotonic() < until_s
            if not self._is_wanted(is_more):
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
        return answers

    def _predict(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Return the logits (B, V) of the token behind `ids` (B, T), and what the model remembers of these, or None."""
        fresh = ids if cache is None else ids[:, -1:]
        inputs: dict[str, Any] = {"input_ids": fresh}
        if not self._is_recurrent():  # Mamba multiplies by it, and takes one token for as many as the mask is wide
            inputs["attention_mask"] = mask
        accepted, cache_name = self._accepted(), self._cache_name()
        if "position_ids" in accepted:  # others find positions by the mask
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        if "logits_to_keep" in accepted:  # all logits of a long prompt are gigabytes
            inputs["logits_to_keep"] = 1
        if "use_cache" in accepted:  # the configuration says no, for the sake of joined rows
            inputs["use_cache"] = True
        if cache is not None and cache_name is not None:
            inputs[cache_name] = cache
        output = self.model(**inputs)
        return output.logits[:, -1].float(), output.get(cache_name) if cache_name else None

    def _is_recurrent(self) -> bool:
        """Say whether all that the model keeps of a text may be a state: without attention it takes no positions."""
        return self._cache_name() is None or (self.base._is_stateful and "position_ids" not in self._accepted())

    def _cache_name(self) -> str | None:
        """What the model calls what it keeps: `cache` from transformers 5.24 on; None for another name, as RWKV's."""
        return next((name for name in ("cache", "past_key_values") if name in self._accepted()), None)

    def _accepted(self) -> set[str]:
        # Of the class: the loss in chunks has put another function into the model.
        return set(inspect.signature(type(self.base).forward).parameters)

    def _is_wanted(self, wish: bool) -> bool:
        """Say whether any process goes on: then all do."""
        return bool(find_maximum([int(wish)], self.plan)[0])
