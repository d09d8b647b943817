import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from peft import LoraConfig, get_peft_model
from tiny import byte_level_tokenizer
from tiny_models import save_tiny, tiny_model, tiny_sae

from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.features.featurizer import SAEFeaturizer
from hf_fac.features.fingerprint import TensorHash
from hf_fac.features.scoring import COLUMNS, FACScorer
from hf_fac.inputs.rows import RowError

pytestmark = pytest.mark.filterwarnings("ignore:The SAE leaves", "ignore:.*use of fork")

TEXTS = ["", " ", "hello world", "The river rises in the hills north of the town.", "a", "def mean(values):"] * 4
TYPES = {
    "fac_features": List(Value("int32")),
    "fac_activations": List(Value("float32")),
    "fac_tokens": Value("int32"),
    "fac_measurement": Value("string"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def featurizer(folders):
    return SAEFeaturizer.from_pretrained(str(folders / "model"), sae=str(folders / "sae"))


@pytest.fixture
def dataset():
    return Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})


def check(scored, featurizer, texts=TEXTS):
    """The columns hold what the featurizer reads."""
    expected = featurizer.read(texts)
    rows = list(scored)
    assert len(rows) == len(texts)
    for number, row in enumerate(rows):
        want = expected.activations[[number]]
        assert row["text"] == texts[number]
        assert list(row["fac_features"]) == want.indices.tolist()
        np.testing.assert_allclose(row["fac_activations"], want.data, rtol=1e-4, atol=1e-5)
        assert row["fac_tokens"] == expected.tokens[number]
        assert json.loads(row["fac_measurement"]) == featurizer.measurement


# Every kind of data set


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_map_adds_typed_columns_also_where_the_first_rows_are_empty(batch_size, featurizer, dataset):
    scored = dataset.map(FACScorer(featurizer), batched=True, batch_size=batch_size, writer_batch_size=2)
    assert scored.features == Features({"text": Value("string"), "number": Value("int64"), **TYPES})
    check(scored, featurizer)
    assert scored["number"][:] == list(range(len(TEXTS)))


def test_the_types_hold_where_no_row_has_a_feature(featurizer):
    dataset = Dataset.from_dict({"text": ["", " "]})
    assert dataset.map(FACScorer(featurizer), batched=True).features == Features({"text": Value("string"), **TYPES})


def test_map_works_on_every_split_of_a_dict(featurizer, dataset):
    scored = DatasetDict({"train": dataset, "test": dataset.select(range(3))}).map(FACScorer(featurizer), batched=True)
    check(scored["train"], featurizer)
    check(scored["test"], featurizer, TEXTS[:3])


def test_a_stream_is_scored_and_knows_its_columns(featurizer, dataset):
    stream = dataset.to_iterable_dataset(num_shards=3)
    assert isinstance(stream, IterableDataset)
    scored = stream.map(FACScorer(featurizer), batched=True, batch_size=5)
    check(scored, featurizer)
    typed = stream.map(FACScorer(featurizer), batched=True, batch_size=5, features=FACScorer.features(stream.features))
    assert typed.features == Features({**dataset.features, **TYPES})
    check(typed, featurizer)


def test_coverage_of_a_scored_stream_is_that_of_the_data_set(featurizer, dataset):
    stream = dataset.to_iterable_dataset(num_shards=3).map(FACScorer(featurizer), batched=True, batch_size=5)
    streamed = FeatureCoverage.from_dataset(stream)
    whole = FeatureCoverage.from_dataset(dataset.map(FACScorer(featurizer), batched=True))
    assert (streamed.rows, streamed.rows_without_tokens) == (whole.rows, whole.rows_without_tokens) == (24, 8)
    np.testing.assert_allclose(streamed.maximum, whole.maximum, rtol=1e-4, atol=1e-5)
    assert streamed.measurement == whole.measurement


def test_a_stream_without_features_says_so():
    stream = IterableDataset.from_generator(lambda: iter([{"text": "hello"}]))
    with pytest.raises(ValueError, match="does not know its features"):
        FACScorer.features(stream.features)


def test_features_names_the_columns_that_map_makes(featurizer, dataset):
    features = FACScorer.features(dataset.features)
    assert features == FACScorer(featurizer).features(dataset.features)
    assert tuple(features)[-4:] == COLUMNS
    scored = dataset.map(FACScorer(featurizer), batched=True, features=features)
    assert scored.features == features
    check(scored, featurizer)


def test_several_processes_load_their_own_and_give_the_same(featurizer, dataset):
    # Threads that have worked do not survive a fork.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)
        for with_rank in (False, True):
            scored = dataset.map(FACScorer(featurizer), batched=True, num_proc=2, with_rank=with_rank)
            assert scored.features == Features({"text": Value("string"), "number": Value("int64"), **TYPES})
            check(scored, featurizer)
    finally:
        torch.set_num_threads(threads)


