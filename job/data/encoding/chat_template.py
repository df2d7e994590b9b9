"""Chat templates by name, from a file or from another model, and what they change in a tokenizer.

A template is more than its text: the special tokens that it writes must be tokens of the model, and the one that ends a
turn must be the EOS that generation stops at. `apply_template` sees to all three, and returns what the training side
has to know: which tokens are new to the model.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from job.data.encoding.render import Renderer, find_template, make_renderer
from job.data.encoding.tokens import find_closing_tokens, keep_torch_out
from job.data.shaping.shapes import RowError
from job.errors import ConfigError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers import PreTrainedTokenizerBase

SETTING = "SFT_MODEL__CHAT_TEMPLATE"

# What a special token looks like: <|im_end|>, <start_of_turn>, [INST] and [/INST], <s> and </s>.
SPECIAL_LOOK = re.compile(r"<\|[^|<>\s\0]+\|>|<[a-z]+_of_[a-z]+>|\[/?[A-Z_]*INST\]|</?s>")
# What one that a tokenizer has added looks like, special or not: <think>, <tool_call>, but no blanks and no words.
ADDED_LOOK = re.compile(r"<\S+>|\[\S+\]")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, the special tokens that it writes, and the one that ends an answer (None: find it by use)."""

    name: str
    text: str
    special_tokens: tuple[str, ...]
    end_of_turn: str | None


@dataclass(frozen=True)
class NewToken:
    """A token that the model never saw: its text and id, and the ids that stood for its text before."""

    text: str
    id: int
    piece_ids: tuple[int, ...]


@dataclass(frozen=True)
class AppliedTemplate:
    """What a template changed in a tokenizer; plain values, so that it can be sent to another process."""

    new_tokens: tuple[NewToken, ...]
    end_of_turn: str | None  # the tokenizer's EOS from now on; None where no token ends a turn
    eos_before: str | None


_QUESTION, _ANSWER = "Qquestionq", "Qanswerq"
_SAMPLE = [
    {"role": "system", "content": "Qsystemq"},
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": _ANSWER},
]

