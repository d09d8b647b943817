"""A local model: its greedy texts are those of `generate`, its draws have the right distribution and do not depend on
the batch, and the model is left as it was."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chats import CONTEXT, MODELS, TOKENIZERS, local, user
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from hf_fac.chat.base import Completion
from hf_fac.chat.endpoint import EndpointChat
from hf_fac.chat.local import LocalChat


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], prefill: str | None) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + (prefill or "")
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
PREFILLS = [None, "The", None, "def mean(", "yes", "", "the town\n", None]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("family", MODELS)
def test_greedy_is_what_generate_writes(family: str, batch_size: int) -> None:
    chat = local(family, batch_size=batch_size, batch_tokens=64)
    completions = chat.complete(PROMPTS, n=2, temperature=0, max_tokens=30, prefill=PREFILLS)
    prompts = [rendered(chat.tokenizer, *pair) for pair in zip(PROMPTS, PREFILLS, strict=True)]
    expected = [generated(chat.model, chat.tokenizer, prompt, 30) for prompt in prompts]
    assert completions == [[answer, answer] for answer in expected]
    assert {answer.finish for answer in expected} == {"stop", "length"}


@settings(max_examples=8, deadline=None)
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


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.8), (1.4, 1.0)])
def test_tokens_are_drawn_with_the_asked_temperature_and_top_p(temperature: float, top_p: float) -> None:
    chat, drawn = local(batch_size=300), 4000
    tokenizer, prompt = chat.tokenizer, rendered(chat.tokenizer, *user("hello world"), None)
    answers = chat.complete(user("hello world"), n=drawn, temperature=temperature, top_p=top_p, max_tokens=1)[0]
    with torch.no_grad():
        logits = chat.model(torch.tensor([prompt])).logits[:, -1]
    # Several ids read the same (special tokens, parts of characters).
    expected: dict[str, float] = {}
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    for token, probability in enumerate(warped.softmax(-1)[0]):
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
    chat = local("gpt2")
    full, beyond = chat.complete(user("hello " * 60, "hello " * 130), n=20, max_tokens=200)
    for answer in beyond:
        assert (answer.finish, answer.text) == ("failed", "")
        assert str(CONTEXT) in answer.error
        assert str(answer.prompt_tokens) in answer.error
    assert {answer.finish for answer in full} == {"stop", "length"}
    for answer in full:
        length = answer.prompt_tokens + answer.completion_tokens
        assert length == CONTEXT if answer.finish == "length" else length <= CONTEXT


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_base_model_continues_the_plain_text(family: str) -> None:
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
        ({"n": 1.5}, "n is 1.5; it must be a whole number"),
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
def test_a_conversation_that_cannot_be_read_is_named(bad: Any) -> None:
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
