"""What writes text. A local model: its greedy texts are those of `generate`, its draws have the right distribution and
do not depend on the batch, a prompt is read once and the batch stays full. An endpoint, over the wire: a flaky server
gives what a healthy one gives, nothing is paid for twice, no key is seen anywhere."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from flaky_server import FAULTS, FlakyServer, SlowServer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny import byte_level_tokenizer, gpt2_tokenizer, metaspace_tokenizer
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import hf_fac.chat.endpoint
from hf_fac.chat.batch_generation import sample
from hf_fac.chat.endpoint import ChatError, EndpointChat
from hf_fac.chat.local import Completion, LocalChat
from hf_fac.chat.transport import Server

QUICK_FAULTS = tuple(fault for fault in FAULTS if fault not in ("hang", "drip"))
KEY = "sk-thisKeyMustNotBeSeenAnywhere"


def user(*contents: str) -> list[list[dict]]:
    return [[{"role": "user", "content": content}] for content in contents]


# --- a local model ---


def tiny_model(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Two random layers in float64, so that a sum's order cannot change a draw; every fortieth id ends a text."""
    torch.manual_seed(0)
    shared = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 2}
    shared["tie_word_embeddings"] = False
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**shared, **sizes))
        case "gemma2":  # a window shorter than the texts, in every second layer
            model = Gemma2ForCausalLM(Gemma2Config(**shared, **sizes, head_dim=8, sliding_window=12))
        case "gpt2":
            model = GPT2LMHeadModel(GPT2Config(**shared, n_embd=32, n_layer=2, n_head=4, n_positions=192))
    model = model.double().eval()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(3, len(tokenizer), 40)]
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TOKENIZERS = {"llama": byte_level_tokenizer(), "gemma2": metaspace_tokenizer(), "gpt2": gpt2_tokenizer()}
MODELS = {family: tiny_model(family, tokenizer) for family, tokenizer in TOKENIZERS.items()}


