"""What a run was paid for is kept and told as it was: rows that count, rounds that add up, failures on the way."""

from __future__ import annotations

import functools
import json
import threading

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from tiny import CHATML, byte_level_tokenizer
from tiny_models import tiny_model
from trainer_runs import (
    THRESHOLD,
    TinySynthesizer,
    assert_same_run,
    assert_same_weights,
    callback_for,
    classifier,
    dpo,
    examples,
    featurizer_of,
    interrupted,
    plain,
    real_synthesizer,
    reward,
    sft,
    tokenized,
    trained,
    with_new,
)

from hf_fac import FeatureCoverage
from hf_fac.training.coverage_round import CoverageRound
from hf_fac.training.processes import ProcessGroup
from hf_fac.training.summary import write_enlarged
from hf_fac.training.trainers import training_set_of

pytestmark = pytest.mark.filterwarnings("ignore")
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def frozen(kind, **settings):
    """A synthesizer whose models are not the one in training."""
    return TinySynthesizer(featurizer_of(tiny_model(), byte_level_tokenizer()), kind, **settings)


def enlarged(folder) -> list[dict]:
    return pq.read_table(folder / "_fac_synthesis" / "enlarged.parquet").to_pylist()


def rounds(folder) -> list[dict]:
    return json.loads((folder / "_fac_synthesis" / "report.json").read_text())


def in_parts(message):
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


@pytest.mark.parametrize("extra", [{"tool_calls": None}, {"name": None, "weight": 1.0}, {"thinking": ["a"]}])
def test_keys_of_the_seeds_messages_that_new_rows_lack_are_null_in_the_whole_set(extra, tmp_path):
    rows = [{"messages": [{**m, **extra} for m in row["messages"]]} for row in examples("messages", 3)]
    new = examples("messages", 2, start=50).add_column("fac_feature", [4, 5])
    write_enlarged(Dataset.from_list(rows).add_column("source", [None] * 3), new, tmp_path / "all.parquet")
    found = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert [row["messages"] for row in found[:3]] == [row["messages"] for row in rows]
    missing = dict.fromkeys(extra)
    assert [row["messages"] for row in found[3:]] == [[{**m, **missing} for m in row["messages"]] for row in new]
    assert [row["fac_feature"] for row in found] == [None, None, None, 4, 5]


@pytest.mark.parametrize("change", [lambda message: {**message, "tool_calls": None}, in_parts])
def test_a_seed_whose_messages_hold_something_else_is_trained_on_all_the_same(change, tmp_path, recwarn):
    text = "(message['content'] if message['content'] is string else message['content'][0]['text'])"
    rows = Dataset.from_list([{"messages": list(map(change, row["messages"]))} for row in examples("messages", 7)])
    trainer = sft(rows, tmp_path, chat_template=CHATML.replace("message['content']", text))
    callback = callback_for(trainer, "messages")
    trained(trainer)
    assert len(trainer.train_dataset) == 7 + len(callback.new_rows) > 7
    told = [str(warning.message) for warning in recwarn if "enlarged.parquet" in str(warning.message)]
    if change is in_parts:
        assert len(told) == 1, "a text is no list of parts"
    else:
        assert not told
        assert [row["messages"] for row in enlarged(tmp_path)[:7]] == list(rows["messages"])


@pytest.mark.parametrize("kind", ["implicit_preference", "plain implicit_preference"])
def test_pairs_that_the_trainer_split_are_whole_in_the_whole_set(kind, tmp_path):
    rows = examples(kind, 7)
    trainer = dpo(rows, tmp_path)
    callback = callback_for(trainer, kind)
    trained(trainer)
    whole = [*rows.to_list(), *callback.new_rows.select_columns(["chosen", "rejected"]).to_list()]
    found = enlarged(tmp_path)
    assert "prompt" not in found[0]
    for row, expected in zip(found, whole, strict=True):
        for side in ("chosen", "rejected"):
            # The trainer ends a plain text in its own columns too.
            text = row[side].removesuffix("<|im_end|>") if isinstance(row[side], str) else row[side]
            assert text == expected[side]


