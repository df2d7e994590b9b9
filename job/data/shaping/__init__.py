"""Rows -> examples: which columns hold the text, and which of it the loss is taken on."""