def local(family: str = "llama", **options: Any) -> LocalChat:
    return LocalChat(MODELS[family], TOKENIZERS[family], **options)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], begun: str | None) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + (begun or "")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def generated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], most: int) -> Completion:
    """What `generate` writes, one prompt at a time."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=most, pad_token_id=0)[0].tolist()
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(output, **settings)[len(tokenizer.decode(prompt, **settings)) :]
    finish = "stop" if output[-1] in model.generation_config.eos_token_id else "length"
    return Completion(text, finish, None, len(prompt), len(output) - len(prompt))


PROMPTS = user("hello world", "hello " * 30, "a", "What is the difference?", "invoice " * 12, "ten minutes", "no", "a")
BEGUN = [None, "The", None, "def mean(", "yes", "", "the town\n", None]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("family", MODELS)
def test_greedy_is_what_generate_writes(family: str, batch_size: int) -> None:
    chat = local(family, batch_size=batch_size, batch_tokens=64)
    completions = chat.complete(PROMPTS, n=2, temperature=0, max_tokens=30, prefill=BEGUN)
    prompts = [rendered(chat.tokenizer, *pair) for pair in zip(PROMPTS, BEGUN, strict=True)]
    expected = [generated(chat.model, chat.tokenizer, prompt, 30) for prompt in prompts]
    assert completions == [[answer, answer] for answer in expected]
    assert {answer.finish for answer in expected} == {"stop", "length"}


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    batch_size=st.integers(1, 40),
    n=st.integers(1, 4),
    max_tokens=st.integers(1, 20),
    temperature=st.sampled_from([0.0, 0.8, 1.5]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    family=st.sampled_from(sorted(MODELS)),
)
def test_a_completion_does_not_depend_on_what_else_is_asked_for(
    lengths: list[int], batch_size: int, n: int, max_tokens: int, temperature: float, top_p: float, family: str
) -> None:
    words = ["town", "salt", "river", "yes"]
    conversations = user(*(" ".join(words[(k + i) % 4] for i in range(length)) for k, length in enumerate(lengths)))
    options = {"n": n, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": 3}
    together = local(family, batch_size=batch_size).complete(conversations, **options)
    for conversation, completions in zip(conversations, together, strict=True):
        assert local(family, batch_size=2).complete([conversation], **options) == [completions]
    assert local(family).complete(conversations[::-1], **{**options, "n": n + 2})[0][:n] == together[-1]


def test_answers_differ_by_number_and_seed_and_repeat_otherwise() -> None:
    chat = local()
    [first, twin, other] = chat.complete(user("hello", "hello", "world"), n=8, max_tokens=12)
    assert len({answer.text for answer in first}) == 8
    assert first == twin != other
    assert chat.complete(user("hello"), n=8, max_tokens=12) == [first]
    assert not {answer.text for answer in chat.complete(user("hello"), n=8, max_tokens=12, seed=1)[0]} & {
        answer.text for answer in first
    }


def reference_distribution(logits: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    return warped.softmax(-1).numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.8), (1.0, 1.0), (1.4, 0.95)])
def test_tokens_are_drawn_with_the_asked_temperature_and_top_p(temperature: float, top_p: float) -> None:
    chat, drawn = local(batch_size=300), 4000
    tokenizer, prompt = chat.tokenizer, rendered(chat.tokenizer, *user("hello world"), None)
    answers = chat.complete(user("hello world"), n=drawn, temperature=temperature, top_p=top_p, max_tokens=1)[0]
    with torch.no_grad():
        logits = chat.model(torch.tensor([prompt])).logits[:, -1]
    # Several ids read the same (special tokens, parts of characters).
    expected: dict[str, float] = {}
    for token, probability in enumerate(reference_distribution(logits, temperature, top_p)[0]):
        text = tokenizer.decode([*prompt[-3:], token], skip_special_tokens=True)
        text = text.removeprefix(tokenizer.decode(prompt[-3:], skip_special_tokens=True))
        expected[text] = expected.get(text, 0) + drawn * float(probability)
    observed = Counter(answer.text for answer in answers)
    assert not [text for text in observed if not expected[text]]
    rare = [text for text, number in expected.items() if number < 5]
    common = [text for text in expected if text not in rare]
    rest = sum(expected[text] for text in rare)
    found, wanted = [observed[text] for text in common], [expected[text] for text in common]
    if rest > 1:
        found, wanted = [*found, drawn - sum(found)], [*wanted, rest]
    assert len(found) > 5
    assert chisquare(found, np.array(wanted) * drawn / sum(wanted) * sum(found) / drawn).pvalue > 0.001


@pytest.mark.parametrize("vocabulary", [3, 100, 3000])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
def test_the_share_of_uniform_numbers_that_give_a_token_is_its_probability(vocabulary: int, top_p: float) -> None:
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = 6_000
    grid = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    tokens = torch.cat([sample(logits.expand(len(part), -1), top_p, part) for part in grid.split(500)])
    share = np.bincount(tokens.numpy(), minlength=vocabulary) / size
    assert np.abs(share - reference_distribution(logits, 1.0, top_p)[0]).max() <= 1 / size


def test_logits_that_are_no_numbers_fail_and_leave_other_rows_alone() -> None:
    logits = torch.zeros(4, 300)
    logits[0, 7] = logits[3, 7] = 50.0
    logits[1, 5], logits[2, 5] = float("nan"), float("inf")
    for top_p in (0.5, 1.0):
        assert sample(logits, top_p, torch.full((4,), 0.5, dtype=torch.float64)).tolist() == [7, -1, -1, 7]
    model = tiny_model("llama", TOKENIZERS["llama"])
    model.lm_head.weight.data[5] = float("nan")
    for temperature in (0, 1):
        [[answer]] = LocalChat(model, TOKENIZERS["llama"]).complete(user("hello"), temperature=temperature)
        assert answer.finish == "failed"
        assert "NaN" in answer.error
        assert answer.prompt_tokens > 0


def test_a_text_ends_before_a_stop_string() -> None:
    chat = local()
    texts = [answers[0].text for answers in chat.complete(PROMPTS, max_tokens=30)]
    whole = max(texts, key=len)
    place = texts.index(whole)
    clean = [i for i in range(3, len(whole) - 2) if "�" not in whole[i : i + 2]]
    string = whole[clean[len(clean) // 2] :][:2]
    [[stopped]] = chat.complete([PROMPTS[place]], max_tokens=30, stop=["never written", string])
    assert stopped.text == whole[: whole.index(string)]
    assert stopped.finish == "stop"
    [[answer]] = chat.complete([PROMPTS[place]], max_tokens=30)
    assert stopped.completion_tokens <= answer.completion_tokens
    # A special token is no text, but ends it all the same.
    likely = 1
    handle = chat.model.lm_head.register_forward_hook(
        lambda _m, _i, logits: logits.index_fill(-1, torch.tensor(likely), 99)
    )
    try:
        first, second = (
            chat.complete(user("hello"), max_tokens=30, stop=stop)[0]
            for stop in ([], [chat.tokenizer.added_tokens_decoder[likely].content])
        )
    finally:
        handle.remove()
    assert (first[0].finish, first[0].completion_tokens) == ("length", 30)
    assert (second[0].finish, second[0].completion_tokens) == ("stop", 1)


def test_the_context_bounds_prompt_and_text() -> None:
    chat = local("gpt2")  # 192 positions
    full, beyond = chat.complete(user("hello " * 45, "hello " * 100), n=20, max_tokens=150)
    for answer in beyond:
        assert (answer.finish, answer.text) == ("failed", "")
        assert "192" in answer.error
        assert str(answer.prompt_tokens) in answer.error
    assert {answer.finish for answer in full} == {"stop", "length"}
    for answer in full:
        length = answer.prompt_tokens + answer.completion_tokens
        assert length == 192 if answer.finish == "length" else length <= 192


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_base_model_goes_on_with_the_plain_text(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        messages = [{"role": "system", "content": "The river"}, {"role": "user", "content": " rises in"}]
        [[answer]] = local(family).complete([messages], temperature=0, max_tokens=20, prefill=[" the hills"])
        expected = generated(MODELS[family], tokenizer, tokenizer("The river rises in the hills")["input_ids"], 20)
        [[empty]] = local("gpt2").complete(user("")) if family == "gpt2" else [[None]]
    finally:
        tokenizer.chat_template = template
    assert answer == expected
    if empty:
        assert (empty.finish, empty.error) == ("failed", "The prompt is empty.")


def test_texts_keep_the_space_they_begin_with() -> None:
    # A Metaspace tokenizer drops the space of the very first token that it decodes.
    chat = local("gemma2")
    answers = chat.complete(user("the river"), n=60, max_tokens=3, temperature=1.5, prefill=["It is"])[0]
    assert any(answer.text.startswith(" ") for answer in answers)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """The shape of the ids of every forward pass."""
    shapes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


def test_a_prompt_is_read_once_and_so_is_what_all_prompts_begin_with() -> None:
    chat = local(batch_size=4)
    system = {"role": "system", "content": "You are a helpful assistant. " * 10}
    conversations = [[system, *conversation] for conversation in user("yes", "no", "hello world")]
    prompts = [rendered(chat.tokenizer, conversation, None) for conversation in conversations]
    shared = next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    with watched(chat.model) as shapes:
        chat.complete(conversations, n=9, max_tokens=5)
    read = sum(rows * columns for rows, columns in shapes if columns > 1)
    assert shared < read <= shared + sum(len(prompt) - shared for prompt in prompts) + 10  # and a little padding


def test_the_batch_stays_full() -> None:
    chat = local(batch_size=8)
    conversations = user(*(f"hello {k}" for k in range(20)))
    with watched(chat.model) as shapes:
        answers = chat.complete(conversations, n=4, max_tokens=120)
    written = [answer.completion_tokens for answers_of_one in answers for answer in answers_of_one]
    rows = [rows for rows, columns in shapes if columns == 1]
    assert max(rows) == 8
    assert sum(written) / sum(rows) > 0.95
    one_batch_after_the_other = sum(8 * max(written[i : i + 8]) for i in range(0, 80, 8))
    assert sum(rows) < 0.6 * one_batch_after_the_other


def test_the_model_is_called_plainly_and_left_as_it_was() -> None:
    chat = local()
    model = chat.model
    before = (model.config.to_dict(), model.generation_config.to_dict(), chat.tokenizer.padding_side)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    plain = chat.complete(PROMPTS, temperature=0, max_tokens=8)
    handle = model.model.layers[0].register_forward_hook(lambda _m, _i, output: output + 1)
    model.train()
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    try:
        pushed = chat.complete(PROMPTS, temperature=0, max_tokens=8)
        assert [part.training for part in model.modules()] == modes
        handle.remove()
        handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.complete(PROMPTS)
        assert [part.training for part in model.modules()] == modes
    finally:
        handle.remove()
        model.eval()
    assert pushed != plain
    assert chat.complete(PROMPTS, temperature=0, max_tokens=8) == plain
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert before == (model.config.to_dict(), model.generation_config.to_dict(), chat.tokenizer.padding_side)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_recurrent_model_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="EndpointChat"):
        LocalChat(model, TOKENIZERS["llama"])


def test_a_model_and_its_tokenizer_are_loaded_by_name(tmp_path: Path) -> None:
    MODELS["llama"].save_pretrained(tmp_path)
    TOKENIZERS["llama"].save_pretrained(tmp_path)
    chat = LocalChat.from_pretrained(str(tmp_path), device="cpu", batch_size=2)
    assert chat.complete(PROMPTS, max_tokens=5) == local().complete(PROMPTS, max_tokens=5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 0}, "n is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prefill": ["one"]}, "1 entries for 2 conversations"),
        ({"stop": "\n"}, "must be a list of strings"),
        ({"stop": [""]}, "none of them empty"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], said: str) -> None:
    for chat in (local(), EndpointChat("m", base_url="http://127.0.0.1:9/v1")):
        with pytest.raises(ValueError, match=said):
            chat.complete(user("one", "two"), **options)


@pytest.mark.parametrize("bad", [[], "hello", [{"role": "user"}], ["hello"], [{"role": "user", "content": None}]])
def test_a_conversation_that_is_none_is_named(bad: Any) -> None:
    for chat in (local(), EndpointChat("m", base_url="http://127.0.0.1:9/v1")):
        with pytest.raises(ValueError, match="Conversation 1 "):
            chat.complete([*user("fine"), bad])


def test_what_the_template_refuses_is_named() -> None:
    two_users = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match=r"Conversation 1 cannot be rendered .* must alternate"):
        local("gemma2").complete([*user("fine"), two_users])


def test_importing_the_protocol_and_the_endpoint_costs_no_torch() -> None:
    code = "import sys, hf_fac.chat, hf_fac.chat.endpoint; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


# --- an endpoint ---


@pytest.fixture(autouse=True)
def close_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hf_fac.chat.endpoint, "FIRST_WAIT_S", 0.01)


def endpoint(server: FlakyServer, **options: Any) -> EndpointChat:
    return EndpointChat("m", base_url=server.url, **{"timeout": 30.0, **options})


CONVERSATIONS = user(*(f"question {k}" for k in range(60)))


def test_a_flaky_server_gives_what_a_healthy_one_gives() -> None:
    with FlakyServer() as server:
        healthy = endpoint(server).complete(CONVERSATIONS, n=4, max_tokens=9)
    assert {answer.finish for answers in healthy for answer in answers} == {"stop", "length"}
    with FlakyServer(rate=0.3, hang=4) as server:
        chat = endpoint(server, timeout=2, attempts=12)
        assert chat.complete(CONVERSATIONS, n=4, max_tokens=9) == healthy
    assert set(server.failed) == set(FAULTS)
    assert set(server.paid.values()) == {1}
    assert len(server.paid) == 240
    assert chat.spent.requests == server.came.total() == 240 + server.failed.total()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_only_fails_is_a_failure_with_a_reason(fault: str) -> None:
    with FlakyServer(rate=1, faults=(fault,), hang=1) as server:
        chat = endpoint(server, attempts=2, timeout=0.2)
        [[answer]] = chat.complete(user("hello"))
    assert answer.finish == "failed"
    assert answer.text == ""
    assert "attempts: 2" in answer.error
    assert server.came.total() == 2
    assert chat.spent.failed == 1


def test_a_server_that_is_gone_is_not_asked_for_ever() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        chat = EndpointChat("m", base_url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1", attempts=2)
        with pytest.raises(ChatError, match="requests in a row") as raised:
            chat.complete(CONVERSATIONS)
    assert {answer.finish for [answer] in raised.value.completions} == {"failed"}
    assert chat.spent.requests < 50


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_server_that_never_answers_ends_the_run_after_a_few_timeouts(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FlakyServer(rate=1, faults=(fault,), hang=1) as server:
        chat = endpoint(server, timeout=0.2, max_concurrency=4)
        start = time.monotonic()
        with pytest.raises(ChatError, match=r"did not answer within 0\.2 s, 3 times in a row") as raised:
            chat.complete(CONVERSATIONS)
        assert time.monotonic() - start < 5
    assert len(raised.value.completions) == 60
    assert chat.spent.requests <= 3 * 4
    first = caplog.records[0]
    assert first.levelname == "WARNING", "the first failure is told at once"
    assert first.message.startswith("The server did not answer within 0.2 s; again in")


@pytest.mark.parametrize(
    ("status", "todo"), [(401, "token="), (402, "credit"), (403, "may not"), (404, "/v1"), (405, "base_url")]
)
def test_what_concerns_every_request_ends_the_run_and_keeps_what_was_paid(
    status: int, todo: str, tmp_path: Path
) -> None:
    conversations = user("one", "two", "three", "bad", "four", "five")
    with FlakyServer(statuses={"bad": status}) as server:
        chat = endpoint(server, max_concurrency=1, cache_dir=tmp_path)
        with pytest.raises(ChatError, match=f"{status} .*{todo}") as raised:
            chat.complete(conversations)
        assert chat.spent.requests == 4  # and not one more, nor the refused one again
        finishes = [answer.finish for [answer] in raised.value.completions]
        assert finishes == ["stop"] * 3 + ["failed"] * 3
        assert [answer.text for [answer] in chat.complete(conversations[:3])] == [
            answer.text for [answer] in raised.value.completions[:3]
        ]
        assert chat.spent.requests == 4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_fails_alone_and_is_not_repeated(status: int) -> None:
    with FlakyServer(statuses={"bad": status}) as server:
        chat = endpoint(server)
        [[good], [bad], [fine]] = chat.complete(user("good", "bad", "fine"))
    assert (good.finish, bad.finish, fine.finish) == ("stop", "failed", "stop")
    assert str(status) in bad.error
    assert f"the server says {status}" in bad.error
    assert chat.spent.requests == 3


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"message": {"role": "assistant", "content": ""}}, "no text"),
        ({"message": {"role": "assistant", "content": None}, "finish_reason": "length"}, "raise max_tokens"),
        ({"message": {"role": "assistant", "content": None, "refusal": "I cannot"}}, "refused: I cannot"),
        ({"message": {"role": "assistant", "content": "half"}, "finish_reason": "content_filter"}, "content filter"),
    ],
)
def test_an_answer_without_text_fails_and_is_not_paid_for_again(choice: dict, reason: str, tmp_path: Path) -> None:
    with FlakyServer(messages={"odd": choice}) as server:
        for _ in range(2):
            [[answer]] = endpoint(server, cache_dir=tmp_path).complete(user("odd"))
            assert (answer.text, answer.finish) == ("", "failed")
            assert reason in answer.error
            assert answer.completion_tokens > 0
        assert server.came.total() == 1


def test_a_pause_that_is_asked_for_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with FlakyServer(rate=1, faults=("429 with Retry-After",)) as server:
        server.retry_after = "1"
        start = time.monotonic()
        [[answer]] = endpoint(server, attempts=2).complete(user("hello"))
        assert 1 <= time.monotonic() - start < 100
        assert "429" in answer.error
        # Other requests wait as well: the limit is the account's.
        server.came.clear()
        start = time.monotonic()
        endpoint(server, attempts=2, max_concurrency=2).complete(user("one", "two"))
        assert time.monotonic() - start >= 1
        server.retry_after = "4000"
        start = time.monotonic()
        [[answer]] = endpoint(server).complete(user("hello"))
        assert time.monotonic() - start < 100
        assert "attempts: 1" in answer.error
        assert "asks to wait 4,000 s, longer than the 300 s of max_wait" in answer.error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x" * 2_000, "2,000 characters, more than max_tokens=5 can hold"),
        ("x" * 2_000_000, "larger than 1,053,696 bytes"),
    ],
)
def test_an_answer_is_no_longer_than_max_tokens_allows(content: str, said: str) -> None:
    with FlakyServer(messages={"long": {"message": {"role": "assistant", "content": content}}}) as server:
        [[answer]] = endpoint(server).complete(user("long"), max_tokens=5)
    assert (answer.finish, answer.text) == ("failed", "")
    assert said in answer.error


@pytest.mark.parametrize("tokens", [-5, 10**12, 1e300, "many", True, None, [7]])
def test_figures_of_usage_that_cannot_be_are_estimated(tokens: Any) -> None:
    content = {"message": {"role": "assistant", "content": "x" * 40}}
    with FlakyServer(
        usage={"prompt_tokens": tokens, "completion_tokens": tokens}, messages={"y" * 80: content}
    ) as server:
        chat = endpoint(server)
        [[answer]] = chat.complete(user("y" * 80))
    assert (answer.finish, answer.prompt_tokens, answer.completion_tokens) == ("stop", 0, 0)
    assert (chat.spent.prompt_tokens, chat.spent.completion_tokens) == (20, 10)


def test_a_redirect_is_refused() -> None:
    with FlakyServer() as other, FlakyServer(redirect=f"{other.url}/chat/completions") as server:
        with pytest.raises(ChatError, match=f"307 .to {other.url}/.*Redirects are not followed"):
            endpoint(server, token=KEY).complete(user("hello"))
        assert not other.keys


def test_a_server_of_ones_own_is_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with FlakyServer() as server:
        assert endpoint(server).complete(user("hello"))[0][0].finish == "stop"
    with pytest.raises(ChatError, match="HF_HUB_OFFLINE is set"):
        EndpointChat("org/m", provider="together", token="hf_x").complete(user("hello"))


@pytest.mark.parametrize("patient", [True, False])
def test_ctrl_c_waits_for_what_is_under_way_and_a_second_one_does_not(patient: bool, tmp_path: Path) -> None:
    script = (
        "import sys; from hf_fac.chat.endpoint import EndpointChat;"
        "chat = EndpointChat('m', base_url=sys.argv[1], cache_dir=sys.argv[2], max_concurrency=3);"
        "chat.complete([[{'role': 'user', 'content': f'question {k}'}] for k in range(60)], max_tokens=9)"
    )
    with SlowServer() as server:
        child = subprocess.Popen(
            [sys.executable, "-c", script, server.url, str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for _ in range(3):
            assert server.waiting.acquire(timeout=60)
        child.send_signal(signal.SIGINT)
        said = child.stderr.readline()
        assert said.startswith("Interrupted: waiting for 3 requests under way, at most 120 s")
        if patient:
            server.open.set()
        else:
            child.send_signal(signal.SIGINT)
        assert child.stderr.read().rstrip().endswith("KeyboardInterrupt")
        assert child.wait(timeout=20) != 0
        server.open.set()
        written = tmp_path / "answers.jsonl"
        assert (written.read_bytes().count(b"\n") if written.exists() else 0) == (3 if patient else 0)


def test_requests_run_at_once_up_to_the_limit() -> None:
    with FlakyServer(latency=0.05) as server:
        endpoint(server, max_concurrency=5).complete(CONVERSATIONS[:30])
    assert server.most_at_once == 5


def test_it_can_be_called_where_an_event_loop_runs() -> None:
    async def notebook(chat: EndpointChat) -> list:
        return chat.complete(CONVERSATIONS[:3])

    with FlakyServer() as server:
        assert [answer.finish for [answer] in asyncio.run(notebook(endpoint(server)))] == ["stop"] * 3


def test_a_cap_stops_spending_and_keeps_what_was_bought(caplog: pytest.LogCaptureFixture) -> None:
    with FlakyServer() as server:
        chat = endpoint(server, max_requests=20)
        finishes = [answer.finish for [answer] in chat.complete(CONVERSATIONS)]
        assert server.came.total() == 20
        assert finishes.count("failed") == 40
        assert "40 of 60 completions failed" in caplog.text
        assert "max_requests is 20" in caplog.text

        chat = endpoint(server, max_tokens_total=50, max_concurrency=2)
        answers = [answer for [answer] in chat.complete(CONVERSATIONS)]
        bought = [answer for answer in answers if answer.finish != "failed"]
        used = sum(answer.prompt_tokens + answer.completion_tokens for answer in bought)
        assert used == chat.spent.prompt_tokens + chat.spent.completion_tokens
        assert 50 <= used <= 50 + 2 * 14
        assert "max_tokens_total is 50" in next(answer.error for answer in answers if answer.error)
    with FlakyServer(usage=False) as server:  # a server that does not count
        chat = endpoint(server, max_tokens_total=50, max_concurrency=1)
        answers = [answer for [answer] in chat.complete(CONVERSATIONS)]
        assert 0 < sum(answer.finish == "stop" for answer in answers) < 30
        assert {answer.completion_tokens for answer in answers} == {0}


def test_what_is_on_disk_is_not_asked_for_again(tmp_path: Path) -> None:
    with FlakyServer() as server:

        def ask(conversations: list = CONVERSATIONS[:5], *, chat: dict | None = None, **options: Any) -> list:
            settings = {"n": 2, **options}
            return endpoint(server, cache_dir=tmp_path, **(chat or {})).complete(conversations, **settings)

        first = ask()
        assert server.came.total() == 10
        assert ask() == first
        assert ask(CONVERSATIONS[4:0:-1]) == first[4:0:-1]
        assert ask(n=1) == [answers[:1] for answers in first]
        assert server.came.total() == 10
        ask(n=3)
        assert server.came.total() == 15
        # Everything that shapes an answer makes it another one.
        for number, other in enumerate(
            [
                {"temperature": 0.7},
                {"top_p": 0.8},
                {"max_tokens": 99},
                {"seed": 40},
                {"stop": ["."]},
                {"prefill": ["The"]},
                {"chat": {"extra_body": {"repetition_penalty": 1.1}}},
            ]
        ):
            ask(CONVERSATIONS[:1], **other)
            assert server.came.total() == 15 + 2 * (number + 1)
        # The same conversation twice in one call is one request.
        came = server.came.total()
        assert len(set(map(tuple, ask(user("new", "new"))))) == 1
        assert server.came.total() == came + 2


def test_a_line_that_was_half_written_is_closed_and_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with FlakyServer() as server:
        first = endpoint(server, cache_dir=tmp_path, max_concurrency=1).complete(CONVERSATIONS[:4])
        whole = file.read_bytes()
        file.write_bytes(whole[:-30])
        assert endpoint(server, cache_dir=tmp_path).complete(CONVERSATIONS[:5])[:4] == first
        assert server.came.total() == 6
        assert endpoint(server, cache_dir=tmp_path).complete(CONVERSATIONS[:4]) == first
        assert server.came.total() == 6
        lines = file.read_bytes().split(b"\n")
        assert lines.pop() == b""
        assert [valid(line) for line in lines] == [True] * 3 + [False] + [True] * 2


def valid(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def test_after_kill_9_nothing_is_paid_for_twice(tmp_path: Path) -> None:
    script = (
        "import sys; import hf_fac.chat.endpoint as e; from hf_fac import EndpointChat; e.FIRST_WAIT_S = 0.01;"
        "options = {'cache_dir': sys.argv[2], 'max_concurrency': 4, 'attempts': 12};"
        "chat = EndpointChat('m', base_url=sys.argv[1], **options);"
        "chat.complete([[{'role': 'user', 'content': f'question {k}'}] for k in range(60)], n=2, max_tokens=9)"
    )
    file = tmp_path / "answers.jsonl"
    with FlakyServer(rate=0.3, faults=QUICK_FAULTS, latency=0.01) as server:
        for round_ in range(1, 4):
            child = subprocess.Popen(
                [sys.executable, "-c", script, server.url, str(tmp_path)], stderr=subprocess.DEVNULL
            )
            while child.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < 25 * round_):
                time.sleep(0.005)
            assert child.poll() is None, "it ended before it was killed"
            child.send_signal(signal.SIGKILL)
            child.wait()
        on_disk = file.read_bytes().count(b"\n")
        chat = endpoint(server, cache_dir=tmp_path, attempts=12, max_concurrency=4)
        answers = chat.complete(CONVERSATIONS, n=2, max_tokens=9)
        assert on_disk - 3 <= chat.spent.from_disk <= on_disk  # a line half written for each kill, at most
    # Only what was under way when it was killed can have been paid for and lost: 4 requests each time.
    assert server.paid.total() <= 120 + 3 * 4
    assert len(server.paid) == 120
    with FlakyServer() as healthy:
        assert endpoint(healthy).complete(CONVERSATIONS, n=2, max_tokens=9) == answers
        assert endpoint(healthy, cache_dir=tmp_path / "other").spent.requests == 0


def test_the_key_is_in_no_file_log_repr_or_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with FlakyServer(
        key=KEY, rate=0.3, faults=QUICK_FAULTS, statuses={"bad": 422, "worse": 403, "busy": 503}
    ) as server:
        chat = endpoint(server, token=KEY, cache_dir=tmp_path, attempts=12)
        chat.complete(CONVERSATIONS[:20])
        assert set(server.keys) == {f"Bearer {KEY}"}
        # This server repeats the key in what it answers.
        said += [str(chat.complete(user("bad")))]
        said += [str(endpoint(server, token=KEY, attempts=2).complete(user("busy")))]
        for conversation, token in (("worse", KEY), ("hello", KEY + "x")):
            with pytest.raises(ChatError) as raised:
                endpoint(server, token=token, attempts=2).complete(user(conversation))
            said += [str(raised.value), repr(raised.value), str(raised.getrepr(style="native"))]
    said += [repr(chat), str(chat), repr(chat.spent), caplog.text]
    said += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert all("***" in text for text in said[:3])
    assert not any(KEY in text for text in said)


def test_a_key_in_an_answer_is_masked(tmp_path: Path) -> None:
    content = {"message": {"role": "assistant", "content": f"You sent {KEY}."}}
    refusal = {"message": {"role": "assistant", "content": None, "refusal": f"Not for {KEY}"}}
    with FlakyServer(messages={"one": content, "two": refusal}) as server:
        [[one], [two]] = endpoint(server, token=KEY, cache_dir=tmp_path).complete(user("one", "two"))
    assert one.text == "You sent ***."
    assert two.error == "The model refused: Not for ***"
    assert KEY not in (tmp_path / "answers.jsonl").read_text()


@pytest.mark.parametrize("token", [f"{KEY}\n", f"  {KEY}\r\n\t"])
def test_what_is_around_a_key_is_not_sent(token: str) -> None:
    with FlakyServer(key=KEY) as server:
        assert endpoint(server, token=token).complete(user("hello"))[0][0].finish == "stop"


@pytest.mark.parametrize("inside", ["\n", " ", "\0", "\x1b", "\x7f", "é", "\u202e", "\ud800"])
def test_a_key_that_cannot_be_one_is_refused_and_not_shown(inside: str) -> None:
    with pytest.raises(ValueError, match="copy it again") as raised:
        EndpointChat("m", base_url="http://127.0.0.1:9/v1", token=KEY + inside + KEY)
    assert KEY not in "".join(traceback.format_exception(raised.value))


SAVED = "hf_savedTokenOfTheHub00000000000000000"


class Recorder(ThreadingHTTPServer):
    """A server and a proxy for every other: keeps what came, and answers with refusals."""

    def __init__(self) -> None:
        self.came: list[tuple[str, str]] = []
        came = self.came

        class Handler(BaseHTTPRequestHandler):
            def refuse(self) -> None:
                came.append((self.requestline, str(self.headers)))
                self.send_error(400)

            do_GET = do_HEAD = do_POST = do_CONNECT = refuse

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self) -> Recorder:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


ASK_EVERYWHERE = """
import sys
from hf_fac.chat.endpoint import ChatError, EndpointChat
port, saved = sys.argv[1:]
here = f"127.0.0.1:{port}"
hosts = [here, f"localhost:{port}", "huggingface.co", "x.huggingface.cloud", "huggingface.co.example.com",
         "nothuggingface.co", "huggingface.co.", "me.hf.space", "huggingface.co:80", f"huggingface.co@{here}",
         f"{here}/huggingface.co", f"{here}#.huggingface.co", f"{here}\\.huggingface.co"]
