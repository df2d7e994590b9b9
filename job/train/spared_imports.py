"""What a process of the job does without, though it is installed: libraries that others import wherever they are.

It must be called before torch, transformers and PEFT are imported.
"""

import sys
from collections.abc import Sequence

from job.plan import TrainPlan
from job.support import uses_bitsandbytes, uses_deepspeed


def leave_out_libraries(plan: TrainPlan, *, trains: bool, report_to: Sequence[str] = ()) -> None:
    """Have PEFT and transformers do without what the plan has no use for, as if it weren't installed: bitsandbytes
    alone, which brings torch's compiler with it, is a quarter of the seconds that the imports take."""
    left_out = [] if report_to else ["boto3"]  # a tracker may store what it is told on S3
    if not trains or not uses_deepspeed(plan.engine):
        left_out.append("deepspeed")
    if not uses_bitsandbytes(plan.quantization, plan.optimizer if trains else "adamw"):
        left_out.append("bitsandbytes")
    for name in left_out:
        sys.modules[name] = None  # type: ignore[assignment]