def both(folder, runs):
    """The errors of two processes, each of which runs with its `ProcessGroup`."""
    errors = [None, None]

    def process(rank):
        try:
            runs[rank](ProcessGroup(folder, rank=rank, world_size=2, token="t"))
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    return errors


@pytest.mark.parametrize("what", ["training set", "anchor set", "featurizer's model"])
def test_processes_with_other_rows_or_models_stop_before_they_measure(what, tmp_path):
    runs, read = [], []
    for rank in range(2):
        synthesizer = frozen("messages")
        synthesizer.featurizer.read = read.append
        rows, anchor = examples("messages", 7), examples("messages", 9, start=1000)
        if what == "training set":
            rows = rows.shuffle(seed=rank)
        if what == "anchor set":
            anchor = anchor.shuffle(seed=rank)
        if what == "featurizer's model":
            synthesizer.featurizer.model.config._name_or_path = f"/scratch/node-{rank}/model"
        training_set = training_set_of(sft(rows, tmp_path), synthesizer.task)

        def run(group, synthesizer=synthesizer, anchor=anchor, training_set=training_set):
            CoverageRound(
                synthesizer=synthesizer, anchor=anchor, training_set=training_set, group=group, threshold=THRESHOLD
            ).run()

        runs.append(run)
    for error in both(tmp_path, runs):
        assert isinstance(error, RuntimeError)
        assert f"The processes differ in their {what}: " in str(error)
        assert "shuffle with a seed" in str(error)
        assert ("/scratch/node-0/model, /scratch/node-1/model" in str(error)) == ("model" in what)
    assert not read