addresses = [f"http://{host}/v1" for host in hosts]
wheres = [{"base_url": one} for one in addresses] + [{"model": one} for one in addresses[:3]]
wheres += [{"provider": one} for one in (None, "together", "hf-inference", "openai", f"http://{here}", "no such")]
for where in wheres:
    for token in (None, "", " ", "\\n", "\\t \\n"):
        try:
            chat = EndpointChat(**{"model": "org/m", **where}, token=token, attempts=1, timeout=20)
            chat.complete([[{"role": "user", "content": "hello"}]])
        except (ValueError, ChatError) as error:
            assert saved not in str(error)
"""


@pytest.mark.parametrize("place", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file"])
def test_the_saved_hub_token_goes_to_no_other_host(place: str, tmp_path: Path) -> None:
    with Recorder() as recorder:
        here = f"http://127.0.0.1:{recorder.server_port}"
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": here, "HF_INFERENCE_ENDPOINT": here}
        # What is for other hosts comes here too, readable where it is not encrypted.
        environment |= {"HTTP_PROXY": here, "HTTPS_PROXY": here, "NO_PROXY": "127.0.0.1,localhost"}
        environment |= {"HF_HUB_OFFLINE": "0"}
        environment |= {} if place == "file" else {place: SAVED}
        if place == "file":
            (tmp_path / "token").write_text(SAVED + "\n")
        command = [sys.executable, "-c", ASK_EVERYWHERE, str(recorder.server_port), SAVED]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    lines = [line for line, _ in recorder.came]
    assert lines.count("POST /v1/chat/completions HTTP/1.1") >= 10
    assert lines.count("CONNECT router.huggingface.co:443 HTTP/1.1") == 6 * 5
    assert {line.split()[1] for line in lines if line.startswith("CONNECT")} == {"router.huggingface.co:443"}
    assert any("example.com" in line for line in lines)
    assert not [line for line, headers in recorder.came if "authorization" in headers.lower() or SAVED in headers]


@pytest.mark.parametrize(
    ("address", "gets_it"),
    [
        ("https://router.huggingface.co/v1", True),
        ("https://HUGGINGFACE.co/v1", True),
        ("https://x.us-east-1.endpoints.huggingface.cloud/v1", True),
        ("http://router.huggingface.co/v1", False),
        ("https://huggingface.co.example.com/v1", False),
        ("https://nothuggingface.co/v1", False),
        ("https://me.hf.space/v1", False),
        ("https://127.0.0.1/huggingface.co", False),
    ],
)
def test_the_saved_hub_token_is_for_the_hubs_own_hosts(
    address: str, gets_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SAVED)
    for token in (None, "", " \n"):
        headers = Server("a chat", address, token, timeout=1, max_wait=1).client().headers
        assert headers.get("Authorization") == (f"Bearer {SAVED}" if gets_it else None)
    given = Server("a chat", address, KEY, timeout=1, max_wait=1).client().headers
    assert given["Authorization"] == f"Bearer {KEY}"


def test_settings_that_do_not_fit_are_refused_without_repeating_a_key() -> None:
    for options, said in (
        ({}, "Give a model"),
        ({"base_url": "http://h/v1", "provider": "together"}, "not both"),
        ({"base_url": "h:8000"}, "begin with http"),
        ({"base_url": " "}, "begin with http"),
        ({"base_url": f"http://user:{KEY}@h/v1"}, "A key is the token"),
        ({"base_url": f"http://h/v1?key={KEY}"}, "A key is the token"),
        ({"model": "m", "max_concurrency": 0}, "at least 1"),
        ({"model": "m", "timeout": 0}, "above 0 seconds"),
        ({"model": "http://h/v1"}, "give it as base_url"),
        ({"base_url": "http://h\x1b/v1"}, "no address"),
        ({"model": "m", "provider": "together", "token": KEY}, "provider's address as base_url"),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            EndpointChat(**options)
        assert KEY not in str(raised.value)


def test_a_turn_is_begun_and_what_was_begun_is_not_in_the_text() -> None:
    asked: list[dict] = []
    with FlakyServer(
        messages={"1. A": {"message": {"role": "assistant", "content": "1. A stone. END of it"}}}
    ) as server:
        [[repeated]] = endpoint(server).complete(user("list"), prefill=["1. A"], stop=["END"])
        [[kept]] = endpoint(server, continue_final_message=True).complete(user("list"), prefill=["1. A"])
        asked = [json.loads(body) for body in server.came]
    assert repeated.text == " stone. "
    assert kept.text == "1. A stone. END of it"
    assert all(body["messages"][-1] == {"role": "assistant", "content": "1. A"} for body in asked)
    assert [body.get("continue_final_message") for body in asked] == [None, True]
    assert [body.get("stop") for body in asked] == [["END"], None]


def test_text_that_cannot_be_sent_fails_alone() -> None:
    with FlakyServer() as server:
        [[good], [bad]] = endpoint(server).complete(user("good", "half a pair \ud800"))
    assert good.finish == "stop"
    assert "UTF-8" in bad.error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_transformers_serve_answers_over_the_wire(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["llama"]
    model = tiny_model("llama", tokenizer).float()
    model.generation_config.update(do_sample=True, eos_token_id=2, pad_token_id=0, top_k=0)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    port = free_port()
    command = ["-c", "from transformers.cli.transformers import main; main()", "serve", str(folder), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, *command, "--port", str(port), "--host", "127.0.0.1"],
            stdout=log,
            stderr=log,
            env=environment,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        chat = EndpointChat(
            str(folder), base_url=f"http://127.0.0.1:{port}/v1", cache_dir=tmp_path / "answers", timeout=30
        )
        answers = chat.complete(user("hello", "What is salt?"), n=4, max_tokens=12, temperature=1.0)
        for of_one in answers:
            texts = {answer.text for answer in of_one if answer.finish != "failed"}
            assert len(texts) >= 3
        assert all(answer.error is None or "no text" in answer.error for of_one in answers for answer in of_one)
        assert all(0 < answer.completion_tokens <= 12 for of_one in answers for answer in of_one)
        assert chat.complete(user("hello", "What is salt?"), n=4, max_tokens=12, temperature=1.0) == answers
        assert chat.spent.requests == 8
        greedy = [answers[0] for answers in chat.complete(user("hello"), n=2, max_tokens=12, temperature=0)]
        [[expected]] = LocalChat(model, tokenizer).complete(user("hello"), max_tokens=12, temperature=0)
        assert greedy[0].text == expected.text
        with pytest.raises(ChatError, match="/v1"):
            EndpointChat(str(folder), base_url=f"http://127.0.0.1:{port}/v2").complete(user("hello"))
    finally:
        server.kill()
        server.wait()


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