_SHIPPED: dict[str, tuple[tuple[str, ...], str | None]] = {
    "chatml": (("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "qwen": (("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "gemma": (("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": (
        (
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        None,  # it writes the tokenizer's own EOS
    ),
    "phi": (("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
}
SHIPPED_NAMES: tuple[str, ...] = tuple(_SHIPPED)


def shipped_template(name: str) -> ChatTemplate:
    """Return the template that comes with the job under `name`, one of SHIPPED_NAMES."""
    special_tokens, end_of_turn = _SHIPPED[name]
    text = files("job.data.encoding").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(name, text, special_tokens, end_of_turn)


def read_template_file(path: Path, shown: str) -> ChatTemplate:
    """Read a template from a .jinja file, which the setting names as `shown`.

    Its special tokens are the texts in it that look like one, such as <|user|>. Raises ConfigError when the file can't
    be read or is no template of conversations.
    """
    from jinja2 import TemplateSyntaxError

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _error(shown, f"byte {error.start + 1} is not UTF-8", "save the template as UTF-8 text") from error
    except OSError as error:
        raise _error(shown, f"can't be read: {error.strerror}", "check the path") from error
    try:
        literals = _literals(text)
    except TemplateSyntaxError as error:
        raise _error(shown, f"line {error.lineno}: {error.message}", "mend the Jinja template") from error
    # Stand-ins that don't look like tokens: which tokens BOS and EOS are is the tokenizer's to say.
    written = literals + _check_sample(Renderer(text, {"bos_token": "Qbosq", "eos_token": "Qeosq"}), shown)
    return ChatTemplate(shown, text, tuple(dict.fromkeys(SPECIAL_LOOK.findall(written))), None)


def clone_template(other: "PreTrainedTokenizerBase", shown: str) -> ChatTemplate:
    """Take over the chat template of another model's tokenizer, which the setting names as `shown`.

    Where the template writes `eos_token` and the like, it keeps writing the other tokenizer's. Raises ConfigError when
    that tokenizer has no chat template.
    """
    from jinja2.meta import find_undeclared_variables

    text = find_template(other)
    renderer = make_renderer(other)
    if text is None or renderer is None:
        raise _error(
            shown,
            "that model's tokenizer has no chat template",
            f"name another model, or one of {', '.join(SHIPPED_NAMES)}",
        )
    used = find_undeclared_variables(_environment().parse(text))
    names = [name for name in other.SPECIAL_TOKENS_ATTRIBUTES if name in used]
    fixed = {name: str(other.special_tokens_map.get(name, "")) for name in names}
    # The line feed is eaten by trim_blocks, so the template itself is as it was.
    settings = "".join(f"{{% set {name} = {_quote(value)} %}}\n" for name, value in fixed.items())
    written = "\0".join([_literals(text), _check_sample(renderer, shown), *fixed.values()])
    special = set(other.all_special_tokens)
    tokens = [
        token
        for token in find_closing_tokens(other).values()
        if token and token in written and (token in special or ADDED_LOOK.fullmatch(token))
    ]
    end_of_turn = find_end_of_turn(other)
    tokens += [] if end_of_turn is None else [end_of_turn]
    return ChatTemplate(shown, settings + text, tuple(dict.fromkeys(tokens)), end_of_turn)


def apply_template(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> AppliedTemplate:
    """Give a tokenizer the template, the special tokens that it writes, and its end-of-turn token as EOS.

    Raises ConfigError when the template can't be used with this tokenizer.
    """
    from tokenizers import AddedToken

    eos_before: str | None = tokenizer.eos_token
    added = set(find_closing_tokens(tokenizer).values())
    missing = [token for token in template.special_tokens if token not in added]
    known = tokenizer.get_vocab()
    pieces = {token: tuple(tokenizer.encode(token, add_special_tokens=False)) for token in missing}
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in missing], special_tokens=True)
    tokenizer.chat_template = template.text
    end_of_turn = template.end_of_turn or find_end_of_turn(tokenizer)
    if end_of_turn is not None:
        tokenizer.eos_token = end_of_turn
    _check_sample(Renderer(template.text, tokenizer.special_tokens_map), template.name)
    # A word of the vocabulary that is now a special token has an embedding already.
    new = [token for token in missing if token not in known]
    return AppliedTemplate(
        tuple(NewToken(token, int(tokenizer.convert_tokens_to_ids(token)), pieces[token]) for token in new),
        end_of_turn,
        eos_before,
    )


def find_end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the special or added token that the tokenizer's template writes behind an answer.

    None where it has no template, or where plain text or nothing ends a turn.
    """
    renderer = make_renderer(tokenizer)
    if renderer is None:
        return None
    try:
        text = _sample(renderer)
    except RowError:
        return None
    if _ANSWER not in text:
        return None
    rest = text.rpartition(_ANSWER)[2].lstrip()
    found = [token for token in find_closing_tokens(tokenizer).values() if token and rest.startswith(token)]
    return max(found, key=len, default=None)


def _sample(renderer: Renderer) -> str:
    """Render a question and its answer, behind a system prompt if the template knows one. Raises RowError."""
    keep_torch_out()
    try:
        return renderer.write(_SAMPLE)
    except RowError:
        return renderer.write(_SAMPLE[1:])


def _check_sample(renderer: Renderer, shown: str) -> str:
    """Return the sample's text. Raises ConfigError where the template can't write it."""
    hint = f"use a template of conversations, such as one of {', '.join(SHIPPED_NAMES)}"
    try:
        text = _sample(renderer)
    except RowError as error:
        raise _error(shown, f"a question and its answer: {error.reason}", hint) from error
    if _QUESTION not in text or _ANSWER not in text:
        raise _error(shown, "the template does not write the messages of a conversation", hint)
    return text


def _literals(text: str) -> str:
    """Return the texts that stand in a template, so that what is only its code is not taken for a token."""
    from jinja2 import nodes

    tree = _environment().parse(text)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts) + "\0"


@cache
def _environment() -> "ImmutableSandboxedEnvironment":
    """Return an environment that parses what transformers' parses; rendering is left to transformers."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _error(shown: str, problem: str, hint: str) -> ConfigError:
    return ConfigError(f"{SETTING}={shown}: {problem}", hint=hint)
