"""What a synthesis may cost, told before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..chat.local import LocalChat
from ..inputs.token_context import MarkedSpan
from ..tasks.prompts import HINTS
from .candidates import Request
from .piecework import PROBED
from .writing import PROBES, SHOWN, SampleWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..chat.local import Chat

_PART = 100  # tokens of words around what a part's request quotes


@dataclass(frozen=True)
class SynthesisPlan:
    """What `synthesize` may cost at most, but for parts of rows that are written again and those of hits that make no
    row; told before anything is spent.

    requests: texts asked for. prompt_tokens, completion_tokens: as the featurizer's tokenizer and chat template count
    them, prompts once for every text. seconds: on this machine, by writing a few tokens; None for an endpoint.
    """

    features: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float | None

    def __str__(self) -> str:
        time_ = "" if self.seconds is None else f", {self.seconds / 60:.1f} minutes"
        return (
            f"at most {self.requests:,} texts for {self.features:,} features: {self.prompt_tokens:,} tokens of prompts "
            f"and {self.completion_tokens:,} written{time_}"
        )


def make_plan(
    chat: Chat, writers: Sequence[SampleWriter], features: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> SynthesisPlan:
    """Returns what writing for the features costs if every one resists to the end.

    Args:
        writers: one for each form that may be taken; where there are several, choosing one costs too.
    """
    costs = [_cost(writer, features, tokenizer) for writer in writers]
    total = {name: max(cost[name] for cost in costs) for name in costs[0]}
    if len(writers) > 1:
        probed = PROBES * min(PROBED, len(features))
        for cost, writer in zip(costs, writers, strict=True):
            total["requests"] += probed
            total["prompt_tokens"] += probed * cost["prompts"] // max(1, len(features))
            total["completion_tokens"] += probed * writer.most_tokens(steered=False)
    seconds = None
    if isinstance(chat, LocalChat) and len(features):
        start = time.perf_counter()
        tried = chat.complete([[{"role": "user", "content": "Write a long story."}]], n=16, max_tokens=16)[0]
        written = sum(completion.completion_tokens for completion in tried)
        seconds = total["completion_tokens"] * (time.perf_counter() - start) / written
    del total["prompts"]
    return SynthesisPlan(len(features), **total, seconds=seconds)


def _cost(writer: SampleWriter, features: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """`prompts`: the tokens of one prompt for each feature, at their longest."""
    settings, rounds = writer.settings, writer.rounds()
    m, n, steered = len(features), settings.candidates, rounds.count("steering")
    words = len(rounds) - steered
    prompts = sum(_tokens(_longest(writer, f), tokenizer) for f in features.tolist() if writer.is_known(f))
    neutral = 0 if writer.neutral is None else _tokens(writer.neutral, tokenizer)
    requests = m * n * len(rounds)
    prompt = n * words * prompts + m * n * steered * neutral
    written = m * n * (words * writer.most_tokens(steered=False) + steered * writer.most_tokens(steered=True))
    if writer.form != "json" or steered:
        others = len(writer.task.parts) - 1
        rows = m * settings.samples_per_feature
        requests += rows * others
        written += rows * others * settings.answer_tokens
        quoted = sum(settings.max_tokens + number * settings.answer_tokens + _PART for number in range(others))
        prompt += rows * quoted
    return {"requests": requests, "prompt_tokens": prompt, "completion_tokens": written, "prompts": prompts}


def _longest(writer: SampleWriter, feature: int) -> Request:
    """The longest request that may be made for a feature."""
    spans, explanation = writer.dictionary.spans(feature), writer.dictionary[feature]["explanation"]
    spans = sorted(spans, key=lambda span: sum(map(len, span[:3])))[-SHOWN:]
    positive = negative = None
    if "two_step" in writer.settings.ways:
        text = " word" * writer.settings.max_tokens
        positive = negative = MarkedSpan("", text, "", 10.0)
    if writer.form == "list":
        *conversation, begun = writer.task.begin(explanation, spans, positive)
        return Request("", feature, conversation, begun["content"], {})
    variant = HINTS.index(max(HINTS, key=len))
    conversation = writer.task.ask(explanation, spans, positive, negative, form=writer.form, variant=variant)
    return Request("", feature, conversation, None, {})


def _tokens(request: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    conversation: list[Mapping[str, str]] = request.conversation
    text = "".join(turn["content"] for turn in conversation)
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text + (getattr(request, "begun", None) or ""))["input_ids"])
