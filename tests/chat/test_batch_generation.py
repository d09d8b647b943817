"""Generation in one batch: a token's share is its probability, a prompt is read once, and the batch stays full."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chats import TOKENIZERS, generating_model, local, user, watched
from transformers import TopPLogitsWarper

from hf_fac.chat.batch_generation import sample
from hf_fac.chat.local import LocalChat


@pytest.mark.parametrize("vocabulary", [3, 3000])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
def test_the_share_of_uniform_numbers_that_give_a_token_is_its_probability(vocabulary: int, top_p: float) -> None:
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = 6_000
    grid = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    tokens = torch.cat([sample(logits.expand(len(part), -1), top_p, part) for part in grid.split(500)])
    expected = (TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits).softmax(-1)[0].numpy()
    share = np.bincount(tokens.numpy(), minlength=vocabulary) / size
    assert np.abs(share - expected).max() <= 1 / size


def test_logits_that_are_no_numbers_fail_in_their_own_row() -> None:
    logits = torch.zeros(4, 300)
    logits[0, 7] = logits[3, 7] = 50.0
    logits[1, 5], logits[2, 5] = float("nan"), float("inf")
    for top_p in (0.5, 1.0):
        assert sample(logits, top_p, torch.full((4,), 0.5, dtype=torch.float64)).tolist() == [7, -1, -1, 7]
    model = generating_model("llama")
    model.lm_head.weight.data[5] = float("nan")
    for temperature in (0, 1):
        [[answer]] = LocalChat(model, TOKENIZERS["llama"]).complete(user("hello"), temperature=temperature)
        assert answer.finish == "failed"
        assert "NaN" in answer.error
        assert answer.prompt_tokens > 0


def test_a_prompt_is_read_once_and_so_is_what_all_prompts_begin_with() -> None:
    chat = local(batch_size=4)
    system = {"role": "system", "content": "You are a helpful assistant. " * 10}
    conversations = [[system, *conversation] for conversation in user("yes", "no", "hello world")]
    prompts = [
        chat.tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in conversations
    ]
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
    batches_one_by_one = sum(8 * max(written[i : i + 8]) for i in range(0, 80, 8))
    assert sum(rows) < 0.6 * batches_one_by_one