@pytest.mark.parametrize("refresh", [SLOW("start"), "epoch"])
def test_a_resumed_run_that_fails_once_does_not_go_on_without_its_rows(refresh, tmp_path):
    rows, extra = examples("messages", 7), {"refresh": refresh, "max_samples": 8}
    settings = {"save_strategy": "epoch", "num_train_epochs": 3}
    whole = sft(rows, tmp_path, **settings)
    callback_for(whole, "messages", **extra)
    trained(whole)
    trainer = sft(rows, tmp_path, **settings)
    callback_for(trainer, "messages", **extra)
    prepare, failures = trainer._prepare_dataset, [OSError("no space left")]

    def fails_once(*args):
        if failures:
            raise failures.pop()
        return prepare(*args)

    trainer._prepare_dataset = fails_once
    checkpoint = str(min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
    with pytest.raises(OSError, match="no space left"):
        trained(trainer, resume_from_checkpoint=checkpoint)
    trained(trainer, resume_from_checkpoint=checkpoint)
    assert_same_weights(trainer, whole)


def test_only_rows_that_the_trainer_keeps_count(tmp_path):
    rows, anchor = examples("preference", 7), examples("preference", 40, start=1000)
    trainer = reward(rows, tmp_path / "one", max_length=60)
    seed, tokenizer = len(trainer.train_dataset), trainer.processing_class
    featurizer = featurizer_of(reward(rows, tmp_path / "two").model.eval(), tokenizer)
    callback = callback_for(trainer, "preference", anchor=anchor)
    trained(trainer)

    def fits(row):
        sides = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        return all(len(tokenizer.apply_chat_template(side, return_dict=False)) <= 60 for side in sides)

    def coverage(rows):
        return FeatureCoverage.from_activations(featurizer(rows), measurement=featurizer.measurement)

    new = callback.new_rows.select_columns(["prompt", "chosen", "rejected"]).to_list()
    kept = [row for row in new if fits(row)]
    assert 0 < len(kept) == len(trainer.train_dataset) - seed < len(new)
    fac = {
        len(added): coverage([row for row in rows if fits(row)] + added)
        .compare(coverage(anchor.to_list()), threshold=THRESHOLD)
        .fac
        for added in ([], kept, new)
    }
    numbers = callback.summary
    assert (numbers["fac/before"], numbers["fac/after"]) == (fac[0], fac[len(kept)])
    assert fac[len(kept)] < fac[len(new)]
    assert numbers["fac/dropped"] == len(new) - len(kept)
    assert numbers["fac/activated"] <= len(kept)
    assert [row["chosen"] for row in enlarged(tmp_path / "one")[-len(kept) :]] == [row["chosen"] for row in kept]
    assert len(enlarged(tmp_path / "one")) == len(trainer.train_dataset)
    trainer.create_model_card()
    card = (tmp_path / "one" / "README.md").read_text()
    assert f"{len(kept)} rows of the training set were synthesized" in card
    assert f"({len(new) - len(kept)} more were dropped by the trainer's own filters)" in card


CUT = {
    "cut": (sft, "messages", {"max_length": 24}, {}, True),
    "cut alike": (sft, "messages", {"max_length": 24}, {"max_length": 24}, False),
    "measured in windows": (sft, "messages", {"max_length": 24}, {"max_length": 24, "stride": 4}, True),
    "long enough": (sft, "messages", {"max_length": 200}, {}, False),
    "without a limit": (sft, "messages", {"max_length": None}, {}, False),
    "packed": (sft, "messages", {"packing": True, "max_length": 48, "padding_free": False}, {}, True),
    "packed, nothing lost": (
        sft, "messages", {"packing": True, "max_length": 48, "padding_free": False, "packing_strategy": "wrapped"}, {},
        False,
    ),
    "pairs": (dpo, "preference", {"max_length": 45}, {}, True),
    "long pairs are dropped": (reward, "preference", {"max_length": 60}, {}, False),
    "classes": (plain, "labelled", {}, {}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", [SLOW(c) if c in ("cut alike", "without a limit", "long enough") else c for c in CUT])
def test_a_warning_says_that_more_is_measured_than_trained_on(case, tmp_path, recwarn):
    make, kind, settings, reading, warns = CUT[case]
    rows = examples(kind, 7)
    trainer = make(rows, tmp_path, **settings)
    synthesizer = TinySynthesizer(featurizer_of(trainer.model, trainer.processing_class, **reading), kind)
    prepare = {"prepare": tokenized} if make is plain else {}
    callback_for(trainer, kind, synthesizer=synthesizer, train_dataset=rows if make is not reward else None, **prepare)
    told = [str(warning.message) for warning in recwarn if "cuts rows" in str(warning.message)]
    assert len(told) == warns
    assert all(f"max_length={settings['max_length']}" in text for text in told)


@pytest.mark.parametrize("at", [4, SLOW(None)])
def test_the_numbers_of_a_growing_run_are_those_of_all_its_rounds(at, tmp_path):
    rows, settings, extra = examples("messages", 7), {"num_train_epochs": 3}, {"refresh": "epoch", "max_samples": 9}
    if at is None:
        trainer = sft(rows, tmp_path, **settings)
        callback = callback_for(trainer, "messages", **extra)
        trained(trainer)
    else:
        trainer, callback, _ = interrupted(sft, rows, tmp_path, "messages", at=at, settings=settings, **extra)
    found, numbers = rounds(tmp_path), callback.summary
    assert [entry["epoch"] for entry in found] == [0, 1, 2]
    assert numbers["fac/before"] == found[0]["before"]["fac"] < found[1]["before"]["fac"]
    assert numbers["fac/missing"] == len(found[0]["before"]["missing"])
    assert numbers["fac/after"] == found[-1]["fac/after"]
    assert numbers["fac/synthesized"] == numbers["fac/new_rows"] == len(callback.new_rows) == 9
    assert numbers["fac/requests"] == sum(entry["synthesis"]["requests"] for entry in found) == 9
    assert numbers["fac/completion_tokens"] == 90
    assert numbers["fac/activated"] == len({feature for entry in found for feature in entry["activated"]})
    assert numbers["fac/seconds"] == pytest.approx(sum(entry["seconds"] for entry in found))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "9 rows of the training set were synthesized for" in card
    assert f"went from {numbers['fac/before']:.3f} to {numbers['fac/after']:.3f}" in card


@pytest.mark.parametrize(("at", "trains"), [(None, True), (4, False), SLOW(None, False), SLOW(4, True)])
def test_exhausted_features_are_written_for_again_only_where_a_model_has_changed(at, trains, tmp_path):
    rows, settings, extra = examples("messages", 7), {"num_train_epochs": 3}, {"refresh": "epoch", "max_samples": 18}
    synthesizers = []

    def make(rows, folder, **settings):
        trainer = sft(rows, folder, **settings)
        tokenizer = trainer.processing_class
        synthesizers.append(TinySynthesizer(featurizer_of(trainer.model if trains else tiny_model(), tokenizer),
                                            "messages", words=2))  # fmt: skip
        return trainer

    def with_callback(trainer):
        return callback_for(trainer, "messages", synthesizer=synthesizers[-1], **extra)

    if at is None:
        with_callback(trainer := make(rows, tmp_path, **settings))
        trained(trainer)
    else:
        interrupted(make, rows, tmp_path, "messages", at=at, settings=settings, with_callback=with_callback)
    asked = [set(features) for synthesizer in synthesizers for features in synthesizer.asked]
    first, *_ = exhausted = [set(entry["exhausted"]) for entry in rounds(tmp_path)]
    assert len(exhausted) == 3
    assert first
    assert any(first & features for features in asked[1:]) == trains


def test_features_whose_rows_the_trainer_dropped_are_not_written_for_again(tmp_path):
    trainer = reward(examples("preference", 7), tmp_path, max_length=60, num_train_epochs=3)
    featurizer = featurizer_of(classifier().eval(), trainer.processing_class)
    callback = callback_for(trainer, "preference", synthesizer=TinySynthesizer(featurizer, "preference"),
                            refresh="epoch", max_samples=40)  # fmt: skip
    trained(trainer)
    assert callback.summary["fac/dropped"] > 0
    assert len(set(callback.synthesizer.written)) == len(callback.synthesizer.written)


def test_what_was_written_before_a_failure_is_kept(tmp_path):
    rows = examples("messages", 7)
    trainer = sft(rows, tmp_path / "one")
    synthesizer = frozen("messages", fails_in=0, fails_after=3)
    callback = callback_for(trainer, "messages", synthesizer=synthesizer, on_error="warn")
    with pytest.warns(UserWarning, match="the run has 3 new rows: the endpoint is gone"):
        trained(trainer)
    assert list(callback.new_rows["fac_feature"]) == synthesizer.written
    assert callback.summary["fac/synthesized"] == callback.summary["fac/requests"] == 3
    assert callback.summary["fac/exhausted"] == 0
    [entry] = rounds(tmp_path / "one")
    assert entry["failure"] == "the endpoint is gone"
    assert entry["synthesis"]["requests"] == 3
    assert_same_run(trainer, trained(sft(with_new(rows, callback.new_rows), tmp_path / "other")))


def test_a_round_writes_for_the_features_that_the_synthesizer_aims_at(tmp_path):
    trainer = sft(examples("messages", 7), tmp_path)
    synthesizer = frozen("messages")
    synthesizer.wanted = lambda report: report.covered[:2]
    callback_for(trainer, "messages", synthesizer=synthesizer)
    trained(trainer)
    assert synthesizer.asked == [rounds(tmp_path)[0]["before"]["covered"][:2]]


@pytest.mark.parametrize("fails", [False, True])
def test_once_max_seconds_are_spent_nothing_is_written(fails, tmp_path):
    trainer = sft(examples("messages", 7), tmp_path, num_train_epochs=3)
    synthesizer = frozen("messages", fails_in=0 if fails else None)
    callback = callback_for(trainer, "messages", synthesizer=synthesizer, refresh="epoch", max_samples=9,
                            max_seconds=1e-3, on_error="warn")  # fmt: skip
    trained(trainer)
    assert synthesizer.calls == 1, "measuring for the first round took longer"
    assert len(callback.new_rows) == (0 if fails else 3)
    assert len(rounds(tmp_path)) == 3


def test_texts_that_the_chat_lost_stop_no_run(tmp_path):
    trainer = sft(examples("prompt_completion", 7), tmp_path)
    callback = callback_for(
        trainer, "prompt_completion", synthesizer=real_synthesizer(trainer, "prompt_completion", loses={3})
    )
    trained(trainer)
    assert len(callback.new_rows) > 0
    [entry] = rounds(tmp_path)
    assert entry["failure"] is None
    assert entry["synthesis"]["ended"] is None


def test_a_round_that_raises_adds_no_rows(tmp_path):
    class Broken(TinySynthesizer):
        def synthesize(self, *args, **kwargs):
            self.calls += 1
            raise OSError(f"gone {self.calls}")

    trainer = sft(examples("messages", 7), tmp_path)
    synthesizer = Broken(featurizer_of(trainer.model, trainer.processing_class), "messages")
    callback = callback_for(trainer, "messages", synthesizer=synthesizer, on_error="warn")
    with pytest.warns(UserWarning, match="gone 1"):
        trained(trainer)
    assert synthesizer.calls == 1
    assert len(callback.new_rows) == 0


def test_a_run_whose_first_round_failed_can_be_resumed(tmp_path):
    rows, settings = examples("messages", 7), {"save_strategy": "epoch"}
    trainer = sft(rows, tmp_path, **settings)
    callback_for(trainer, "messages", synthesizer=frozen("messages", fails_in=0), on_error="warn")
    trained(trainer)
    resumed = sft(rows, tmp_path, **settings)
    callback = callback_for(resumed, "messages", synthesizer=frozen("messages"), on_error="warn")
    trained(resumed, resume_from_checkpoint=str(min(tmp_path.glob("checkpoint-*"))))
    assert callback.synthesizer.calls == 0
    assert_same_weights(resumed, trainer)


@pytest.mark.parametrize("where", ["measuring", "writing"])
def test_measuring_or_writing_that_takes_all_memory_makes_no_batch_smaller(where, tmp_path):
    trainer = sft(examples("messages", 7), tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4)
    synthesizer = TinySynthesizer(featurizer_of(trainer.model, trainer.processing_class), "messages")
    calls = []

    def out_of_memory(*args, **kwargs):
        calls.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    if where == "measuring":
        synthesizer.featurizer.read = out_of_memory
    else:
        synthesizer.synthesize = out_of_memory
    callback_for(trainer, "messages", synthesizer=synthesizer)
    with pytest.raises(
        RuntimeError, match="Measuring rows or writing samples, not training, ran out of memory"
    ) as found:
        trained(trainer)
    assert isinstance(found.value.__cause__, torch.OutOfMemoryError)
    assert len(calls) == 1
    assert trainer._train_batch_size == 4


@pytest.mark.parametrize(
    ("refresh", "trains_first"), [("start", False), SLOW("epoch", True), SLOW("start", True), SLOW("epoch", False)]
)
def test_another_training_set_than_the_one_that_was_seen_is_refused(refresh, trains_first, tmp_path):
    trainer = sft(examples("messages", 7), tmp_path)
    callback = callback_for(trainer, "messages", refresh=refresh, max_samples=4)
    if trains_first:
        trained(trainer)
    trainer.train_dataset = sft(examples("messages", 12, start=300), tmp_path).train_dataset
    with pytest.raises(ValueError, match="got another training set after the callback was made"):
        trained(trainer)
    assert callback.synthesizer.calls == (0 if not trains_first else 1 if refresh == "start" else 2)


def test_a_folder_that_would_be_pushed_with_the_model_is_refused(tmp_path):
    trainer = sft(examples("messages", 7), tmp_path / "run")
    with pytest.raises(ValueError, match=r"output_dir is .*run/fac, inside the trainer's"):
        callback_for(trainer, "messages", output_dir=tmp_path / "run" / "fac")
    with pytest.raises(ValueError, match="inside the trainer's"):
        callback_for(trainer, "messages", output_dir=tmp_path / "run" / "fac" / "_hidden")
    for folder in (tmp_path / "run", tmp_path / "run" / "_fac" / "one", tmp_path / "other", tmp_path):
        callback = callback_for(trainer, "messages", output_dir=folder)
        assert callback.folder == folder / "_fac_synthesis"
        trainer.remove_callback(callback)


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_distributed_loading_by_transformers"])
def test_a_model_in_parts_neither_measures_nor_writes(flag, tmp_path):
    from hf_fac.chat.local import LocalChat

    trainer = sft(examples("messages", 7), tmp_path)
    setattr(trainer, flag, True)
    own = LocalChat(trainer.model, trainer.processing_class)
    other = LocalChat(tiny_model(), trainer.processing_class)
    measures = TinySynthesizer(featurizer_of(trainer.model, trainer.processing_class), "messages", chat=other)
    for synthesizer in (measures, frozen("messages", chat=own)):
        with pytest.raises(ValueError, match="a model of its own"):
            callback_for(trainer, "messages", synthesizer=synthesizer)
    callback_for(trainer, "messages", synthesizer=frozen("messages", chat=other))


def test_a_report_that_cannot_be_read_is_left_alone_and_ends_no_run(tmp_path):
    trainer = sft(examples("messages", 7), tmp_path)
    callback = callback_for(trainer, "messages")
    callback.folder.mkdir()
    (callback.folder / "report.json").write_text("garbage")
    with pytest.warns(UserWarning, match="has no whole report.json"):
        trained(trainer)
    assert len(trainer.train_dataset) == 7 + len(callback.new_rows) > 7
    assert (callback.folder / "report.json").read_text() == "garbage"


@pytest.mark.parametrize("drops", [False, True])
def test_a_new_row_is_prepared_once_and_read_only_where_a_number_needs_it(drops, tmp_path):
    trainer = reward(examples("preference", 7), tmp_path, max_length=60 if drops else None)
    synthesizer = TinySynthesizer(featurizer_of(classifier().eval(), trainer.processing_class), "preference")
    callback = callback_for(trainer, "preference", synthesizer=synthesizer)
    seed, prepare, read = len(trainer.train_dataset), trainer._prepare_dataset, synthesizer.featurizer.read
    prepared, measured = [], []
    trainer._prepare_dataset = lambda rows, *args: (prepared.append(len(rows)), prepare(rows, *args))[1]
    synthesizer.featurizer.read = lambda rows, **given: (measured.append(len(rows)), read(rows, **given))[1]
    trained(trainer)
    new, kept = len(callback.new_rows), len(trainer.train_dataset) - seed
    assert prepared == [new]
    assert kept < new if drops else kept == new
    # The anchor set, the seed set, each row as it is written, and all of them for the report of the synthesis.
    assert measured == [40, seed, *[1] * new, new, *[kept] * drops]


def test_a_calibrated_delta_stays_that_of_the_first_round(tmp_path):
    trainer = sft(examples("messages", 7), tmp_path, num_train_epochs=3)
    featurizer = featurizer_of(trainer.model, trainer.processing_class)
    synthesizer = TinySynthesizer(featurizer, "messages", threshold=None)
    callback_for(trainer, "messages", synthesizer=synthesizer, refresh="epoch", max_samples=6)
    trained(trainer)
    first, *later = [entry["before"] for entry in rounds(tmp_path)]
    assert "calibrated on the anchor" in first["threshold_source"]
    assert {found["threshold"] for found in later} == {first["threshold"]}
