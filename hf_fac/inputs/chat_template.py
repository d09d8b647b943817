"""Conversations in; out, the text that a chat template renders, and the position of each message's content in it.

A template is rendered twice: with the messages, and with a numbered probe in place of every content. The probes show
where contents go and how they are trimmed. The contents are then filled into the second rendering: only when the result
equals the first rendering are the positions known. When it differs, the content cannot be located, which is an error.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A probe's whitespace shows what is trimmed: all of it, only newlines, or nothing. No template contains so many
# newlines or these spaces. Its quotation mark shows whether the content is written as JSON.
_PROBE = "\n" * 7 + '\u2003\ue000{}"\ue001\u2002' + "\n" * 11
_RENDERED_PROBE = re.compile(
    r"(?:(?P<top>\n{7}|(?:\\n){7})?(?P<left>\u2003))?"
    r'\ue000(?P<number>\d+)(?P<escape>\\?)"\ue001'
    r"(?:(?P<right>\u2002)(?P<bottom>\n{11}|(?:\\n){11})?)?"
)
# Tags that a template may look for inside a content: <think>, <|im_end|>, [THINK].
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{1,40}\]")
_REMEMBERED = 1024


class Place(NamedTuple):
    """A stretch of content in a rendered conversation: `[start, end)` in characters, and the index of its message."""

    start: int
    end: int
    message: int


class _Mark(NamedTuple):
    """The content that a probe replaces: `content[start:end]`.

    unit: number of the content, or of its text part, in the conversation. thought: an assistant's text before a closing
    tag, which the template may drop.
    """

    message: int
    unit: int
    content: str
    start: int
    end: int
    thought: bool


class _Slot(NamedTuple):
    """Where a template puts a content, and how it trims and writes it."""

    number: int
    left: str | None
    right: str | None
    escape: bool

    def trimmed(self, content: str, start: int, end: int) -> tuple[int, int]:
        start = end - len(content[start:end].lstrip(self.left))
        return start, start + len(content[start:end].rstrip(self.right))


class _Skeleton(NamedTuple):
    """The template's own text: literals, with a slot between each two of them."""

    literals: list[str]
    slots: list[_Slot]


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and finds each message's content in the text.

    A content is located when it is rendered unchanged, trimmed, or as a JSON string. The template may drop the thought
    of a turn (`<think>...</think>answer`), or render thought and answer in two places.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._skeletons: dict[tuple[str, str], _Skeleton | None] = {}

    def __call__(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[Any] | str | None = None,
        options: Mapping[str, Any] | None = None,
        answer_follows: bool = False,
    ) -> tuple[str, list[Place]]:
        """Returns the rendered conversation and the positions of content in it, in the order of the text.

        Args:
            messages: what `check_messages` returns.
            tools: JSON schemas, or a list of them written as JSON.
            options: further arguments of the template.
            answer_follows: render a prompt as TRL does: with a generation prompt, or continuing an assistant message.
        Raises: ValueError when the template refuses the conversation, or a content cannot be located.
        """
        settings = {"tools": _read_tools(tools), **_read_options(options)}
        if answer_follows:
            continues = messages[-1]["role"] == "assistant"
            settings |= {"add_generation_prompt": not continues, "continue_final_message": continues}
        if not self.tokenizer.chat_template and not settings.get("chat_template"):
            raise ValueError(
                "the tokenizer has no chat template; set tokenizer.chat_template, or give the row as plain text"
            )
        text = self._render(messages, settings)
        template = self.tokenizer.get_chat_template(settings.get("chat_template"), settings.get("tools"))
        tags = _tags(template)
        tried: list[list[dict[str, Any]]] = []
        everyone = {message["role"] for message in messages}
        # A template may search a content: the model's for a thought, a user's for a tool's answer, any for some text.
        for split, keep_bare in itertools.product((set(), {"assistant"}, everyone), (False, True)):
            marked, marks = _mark(messages, tags, split, keep_bare)
            if marked in tried:
                continue
            skeleton = self._skeleton(template, marked, settings)
            places = _fill(text, skeleton, marks) if skeleton else None
            if places is not None:
                return text, places
            if not tried:
                lost = _what_is_lost(text, skeleton, marks)
            tried.append(marked)
        raise ValueError(lost)

    def _render(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        except Exception as error:
            # A template is a program, and can raise anything.
            reason = str(error)[:300].encode("ascii", "backslashreplace").decode()
            raise ValueError(
                f"the chat template refuses the row ({type(error).__name__}: {reason}); change the row to what "
                "the template takes, or set another tokenizer.chat_template"
            ) from error

    def _skeleton(self, template: str, marked: list[dict[str, Any]], settings: dict[str, Any]) -> _Skeleton | None:
        key = (template, repr((marked, settings, self.tokenizer.special_tokens_map)))
        # A template that writes the time renders differently later.
        if key not in self._skeletons or "strftime_now" in template:
            if len(self._skeletons) >= _REMEMBERED:
                self._skeletons.clear()
            try:
                self._skeletons[key] = _read_skeleton(self._render(marked, settings))
            except ValueError:
                self._skeletons[key] = None
        return self._skeletons[key]


def check_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns messages as a list. Raises: ValueError where one cannot be read; `name` is what the error calls them."""
    if not isinstance(value, Sequence) or not len(value) or not all(isinstance(m, Mapping) for m in value):
        what = "an empty list" if isinstance(value, Sequence) and not len(value) else named(value)
        alternative = "" if name == "messages" else "a string or "
        raise ValueError(f"{name} is {what}; it must be {alternative}a list of {{'role', 'content'}} dicts")
    for number, message in enumerate(value):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{name}[{number}] has no role; each message needs 'role' and 'content'")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, Mapping) for part in content):
                raise ValueError(
                    f"{name}[{number}]['content'] is a list, but not of {{'type', 'text'}} dicts; give a string"
                )
            if any(part.get("type", "text") != "text" for part in content):
                raise ValueError(f"{name}[{number}] holds images or sound; hf_fac reads text only, leave the row out")
            for part in content:
                check_string(part.get("text"), f"a text part of {name}[{number}]")
        elif content is not None or not message.get("tool_calls"):
            check_string(content, f"{name}[{number}]['content']")
    return list(value)


def check_string(value: Any, name: str) -> str:
    """Returns a string. Raises: ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {named(value)}; it must be a string")
    return value


def named(value: Any) -> str:
    """Returns a value's type in words, for an error message."""
    return "None" if value is None else f"of type {type(value).__name__}"


def excerpt(value: Any) -> str:
    """Returns a value in ASCII, short enough for an error message."""
    text = ascii(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _read_tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"tools is a string but not JSON ({error}); give a list of JSON schemas") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools is {named(tools)}; it must be a list of JSON schemas, or one written as JSON")
    return tools


def _read_options(options: Any) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"chat_template_kwargs is {named(options)}; it must be a dict")
    return dict(options or {})


