"""`sft-job verify URI`: whether what was published is still there, whole, and loads."""

from job.outcome import Progress
from job.settings_groups import RuntimeSettings


def verify(uri: str, runtime: RuntimeSettings, progress: Progress) -> str:
    """Check a published slot, and print what was found; return what there is to say of it."""
    raise NotImplementedError
