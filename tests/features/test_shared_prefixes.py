import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_level_tokenizer
from tiny_models import FAMILIES, assert_same_features, slow_rows, tiny_model, tiny_sae

from hf_fac.features.featurizer import SAEFeaturizer
from hf_fac.inputs.rows import RowError

pytestmark = pytest.mark.filterwarnings("ignore:The SAE leaves")

WORDS = ["The", "river", "rises", "in", "the", "hills", "north", "of", "a", "town", "and", "reaches", "its", "sea"]
SYSTEM = {"role": "system", "content": "You are a helpful assistant that answers briefly and politely."}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


def words(rng, n):
    return " ".join(rng.choice(WORDS, n))


def random_rows(kind, n, seed):
    """Rows of which many begin alike: some are repeated, some are beginnings of others."""
    rng = np.random.default_rng(seed)
    heads = [words(rng, size) for size in (5, 8, 10)]

    def text():
        return f"{rng.choice(heads)} {words(rng, rng.integers(1, 4))}"

    def answer():
        return [{"role": "assistant", "content": words(rng, rng.integers(1, 4))}]

    rows = []
    for _ in range(n):
        if kind == "text":
            rows.append({"text": text() if rng.random() < 0.8 else str(rng.choice(heads))})
        elif kind == "prompt, completion":
            whole = text()
            cut = int(rng.integers(1, len(whole)))
            rows.append({"prompt": whole[:cut], "completion": whole[cut:]})
        else:
            prompt = [SYSTEM, {"role": "user", "content": text()}]
            rows.append({"prompt": prompt, "chosen": answer(), "rejected": answer()})
    return rows


def check(featurizer, family, rows, **reader):
    """Features, values, positions, tokens and sinks are those of each row read alone."""
    reading = featurizer.read(rows, positions=True)
    own = featurizer.settings
    expected = slow_rows(
        featurizer.model, family, featurizer.tokenizer, featurizer.sae, rows, activation=own.activation,
        sink_norm=own.sink_norm, center=own.center, **{"max_length": 256, **reader},
    )  # fmt: skip
    found = reading.activations
    assert_same_features(found, [best for best, _, _ in expected], floor=featurizer.keep_above)
    for number, (best, _, _) in enumerate(expected):
        start, end = found.indptr[number : number + 2]
        entries = zip(found.indices[start:end], found.data[start:end], reading.positions[start:end], strict=True)
        # Of two tokens with nearly the same activation, rounding decides which is the first.
        wrong = [f for f, value, at in entries if f in best and best[f][1] != at]
        assert len(wrong) <= 0.02 * len(best) + 1
    assert reading.tokens.tolist() == [tokens for _, tokens, _ in expected]
    assert reading.sinks == sum(sinks for _, _, sinks in expected)


class Tokens:
    """Counts the tokens that the first block of a model reads."""

    def __init__(self, model):
        self.n = 0
        model.model.layers[0].register_forward_hook(self)

    def __call__(self, _module, args, _output):
        self.n += args[0].shape[:2].numel()


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 16), st.sampled_from([1, 100, 1000]))
@pytest.mark.parametrize("kind", ["text", "prompt, completion", "preference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_begin_alike_have_the_features_of_rows_read_alone(family, kind, seed, n, batch_tokens):
    window = {"sliding_window": 64} if family in ("mistral", "gemma2", "gemma3") else {}
    featurizer = SAEFeaturizer(
        tiny_model(family, **window), byte_level_tokenizer(), tiny_sae(), batch_tokens=batch_tokens, sink_norm=60.0
    )
    check(featurizer, family, random_rows(kind, n, seed))


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6))
@pytest.mark.parametrize("pool_over", ["user", "assistant", "completion"])
def test_what_counts_is_decided_for_each_row(pool_over, seed):
    for kind in ("prompt, completion", "preference"):
        settings = {"pool_over": pool_over, "side": "rejected"}
        featurizer = SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae("standard"), **settings)
        check(featurizer, "llama", random_rows(kind, 12, seed), **settings)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6))