@functools.lru_cache
def _tags(template: str) -> re.Pattern[str]:
    """Returns a pattern of the tags that a template looks for, longest first; without tags it matches nothing."""
    tags = sorted(set(_TAG.findall(template)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tags)) or "(?!)")


def _mark(
    messages: list[dict[str, Any]], tags: re.Pattern[str], split: set[str], keep_bare: bool
) -> tuple[list[dict[str, Any]], list[_Mark]]:
    """The messages with probes in place of their contents, or in place of the text between a content's tags.

    split: the roles whose contents get probes between tags.
    keep_bare: put no probe into a blank content, or into an assistant's empty thought without an answer.
    """
    marks: list[_Mark] = []

    def mark(content: str, message: int, unit: int) -> str:
        if not content:
            return content
        role = messages[message]["role"]
        inside = list(tags.finditer(content)) if role in split else []
        thought = 0
        if role == "assistant":
            # What comes after the last closing tag is the answer, one run.
            thought = max((tag.start() for tag in inside if tag.group()[1] == "/"), default=-1)
            inside = [tag for tag in inside if tag.start() <= thought]
        borders = [0, *(edge for tag in inside for edge in tag.span()), len(content)]
        runs = [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if content[a:b].strip()]
        is_bare = not content.strip() or (role == "assistant" and inside)
        if not runs and not (keep_bare and is_bare):
            runs = [(0, len(content))]
        parts, last = [], 0
        for start, end in runs:
            parts += content[last:start], _PROBE.format(len(marks))
            marks.append(_Mark(message, unit, content, start, end, end <= thought))
            last = end
        return "".join([*parts, content[last:]])

    return _each_content(messages, mark), marks


