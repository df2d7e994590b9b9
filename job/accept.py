"""What loading the published adapter back in a fresh process has shown."""

from pydantic import BaseModel, ConfigDict


class Acceptance(BaseModel):
    """The loss on some rows with the adapter as it was published, beside the trained model's; `skipped` says why it
    could not be tried."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    loss: float | None
    loss_trained: float | None
    tolerance: float | None
    skipped: str | None