def test_conversations_and_other_columns_pass_through(featurizer):
    messages = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in TEXTS]
    dataset = Dataset.from_dict({"messages": messages, "source": ["x"] * len(TEXTS)})
    scored = dataset.map(FACScorer(featurizer), batched=True)
    expected = featurizer(list(dataset))
    assert scored["messages"][:] == messages
    assert list(scored["fac_features"]) == [expected[[i]].indices.tolist() for i in range(len(TEXTS))]


def test_rows_that_were_scored_before_are_scored_again(featurizer, dataset):
    old = dataset.map(FACScorer(SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae(seed=4))), batched=True)
    assert old["fac_features"][2] != featurizer(TEXTS[2:3]).indices.tolist()
    check(old.map(FACScorer(featurizer), batched=True), featurizer)


def test_a_data_set_without_rows_stays_as_it_is(featurizer, dataset):
    assert len(dataset.select([]).map(FACScorer(featurizer), batched=True)) == 0
    empty = FACScorer(featurizer)({"text": []})
    assert {name: len(column) for name, column in empty.items()} == dict.fromkeys(COLUMNS, 0)


def test_a_row_that_cannot_be_read_stops_the_map_or_is_skipped(featurizer):
    dataset = Dataset.from_dict({"text": ["hello", None, "world"]})
    with pytest.raises(RowError, match="Row 1") as error:
        dataset.map(FACScorer(featurizer), batched=True)
    assert error.value.__notes__ == [
        "The row is counted in its batch; datasets.map tells its number with with_indices=True."
    ]
    with pytest.raises(RowError, match="Row 1") as error:
        dataset.map(FACScorer(featurizer), batched=True, with_indices=True)
    assert not hasattr(error.value, "__notes__")
    skipping = FACScorer(SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae(), on_error="skip"))
    assert dataset.map(skipping, batched=True)["fac_tokens"][1] == 0


def test_map_without_batched_is_refused(featurizer, dataset):
    with pytest.raises(TypeError, match="batched=True"):
        dataset.map(FACScorer(featurizer))


# The cache of map


def hashes(change=None, **settings):
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    if change is not None:
        model, tokenizer = change(model, tokenizer)
    return Hasher.hash(FACScorer(SAEFeaturizer(model, tokenizer, tiny_sae(), **settings)))


def trained(model, tokenizer):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    optimizer.step()
    return model, tokenizer


def edited(model, tokenizer):
    model.model.layers[1].self_attn.o_proj.weight.data[3, 4] += 1e-3
    return model, tokenizer


def adapted(model, tokenizer):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"])), tokenizer


def another_template(model, tokenizer):
    tokenizer.chat_template += "\n"
    return model, tokenizer


@pytest.mark.parametrize("change", [trained, edited, adapted, another_template])
def test_another_model_or_template_is_computed_anew(change):
    assert hashes(change) != hashes()
    assert hashes() == hashes()


@pytest.mark.parametrize("settings", [{"activation": "relu"}, {"keep_above": 1.0}, {"pool_over": "user"}])
def test_another_setting_is_computed_anew(settings):
    assert hashes(**settings) != hashes()


def test_rows_that_lack_a_column_of_today_are_computed_anew(monkeypatch):
    before = hashes()
    monkeypatch.setattr("hf_fac.features.scoring.COLUMNS", (*COLUMNS, "fac_new"))
    assert hashes() != before


def test_the_same_scorer_after_a_training_step_has_another_hash():
    featurizer = SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae())
    scorer = FACScorer(featurizer)
    before = Hasher.hash(scorer)
    assert Hasher.hash(scorer) == before
    trained(featurizer.model, None)
    assert Hasher.hash(scorer) != before


@pytest.fixture
def hashed(monkeypatch):
    """Grows whenever the weights are hashed."""
    calls, hash_weights = [], TensorHash.__call__
    monkeypatch.setattr(TensorHash, "__call__", lambda self, tensors: calls.append(1) or hash_weights(self, tensors))
    return calls


@pytest.mark.parametrize("stream", [False, True])
def test_the_weights_are_hashed_once_for_all_batches_of_a_map(stream, dataset, hashed):
    counts = []
    for batch_size in (len(dataset), 3):
        hashed.clear()
        scorer = FACScorer(SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae()))
        list((dataset.to_iterable_dataset() if stream else dataset).map(scorer, batched=True, batch_size=batch_size))
        counts.append(len(hashed))
    assert counts[0] == counts[1]


