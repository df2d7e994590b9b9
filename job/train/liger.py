"""Liger's fused loss on a GPU: head and cross entropy in one kernel, put in by transformers' Trainer.

Source: https://github.com/linkedin/Liger-Kernel, `transformers/monkey_patch.py` of liger-kernel 0.8.5.
"""

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from job.errors import ConfigError

# Liger puts in every kernel it has unless it is told not to; those it doesn't know for a model it leaves out.
LIGER_KERNELS = {
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
    "geglu": False,
    "layer_norm": False,
    "rms_norm": False,
    "rope": False,
    "swiglu": False,
}


def check_liger_serves(model: PeftModel) -> None:
    """Raise ConfigError where Liger would leave the loss as it is, or compute another one, both without a word."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    base = model.get_base_model()
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        _refuse(f"Liger has no loss for {base.config.model_type}")
    head = base.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save["default"]
    if type(head) is not nn.Linear or head.bias is not None:  # it takes the weight alone
        _refuse("Liger would leave out the bias, the adapter or the new rows of this head")


def _refuse(reason: str) -> None:
    raise ConfigError(f"SFT_TRAIN__LOSS=liger: {reason}", hint="set SFT_TRAIN__LOSS=chunked")
