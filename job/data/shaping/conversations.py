"""Lists of messages -> turns. A message is `{"role", "content"}`, or `{"from", "value"}` as ShareGPT has it.

Tool calls become what chat templates expect: `tool_calls` is a list of `{"type": "function", "function": {"name",
"arguments"}}`, in which the arguments are an object rather than a JSON string of one.
"""

from typing import Any

from job.data.reading.files import json_type
from job.data.shaping.cells import check_answer, check_unicode, describe_type, drop_nulls, parse_json, to_text
from job.data.shaping.examples import Message, RowError

ROLES = ("system", "user", "assistant", "developer", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
CALL_NOTE = "a function call in an unknown form, read as text"


def to_messages(items: list[Any], where: str, notes: list[str]) -> list[Message]:
    """Return the turns of a list of messages, none of them supervised yet.

    `where` names the list in errors. Raises RowError for a message that can't be used, an empty answer included.
    """
    return [_to_message(item, f"{where}[{index}]", notes) for index, item in enumerate(items)]


def _to_message(item: Any, where: str, notes: list[str]) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{where} is {describe_type(item)}, not an object with role and content")
    role, content = item.get("role"), item.get("content")
    if len(item) == 2 and isinstance(content, str) and role in ROLES:  # nearly every message there is
        check_unicode(content, f"{where}.content")
        if role == "assistant":
            check_answer(content, f"{where} (assistant)")
        return Message(role, content)
    given: dict[str, Any] = drop_nulls(item)
    if "from" in given and "role" not in given:
        return _from_sharegpt(given, where, notes)
    if role not in ROLES:
        raise _unknown_role(role, where, ROLES)
    return _make_message(role, "content", given, where, notes)


def _from_sharegpt(given: dict[str, Any], where: str, notes: list[str]) -> Message:
    speaker = given["from"]
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise _unknown_role(speaker, where, SHAREGPT_ROLES)
    if speaker == "function_call" and isinstance(given.get("value"), str):
        calls = _parse_calls(given["value"])
        if calls:
            return Message(role, "", extra={"tool_calls": calls})
        notes.append(CALL_NOTE)
    return _make_message(role, "value", given, where, notes)


def _make_message(role: str, key: str, given: dict[str, Any], where: str, notes: list[str]) -> Message:
    extra = {name: value for name, value in given.items() if name not in ("role", "from", key)}
    if calls := extra.get("tool_calls"):
        extra["tool_calls"] = _convert_calls(calls, where)
    calls_tools = role == "assistant" and bool(calls)
    content = "" if calls_tools and key not in given else _join_parts(given.get(key), f"{where}.{key}", notes)
    if role == "assistant" and not calls_tools:
        check_answer(content, f"{where} (assistant)")
    return Message(role, content, extra=extra)


def _join_parts(content: Any, where: str, notes: list[str]) -> str:
    """Content is text, or a list of `{"type": "text", "text": ...}` parts, which are joined."""
    if not isinstance(content, list):
        return to_text(content, where, notes)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
            raise RowError(f"{where} holds something else than text")
    return "".join(to_text(part["text"], where, notes) for part in content)


def _convert_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects, whether a call stands in a `function` key or not."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{where}.tool_calls is not a list of objects")
    return [
        {**call, "function": _convert_arguments(call["function"])}
        if isinstance(call.get("function"), dict)
        else _convert_arguments(call)
        for call in calls
    ]


def _convert_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(call.get("arguments"), str):
        return call
    arguments = parse_json(call["arguments"])
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _parse_calls(text: str) -> list[dict[str, Any]]:
    """Return the tool calls in a JSON text, `{"name", "arguments"}` or a list of them; none when it holds no such."""
    parsed = parse_json(text)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [
        {"type": "function", "function": _convert_arguments({"arguments": {}} | drop_nulls(call))} for call in calls
    ]


def _unknown_role(role: Any, where: str, known: Any) -> RowError:
    shown = repr(role)[:40] if isinstance(role, str) else json_type(role)
    return RowError(f"{where} has the role {shown}; known are {', '.join(known)}")