def test_a_measurement_hashes_the_weights_again_only_after_they_changed(hashed):
    featurizer = SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae())
    first = [featurizer.measurement for _ in range(3)]
    assert len(hashed) == 1
    trained(featurizer.model, None)
    second = [featurizer.measurement for _ in range(3)]
    assert len(hashed) == 2
    assert first[0] == first[2] != second[0] == second[2]
    assert second[0]["fingerprint"] == featurizer.fingerprint()


def test_the_weights_are_hashed_once_for_a_pickle(folders, hashed):
    for featurizer in (
        SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae()),
        SAEFeaturizer.from_pretrained(folders / "model", sae=folders / "sae", device="cpu"),
    ):
        assert featurizer.model is not None
        hashed.clear()
        pickle.dumps(FACScorer(featurizer))
        assert len(hashed) == 1


@pytest.mark.parametrize("way", ["trained", "copied", "adapters"])
def test_rows_scored_after_the_model_changed_say_so_within_a_stream(way, dataset):
    model = tiny_model()
    if way == "adapters":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    featurizer = SAEFeaturizer(model, byte_level_tokenizer(), tiny_sae())
    rows = iter(dataset.to_iterable_dataset().map(FACScorer(featurizer), batched=True, batch_size=4))
    first = json.loads(next(rows)["fac_measurement"])
    assert first == featurizer.measurement
    if way == "trained":
        trained(model, None)
    elif way == "copied":  # as averaged weights are
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data * 1.01)
    else:
        model.base_model.disable_adapter_layers()
    last = json.loads(list(rows)[-1]["fac_measurement"])
    assert last == featurizer.measurement != first


# Going to another process


def test_a_pickled_scorer_carries_names_and_no_weights(featurizer):
    scorer = FACScorer(featurizer)
    pickled = pickle.dumps(scorer)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert pickle.dumps(again) == pickled
    found, expected = again({"text": TEXTS}), scorer({"text": TEXTS})
    for name in COLUMNS:
        for a, b in zip(found[name], expected[name], strict=True):
            assert np.array_equal(a, b)
    assert Hasher.hash(pickle.loads(pickled)) == Hasher.hash(scorer)


def test_a_scorer_of_loaded_objects_refuses_to_work_elsewhere_and_says_what_to_do(dataset):
    scorer = FACScorer(SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae()))
    with pytest.raises(RuntimeError, match=r"made from loaded objects.*from_pretrained"):
        pickle.loads(pickle.dumps(scorer))({"text": ["hello"]})
    with pytest.raises(RuntimeError, match=r"made from loaded objects.*from_pretrained"):
        dataset.map(scorer, batched=True, num_proc=2)


def test_a_scorer_whose_model_was_trained_on_refuses_to_load_the_untrained_one(featurizer):
    trained(featurizer.model, None)
    with pytest.raises(RuntimeError, match="is not the one that was pickled"):
        pickle.loads(pickle.dumps(FACScorer(featurizer)))({"text": ["hello"]})


def test_settings_travel_along(folders):
    featurizer = SAEFeaturizer.from_pretrained(
        folders / "model", sae=folders / "sae", features=[30, 2, 17], keep_above=0.3, device="cpu", dtype=torch.float32
    )
    again = pickle.loads(pickle.dumps(FACScorer(featurizer))).featurizer
    assert again.fingerprint() == featurizer.fingerprint()
    assert (again(TEXTS) != featurizer(TEXTS)).nnz == 0


@pytest.mark.parametrize("num_proc", [None, 2])
def test_with_indices_names_rows_by_their_number_and_leaves_the_rank_alone(num_proc, featurizer, dataset):
    scored = dataset.map(FACScorer(featurizer), batched=True)
    both = dataset.map(
        FACScorer(featurizer), batched=True, batch_size=2, with_indices=True, with_rank=True, num_proc=num_proc
    )
    assert both["fac_features"][:] == scored["fac_features"][:]
    rows = Dataset.from_list([{"text": "a"}] * 5 + [{"text": None}])
    for first_row in (0, 10):
        with pytest.raises(RowError, match=f"Row {first_row + 5} cannot be read"):
            rows.map(
                FACScorer(featurizer), batched=True, batch_size=2, with_indices=True, fn_kwargs={"first_row": first_row}
            )


@pytest.mark.parametrize("columns", ["text", ["text", "text"]])
def test_map_with_input_columns_is_refused_with_the_remedy(columns, featurizer, dataset):
    with pytest.raises(TypeError, match=r"leave input_columns= out of map, and choose columns before it"):
        dataset.map(FACScorer(featurizer), batched=True, input_columns=columns)
