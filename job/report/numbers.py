"""Numbers in the form in which people read them; what is no number is None."""

import math

_LARGEST = 1e15  # nothing that is measured here comes near it, and no axis need show it


def as_number(value: object) -> float | None:
    """Return a finite number of a sensible size as float; None for anything else, such as "nan" in metrics.jsonl."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None  # which NaN isn't


def format_perplexity(loss: float) -> str:
    """Return the perplexity that a mean loss in nats means."""
    if loss > 20:
        return f"e^{loss:.0f}"
    perplexity = math.exp(loss)
    return f"{perplexity:,.0f}" if perplexity >= 100 else f"{perplexity:.2f}"


def format_duration(seconds: float) -> str:
    """Write a time for people: `3 min 2 s`, `6 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
