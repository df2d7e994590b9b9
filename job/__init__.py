"""sft-job: fine-tune a language model with LoRA as one batch job."""

__version__ = "0.1.0"
