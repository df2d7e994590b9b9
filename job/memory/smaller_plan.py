"""Plans that need less memory and learn the same: the global batch and the order of the rows stay."""

from collections.abc import Mapping

from job.plan import TrainPlan


def take_smaller_step(plan: TrainPlan) -> TrainPlan | None:
    """Return the plan to try after this one ran out of memory, its last warning saying what is different; None after
    the last.

    The micro batch goes down first, for that costs the least; then activations are computed twice, and then the
    logits of a few tokens at a time.
    """
    micro = plan.micro_batch_size
    if micro > 1:
        share = micro * plan.gradient_accumulation_steps  # sequences of a process in every step
        half = max(size for size in range(1, micro // 2 + 1) if share % size == 0)
        asked = "SFT_TRAIN__MICRO_BATCH_SIZE"
        name = asked if plan.sources["micro_batch_size"] == asked else "micro batch"
        return lower(
            plan,
            {"micro_batch_size": half},
            source=f"out of memory at {micro}",
            warning=f"out of memory with {name}={micro}: trying {half} x {share // half} (micro batch x accumulation); "
            f"the global batch stays {plan.global_batch_size}",
        )
    if (layers := plan.gradient_checkpointing) < 1:
        return lower(
            plan,
            {"gradient_checkpointing": 1.0},
            source=f"out of memory with {layers:g} of the layers" if layers else "out of memory without",
            warning="out of memory with a micro batch of 1: trying gradient checkpointing of all layers, a slower way",
        )
    if plan.loss == "full":
        return lower(
            plan,
            {"loss": "chunked"},
            source="out of memory with all logits at once",
            warning="out of memory with gradient checkpointing: trying the loss in chunks",
        )
    return None


def lower(plan: TrainPlan, values: Mapping[str, object], *, source: str, warning: str) -> TrainPlan:
    """Return a plan with some values changed, each from `source`; accumulation makes up for a smaller micro batch."""
    changes = dict(values)
    if "micro_batch_size" in changes:
        share = plan.micro_batch_size * plan.gradient_accumulation_steps
        changes["gradient_accumulation_steps"] = share // int(str(changes["micro_batch_size"]))
    return plan.model_copy(
        update={
            **changes,
            "sources": plan.sources | dict.fromkeys(values, source),
            "warnings": [*plan.warnings, warning],
        }
    )
