"""Loading a model's tokenizer, and examples -> token ids and labels with it, many at a time.

Which of the tokens are supervised is `job.data.encoding.labels`'s to say and to prove.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.encoding.labels import NOT_SUPERVISED, Encoded, label_chat, label_plain
from job.data.encoding.places import BatchTokenizer
from job.data.encoding.render import Rendered, Renderer, make_renderer
from job.data.shaping.shapes import ChatExample, Example, PlainExample, RowError
from job.errors import ConfigError
from job.log import adopt_library_logs

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "NOT_SUPERVISED",
    "BatchEncoder",
    "Encoded",
    "encode",
    "encode_batch",
    "encode_prompt",
    "find_closing_tokens",
    "keep_torch_out",
    "load_tokenizer",
    "warm_up",
]


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder without torch and without network.

    Raises ConfigError when the folder has no tokenizer, or one that can't give character offsets.
    """
    keep_torch_out()
    from transformers import AutoTokenizer

    adopt_library_logs()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(_check_folder(folder)), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise _no_tokenizer(folder, reason) from error
    if not tokenizer.is_fast:
        raise _no_tokenizer(folder, "it has only a slow tokenizer, which can't tell where its tokens stand in a text")
    return tokenizer


def warm_up() -> None:
    """Import now what tokenising will import."""
    keep_torch_out()
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    del PreTrainedTokenizerFast, chat_template_utils


def _check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise _no_tokenizer(folder, "there is no such folder")
    saved = folder / "tokenizer.json"
    if saved.is_file():
        # The tokenizers library reports a damaged file as a bare Exception.
        try:
            json.loads(saved.read_bytes())
        except ValueError as error:
            raise _no_tokenizer(folder, f"tokenizer.json is not valid JSON: {error}") from error
    return folder


def _no_tokenizer(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"the base model in {folder} has no usable tokenizer: {reason}",
        hint="set SFT_MODEL__ID to a model whose folder holds tokenizer.json and tokenizer_config.json",
    )


def keep_torch_out() -> None:
    """Make `import transformers` do without torch, and say nothing about it.

    transformers imports torch for AutoTokenizer wherever torch is installed: seconds of waiting and hundreds of
    megabytes, in a process that only counts tokens. None in sys.modules makes `import torch` fail from here on, which
    transformers takes for "not installed". A process that has torch already keeps it.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
    logger = logging.getLogger("transformers")
    if _say_nothing_of_torch not in logger.filters:
        logger.addFilter(_say_nothing_of_torch)


def _say_nothing_of_torch(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("PyTorch was not found")


def encode(example: Example, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return one example's token ids and labels, both (T,). Raises RowError or FatalRowError, as rendering does."""
    encoded = encode_batch([example], tokenizer)[0]
    if isinstance(encoded, RowError):
        raise encoded
    return encoded.input_ids.tolist(), encoded.labels.tolist()


def encode_batch(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> list[Encoded | RowError]:
    """Tokenise examples together; where one can't be, its place holds the reason."""
    return BatchEncoder(tokenizer)(examples)


class BatchEncoder:
    """Tokenises examples with one tokenizer, many at a time."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._renderer = make_renderer(tokenizer)
        self._closing = find_closing_tokens(tokenizer)
        self._tokenize_chats = BatchTokenizer(_prepare_backend(tokenizer))

    def __call__(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """Return what each example becomes; where one can't be tokenised, its place holds the reason."""
        results: list[Encoded | RowError | None] = [None] * len(examples)
        plain: list[tuple[int, PlainExample]] = []
        chats: list[tuple[int, Rendered]] = []
        for index, example in enumerate(examples):
            if isinstance(example, PlainExample):
                plain.append((index, example))
                continue
            rendered = _try_render(example, self._renderer)
            if isinstance(rendered, RowError):
                results[index] = rendered
            else:
                chats.append((index, rendered))
        # The template has written the special tokens of a conversation; those of a plain text are the tokenizer's.
        encodings = _prepare_backend(self._tokenizer).encode_batch([example.text for _, example in plain])
        for (index, example), encoding in zip(plain, encodings, strict=True):
            results[index] = label_plain(example, encoding, _get_eos(self._tokenizer))
        tokenized = self._tokenize_chats([rendered.text for _, rendered in chats])
        for (index, rendered), tokens in zip(chats, tokenized, strict=True):
            try:
                results[index] = label_chat(rendered, tokens, self._closing, self._tokenizer.eos_token_id)
            except RowError as error:
                results[index] = error
        return [result for result in results if result is not None]


def encode_prompt(text: str, tokenizer: "PreTrainedTokenizerBase", *, is_plain: bool) -> list[int]:
    """Return the token ids of what stands before an answer: plain text, or what the chat template has written."""
    ids: list[int] = _prepare_backend(tokenizer).encode(text, add_special_tokens=is_plain).ids
    # Some tokenizers end a plain text with EOS, behind which there is nothing to be said.
    return ids[:-1] if is_plain and ids[-1:] == [tokenizer.eos_token_id] else ids


def find_closing_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Return the ids and texts of the tokens that can close a turn: every special or added token."""
    texts = {index: token.content.strip() for index, token in tokenizer.added_tokens_decoder.items()}
    return texts | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _try_render(example: ChatExample, renderer: Renderer | None) -> Rendered | RowError:
    if renderer is None:
        return RowError("holds a conversation, but the base model's tokenizer has no chat template")
    try:
        return renderer.render(example)
    except RowError as error:
        return error


def _prepare_backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
    """Return what tokenises, without the truncation or padding that the tokenizer was saved with."""
    # transformers' own call turns every token into Python objects three times over, which takes a third as long as
    # the tokenising itself.
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _get_eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            "the base model's tokenizer names no EOS token, so the model could not learn to stop",
            hint="set SFT_MODEL__ID to a model whose tokenizer_config.json has eos_token",
        )
    return int(eos)
