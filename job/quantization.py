"""How the frozen base model is held while it is trained on: as the setting says, or as it was stored."""

from collections.abc import Mapping
from typing import Any

from job.choices import Choices
from job.errors import ConfigError
from job.settings import Settings
from job.support import Device, Quantization, why_not_dora, why_not_quantization

_NAMES = {"nf4": "4-bit NF4", "int8": "LLM.int8"}


def find_stored_quantization(model_id: str, configuration: Mapping[str, Any]) -> Quantization:
    """Return how a base model's weights are stored, by its config.json.

    Raises ConfigError for every kind but those that bitsandbytes trains on: NF4 and LLM.int8.
    """
    stored = configuration.get("quantization_config")
    if not stored:
        return "none"
    details = stored if isinstance(stored, dict) else {}
    if details.get("load_in_8bit"):
        return "int8"
    if details.get("load_in_4bit") and details.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    method = details.get("quant_method", "unknown")
    kind = f"{method} {details['bnb_4bit_quant_type']}" if "bnb_4bit_quant_type" in details else method
    raise ConfigError(
        f"SFT_MODEL__ID={model_id}: its weights are stored quantised ({kind}), which can't be trained on",
        hint="name the model that it was made from, and set SFT_QUANTIZATION=nf4 to hold that in 4 bits",
    )


def check_quantization(settings: Settings, device: Device, compute_capability: tuple[int, int] | None) -> None:
    """Raise ConfigError for a quantisation that was asked for and can't be had on this machine."""
    asked = settings.quantization
    _refuse(f"SFT_QUANTIZATION={asked}", settings, asked, device, compute_capability)


def choose_quantization(choices: Choices, settings: Settings, stored: Quantization, device: Device) -> None:
    """Note the quantisation, and what is to be warned of.

    Raises ConfigError where the setting contradicts the weights, or can't be merged.
    """
    is_given = "quantization" in settings.model_fields_set
    if stored == "none":
        choices.put("quantization", settings.quantization, "SFT_QUANTIZATION" if is_given else "default")
    else:
        _check_stored(settings, stored, is_given=is_given)
        _refuse(f"SFT_MODEL__ID={settings.model.id}: stored in {_NAMES[stored]}", settings, stored, device, None)
        choices.put("quantization", stored, "the base model's weights are stored so")
    chosen = choices.values["quantization"]
    if chosen == "fp8" and device == "cpu":
        choices.warnings.append("quantization fp8: a CPU multiplies the rounded numbers in float32, which is slower")
    elif chosen != "none" and device == "cpu":
        # SmolLM2-135M-Instruct on 2 cores: 115 tokens/s in float32, 96 in int8, 95 in nf4 (bitsandbytes 0.50).
        choices.warnings.append(f"quantization {chosen}: on a CPU it saves memory, and is slower than float32")


def _check_stored(settings: Settings, stored: Quantization, *, is_given: bool) -> None:
    model_id, asked = settings.model.id, settings.quantization
    if is_given and asked != stored:
        raise ConfigError(
            f"SFT_QUANTIZATION={asked}: the weights of SFT_MODEL__ID={model_id} are stored in {_NAMES[stored]}",
            hint="leave SFT_QUANTIZATION out, or name the model that it was made from",
        )
    if settings.output.merge:
        raise ConfigError(
            f"SFT_OUTPUT__MERGE=true: the weights of SFT_MODEL__ID={model_id} are stored in {_NAMES[stored]}, so there "
            f"is no whole model to merge into",
            hint=f"name the model that it was made from, and set SFT_QUANTIZATION={stored} to train on the same",
        )


def _refuse(
    what: str,
    settings: Settings,
    quantization: Quantization,
    device: Device,
    compute_capability: tuple[int, int] | None,
) -> None:
    lacking = why_not_quantization(quantization, device, compute_capability)
    if lacking is not None:
        raise ConfigError(f"{what}: {lacking}", hint="train on the model as it is, with SFT_QUANTIZATION=none")
    lacking = why_not_dora(quantization, device) if settings.lora.dora else None
    if lacking is not None:
        raise ConfigError(f"SFT_LORA__DORA=true: {lacking}", hint="set SFT_LORA__DORA=false, or SFT_QUANTIZATION=nf4")
