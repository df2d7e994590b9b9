"""What tutorials do: transformers' Trainer on rows that are all padded to the longest length there may be."""

import json
from typing import Any

from training_rows import training_parser


def main() -> None:
    """Train, and save the adapter."""
    parser = training_parser(__doc__)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--max-steps", type=int, required=True)
    options = parser.parse_args()

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=options.batch,
        learning_rate=options.learning_rate,
        bf16=options.dtype == "bfloat16",
        use_cpu=True,
        report_to="none",
        seed=options.seed,
    )
    lines = options.rows.read_text().splitlines()
    rows = [_pad(tokenizer, json.loads(line), options.max_length) for line in lines]
    trainer = Trainer(get_peft_model(base, lora), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()


def _pad(tokenizer: Any, row: dict[str, Any], max_length: int) -> dict[str, list[int]]:
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, padding="max_length", truncation=True, max_length=max_length)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    # The padding token is the end-of-turn token, which is to be learned: the mask tells them apart.
    labels = [token if seen else -100 for token, seen in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


if __name__ == "__main__":
    main()
