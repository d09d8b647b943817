"""FAC Synthesis on tiny models: what is kept activates its feature, what is dropped says why."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from flaky_server import FlakyServer
from hand_made import relevant
from synthesis_parts import as_dicts, make_featurizer, make_parts, rows, synthesizer
from tiny import byte_level_tokenizer
from tiny_models import D_SAE, tiny_model, tiny_sae
from writing_chat import WritingChat, sentence

from hf_fac.chat.base import Completion
from hf_fac.chat.endpoint import ChatError, EndpointChat
from hf_fac.chat.local import LocalChat
from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.features.featurizer import SAEFeaturizer
from hf_fac.inputs.token_context import mark_span
from hf_fac.storage.cache import Cache, Processes
from hf_fac.synthesis import rounds, verification
from hf_fac.synthesis.filters import NearDuplicates, copied_run, words
from hf_fac.synthesis.synthesizer import FACSynthesizer
from hf_fac.tasks.prompts import HINTS
from hf_fac.tasks.task import get_task

TASKS = ["toxicity", "helpfulness", "instruction_following", "sycophancy"]


def asked_of(chat):
    """What each conversation asked for in its last message."""
    return [json.loads(key)[0][-1]["content"] for key, _ in chat.asked]


def assert_same(one, other):
    """Equal but for activations, which depend in their last digits on what else was measured at the time."""
    assert_same_rows(as_dicts(one), as_dicts(other))


def assert_same_rows(one, other):
    for found, expected in zip(one, other, strict=True):
        about = [{**row, "fac_activation": pytest.approx(row["fac_activation"], rel=1e-4)} for row in expected]
        assert found == about


@pytest.mark.parametrize("form", ["list", "text", "json"])
@pytest.mark.parametrize("task", TASKS)
def test_every_sample_activates_its_feature_on_the_tokens_that_the_task_pools(
    featurizer, dictionary, report, task, form
):
    task = get_task(task)
    result = synthesizer(featurizer, dictionary, report, task=task, prompt_format=form).synthesize(report.missing)
    assert len(result.dataset) > 2
    assert set(result.dataset["fac_feature"]) <= set(report.missing.tolist())
    assert list(result.dataset.features)[: len(task.features())] == list(task.features())
    reader = make_featurizer(pool_over=task.pool_over)
    samples = [task.featurizer_row({name: row[name] for name in task.features()}) for row in result.dataset]
    acts = reader(samples).toarray()
    feature, activation = np.array(result.dataset["fac_feature"]), np.array(result.dataset["fac_activation"])
    found = acts[np.arange(len(samples)), feature]
    assert (found > report.threshold).all()
    np.testing.assert_allclose(found, activation, rtol=1e-4, atol=1e-5)
    assert max(Counter(feature.tolist()).values()) <= 2
    if task.target_field == "chosen":
        other = make_featurizer(pool_over=task.pool_over, side="rejected")(samples).toarray()
        assert (other[np.arange(len(samples)), feature] <= report.threshold).all()


@pytest.mark.parametrize("form", ["list", "text", "json"])
def test_a_task_of_prompts_alone_asks_for_no_answer(featurizer, dictionary, report, form):
    instructions = get_task("instruction_following")
    task = replace(instructions, type="prompt", parts={"prompt": instructions.parts["prompt"]})
    chat = WritingChat()
    result = synthesizer(featurizer, dictionary, report, task=task, chat=chat, prompt_format=form).synthesize(report)
    assert len(result.dataset) > 2
    assert [message["role"] for row in result.dataset["prompt"] for message in row] == ["user"] * len(result.dataset)
    found = make_featurizer(pool_over="user")(result.dataset.select_columns(["prompt"])).toarray()
    assert (found[np.arange(len(found)), result.dataset["fac_feature"]] > report.threshold).all()
    texts = {row["prompt"][0]["content"] for row in result.dataset}
    assert not texts & set(asked_of(chat))


def test_the_report_counts_what_the_samples_add(featurizer, dictionary, report):
    result = synthesizer(featurizer, dictionary, report).synthesize(report)
    told = result.report
    data = FeatureCoverage.from_activations(featurizer(rows(3, seed=1)), measurement=featurizer.measurement)
    new = FeatureCoverage.from_activations(
        featurizer(result.dataset.select_columns(["prompt", "completion"])), measurement=featurizer.measurement
    )
    anchor = FeatureCoverage.from_activations(featurizer(rows(150)), measurement=featurizer.measurement)
    after = (data | new).compare(anchor, threshold=report.threshold)
    assert told.fac_before == report.fac
    assert told.fac_after == pytest.approx(after.fac)
    assert told.fac_after > told.fac_before
    np.testing.assert_array_equal(told.covered, after.covered)
    assert len(told.curve) == len(result.dataset) + 1
    assert (np.diff(told.curve) >= 0).all()
    assert told.kl_after < told.kl_before
    assert set(told.activated) == set(result.dataset["fac_feature"])
    assert sorted([*told.activated, *told.exhausted]) == sorted(report.missing)
    json.dumps(told.to_dict(), allow_nan=False)
    assert "FAC" in str(told)


def test_first_samples_of_all_features_come_before_second_ones(featurizer, dictionary, report):
    features = synthesizer(featurizer, dictionary, report).synthesize(report).dataset["fac_feature"]
    first = len(set(features))
    assert len(set(features[:first])) == first < len(features)


def test_no_sample_is_a_copy_a_near_duplicate_or_a_scrap(featurizer, dictionary, report):
    avoided = [{"text": sentence(random.Random(i))} for i in range(50)]
    chat = WritingChat(wrong=0.3)
    result = synthesizer(
        featurizer, dictionary, report, chat=chat, avoid={"the evaluation set": avoided}, max_copied_words=2
    ).synthesize(report)
    texts = [get_task("instruction_following").target_text(row) for row in result.dataset]
    known = NearDuplicates({"the evaluation set": [row["text"] for row in avoided]})
    for text, feature in zip(texts, result.dataset["fac_feature"], strict=True):
        assert known.source_of(text) is None
        known.add(text, "samples")
        assert copied_run(text, ["".join(s[:3]) for s in dictionary.spans(feature)]) <= 2
        assert len(words(text)) > 2
        assert "pattern" not in text
    reasons = {reason.split(":")[0] for reason in result.dropped["reason"]}
    assert {"truncated", "talk about the request", "the chat failed", "copy of what the prompt showed"} <= reasons
    assert sum(result.report.dropped.values()) == len(result.dropped)


def test_near_duplicates_of_avoided_data_are_dropped_and_counted(featurizer, dictionary, report):
    free = synthesizer(featurizer, dictionary, report).synthesize(report)
    taken = free.dataset.select(range(5)).select_columns(["prompt"])
    bound = synthesizer(featurizer, dictionary, report, avoid={"the test set": taken}).synthesize(report)
    assert not set(map(str, taken["prompt"])) & set(map(str, bound.dataset["prompt"]))
    assert bound.report.dropped["near-duplicate of the test set"] >= 5


@pytest.mark.parametrize("form", ["list", "text", "json"])
def test_a_fixed_label_is_that_of_every_row_and_costs_nothing(featurizer, dictionary, report, form):
    task = replace(get_task("toxicity"), label="toxic", parts={"text": "a rude message"})
    made = synthesizer(featurizer, dictionary, report, task=task, prompt_format=form, candidates=2, rounds=1)
    result = made.synthesize(report, max_samples=6)
    assert set(result.dataset["label"]) == {1}
    assert not any("label" in request for request in asked_of(made.chat))


class Refusing(WritingChat):
    def _answer(self, key, seed, i, request, before):
        text = "I can't help with that."
        return Completion(text if before is None else f" {text}", "stop", None, 10, 5)


@pytest.mark.parametrize(
    ("task", "reason"),
    [("instruction_following", "refusal"), ("helpfulness", "no whole row: prompt: it is a refusal")],
)
def test_a_model_that_refuses_writes_no_samples(featurizer, dictionary, report, task, reason):
    """Though its refusals activate features."""
    made = synthesizer(featurizer, dictionary, report, chat=Refusing(), task=task, candidates=1, rounds=0)
    result = made.synthesize(report)
    assert not len(result.dataset)
    reasons = [row["reason"] for row in result.dropped if row["fac_activation"] > report.threshold]
    assert set(reasons) == {reason}


def test_the_callers_own_filter_is_the_last_word(featurizer, dictionary, report):
    keep = lambda row: "the" not in words(row["prompt"][0]["content"])  # noqa: E731
    result = synthesizer(featurizer, dictionary, report, keep=keep).synthesize(report)
    assert len(result.dataset)
    assert all(keep(row) for row in result.dataset)
    assert result.report.dropped["the caller's own filter"] > 0


class FailingParts(WritingChat):
    """Writes texts that continue a list, and fails to write the other parts of their rows."""

    def complete(self, conversations, *, prefill=None, **settings):
        done = super().complete(conversations, prefill=prefill, **settings)
        failed = Completion("", "failed", "the server is gone", 0, 0)
        return done if prefill[0] is not None else [[failed] for _ in done]


@pytest.mark.parametrize("rows_are", ["filtered", "near-duplicates", "failed"])
@pytest.mark.filterwarnings("ignore:The chat did not write")
def test_hit_rates_are_of_texts_whatever_becomes_of_their_rows(featurizer, dictionary, report, rows_are):
    task = replace(get_task("instruction_following"), pool_over="all")  # a row activates more than its text
    settings = {"task": task, "methods": ("one_step",), "rounds": 0}
    whole = synthesizer(featurizer, dictionary, report, **settings).synthesize(report)
    assert len(whole.dataset) > 5
    changes = {
        "filtered": {"keep": lambda row: False},
        "near-duplicates": {"avoid": {"the test set": whole.dataset.select_columns(["prompt"])}},
        "failed": {"chat": FailingParts()},
    }
    bound = synthesizer(featurizer, dictionary, report, **settings, **changes[rows_are]).synthesize(report)
    assert len(bound.dataset) < len(whole.dataset)
    assert bound.report.to_dict()["methods"] == whole.report.to_dict()["methods"]
    assert bound.report.copied == whole.report.copied


def test_the_second_step_shows_the_strongest_and_the_weakest_text_of_the_first(featurizer, dictionary, report):
    chat = WritingChat()
    settings = {"chat": chat, "prompt_format": "text", "rounds": 1, "samples_per_feature": 50}
    result = synthesizer(featurizer, dictionary, report, **settings).synthesize(report.missing[:4])
    second = [text for text in asked_of(chat) if "This text has it" in text]
    assert len(second) == 4
    assert all("This text has it (strength" in request for request in second)
    assert any("This text misses it" in request for request in second)
    assert result.report.methods.keys() == {"two_step"}
    assert {json.loads(text)["step"] for text in result.dataset["fac_provenance"]} == {1, 2}


def test_a_feature_without_spans_or_candidates_borrows_or_is_left(featurizer, dictionary, report):
    class Silent(WritingChat):
        def complete(self, conversations, **settings):
            super().complete(conversations, **settings)
            return [[c._replace(text="") for c in cs] for cs in super().complete(conversations, **settings)]

    chat = Silent()
    result = synthesizer(featurizer, dictionary, report, chat=chat, prompt_format="text").synthesize(report.missing[:3])
    assert len(result.dataset) == 0
    assert list(result.dataset.features)[:2] == ["prompt", "completion"]
    assert any("This text has it (strength" in text for text in asked_of(chat)), "borrowed from a span"
    assert result.report.exhausted.tolist() == report.missing[:3].tolist()


def test_a_feature_that_the_dictionary_does_not_know_is_not_asked_for_in_words(featurizer, dictionary, report):
    unknown = report.missing[:2].tolist()
    rest = dictionary.filter(lambda row: row["feature"] not in unknown)
    chat = WritingChat()
    result = synthesizer(featurizer, rest, report, chat=chat).synthesize(report.missing[:4])
    assert not set(unknown) & {*result.report.activated, *result.report.exhausted}
    assert chat.asked


def test_features_that_cannot_be_asked_for_make_no_bounded_synthesis_ask_for_more(featurizer, dictionary, report):
    unknown, known = report.missing[:8].tolist(), report.missing[8:].tolist()
    rest = dictionary.filter(lambda row: row["feature"] not in unknown)
    requests = [
        synthesizer(featurizer, rest, report).synthesize(ids, max_samples=2).report.requests
        for ids in (known, unknown + known)
    ]
    assert requests[0] == requests[1] > 0


@pytest.mark.parametrize("methods", [("one_step",), ("steering", "one_step")])
def test_the_first_round_of_a_method_shows_the_strongest_spans_whatever_came_before(
    featurizer, dictionary, report, methods
):
    chat = WritingChat()
    made = synthesizer(featurizer, dictionary, report, chat=chat, methods=methods, rounds=0, prompt_format="text")
    feature = next(f for f in report.missing.tolist() if f in dictionary)
    made.synthesize([feature])
    [request] = [text for text in asked_of(chat) if "The pattern:" in text]
    assert HINTS[1] not in request
    assert mark_span(dictionary.spans(feature)[0]) in request


def test_one_step_and_two_step_ask_for_as_many_texts(featurizer, dictionary, report):
    asked = []
    for ways in (("one_step",), ("two_step",)):
        chat = WritingChat()
        settings = {"chat": chat, "methods": ways, "samples_per_feature": 20}
        synthesizer(featurizer, dictionary, report, **settings).synthesize(report.missing[:5])
        asked.append(sum("numbered list" in key for key, _ in chat.asked))
    assert asked == [20, 20]


def test_the_form_that_is_kept_most_often_is_chosen(featurizer, dictionary, report):
    class NoJSON(WritingChat):
        def _answer(self, key, seed, i, request, before):
            found = super()._answer(key, seed, i, request, before)
            return found._replace(text="no idea") if before is None and "numbered list" not in key else found

    chat = NoJSON()
    result = synthesizer(featurizer, dictionary, report, chat=chat, prompt_format=None).synthesize(report.missing)
    assert result.report.requests == chat.texts  # what choosing cost is counted too
    forms = {json.loads(text)["prompt_format"] for text in result.dataset["fac_provenance"]}
    assert forms == {"list"}


def test_where_no_form_is_kept_the_one_that_can_be_read_is_chosen(featurizer, dictionary, report):
    class Plain(WritingChat):
        def _answer(self, *arguments):
            return super()._answer(*arguments)._replace(text="Two words.")

    result = synthesizer(featurizer, dictionary, report, chat=Plain(), prompt_format=None).synthesize(report.missing)
    asked = {json.loads(text)["prompt_format"] for text in result.dataset["fac_provenance"]}
    assert asked <= {"text", "list"}
    assert result.report.dropped.get("unreadable", 0) <= 8 * 2, "but for the eight that were tried"


def test_steering_writes_for_features_with_the_model_that_is_measured(featurizer, dictionary, report):
    chat = LocalChat(featurizer.model, featurizer.tokenizer)
    settings = {"chat": chat, "methods": ("steering",), "max_tokens": 12, "answer_tokens": 4, "task": "toxicity"}
    result = synthesizer(featurizer, dictionary, report, **settings).synthesize(report.missing[:6])
    assert all(json.loads(text)["chat"] == "LlamaForCausalLM" for text in result.dataset["fac_provenance"])
    assert result.report.methods["steering"].features == 6
    assert result.report.requests >= 6 * 4
    tried = {json.loads(text)["strength"] for text in result.dataset["fac_provenance"]}
    assert len(result.dataset) == 0 or min(tried) > 0


def test_every_written_sample_says_how_it_was_asked_for(featurizer, dictionary, report, monkeypatch):
    monkeypatch.setattr(verification, "MAX_PERPLEXITY", float("inf"))  # a random model writes nothing fluent
    low = replace(report, threshold=0.0)
    settings = {"methods": ("one_step", "steering"), "rounds": 0, "samples_per_feature": 9, "max_tokens": 12}
    result = synthesizer(featurizer, dictionary, low, task="toxicity", **settings).synthesize(report.missing[:6])
    for method in ("one_step", "steering"):
        rows_ = [row for row in result.dataset if row["fac_method"] == method]
        assert rows_, method
        assert all({"round", "prompt_format", "chat"} <= json.loads(row["fac_provenance"]).keys() for row in rows_)


def test_a_steered_text_of_the_user_starts_where_the_template_starts_a_user_message(featurizer, dictionary, report):
    read, tokenizer = [], featurizer.tokenizer
    handle = featurizer.model.register_forward_pre_hook(
        lambda _m, _args, kwargs: read.extend(tokenizer.batch_decode(kwargs["input_ids"])), with_kwargs=True
    )
    settings = {"methods": ("steering",), "max_tokens": 3, "answer_tokens": 3, "task": "toxicity"}
    chat = LocalChat(featurizer.model, tokenizer)
    try:
        synthesizer(featurizer, dictionary, report, chat=chat, **settings).synthesize(report.missing[:1])
    finally:
        handle.remove()
    assert any(text == "<|im_start|>user" for text in read)
    assert not any("<|im_start|>assistant" in text for text in read if text.startswith("<|im_start|>user"))


def test_the_same_journal_resumes_to_the_same_samples_without_asking_again(featurizer, dictionary, report, tmp_path):
    chat = WritingChat()
    whole = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, cache_dir=tmp_path / "a")
    n = len(chat.asked)
    again = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, cache_dir=tmp_path / "a")
    assert len(chat.asked) == n
    assert as_dicts(again) == as_dicts(whole)
    plain = synthesizer(featurizer, dictionary, report).synthesize(report)
    assert as_dicts(plain) == as_dicts(whole)


def test_other_settings_use_what_they_share_with_the_cache(featurizer, dictionary, report, tmp_path):
    synthesizer(featurizer, dictionary, report).synthesize(report, cache_dir=tmp_path)
    for settings in ({"samples_per_feature": 1}, {"max_copied_words": 1}, {"candidates": 5}):
        chat, fresh = WritingChat(), WritingChat()
        made = synthesizer(featurizer, dictionary, report, chat=chat, **settings)
        result = made.synthesize(report, cache_dir=tmp_path)
        assert_same(result, synthesizer(featurizer, dictionary, report, chat=fresh, **settings).synthesize(report))
        assert chat.texts < fresh.texts / 2


def _write(folder, *, chat=None, processes=None, **bounds):
    featurizer, dictionary, report = make_parts()
    made = synthesizer(featurizer, dictionary, report, chat=chat or WritingChat())
    return as_dicts(made.synthesize(report, cache_dir=folder, processes=processes or Processes(), **bounds))


def _write_in_child(queue, folder, dies_after=None, processes=None, **bounds):
    torch.set_num_threads(1)
    chat = WritingChat(dies_after=dies_after)
    queue.put((_write(folder, chat=chat, processes=processes, **bounds), chat.texts))


def _in_children(folder, n, **bounds):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [
        context.Process(target=_write_in_child, args=(queue, folder, None, Processes(rank, n, "run")), kwargs=bounds)
        for rank in range(n)
    ]
    for child in children:
        child.start()
    found = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join(60)
    return found


def test_killed_anywhere_it_ends_with_the_same_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "_WAVE", 8)
    whole = WritingChat()
    expected = _write(tmp_path / "whole", chat=whole)
    context = multiprocessing.get_context("fork")
    for number in sorted(random.Random(0).sample(range(1, whole.texts // 3), 10)):
        child = context.Process(target=_write_in_child, args=(context.Queue(), tmp_path / "killed", number))
        child.start()
        child.join(120)
        assert child.exitcode in (-signal.SIGKILL, 0)
    chat = WritingChat()
    assert _write(tmp_path / "killed", chat=chat) == expected
    assert chat.texts < whole.texts / 2, "what was answered before the kills is not asked again"


def test_several_processes_share_the_work_and_end_with_the_samples_of_one(tmp_path):
    alone = WritingChat()
    expected = _write(tmp_path / "alone", chat=alone)
    found = _in_children(tmp_path / "shared", 3)
    for samples, _ in found:
        assert_same_rows(samples, expected)
    asked = [texts for _, texts in found]
    assert sum(asked) == alone.texts, "no text is asked for twice"
    assert max(asked) < 0.4 * alone.texts


def test_processes_together_keep_to_bounds(tmp_path):
    (one, asked), *others = _in_children(tmp_path, 3, max_requests=100)
    assert 80 < asked + sum(n for _, n in others) <= 100
    assert all(samples == one for samples, _ in others)
    for samples, _ in _in_children(tmp_path / "timed", 2, max_seconds=0):
        assert samples == ([], [])


def test_bounds_end_the_work_and_keep_what_was_done(featurizer, dictionary, report, tmp_path):
    chat = WritingChat()
    few = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(
        report, cache_dir=tmp_path / "r", max_requests=60
    )
    assert few.report.requests <= 60
    assert few.report.ended == "max_requests 60"
    n = len(chat.asked)
    again = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(
        report, cache_dir=tmp_path / "r", max_requests=60
    )
    assert as_dicts(again) == as_dicts(few)
    assert len(chat.asked) == n
    whole = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, cache_dir=tmp_path / "r")
    assert whole.report.ended is None
    assert_same(whole, synthesizer(featurizer, dictionary, report).synthesize(report))
    nothing = synthesizer(featurizer, dictionary, report).synthesize(report, max_seconds=0)
    assert len(nothing.dataset) == 0
    assert nothing.report.ended == "max_seconds 0"


def test_rows_that_were_begun_are_finished_when_a_bound_is_reached(featurizer, dictionary, report):
    slow = synthesizer(featurizer, dictionary, report, chat=WritingChat(seconds=0.6))
    timed = slow.synthesize(report, max_seconds=0.5)
    assert timed.report.ended == "max_seconds 0.5"
    assert len(timed.dataset) > 3
    assert {json.loads(text)["step"] for text in timed.dataset["fac_provenance"]} == {1}
    n = 4 * len(report.missing)
    counted = synthesizer(featurizer, dictionary, report).synthesize(report, max_requests=n + 60)
    assert counted.report.requests <= n + 60
    assert len(counted.dataset) >= len(timed.dataset), "requests for the answers were kept back"


def test_a_few_requests_make_a_few_samples(featurizer, dictionary, report):
    few = synthesizer(featurizer, dictionary, report).synthesize(report, max_requests=40)
    assert 30 < few.report.requests <= 40
    assert len(few.dataset) > 2, "requests for the answers were kept back in every batch"
    assert not len(few.report.exhausted), "not all was tried for any feature"
    nothing = synthesizer(featurizer, dictionary, report).synthesize(report, max_requests=1)
    assert nothing.report.requests == 0


def test_a_raised_number_of_samples_goes_on_where_the_lower_one_stopped(featurizer, dictionary, report, tmp_path):
    chat = WritingChat()
    few = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, cache_dir=tmp_path, max_samples=5)
    assert few.report.ended == "max_samples 5"
    assert len(few.dataset) == 5
    assert not len(few.report.exhausted)
    n = chat.texts
    assert n < 4 * 33 + 40, "answers are asked for just the samples that are wanted"
    whole = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, cache_dir=tmp_path)
    fresh = WritingChat()
    assert_same(whole, synthesizer(featurizer, dictionary, report, chat=fresh).synthesize(report))
    assert whole.report.requests == chat.texts <= fresh.texts + 1, "nothing was asked twice"


def test_a_piece_whose_rounds_are_all_tried_is_not_done_while_rows_are_left_to_make(
    featurizer, dictionary, report, tmp_path
):
    made = synthesizer(featurizer, dictionary, report, rounds=0)
    whole = made.synthesize(report)
    assert not len(made.synthesize(report, cache_dir=tmp_path, max_requests=1).dataset)
    for n in (1, 3):
        assert len(made.synthesize(report, cache_dir=tmp_path, max_samples=n).dataset) == n < len(whole.dataset)
    assert_same(made.synthesize(report, cache_dir=tmp_path), whole)


@pytest.mark.parametrize("form", ["list", None])
def test_a_chat_at_its_end_is_asked_again_by_the_same_call(featurizer, dictionary, report, tmp_path, form):
    whole = synthesizer(featurizer, dictionary, report, prompt_format=form).synthesize(report)
    for at_most in (0, 30, 150, whole.report.requests - 200):
        chat = WritingChat(at_most=at_most)
        with pytest.warns(UserWarning, match="asks for the missing texts"):
            result = synthesizer(featurizer, dictionary, report, prompt_format=form, chat=chat).synthesize(
                report, cache_dir=tmp_path
            )
        assert "max_tokens_total is reached" in result.report.ended
    assert 0 < len(result.dataset) < len(whole.dataset)
    chat = WritingChat()
    result = synthesizer(featurizer, dictionary, report, prompt_format=form, chat=chat).synthesize(
        report, cache_dir=tmp_path
    )
    assert_same(result, whole)
    assert result.report.requests == whole.report.requests
    assert chat.texts == 20


def test_a_text_that_failed_is_asked_for_again_and_no_other(featurizer, dictionary, report, tmp_path):
    whole = synthesizer(featurizer, dictionary, report).synthesize(report)
    chat = WritingChat(loses=range(0, 10_000, 9))
    with pytest.warns(UserWarning, match="the server is gone"):
        lossy = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, cache_dir=tmp_path)
    assert 0 < len(lossy.dataset) <= len(whole.dataset)
    assert lossy.report.requests == chat.texts
    chat = WritingChat()
    result = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, cache_dir=tmp_path)
    assert result.report.ended is None
    assert chat.texts < whole.report.requests / 2


def test_what_follows_a_text_that_cannot_be_asked_for_again_counts_all_the_same(
    featurizer, dictionary, report, tmp_path
):
    chat = WritingChat(loses=range(0, 10_000, 40))
    with pytest.warns(UserWarning, match="the server is gone"):
        lossy = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="max_tokens_total"):
        again = synthesizer(featurizer, dictionary, report, chat=WritingChat(at_most=0)).synthesize(
            report, cache_dir=tmp_path
        )
    assert as_dicts(again)[0] == as_dicts(lossy)[0]


def test_a_hit_whose_other_parts_are_not_asked_for_stays_a_hit(featurizer, dictionary, report, tmp_path):
    class WithoutParts(WritingChat):
        """Takes requests for texts, and none for the parts of a row."""

        def _unless_lost(self, answer):
            return super()._unless_lost(answer) if self.takes else Completion("", "not_asked", "no credit", 0, 0)

        def complete(self, conversations, *, prefill=None, **settings):
            self.takes = prefill[0] is not None
            return super().complete(conversations, prefill=prefill, **settings)

    with pytest.warns(UserWarning, match="no credit"):
        told = synthesizer(featurizer, dictionary, report, chat=WithoutParts()).synthesize(report, cache_dir=tmp_path)
    assert told.report.methods["two_step"].hit_rate > 0, "the text itself was written and measured"
    assert "the chat failed" not in told.report.dropped
    assert not len(told.report.exhausted)
    again = synthesizer(featurizer, dictionary, report).synthesize(report, cache_dir=tmp_path)
    assert_same(again, synthesizer(featurizer, dictionary, report).synthesize(report))


def test_an_answer_without_text_is_paid_for_once_and_another_seed_asks_for_another(
    featurizer, dictionary, report, tmp_path
):
    class Refusing(FlakyServer):
        def proper(self, asked):
            return {**super().proper(asked), "choices": [{"message": {"role": "assistant", "refusal": "I cannot"}}]}

    sent = []
    with Refusing() as server:
        for seed in (0, 0, 1):
            chat = EndpointChat("m", base_url=server.url)
            made = synthesizer(featurizer, dictionary, report, chat=chat, rounds=0, prompt_format="text", seed=seed)
            with pytest.warns(UserWarning, match=r"answers without text.*another seed"):
                made.synthesize(report.missing[:2], cache_dir=tmp_path)
            sent.append(server.came.total())
    assert sent == [8, 8, 16]


def test_a_form_is_not_chosen_on_texts_that_the_chat_lost(featurizer, dictionary, report, tmp_path):
    with pytest.warns(UserWarning, match="the server is gone"):
        nothing = synthesizer(
            featurizer, dictionary, report, prompt_format=None, chat=WritingChat(loses=range(15))
        ).synthesize(report.missing, cache_dir=tmp_path)
    assert not len(nothing.dataset)
    found = synthesizer(featurizer, dictionary, report, prompt_format=None).synthesize(
        report.missing, cache_dir=tmp_path
    )
    assert_same(found, synthesizer(featurizer, dictionary, report, prompt_format=None).synthesize(report.missing))


def test_a_form_is_tried_on_features_that_the_dictionary_knows(featurizer, dictionary, report):
    class NoJSON(WritingChat):
        def _answer(self, key, seed, i, request, before):
            found = super()._answer(key, seed, i, request, before)
            return found._replace(text="no idea") if "JSON" in request else found

    known = dictionary.filter(lambda row: row["feature"] not in report.missing[:8].tolist())
    result = synthesizer(featurizer, known, report, prompt_format=None, chat=NoJSON()).synthesize(report.missing)
    assert len(result.dataset) > 5


def test_ways_in_any_order_try_a_form_at_the_first_temperature(featurizer, dictionary, report):
    chat = WritingChat()
    settings = {
        "methods": ("steering", "two_step"),
        "prompt_format": None,
        "temperature": 0.4,
        "max_tokens": 6,
        "rounds": 0,
    }
    result = synthesizer(featurizer, dictionary, report, chat=chat, **settings).synthesize(report.missing[:2])
    assert result.report.requests > 0


def test_exhausted_features_were_tried_in_every_round(featurizer, dictionary, report):
    made = synthesizer(featurizer, dictionary, report, samples_per_feature=1, keep=lambda row: False)
    result = made.synthesize(report)
    assert sorted(result.report.exhausted) == sorted(report.missing)
    assert result.report.requests >= 4 * 4 * len(report.missing)
    few = made.synthesize(report, max_requests=100)
    assert not len(few.report.exhausted)


def test_max_samples_takes_first_samples_first(featurizer, dictionary, report):
    result = synthesizer(featurizer, dictionary, report).synthesize(report, max_samples=5)
    assert len(result.dataset) == 5
    assert len(set(result.dataset["fac_feature"])) == 5


def test_the_plan_covers_every_round(featurizer, dictionary, report):
    for form in ("list", "text", "json"):
        made = synthesizer(featurizer, dictionary, report, prompt_format=form)
        plan = made.plan(report)
        told = made.synthesize(report).report
        assert plan.features == len(report.missing)
        assert told.requests <= plan.requests
        assert told.completion_tokens <= plan.completion_tokens
        one_step = synthesizer(featurizer, dictionary, report, prompt_format=form, methods=("one_step",)).plan(report)
        assert plan.prompt_tokens > one_step.prompt_tokens, "contrastive pairs are longer"


def test_rows_in_vain_cost_more_than_the_plan_which_says_so(featurizer, dictionary, report):
    made = synthesizer(featurizer, dictionary, report, samples_per_feature=1, keep=lambda row: False)
    plan = made.plan(report)
    assert made.synthesize(report).report.requests > plan.requests
    assert "at most" not in str(plan)
    assert "max_requests is a bound" in str(plan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("magic",)}, "methods is"),
        ({"methods": ()}, "methods is"),
        ({"prompt_format": "xml"}, "prompt_format is 'xml'"),
        ({"samples_per_feature": 0}, "samples_per_feature is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"task": "cooking"}, "no task 'cooking'"),
    ],
)
def test_settings_that_cannot_be_are_refused(featurizer, dictionary, report, settings, message):
    with pytest.raises(ValueError, match=message):
        synthesizer(featurizer, dictionary, report, **settings)


@pytest.mark.parametrize(
    ("missing", "message"),
    [([1, 1], "more than once"), ([0.5], "whole numbers"), ([D_SAE], "features 0 to 47"), ([-1], "does not exist")],
)
def test_features_that_cannot_be_are_refused(featurizer, dictionary, report, missing, message):
    with pytest.raises(ValueError, match=message):
        synthesizer(featurizer, dictionary, report).synthesize(missing)


def test_a_featurizer_that_cannot_read_the_tasks_rows_is_refused(dictionary, report):
    with pytest.raises(ValueError, match=r"pool_over='completion'.*make it with pool_over='user'"):
        synthesizer(make_featurizer(pool_over="completion"), dictionary, report, task="toxicity")
    synthesizer(make_featurizer(), dictionary, report, task="toxicity")


def test_candidates_are_measured_as_the_paper_measures_where_the_featurizer_does() -> None:
    featurizer = SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae(), preset="paper")
    every = np.arange(D_SAE)
    scorer = verification.SampleScorer(featurizer, get_task("toxicity"), every, np.zeros(D_SAE), Cache(None))
    rows = [{"text": sentence(random.Random(0), n=40), "label": 1}] * D_SAE
    found = [score.activation for score in scorer.score(rows, every.tolist())]
    assert found == featurizer(rows[:1]).toarray()[0].tolist()
    assert max(found) > 0


def test_a_filter_may_be_a_method_and_is_applied_to_what_is_in_the_journal_too(
    featurizer, dictionary, report, tmp_path
):
    class Filter:
        def __init__(self, answer):
            self.lock, self.answer = threading.Lock(), answer

        def keep(self, row):
            return self.answer

    settings = {"keep": Filter(True).keep}
    kept = synthesizer(featurizer, dictionary, report, **settings).synthesize(report.missing[:6], cache_dir=tmp_path)
    assert len(kept.dataset)
    settings = {"keep": Filter(False).keep}
    none = synthesizer(featurizer, dictionary, report, **settings).synthesize(report.missing[:6], cache_dir=tmp_path)
    assert not len(none.dataset)
    assert none.report.dropped["the caller's own filter"] >= len(kept.dataset)


def test_a_report_measured_otherwise_is_refused_before_anything_is_asked(featurizer, dictionary, report):
    chat = WritingChat()
    with pytest.raises(ValueError, match="computed with another featurizer"):
        synthesizer(make_featurizer(), dictionary, report, chat=chat).synthesize(report)
    lower = SimpleNamespace(threshold=0.5 * report.threshold)
    with pytest.raises(ValueError, match=r"threshold=report\.threshold"):
        synthesizer(featurizer, dictionary, lower, chat=chat).synthesize(report)
    assert not chat.asked


def test_some_of_the_missing_features_can_be_chosen(featurizer, dictionary, report):
    some = report.missing[3:9]
    features = relevant([*report.covered[:2], *some], featurizer.measurement)
    result = synthesizer(featurizer, dictionary, report).synthesize(report, features=features)
    assert set(result.dataset["fac_feature"]) <= set(some)
    assert result.report.fac_before == report.fac < result.report.fac_after


def test_no_missing_feature_is_no_work(featurizer, dictionary, report):
    result = synthesizer(featurizer, dictionary, report).synthesize([])
    assert len(result.dataset) == 0
    assert result.report.requests == 0


def test_a_dictionary_of_another_model_is_refused(dictionary, report):
    other = SAEFeaturizer(tiny_model(seed=5), byte_level_tokenizer(), tiny_sae(), sink_norm=float("inf"))
    with pytest.raises(ValueError, match="another model or SAE"):
        synthesizer(other, dictionary, report)


def test_the_fingerprint_tells_settings_apart(featurizer, dictionary, report):
    one = synthesizer(featurizer, dictionary, report)
    assert one.fingerprint() == synthesizer(featurizer, dictionary, report).fingerprint()
    assert one.fingerprint() != synthesizer(featurizer, dictionary, report, seed=1).fingerprint()


def test_a_flaky_endpoint_changes_the_time_and_not_the_samples(featurizer, dictionary, report):
    results = []
    for faults in ({}, {"rate": 0.3, "hang": 4}):
        with FlakyServer(**faults) as server:
            chat = EndpointChat("m", base_url=server.url, timeout=2, attempts=12)
            settings = {"chat": chat, "prompt_format": "text", "rounds": 0, "candidates": 3}
            results.append(synthesizer(featurizer, dictionary, report, **settings).synthesize(report.missing[:5]))
            assert bool(server.failed.total()) == bool(faults)
    assert len(results[0].dataset)
    assert as_dicts(results[1]) == as_dicts(results[0])


def test_a_chat_that_gives_up_loses_nothing(featurizer, dictionary, report, tmp_path):
    with pytest.warns(UserWarning, match="no credit left"):
        result = synthesizer(featurizer, dictionary, report, chat=WritingChat(gives_up_after=5)).synthesize(
            report.missing[:5], cache_dir=tmp_path
        )
    assert result.report.chat_failed
    assert result.report.ended == "the chat: no credit left"
    assert result.report.requests == 3 * 4
    assert set(result.dropped["fac_feature"]) <= set(report.missing[:3])
    chat = WritingChat()
    found = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report.missing[:5], cache_dir=tmp_path)
    whole = WritingChat()
    expected = synthesizer(featurizer, dictionary, report, chat=whole).synthesize(report.missing[:5])
    assert as_dicts(found) == as_dicts(expected)
    assert chat.texts == whole.texts - 12


def test_a_chat_that_answers_nothing_at_all_is_an_error(featurizer, dictionary, report):
    class Broken(WritingChat):
        def complete(self, conversations, **settings):
            raise ChatError("wrong key")

    with pytest.raises(ChatError, match="wrong key"):
        synthesizer(featurizer, dictionary, report, chat=Broken()).synthesize(report)


def test_a_small_bound_costs_little(featurizer, dictionary, report):
    chat = WritingChat()
    result = synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, max_samples=3)
    assert len(result.dataset) == 3
    assert chat.texts <= 2 * 3 * 4 + 3 + 8


def test_what_the_synthesizer_can_know_need_not_be_said(featurizer, report):
    made = FACSynthesizer(
        featurizer=featurizer, task="instruction_following", methods=("steering",), max_tokens=6, answer_tokens=4
    )
    anchor = Dataset.from_list(rows(60, seed=3))
    result = made.synthesize(report, anchor=anchor, features=report.missing[:2], max_requests=60)
    assert result.report.requests > 8
    assert made.chat.model is featurizer.model
    with pytest.raises(ValueError, match=r"has no dictionary.*anchor=rows"):
        made.synthesize(report, pool=object())  # said before the pool is read
    with pytest.raises(ValueError, match=r"carries no threshold"):
        made.synthesize([1, 2], anchor=anchor)
    with pytest.raises(TypeError, match="needs featurizer="):
        FACSynthesizer(task="toxicity")


def test_contrastive_samples_come_from_pairs_alone(featurizer, dictionary, report):
    chat = WritingChat()
    made = synthesizer(
        featurizer, dictionary, report, chat=chat, methods=("contrastive",), rounds=1, prompt_format="text"
    )
    result = made.synthesize(report)
    assert len(result.dataset) > 2
    assert set(result.dataset["fac_method"]) == {"contrastive"}
    assert {json.loads(text)["step"] for text in result.dataset["fac_provenance"]} == {2}
    asked = [text for text in asked_of(chat) if "This text has it" in text]
    assert len(asked) == len(report.missing), "every feature gets samples from its pair"
    assert all("This text has it" in request for request in asked)


def test_a_number_of_requests_is_kept_to_when_hits_of_earlier_rounds_are_completed_too(featurizer, dictionary, report):
    made = synthesizer(featurizer, dictionary, report, keep=lambda row: len(str(row)) % 2, samples_per_feature=3)
    whole = made.synthesize(report).report.requests
    for bound in range(40, whole, 97):
        told = made.synthesize(report, max_requests=bound).report
        assert told.requests <= bound
        assert told.ended == f"max_requests {bound}"


def test_any_chat_may_keep_its_answers_as_they_come(featurizer, dictionary, report, tmp_path):
    class Keeping(WritingChat):
        def with_cache(self, cache):
            self.folder = cache.folder
            return self

    chat = Keeping()
    synthesizer(featurizer, dictionary, report, chat=chat).synthesize(report, cache_dir=tmp_path, max_requests=20)
    assert chat.folder == tmp_path


def test_a_lost_text_is_told_and_does_not_end_the_synthesis(featurizer, dictionary, report):
    with pytest.warns(UserWarning, match=r"did not write 1 texts \(the first: the server is gone\)"):
        result = synthesizer(featurizer, dictionary, report, chat=WritingChat(loses=[3])).synthesize(report)
    assert result.report.ended is None
    assert not result.report.chat_failed
    assert result.report.dropped["the chat failed"] == 1


def test_a_dictionary_of_the_anchor_rows_is_built_once(featurizer, report, tmp_path, monkeypatch):
    made = FACSynthesizer(WritingChat(), featurizer, task="instruction_following", methods=("two_step",), rounds=0)
    anchor = Dataset.from_list(rows(60, seed=3))
    first = made.synthesize(report, anchor=anchor, cache_dir=tmp_path, max_requests=60)
    monkeypatch.setattr("hf_fac.dictionary.build.build_dictionary", None)
    assert as_dicts(made.synthesize(report, anchor=anchor, cache_dir=tmp_path, max_requests=60)) == as_dicts(first)
