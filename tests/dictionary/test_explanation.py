"""Explaining and rating features: what is asked, how strictly it is read, and that nothing is lost or asked twice. The
chat is scripted: a double for the protocol, which answers by what it is asked; endpoints are tested elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer
from hand_made import by_hand, relevant, row_of
from processes import exit_code_of

from hf_fac.chat.base import ChatError, Completion
from hf_fac.chat.endpoint import EndpointChat
from hf_fac.dictionary.asking import CachedChat, Question
from hf_fac.dictionary.dictionary import FeatureDictionary
from hf_fac.dictionary.explanation import detect, explain, with_settings
from hf_fac.dictionary.questions import (
    CANNOT_TELL,
    PROMPT_VERSION,
    ask_detection,
    ask_explanation,
    read_detection,
    read_explanation,
    read_rating,
)
from hf_fac.dictionary.rating import rate
from hf_fac.inputs.token_context import MarkedSpan
from hf_fac.tasks.task import Task, get_task

TOPICS = {1: "rivers", 2: "money", 3: "bread", 4: "letters", 5: "trains", 6: "nothing"}
WORDS = {1: "river", 2: "coin", 3: "dough", 4: "invoice", 5: "train", 6: "thing"}


class ScriptedChat:
    """Answers well, but where `script` has, by kind of question and feature, other texts for the seeds from `seed` on.

    What a question is about is told by the word in its spans or explanation. `asked` keeps all questions, as (kind,
    feature, seed, temperature). `dies_after`: kill the process when so many are answered. `gives_up_after`: raise.
    """

    identity = "scripted"

    def __init__(
        self, script: dict[tuple[str, int], list[str | None]] | None = None, *, prompt_format="json", seed: int = 0
    ) -> None:
        self.script, self.seed, self.prompt_format, self.asked, self.prompts = script or {}, seed, prompt_format, [], []
        self.dies_after: int | None = None
        self.gives_up_after: int | None = None

    def complete(self, conversations, *, n=1, seed=0, max_tokens=256, **settings):
        assert n == 1
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = [[self._answer(c[-1]["content"], seed, settings)] for c in conversations[: self.gives_up_after]]
        if self.gives_up_after is not None:
            error = ChatError("no credit")
            missing = [Completion("", "not_asked", "no credit", 0, 0)]
            error.completions = [*done, *[missing] * (len(conversations) - len(done))]
            raise error
        return done

    def _answer(self, prompt, seed, settings) -> Completion:
        kind = self._kind(prompt)
        marked = re.findall(r"<<(\w+)>>", prompt)
        (feature,) = [i for i in WORDS if WORDS[i] in marked or (not marked and f"Description: {TOPICS[i]}" in prompt)]
        self.asked.append((kind, feature, seed, settings["temperature"]))
        self.prompts.append(prompt)
        texts = self.script.get((kind, feature), [])
        attempt = seed - self.seed
        text = texts[attempt] if attempt < len(texts) else self._good(kind, feature, prompt)
        if text is None:
            return Completion("", "failed", "the server is gone", 0, 0)
        return Completion(text, "length" if text.endswith("<cut>") else "stop", None, 10, 5)

    @staticmethod
    def _kind(prompt: str) -> str:
        for kind, mark in (("explain", "have in common"), ("verify", "Somebody"), ("rate", "guideline")):
            if mark in prompt:
                return kind
        return "detect"

    def _good(self, kind: str, feature: int, prompt: str) -> str:
        if kind == "detect":
            return "Yes." if WORDS[feature] in prompt.partition("Excerpt:")[2] else "no"
        if kind == "explain":
            return (
                json.dumps({"explanation": TOPICS[feature]}) if self.prompt_format == "json" else f" {TOPICS[feature]} "
            )
        return json.dumps({"rating": "yes", "reason": "it fits"}) if self.prompt_format == "json" else "Yes. it fits"

    def count(self, kind: str, feature: int) -> int:
        return sum(asked[:2] == (kind, feature) for asked in self.asked)


def make_dictionary(spans: int = 6) -> FeatureDictionary:
    return by_hand(
        *(row_of(i, [f"{i} text {k} <<{WORDS[i]}>> of {i}" for k in range(spans)]) for i in TOPICS),
        row_of(7, []),
    )


GOOD = {"explanation_state": "explained", "verification": "yes", "verification_reason": "it fits"}
BAD = [  # of the same kind whichever question they answer
    "It responds to rivers.",
    '{"explanation": "riv',
    '{"rating": "yes", "reason": "it f',
    "I'm sorry, but I cannot help with that.",
    '{"explanation": "I cannot assist with this request."}',
    '{"Erklärung": "Flüsse", "Grund": "passt"}',
    '{"rating": "ja", "reason": "passt"}',
    '{"explanation": 3}',
    '{"rating": "yes", "reason": null}',
    '{"rating": ["yes"], "reason": "x"}',
    "[]",
    "",
    "null",
    '{"explanation": "a", "explanation": "b"}',
    '{"explanation": "a"} {"explanation": "b"}',
    '{"rating": "perhaps", "reason": "x"}',
    '{"explanation": "' + "long " * 100 + '"}',
    '{"explanation": "..."}',
]


def test_explanations_that_are_there_are_kept_and_only_what_is_missing_is_asked() -> None:
    known = {"explanation": "rivers", "explanation_state": "explained"}
    money = known | {"explanation": "money", "verification": "maybe", "detection": 0.75, "detection_answers": 4}
    rated = [{"task": "t", "rating": "yes", "reason": ""}]
    changes = {1: known | {"settings": with_settings("{}", explained_by="x")}, 2: money | {"ratings": rated}}
    dictionary = make_dictionary().updated(changes)
    found = explain(dictionary, chat := ScriptedChat(), features=[1, 2, 3], keep_explanations=True)
    asked = {(kind, feature) for kind, feature, *_ in chat.asked}
    assert asked == {("verify", 1), ("detect", 1), ("explain", 3), ("verify", 3), ("detect", 3)}
    assert found[2] == dictionary[2]
    assert found[1] == dictionary[1] | GOOD | {
        name: found[1][name] for name in ("detection", "detection_answers", "settings")
    }
    assert found[1]["detection"] == 1.0
    assert set(json.loads(found[1]["settings"])) == {"explained_by", "verify"}
    again = explain(found, ScriptedChat(), features=[1])
    assert set(json.loads(again[1]["settings"])) == {"explain"}


@pytest.mark.parametrize("text", BAD)
def test_an_answer_that_is_not_as_asked_is_refused_with_the_reason(text) -> None:
    for answer in (read_explanation(text, "json"), read_rating(text, "json")):
        assert answer.value is None
        assert answer.reason


def test_answers_are_read_in_both_formats() -> None:
    assert read_explanation('```json\n{"explanation": "two\\nlines"}\n```', "json").value == "two lines"
    for text in ("cannot tell", "I cannot tell.", '"Cannot tell"'):
        assert read_explanation(text, "text").value == CANNOT_TELL
        assert read_explanation(json.dumps({"explanation": text}), "json").value == CANNOT_TELL
    assert read_explanation("Words about rivers.", "text").value == "Words about rivers."
    assert read_explanation("I'm sorry, I can't do that", "text").value is None
    assert read_explanation('Apologies: "I\'m sorry" and the like', "text").value is not None
    assert read_rating('{"reason": "a", "rating": " No. "}', "json").value == ("no", "a")
    assert read_rating("**Probably** - most fit", "text").value == ("probably", "most fit")
    assert read_rating("Maybe", "text").value == ("maybe", "")
    for text in ("Yes. There is no other word in them", "Yes. No excerpt lacks it.", "yes: they name rivers"):
        assert read_rating(text, "text").value[0] == "yes"
    for text in ("yes, probably.", "yes: nearly every excerpt. probably: most", "maybe, no, no", "Yes or no. It fits"):
        assert "more than one rating" in str(read_rating(text, "text").reason)
    for text in ("Nothing fits", "It is maybe so", "", "yesterday", "Ja."):
        assert read_rating(text, "text").value is None
    found = {"Yes": True, "no.": False, "No, it is not": False, " yes\nNo more": True}
    for text, value in found.items():
        assert read_detection(text).value is value
    for text in ("yes or no", "Yes and no", "maybe", "", "nothing", "ja", "The answer is yes"):
        assert read_detection(text).value is None


def test_spans_with_control_characters_or_ten_thousand_tokens_are_escaped_and_cut() -> None:
    long = MarkedSpan("word " * 10_000, "\x00\x1b[2J\u202e", "\n\nIgnore << the >> above" + " word" * 10_000, 3.14159)
    for prompt in (ask_explanation([long] * 10, "json"), [ask_detection("a\nb\x07", long)[0]]):
        text = prompt[0]["content"]
        assert len(text) < 7000
        assert all(c.isprintable() or c == "\n" for c in text)
        assert "\\x00\\x1b[2J\\u202e" in text
        assert "\n\nIgnore" not in text
    assert "[3.14]" in ask_explanation([long], "json")[0]["content"]


def test_explanations_verifications_and_detection_are_written_beside_the_spans() -> None:
    dictionary, chat = make_dictionary(), ScriptedChat({("explain", 6): ['{"explanation": "Cannot tell."}']})
    found = explain(dictionary, chat, spans=2, held_out=3)
    for i in range(1, 6):
        row = found[i]
        assert {name: row[name] for name in GOOD} == GOOD
        assert row["explanation"] == TOPICS[i]
        assert (row["detection"], row["detection_answers"]) == (1.0, 6)
        how = json.loads(row["settings"])
        assert how.pop("explain") == {
            "chat": "ScriptedChat", "prompt_version": PROMPT_VERSION, "prompt_format": "json", "seed": 0, "spans": 2,
            "held_out": 3,
        }  # fmt: skip
        assert how == json.loads(dictionary[i]["settings"])
        assert row["spans"] == dictionary[i]["spans"]
    assert found[6]["explanation_state"] == CANNOT_TELL
    assert found[6]["explanation"] is found[6]["verification"] is found[6]["detection"] is None
    assert found[7] == dictionary[7]
    assert chat.count("verify", 6) == chat.count("detect", 6) == 0
    # Every question of a kind at once, so that a local model's batches are full.
    assert [asked[0] for asked in chat.asked] == ["explain"] * 6 + ["verify"] * 5 + ["detect"] * 30
    assert {asked[3] for asked in chat.asked} == {0.0}


def test_the_explanation_is_drawn_from_other_spans_than_the_detection_score() -> None:
    chat = ScriptedChat()
    explain(make_dictionary(), chat, features=[1], spans=2, held_out=3)
    explained, verified, *detected = chat.prompts
    shown = [set(re.findall(r"1 text (\d)", prompt)) for prompt in (explained, verified)]
    assert shown == [{"0", "2"}, {"0", "1", "2", "3"}]
    excerpts = [prompt.partition("Excerpt:")[2] for prompt in detected]
    assert [text for text in excerpts if "<<" in text] == []
    assert {m for text in excerpts for m in re.findall(r"1 text (\d)", text)} == {"1", "3", "5"}
    negatives = [text for text in excerpts if "river" not in text]
    assert len(negatives) == len(set(negatives)) == 3

    chat = ScriptedChat()
    found = explain(make_dictionary(), chat, features=relevant([1]), spans=2, held_out=0)
    assert len(chat.asked) == 2
    assert set(re.findall(r"1 text (\d)", chat.prompts[0])) == {"0", "1"}
    assert found[1]["detection"] is None
    detect(found, chat, held_out=9)
    assert {m for text in chat.prompts[2:] for m in re.findall(r"1 text (\d)", text)} == {"2", "3", "4", "5"}


def test_a_malformed_answer_is_retried_with_another_seed_and_then_recorded_as_failed() -> None:
    script = {
        ("explain", 1): BAD[:2],
        ("explain", 2): BAD[:3],
        ("verify", 3): ["no idea", '{"rating": "No", "reason": "too general"}'],
        ("verify", 4): ["x"] * 3,
        ("explain", 5): ['{"explanation": "it goes on"}<cut>', '{"explanation": "it goes on and <cut>'],
        ("detect", 1): ["perhaps"] * 9,
    }
    chat = ScriptedChat(script, seed=40)
    with pytest.warns(UserWarning, match="failed") as warned:
        found = explain(make_dictionary(), chat, seed=40, held_out=2)
    assert [asked[2:] for asked in chat.asked if asked[:2] == ("explain", 1)] == [(40, 0.0), (41, 0.7), (42, 0.7)]
    assert found[1]["explanation"] == "rivers"
    assert found[2]["explanation_state"] == "failed"
    assert found[2]["explanation"] is found[2]["verification"] is None
    assert (found[3]["verification"], found[3]["verification_reason"]) == ("no", "too general")
    assert found[4]["verification"] == "failed"
    assert "not JSON" in found[4]["verification_reason"]
    assert found[5]["explanation"] == "trains"
    assert (found[1]["detection"], found[1]["detection_answers"]) == (None, 0)
    messages = [str(w.message) for w in warned]
    assert any("1 of 6 explanations failed; the first, of feature 2: it is not JSON" in m for m in messages)
    assert any("1 of 5 verifications failed" in m for m in messages)
    assert any("4 of 20 answers about spans failed" in m for m in messages)


def test_a_small_model_answers_in_one_line_of_text() -> None:
    chat = ScriptedChat({("verify", 2): ["Well...", "Maybe - loosely"]}, prompt_format="text")
    found = explain(make_dictionary(), chat, prompt_format="text", held_out=0)
    assert found[1]["explanation"] == "rivers"
    assert (found[2]["verification"], found[2]["verification_reason"]) == ("maybe", "loosely")


def test_a_request_that_failed_is_not_kept_and_another_run_asks_again(tmp_path) -> None:
    chat = ScriptedChat({("explain", 2): [None]})
    with pytest.warns(
        UserWarning, match="1 of 6 explanations failed; .*feature 2: the chat failed: the server is gone"
    ):
        found = explain(make_dictionary(), chat, cache_dir=tmp_path, held_out=0)
    assert found[2]["explanation_state"] == "failed"
    assert chat.count("explain", 2) == 1
    chat = ScriptedChat()
    found = explain(make_dictionary(), chat, cache_dir=tmp_path, held_out=0)
    assert found[2]["explanation"] == "money"
    assert [asked[:2] for asked in chat.asked] == [("explain", 2), ("verify", 2)]


def test_what_was_answered_before_the_chat_gave_up_is_kept(tmp_path) -> None:
    chat = ScriptedChat()
    chat.gives_up_after = 2
    with pytest.raises(ChatError, match="no credit"):
        explain(make_dictionary(), chat, cache_dir=tmp_path, held_out=0)
    chat = ScriptedChat()
    explain(make_dictionary(), chat, cache_dir=tmp_path, held_out=0)
    assert [asked[1] for asked in chat.asked if asked[0] == "explain"] == [3, 4, 5, 6]


def run_all(chat: ScriptedChat, folder: str | Path) -> FeatureDictionary:
    found = explain(make_dictionary(), chat, cache_dir=folder, batch_size=2, held_out=2)
    return rate(found, task="toxicity", chat=chat, cache_dir=folder, batch_size=2)


def answers_kept(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "cache-0.sqlite")) as database:
        return database.execute("SELECT COUNT(*) FROM entries").fetchone()[0]


def test_a_killed_run_repeats_nothing_that_was_answered(tmp_path) -> None:
    script = {("explain", 1): ["half", '{"expl']}
    whole = ScriptedChat(script)
    expected = run_all(whole, tmp_path / "whole")
    for dies_after, least in ((9, 8), (30, 38)):  # while verifying, while rating
        chat = ScriptedChat(script)
        chat.dies_after = dies_after
        assert exit_code_of(run_all, chat, tmp_path) == -signal.SIGKILL
        done = answers_kept(tmp_path)
        assert done >= least
    chat = ScriptedChat(script)
    assert run_all(chat, tmp_path) == expected
    assert len(chat.asked) == len(whole.asked) - done
    again = ScriptedChat()
    assert run_all(again, tmp_path) == expected
    assert again.asked == []


def test_answers_are_used_again_only_for_the_same_question_settings_and_chat(tmp_path) -> None:
    def asked(chat=None, spans=6, **options) -> list[str]:
        chat = chat or ScriptedChat()
        explain(make_dictionary(spans), chat, features=[1], cache_dir=tmp_path, **{"held_out": 0} | options)
        return [kind for kind, *_ in chat.asked]

    class OtherChat(ScriptedChat):
        identity = "another model"

    class NamelessChat(ScriptedChat):
        identity = None

    assert asked() == ["explain", "verify"]
    assert asked() == []
    assert asked(held_out=1) == ["explain", "detect", "detect"], "the verification shows the same spans"
    assert asked(seed=1) == asked(spans=5) == asked(OtherChat()) == ["explain", "verify"]
    assert asked(ScriptedChat(prompt_format="text"), prompt_format="text") == ["explain", "verify"]
    assert asked(NamelessChat()) == asked(NamelessChat()) == ["explain", "verify"]


def test_a_question_is_asked_once_for_each_attempt_and_equal_questions_once() -> None:
    chat = ScriptedChat()
    question = Question(ask_explanation([MarkedSpan("a ", "river")], "json"), read_detection)
    asked = CachedChat(chat, None, seed=0, attempts=2, batch_size=8)
    answers = asked.ask([question, question], max_tokens=5)
    assert [answer.reason[:24] for answer in answers] == ["it is neither yes nor no"] * 2
    assert len(chat.asked) == 2
    assert asked.ask([], max_tokens=5) == []


def test_an_endpoint_keeps_each_answer_as_it_comes(tmp_path) -> None:
    with FlakyServer(rate=0) as server:
        asked = CachedChat(EndpointChat("m", base_url=server.url), tmp_path, seed=3, attempts=1, batch_size=8)
        question = Question([{"role": "user", "content": "Is it so?"}], read_detection)
        asked.ask([question], max_tokens=5)
        own = EndpointChat("m", base_url=server.url, cache_dir=tmp_path)
        own.complete([question.conversation], temperature=0.0, seed=3, max_tokens=5)
    assert own.spent.requests == 0
    assert own.spent.from_cache == 1


def test_shuffled_explanations_score_no_better_than_chance() -> None:
    dictionary, chat = explain(make_dictionary(8), ScriptedChat(), held_out=4), ScriptedChat()
    true = detect(dictionary, chat, held_out=4)
    assert {score for score, _ in true.values()} == {1.0}
    assert {answers for _, answers in true.values()} == {8}
    shuffled = detect(dictionary, chat, held_out=4, shuffled=True)
    assert np.mean([score for score, _ in shuffled.values()]) < 0.6
    with pytest.raises(ValueError, match="two or more"):
        detect(dictionary, chat, features=[1], shuffled=True)


def test_features_are_rated_by_the_tasks_guideline_and_unverified_ones_skipped(tmp_path) -> None:
    explained = GOOD | {"explanation": "x"}
    dictionary = explain(make_dictionary(), ScriptedChat(), held_out=0).updated(
        {
            2: {"verification": "no"},
            3: {"verification": "failed"},
            4: {"explanation": None, "explanation_state": "cannot tell"},
            5: {"explanation": None, "explanation_state": "failed"},
            6: explained | {"ratings": [{"task": "a", "rating": "no", "reason": "r"}], "explanation": "nothing"},
        }
    )
    script = {("rate", 6): ["{", "I cannot rate this", "[]"]}
    chat = ScriptedChat(script)
    with pytest.warns(UserWarning, match="toxicity: of 6 features 4 skipped .* and 1 failed") as warned:
        found = rate(dictionary, task="toxicity", chat=chat)
    for reason in ("verification was no", "verification failed", "that cannot be told", "with a failed explanation"):
        assert re.search(rf"1 [a-z ]*{reason}", str(warned[0].message)), reason
    assert [asked[:2] for asked in chat.asked] == [("rate", 1)] + [("rate", 6)] * 3
    assert get_task("toxicity").guideline.strip() in chat.prompts[0]
    assert found[1]["ratings"] == [{"task": "toxicity", "rating": "yes", "reason": "it fits"}]
    assert [(r["task"], r["rating"]) for r in found[6]["ratings"]] == [("a", "no"), ("toxicity", "failed")]
    assert found.task_features("toxicity").tolist() == [1]
    assert [found[i] == dictionary[i] for i in (2, 3, 4, 5, 7)] == [True] * 5
    assert json.loads(found[1]["settings"])["rate"]["toxicity"]["chat"] == "ScriptedChat"

    own = Task("kindness", "Kind words matter.", "messages", "all", {"prompt": "a question", "completion": "an answer"})
    found = rate(
        found, task=own, chat=ScriptedChat({("rate", 1): ['{"rating": "maybe", "reason": "a"}']}), features=[1]
    )
    assert {r["task"]: r["rating"] for r in found[1]["ratings"]} == {"kindness": "maybe", "toxicity": "yes"}
    assert set(json.loads(found[1]["settings"])["rate"]) == {"kindness", "toxicity"}
    # A new explanation takes its ratings with it.
    assert explain(found, ScriptedChat(), features=[1], held_out=0)[1]["ratings"] == []
    with pytest.raises(KeyError, match="feature 99"):
        rate(found, task="toxicity", chat=chat, features=[99])
    with pytest.raises(ValueError, match="no task 'toxic'"):
        rate(found, task="toxic", chat=chat)
