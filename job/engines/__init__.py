"""Configuration files for `accelerate launch`, one for each way to distribute the work."""
