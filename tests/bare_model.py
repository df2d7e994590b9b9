"""A random llama with a tokenizer of its own that has neither a chat template nor the tokens of one: all is small, so
that it loads in no time."""

import json
from pathlib import Path

TEXTS = Path(__file__).parent / "data" / "recipes" / "chat-template.jsonl"


def save_bare_model(
    folder: Path,
    *,
    tied: bool,
    hidden_size: int = 64,
    layers: int = 2,
    vocabulary_size: int | None = None,
    dtype: str = "float32",
) -> Path:
    """Save model and tokenizer, a byte-level one of 500 tokens, with the head tied to the embeddings or not.

    `vocabulary_size` is the model's, where it has more rows than the tokenizer has tokens.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [json.loads(line) for line in TEXTS.read_text().splitlines()]
    backend.train_from_iterator((turn["content"] for row in rows for turn in row["messages"]), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=vocabulary_size or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden_size // 64),
        num_key_value_heads=max(2, hidden_size // 256),
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
