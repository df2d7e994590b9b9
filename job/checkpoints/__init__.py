"""Checkpoints in the store: uploaded while training goes on, verified, and found again by the next start."""
