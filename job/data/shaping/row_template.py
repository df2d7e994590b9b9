"""The user's template of a row -> text, and which of it the loss is taken on.

The template is a small part of Jinja (see `job.data.shaping.template_language`) with marks around what is learned:
`Q: {{ question }} A: {% generation %}{{ answer }}{% endgeneration %}`. Fields that are missing or null are errors of
the row wherever they would be written, never an empty string or `None`. Marks are pieces of the output of their own, so
what stands between them is found by counting, whatever the row holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from job.data.shaping.examples import LossOn, PlainExample, RowError
from job.data.shaping.template_language import (
    END_MARK,
    LOOP_STEPS,
    START_MARK,
    Language,
    LoopSteps,
    check_syntax,
    find_text_after_marks,
    guard_values,
    has_marks,
)
from job.errors import ConfigError

SETTING = "SFT_DATA__TEMPLATE"
EXAMPLE = "Q: {{ question }} A: {% generation %}{{ answer }}{% endgeneration %}"
# Longer ones can hit limits of Python's compiler that it does not report as errors of syntax.
MAX_SOURCE_CHARACTERS = 20_000
MAX_CHARACTERS = 10_000_000


@dataclass(frozen=True)
class RowTemplate:
    """A template that was read and found sound; made by `compile_template`."""

    template: Template
    fields: frozenset[str]  # the columns that it uses
    has_marks: bool
    line_after_marks: int | None  # where it writes text after the last mark

    def check_loss_on(self, loss_on: LossOn) -> None:
        """Raise ConfigError when answers are to be learned, and the template marks none or writes on after the last."""
        if loss_on == "all":
            return
        if not self.has_marks:
            raise ConfigError(
                f"{SETTING} marks nothing to learn, and SFT_DATA__LOSS_ON is {loss_on}",
                hint=f"put marks around the answer, such as {EXAMPLE}, or set SFT_DATA__LOSS_ON=all",
            )
        if self.line_after_marks is not None:
            raise ConfigError(
                f"{SETTING}, line {self.line_after_marks}: text after {{% endgeneration %}}, where a model could not "
                "learn to stop",
                hint="end the template with the answer (EOS is added after it), or move the text within the marks",
            )

    def to_example(self, values: Mapping[str, Any], loss_on: LossOn) -> PlainExample:
        """Fill in the template with a row's values.

        The loss is taken on what stands between the marks; on the last of them for `completion`; on everything for
        `all`. Blanks after the last mark are cut off, so that the text ends where the answer does. Raises RowError
        when a field is missing, null or not text, when an answer is empty, or when text follows the last one.
        """
        text, spans = self._fill_in(values)
        if loss_on == "all":
            if not text.strip():
                raise RowError("the template makes an empty text of it")
            return PlainExample(text, ((0, len(text)),))
        if not spans:
            raise RowError("the template marks no answer in it")
        if any(not text[start:end].strip() for start, end in spans):
            raise RowError("the answer that the template marks is empty")
        end = spans[-1][1]
        if text[end:].strip():
            raise RowError("the template writes text after the last answer, where a model could not learn to stop")
        return PlainExample(text[:end], tuple(spans[-1:] if loss_on == "completion" else spans))

    def _fill_in(self, values: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the half-open character ranges between the marks."""
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        length = start = 0
        try:
            for piece in self.template.generate({**values, LOOP_STEPS: LoopSteps()}):
                if piece == START_MARK:
                    start = length
                elif piece == END_MARK:
                    spans.append((start, length))
                else:
                    pieces.append(piece)
                    length += len(piece)
                    if length > MAX_CHARACTERS:
                        raise RowError(f"the template makes more than {MAX_CHARACTERS:,} characters of it")
        except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise RowError(f"the template can't be filled in: {error}") from error
        return "".join(pieces), spans


@lru_cache
def compile_template(source: str) -> RowTemplate:
    """Read a template and check it.

    Raises ConfigError, with the template's line, when it isn't valid or uses what row templates don't have.
    """
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise ConfigError(
            f"{SETTING} has {len(source):,} characters, more than {MAX_SOURCE_CHARACTERS:,}", hint="shorten it"
        )
    language = Language()
    try:
        tree = language.parse(source)
        check_syntax(tree)
        fields = frozenset(find_undeclared_variables(tree))
        marks, line_after_marks = has_marks(tree), find_text_after_marks(tree)
        template = language.from_string(guard_values(tree))
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{SETTING}, line {error.lineno}: {error.message}",
            hint=f"write it with fields of the row, if, for and set; an example: {EXAMPLE}",
        ) from error
    except (SyntaxError, ValueError, RecursionError) as error:
        # Python's own limits: of nested blocks and parentheses, of digits, and text that is not Unicode.
        raise ConfigError(f"{SETTING} can't be compiled: {error}", hint="make it simpler") from error
    return RowTemplate(template, fields, marks, line_after_marks)
