"""What a chat template writes around contents, learned once, so that answers are found without rendering per turn.

Most templates write a conversation as contents with fixed text between them, which depends on the roles to the left
and to the right only. For such a template the place of every answer follows by arithmetic. It is never assumed: the
fixed text with a row's contents in it must equal what the template rendered for that row, character by character, else
the row is located by rendering its prefixes (`job.data.encoding.render`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from job.data.shaping.shapes import Message, RowError

Write = Callable[..., str]  # Renderer.write
START = ""  # stands for the role before the first message


@dataclass(frozen=True)
class Frames:
    """The fixed text of a template: between two roles, and after the last one; and the roles it trims contents of."""

    between: dict[tuple[str, str], str]
    ends: dict[str, str]
    trimmed: frozenset[str]

    def match(self, text: str, messages: Sequence[Message]) -> dict[int, tuple[int, int]] | None:
        """Return the range in `text` of each assistant turn by its index, or None where `text` is not so made.

        A range is what a model would generate: the content and all that ends the turn, as if no turn followed.
        """
        pieces: list[str] = []
        spans: dict[int, tuple[int, int]] = {}
        position, before = 0, START
        for index, message in enumerate(messages):
            frame = self.between.get((before, message.role))
            if frame is None or message.extra:
                return None
            content = message.content.strip() if message.role in self.trimmed else message.content
            pieces += frame, content
            start = position + len(frame)
            position = start + len(content)
            if message.role == "assistant":
                spans[index] = (start, position + len(self.ends["assistant"]))
            before = message.role
        pieces.append(self.ends.get(before, ""))
        return spans if "".join(pieces) == text else None


def learn_frames(write: Write) -> Frames | None:
    """Learn the frames of a template by rendering a few conversations; None where it is not made of frames."""
    # Blanks around a content show whether the template trims it.
    user, assistant, system = ({"role": role, "content": f" Q{role}Z "} for role in ("user", "assistant", "system"))
    dialogue = [user, assistant, user, assistant]
    try:
        asked, prompt = write([user]), write([user], add_generation_prompt=True)
        text, answered = write(dialogue), write(dialogue[:2])
    except RowError:
        return None
    trimmed = frozenset(turn["role"] for turn in (user, assistant) if turn["content"] not in text)
    learned = Frames({}, {}, trimmed)
    known = all(
        _learn(learned, rendered, turns)
        for rendered, turns in ((asked, [user]), (answered, dialogue[:2]), (text, dialogue))
    )
    # The answer must begin where the prompt ends, and what ends it must be there when turns follow, too.
    if not known or not answered.startswith(prompt) or not text.startswith(answered):
        return None
    spans = learned.match(answered, [Message(turn["role"], turn["content"]) for turn in dialogue[:2]])
    if spans is None or spans[1][0] != len(prompt):
        return None
    return _learn_system(learned, write, [system, *dialogue]) or learned


def _learn_system(learned: Frames, write: Write, turns: list[dict[str, str]]) -> Frames | None:
    """Return the frames with those of a system prompt; None where the template refuses or rewrites one."""
    try:
        text = write(turns)
    except RowError:
        return None
    trimmed = learned.trimmed if turns[0]["content"] in text else learned.trimmed | {"system"}
    whole = Frames(dict(learned.between), dict(learned.ends), trimmed)
    return whole if _learn(whole, text, turns) else None


def _learn(frames: Frames, text: str, turns: list[dict[str, str]]) -> bool:
    """Cut `text` at the contents of `turns` and keep the pieces; say whether they agree with those kept before."""
    position, before = 0, START
    for turn in turns:
        content = turn["content"].strip() if turn["role"] in frames.trimmed else turn["content"]
        start = text.find(content, position)
        if start < 0 or frames.between.setdefault((before, turn["role"]), text[position:start]) != text[position:start]:
            return False
        position, before = start + len(content), turn["role"]
    return frames.ends.setdefault(before, text[position:]) == text[position:]