@pytest.mark.parametrize(
    "reader", [{"max_length": 40}, {"max_length": 40, "stride": 30}, {"max_length": 25, "stride": 3}]
)
def test_rows_cut_or_read_in_windows_share_too(reader, seed):
    featurizer = SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae(), **reader)
    check(featurizer, "llama", random_rows("text", 12, seed), **reader)


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
def test_a_system_prompt_of_hundreds_of_rows_is_read_once(architecture, tokenizer):
    rng = np.random.default_rng(0)
    rows = [{"messages": [SYSTEM, {"role": "user", "content": f"{number} {words(rng, 6)}"}]} for number in range(60)]
    featurizer = SAEFeaturizer(tiny_model(), tokenizer, tiny_sae(architecture), keep_above=0.1)
    featurizer.read(rows)
    tokens = Tokens(featurizer.model)
    reading = featurizer.read(rows, positions=True)
    lengths = [len(ids) for ids in featurizer.reader(rows).ids]
    assert tokens.n < 0.7 * sum(lengths)
    for number in range(0, 60, 7):
        alone = featurizer.read(rows[number : number + 1])
        assert alone.tokens[0] == reading.tokens[number]
        np.testing.assert_allclose(
            reading.activations[[number]].toarray(), alone.activations.toarray(), rtol=1e-3, atol=1e-4
        )


def test_both_sides_are_those_read_one_after_the_other_and_the_prompt_is_read_once(tokenizer):
    rows = random_rows("preference", 20, 1)
    featurizer = SAEFeaturizer(tiny_model(), tokenizer, tiny_sae())
    one_side = {side: featurizer.with_settings(side=side) for side in ("chosen", "rejected")}
    expected = {side: one.read(rows) for side, one in one_side.items()}
    tokens = Tokens(featurizer.model)
    found = featurizer.read_sides(rows)
    together, tokens.n = tokens.n, 0
    for one in one_side.values():
        one.read(rows)
    assert together < 0.8 * tokens.n
    for reading, side in zip(found, expected, strict=True):
        want = expected[side]
        np.testing.assert_allclose(reading.activations.toarray(), want.activations.toarray(), rtol=1e-4, atol=1e-5)
        assert reading.tokens.tolist() == want.tokens.tolist()
        assert (reading.sinks, reading.truncated) == (want.sinks, want.truncated)


def test_a_side_that_cannot_be_read_is_named_or_skipped_on_its_own(tokenizer):
    rows = random_rows("preference", 3, 1)
    rows[1] = rows[1] | {"rejected": [{"role": "assistant", "content": 7}]}
    with pytest.raises(RowError, match="Row 11 cannot be read"):
        SAEFeaturizer(tiny_model(), tokenizer, tiny_sae()).read_sides(rows, first_row=10)
    empty = [{"chosen": "some text", "rejected": ""}, {"chosen": "some text", "rejected": "some words"}]
    chosen, rejected = SAEFeaturizer(tiny_model(), tokenizer, tiny_sae()).read_sides(empty)
    assert chosen.skipped == {}
    assert list(rejected.skipped) == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other_that_begins_alike(value, tokenizer):
    rng = np.random.default_rng(0)
    head = words(rng, 10)
    rows = [f"{head} {words(rng, 3)}{end}" for end in ("", " x", "", " xx", "")]
    clean = SAEFeaturizer(tiny_model(), tokenizer, tiny_sae())(rows)
    broken = tiny_model()
    with torch.no_grad():
        broken.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("x")] = value
    with pytest.raises(RowError, match="Row 1 cannot be measured"):
        SAEFeaturizer(broken, tokenizer, tiny_sae()).read(rows)
    reading = SAEFeaturizer(broken, tokenizer, tiny_sae(), on_error="skip").read(rows)
    assert sorted(reading.skipped) == [1, 3]
    kept = [0, 2, 4]
    np.testing.assert_allclose(reading.activations[kept].toarray(), clean[kept].toarray(), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_continue_a_prefix_reads_whole_rows(tokenizer):
    rows = random_rows("text", 12, 0)
    model = tiny_model()
    # Positions that the caller gives are not used: the second node of a line would be in the wrong place.
    forward = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: forward(
        x, torch.arange(x.shape[1]).expand(len(position_ids), -1)
    )
    featurizer = SAEFeaturizer(model, tokenizer, tiny_sae())
    tokens = Tokens(model)
    check(featurizer, "llama", rows)
    assert featurizer._parts().shares is False
    assert tokens.n > 0
