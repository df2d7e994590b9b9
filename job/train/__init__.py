"""The worker side: the only code that imports torch."""
