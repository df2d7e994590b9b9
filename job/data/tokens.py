"""Examples -> token ids and labels.

A label is the token's own id where the loss is taken, and -100 elsewhere. Labels come from the character offsets of the
tokens, so the text is tokenised once, as a whole, exactly as a model will see it.

Where an answer ends. A chat template closes an answer with a special or added token (`<|im_end|>`, `<|eot_id|>`,
`</s>`); it is supervised, for it is what makes a model stop, and blanks that the template writes after it are not. A
template that closes an answer with plain text only gives a model nothing to stop at: then the blanks after the last
answer are cut off and EOS is put there, supervised, because EOS is what generation stops at; answers before it are
supervised up to their last word. A template that marks its answers with `{% generation %}` and leaves the end-of-turn
token outside is taken at its word. Plain text always ends in a supervised EOS.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from job.data.render import Rendered, find_template, render
from job.data.shapes import ChatExample, Example, PlainExample, RowError
from job.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_SUPERVISED = -100


class Encoded(NamedTuple):
    """One tokenised example: both (T,) int32, labels -100 where not supervised."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder without torch and without network.

    Raises ConfigError when the folder has no tokenizer, or one that can't give character offsets.
    """
    _keep_torch_out()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(_check_folder(folder)), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise _no_tokenizer(folder, reason) from error
    if not tokenizer.is_fast:
        raise _no_tokenizer(folder, "it has only a slow tokenizer, which can't tell where its tokens stand in a text")
    return tokenizer


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


def _keep_torch_out() -> None:
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
    """Return one example's token ids and labels, both (T,). Raises RowError or FatalRowError (see `render`)."""
    encoded = encode_batch([example], tokenizer)[0]
    if isinstance(encoded, RowError):
        raise encoded
    return encoded.input_ids.tolist(), encoded.labels.tolist()


def encode_batch(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> list[Encoded | RowError]:
    """Tokenise examples together; where one can't be, its place holds the reason."""
    template = find_template(tokenizer)
    results: list[Encoded | RowError | None] = [None] * len(examples)
    plain: list[tuple[int, PlainExample]] = []
    chats: list[tuple[int, Rendered]] = []
    for index, example in enumerate(examples):
        if isinstance(example, PlainExample):
            plain.append((index, example))
            continue
        rendered = _try_render(example, tokenizer, template)
        if isinstance(rendered, RowError):
            results[index] = rendered
        else:
            chats.append((index, rendered))
    # The template has written the special tokens of a conversation; those of a plain text are the tokenizer's to add.
    plain_tokens = _tokenize([example.text for _, example in plain], tokenizer, add_special_tokens=True)
    for (index, example), (ids, offsets) in zip(plain, plain_tokens, strict=True):
        results[index] = _label_plain(example, ids, offsets, tokenizer)
    closing = find_closing_tokens(tokenizer)
    chat_tokens = _tokenize([rendered.text for _, rendered in chats], tokenizer, add_special_tokens=False)
    for (index, rendered), (ids, offsets) in zip(chats, chat_tokens, strict=True):
        results[index] = _label_chat(rendered, ids, offsets, closing, tokenizer)
    return [result for result in results if result is not None]


def find_closing_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Return the ids and texts of the tokens that can close a turn: every special or added token."""
    texts = {index: token.content.strip() for index, token in tokenizer.added_tokens_decoder.items()}
    return texts | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _try_render(
    example: ChatExample, tokenizer: "PreTrainedTokenizerBase", template: str | None
) -> Rendered | RowError:
    if template is None:
        return RowError("holds a conversation, but the base model's tokenizer has no chat template")
    try:
        return render(example, tokenizer, template)
    except RowError as error:
        return error


def _tokenize(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", *, add_special_tokens: bool
) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Return for each text its ids (T,) and the half-open character range of each token (T, 2)."""
    if not texts:
        return []
    batch = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        # It would warn of texts longer than the model's context; select_rows deals with those.
        verbose=False,
    )
    return [
        (np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2))
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def _label_plain(
    example: PlainExample, ids: NDArray[np.int32], offsets: NDArray[np.int64], tokenizer: "PreTrainedTokenizerBase"
) -> Encoded:
    # A token that straddles the end of the prompt is supervised: it holds the first characters of the completion.
    supervised = offsets[:, 1] > example.supervised_from
    if example.supervised_from == 0:
        # A space at the very start may have the range (0, 0), as BOS has.
        supervised[1:] = True
    eos = _get_eos(tokenizer)
    if len(ids) == 0 or ids[-1] != eos:
        ids, supervised = np.append(ids, np.int32(eos)), np.append(supervised, True)
    supervised[-1] = True
    return _make_encoded(ids, supervised)


def _label_chat(
    rendered: Rendered,
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    closing: dict[int, str],
    tokenizer: "PreTrainedTokenizerBase",
) -> Encoded:
    supervised = np.zeros(len(ids), dtype=np.bool_)
    for start, end in rendered.spans:
        inside = np.arange(len(ids)) if rendered.supervise_all else _find_tokens(offsets, start, end)
        if len(inside) == 0:
            continue
        last, word = _find_last_word(rendered.text, offsets, inside)
        supervised[inside[0] : (inside[-1] if rendered.supervise_all else last) + 1] = True
        # The text is compared too: some vocabularies list bytes, such as <0x0A>, among their added tokens.
        is_closed = closing.get(int(ids[last])) == word
        if not is_closed and not rendered.text[end:].strip():
            ids = np.append(ids[: last + 1], np.int32(_get_eos(tokenizer)))
            supervised = np.append(supervised[: last + 1], True)
            break
    return _make_encoded(ids, supervised)


def _find_tokens(offsets: NDArray[np.int64], start: int, end: int) -> NDArray[np.int64]:
    """Return the indices of the tokens that share a character with [start, end)."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    found: NDArray[np.int64] = np.flatnonzero((ends > start) & (starts < end))
    return found


def _find_last_word(text: str, offsets: NDArray[np.int64], inside: NDArray[np.int64]) -> tuple[int, str]:
    """Return the last of the tokens `inside` that is more than blanks: its index, and its text without blanks."""
    for index in inside[::-1]:
        if word := text[slice(*offsets[index])].strip():
            return int(index), word
    return int(inside[-1]), ""


def _make_encoded(ids: NDArray[np.int32], supervised: NDArray[np.bool_]) -> Encoded:
    return Encoded(ids, np.where(supervised, ids, np.int32(NOT_SUPERVISED)).astype(np.int32))


def _get_eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            "the base model's tokenizer names no EOS token, so the model could not learn to stop",
            hint="set SFT_MODEL__ID to a model whose tokenizer_config.json has eos_token",
        )
    return int(eos)
