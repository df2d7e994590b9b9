"""Examples -> token ids and labels: chat templates, and the proof that what is supervised is the answer."""