def _each_content(messages: list[dict[str, Any]], change: Callable[[str, int, int], str]) -> list[dict[str, Any]]:
    changed, unit = [], 0
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            content = [{**part, "text": change(part["text"], number, unit + i)} for i, part in enumerate(content)]
            unit += len(content)
        elif isinstance(content, str):
            content = change(content, number, unit)
            unit += 1
        changed.append({**message, "content": content})
    return changed


def _read_skeleton(rendered: str) -> _Skeleton:
    literals, slots, last = [], [], 0
    for probe in _RENDERED_PROBE.finditer(rendered):
        literals.append(rendered[last : probe.start()])
        last = probe.end()
        # The argument of str.strip on each side: None strips all whitespace, "" nothing.
        left = None if probe["left"] is None else "\n" if probe["top"] is None else ""
        right = None if probe["right"] is None else "\n" if probe["bottom"] is None else ""
        slots.append(_Slot(int(probe["number"]), left, right, bool(probe["escape"])))
    return _Skeleton([*literals, rendered[last:]], slots)


def _what_is_lost(text: str, skeleton: _Skeleton | None, marks: list[_Mark]) -> str:
    shown = {slot.number for slot in skeleton.slots} if skeleton else set()
    dropped = next((mark for number, mark in enumerate(marks) if number not in shown), None)
    lost = dropped or next((mark for mark in marks if mark.content.strip() not in text), None)
    which = f"the content of message {lost.message}, {excerpt(lost.content)}," if lost else "the messages"
    return (
        f"{which} cannot be located in what the chat template makes of the conversation: the template "
        f"{'drops or ' if dropped else ''}rewrites it; change the message (a plain string as its content, say), or set "
        "another tokenizer.chat_template"
    )


class _Filled(NamedTuple):
    """`content[inner_start:inner_end]` of a mark stands at `text[start:end]`."""

    start: int
    end: int
    inner_start: int
    inner_end: int
    mark: _Mark


def _fill(text: str, skeleton: _Skeleton, marks: list[_Mark]) -> list[Place] | None:
    """The positions of content; None when content other than thoughts is missing, or the texts differ."""
    shown = {slot.number for slot in skeleton.slots}
    # A row may contain text that looks like a probe, for example in the arguments of a tool.
    if not shown <= set(range(len(marks))):
        return None
    if any(number not in shown and not mark.thought for number, mark in enumerate(marks)):
        return None
    position, filled = len(skeleton.literals[0]), []
    written = [skeleton.literals[0]]
    for slot, literal in zip(skeleton.slots, skeleton.literals[1:], strict=True):
        mark = marks[slot.number]
        start, end = slot.trimmed(mark.content, mark.start, mark.end)
        run = mark.content[start:end]
        run = json.dumps(run, ensure_ascii=False)[1:-1] if slot.escape else run
        written += run, literal
        filled.append(_Filled(position, position + len(run), start, end, mark))
        position += len(run) + len(literal)
    if "".join(written) != text:
        return None
    return [Place(f.start, f.end, f.mark.message) for f in _joined(text, filled) if f.start < f.end]


def _joined(text: str, filled: list[_Filled]) -> Iterator[_Filled]:
    """Joins the runs of a content and the tags between them, where the text has the tags as the content has them."""
    held: _Filled | None = None
    for run in filled:
        floor, goes_on = 0, False
        if held is not None:
            goes_on = held.mark.unit == run.mark.unit and held.inner_end <= run.inner_start
            between = held.mark.content[held.inner_end : run.inner_start]
            if goes_on and text[held.end : run.start] == between:
                held = held._replace(end=run.end, inner_end=run.inner_end)
                continue
            held = _with_end(text, held, run.start)
            yield held
            floor = held.end
        before = "" if goes_on else run.mark.content[: run.inner_start].lstrip()
        if text.endswith(before, floor, run.start):
            run = run._replace(start=run.start - len(before), inner_start=run.inner_start - len(before))
        held = run
    if held is not None:
        yield _with_end(text, held, len(text))


def _with_end(text: str, run: _Filled, ceiling: int) -> _Filled:
    after = run.mark.content[run.inner_end :].rstrip()
    return run._replace(end=run.end + len(after)) if text.startswith(after, run.end, ceiling) else run
