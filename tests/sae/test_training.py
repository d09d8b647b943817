"""Training SAEs on tiny random models: what goes in, what comes out, what a fault leaves behind."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from processes import exit_code_of
from sae_lens import SAE
from tiny import CORPUS, byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_fac.inputs.rows import ConversationReader
from hf_fac.sae.evaluation import evaluate_sae
from hf_fac.sae.loading import fvu
from hf_fac.sae.training import train_sae

LAYER = 1


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    # Token 1, which starts every turn, gets a huge norm: a sink.
    model.model.embed_tokens.weight.data[1] *= 1000
    return model


@pytest.fixture(scope="module")
def rows():
    words = " ".join(CORPUS).split()
    rng = random.Random(0)
    return [{"messages": [{"role": "user", "content": " ".join(rng.choices(words, k=12))}]} for _ in range(120)]


def options(**changes):
    return {"layer": LAYER, "d_sae": 64, "k": 4, "batch_size": 64, "buffer_tokens": 400, "epochs": 2} | changes


@pytest.fixture(scope="module")
def trained(model, tokenizer, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    sae = train_sae(model, tokenizer, Dataset.from_list(rows), output_dir=folder, **options(epochs=6))
    return sae, folder


def content_states(model, tokenizer, rows, sink_norm):
    """The definition, row by row: hidden states of content tokens that are no sinks."""
    states = []
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        content = ConversationReader(tokenizer)([row]).content[0]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER][0]
        states.append(hidden[torch.from_numpy(content) & (hidden.norm(dim=-1) <= sink_norm)])
    return torch.cat(states)


def test_training_explains_far_more_than_an_untrained_sae(trained, model, tokenizer, rows):
    sae, _ = trained
    states = content_states(model, tokenizer, rows[:20], sae.cfg.metadata["hf_fac"]["sink_norm"])
    assert fvu(sae, states) < 0.5


def test_the_saved_sae_opens_in_plain_saelens_and_reads_raw_hidden_states(trained, model, tokenizer, rows):
    sae, folder = trained
    states = content_states(model, tokenizer, rows[:20], sae.cfg.metadata["hf_fac"]["sink_norm"])
    plain = SAE.load_from_disk(folder).requires_grad_(False)
    torch.testing.assert_close(plain.encode(states), sae.encode(states))
    unexplained = (states - plain(states)).square().sum() / (states - states.mean(0)).square().sum()
    assert float(unexplained) == pytest.approx(fvu(sae, states), rel=1e-4)


def test_metadata_says_what_was_measured(trained):
    metadata = json.loads((trained[1] / "cfg.json").read_text())["metadata"]
    own = metadata["hf_fac"]
    assert metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert own["layer"] == LAYER
    assert 0 < own["fvu"] < 0.6
    assert own["l0"] <= 4
    assert 0 <= own["dead_share"] < 1
    assert own["training_tokens"] > 0
    assert own["eval_tokens"] > 0
    assert own["sink_norm"] > 0
    assert sorted(path.name for path in trained[1].iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_sinks_special_and_template_tokens_are_not_trained_on(model, tokenizer, rows, monkeypatch):
    seen = []
    from sae_lens.training.sae_trainer import SAETrainer

    original = SAETrainer.step
    monkeypatch.setattr(SAETrainer, "step", lambda self, batch: (seen.append(batch.clone()), original(self, batch))[1])
    sae = train_sae(
        model, tokenizer, Dataset.from_list(rows), eval_dataset=rows[:5],
        **options(epochs=1, buffer_tokens=10**6, batch_size=1),
    )  # fmt: skip
    expected = content_states(model, tokenizer, rows, sae.cfg.metadata["hf_fac"]["sink_norm"])
    got = torch.cat(seen)
    assert len(got) == len(expected)
    # Inputs are divided by one scale; sorted norms must then match those of the definition.
    ratio = got.norm(dim=-1).sort().values / expected.norm(dim=-1).sort().values
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("epochs", "buffer_tokens"), [(1, 10**6), (3, 10**6), (1, 400), (2, 400)])
def test_hardly_any_row_is_read_more_often_than_there_are_epochs(
    model, tokenizer, rows, monkeypatch, epochs, buffer_tokens
):
    import hf_fac.sae.training as training

    read = []
    original = training.content_states
    monkeypatch.setattr(
        training, "content_states", lambda m, pieces, *a: (read.append(pieces.n_rows), original(m, pieces, *a))[1]
    )
    monkeypatch.setattr(training, "_ROWS_AT_ONCE", 8)
    monkeypatch.setattr(training, "_SCALE_ROWS", 8)
    settings = options(epochs=epochs, buffer_tokens=buffer_tokens)
    train_sae(model, tokenizer, Dataset.from_list(rows), eval_dataset=rows[:5], **settings)
    passes = epochs if buffer_tokens == 400 else 1
    # The rest of a buffer that makes no whole batch is left out, and made up for at the end.
    assert passes * len(rows) - 8 <= sum(read) <= 1.2 * passes * len(rows)


@pytest.mark.parametrize(("buffer_tokens", "in_last_step"), [(400, False), (10**6, False), (10**6, True)])
def test_a_run_that_died_goes_on_and_ends_with_equal_weights(
    model, tokenizer, rows, tmp_path, monkeypatch, buffer_tokens, in_last_step
):
    from sae_lens.training.sae_trainer import SAETrainer

    data, settings = Dataset.from_list(rows), options(epochs=4, buffer_tokens=buffer_tokens, batch_tokens=100)
    whole = train_sae(model, tokenizer, data, output_dir=tmp_path / "whole", **settings)
    steps = whole.cfg.metadata["hf_fac"]["training_tokens"] // 64
    calls, original = [], SAETrainer.step

    def dying(self, batch):
        calls.append(1)
        if len(calls) == (steps if in_last_step else 60):
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(SAETrainer, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        train_sae(model, tokenizer, data, output_dir=tmp_path / "died", **settings)
    assert len(list((tmp_path / "died").glob("sae-training/samples-*"))) == 1
    steps_before = len(calls)
    torch.manual_seed(123)
    resumed = train_sae(model, tokenizer, data, output_dir=tmp_path / "died", **settings)
    # It took up the work at its checkpoint, not at the start.
    assert len(calls) - steps_before <= steps - 40
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0)


def killed_in_step(monkeypatch, n):
    """From now on training dies in its n-th step."""
    from sae_lens.training.sae_trainer import SAETrainer

    original, calls = SAETrainer.step, []

    def dying(self, batch):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(SAETrainer, "step", dying)


def test_a_checkpoint_of_another_run_is_refused(model, tokenizer, rows, tmp_path, monkeypatch):
    killed_in_step(monkeypatch, 70)
    with pytest.raises(KeyboardInterrupt):
        train_sae(model, tokenizer, Dataset.from_list(rows), output_dir=tmp_path, **options())
    for other, changes in ((rows, {"k": 5}), ([*rows[:-1], rows[0]], {})):
        with pytest.raises(ValueError, match="other settings or rows"):
            train_sae(model, tokenizer, Dataset.from_list(other), output_dir=tmp_path, **options(**changes))


def test_what_others_put_into_the_folder_stays(model, tokenizer, rows, tmp_path, monkeypatch):
    theirs = [tmp_path / name for name in ("checkpoint-5/weights", "checkpoint-best/weights", "sae-training/notes")]
    for file in theirs:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    killed_in_step(monkeypatch, 70)
    with pytest.raises(KeyboardInterrupt):
        train_sae(model, tokenizer, Dataset.from_list(rows), output_dir=tmp_path, **options())
    train_sae(model, tokenizer, Dataset.from_list(rows), output_dir=tmp_path, **options())
    assert [file.read_text() for file in theirs] == ["mine"] * 3
    assert [path.name for path in (tmp_path / "sae-training").iterdir()] == ["notes"]


def test_a_second_run_in_the_same_folder_says_so_before_any_work(model, tokenizer, rows, tmp_path, monkeypatch):
    from sae_lens.training.sae_trainer import SAETrainer

    original, told = SAETrainer.step, tmp_path / "told"

    def second_run():
        try:
            train_sae(model, tokenizer, None, layer=1, output_dir=tmp_path / "sae")
        except Exception as error:
            told.write_text(str(error))

    def step(self, batch):
        if not told.exists():
            exit_code_of(second_run)
        return original(self, batch)

    monkeypatch.setattr(SAETrainer, "step", step)
    train_sae(model, tokenizer, Dataset.from_list(rows), output_dir=tmp_path / "sae", **options(epochs=1))
    assert f"Another process is training an SAE into {tmp_path / 'sae'}" in told.read_text()
    assert not (tmp_path / "sae" / "sae-training").exists()


def test_an_output_that_cannot_be_written_to_is_found_before_any_work(model, tokenizer, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "sae", Path("/proc/sae")):
        with pytest.raises(OSError, match=r"sae cannot be written"):
            train_sae(model, tokenizer, None, output_dir=folder, **options())


def test_a_streaming_data_set_needs_a_number_of_tokens(model, tokenizer, rows):
    stream = Dataset.from_list(rows * 3).to_iterable_dataset()
    with pytest.raises(ValueError, match="training_tokens"):
        train_sae(model, tokenizer, stream, **options())
    sae = train_sae(model, tokenizer, stream, training_tokens=2000, **options())
    assert sae.cfg.metadata["hf_fac"]["training_tokens"] == 2000 // 64 * 64
    with pytest.raises(ValueError, match=r"no content token to train on.*the first 200 of a stream are held out"):
        train_sae(model, tokenizer, stream.take(200), training_tokens=2000, **options())


@pytest.mark.parametrize("architecture", ["batchtopk", "standard", "jumprelu", "gated"])
def test_every_architecture_trains_and_loads_as_an_inference_sae(model, tokenizer, rows, architecture):
    sae = train_sae(model, tokenizer, Dataset.from_list(rows), architecture=architecture, **options(epochs=1))
    assert isinstance(sae, SAE)
    assert sae.cfg.d_sae == 64
    assert np.isfinite(sae.cfg.metadata["hf_fac"]["fvu"])


def test_a_lossless_sae_recovers_the_whole_loss(model, tokenizer, rows, trained):
    sae = trained[0]

    class Lossless:
        cfg, device, dtype = sae.cfg, sae.device, sae.dtype
        encode = staticmethod(lambda x: x.repeat(1, 1, 4) if x.ndim == 3 else x.repeat(1, 4))
        decode = staticmethod(lambda acts: acts[..., :16])

        def __call__(self, x):
            return x

    found = evaluate_sae(model, tokenizer, Lossless(), rows[:20], layer=LAYER, sink_norm=1e9)
    assert found.loss_recovered is None or found.loss_recovered == pytest.approx(1.0, abs=1e-5)
    assert found.fvu == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_leaves_the_mode_of_every_module_and_the_hooks_as_they_were(model, tokenizer, rows, trained, fails):
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0) if fails else None
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = [list(block._forward_hooks) for block in model.model.layers]
    try:
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            evaluate_sae(model, tokenizer, trained[0], rows[:20], layer=LAYER, sink_norm=1e9)
        assert [module.training for module in model.modules()] == modes
        assert [list(block._forward_hooks) for block in model.model.layers] == hooks
        assert torch.is_grad_enabled()
    finally:
        model.eval()
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 3}, "layers 0"),
        ({"architecture": "nonsense"}, "SAELens trains no 'nonsense'"),
        ({"k": 65}, "k is 65, more active features a token than the SAE's d_sae = 64"),
        ({"k": 0}, "k is 0; it must be a whole number from 1 up"),
        ({"d_sae": 0}, "d_sae is 0; it must be"),
        ({"batch_size": 0}, "batch_size is 0; it must be"),
        ({"batch_size": 1.5}, "batch_size is 1.5; it must be"),
        ({"training_tokens": 0}, "training_tokens is 0; it must be"),
        ({"epochs": 0}, "epochs is 0; it must be"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be"),
    ],
)
def test_what_cannot_be_trained_is_refused(model, tokenizer, rows, changes, message):
    with pytest.raises(ValueError, match=message):
        train_sae(model, tokenizer, Dataset.from_list(rows), **options(**changes))


@pytest.mark.parametrize("n", [0, 3])
def test_rows_without_a_content_token_are_refused(model, tokenizer, n):
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": tokenizer.eos_token * n}]}] * 40)
    with pytest.raises(ValueError, match="no content token to train on"):
        train_sae(model, tokenizer, rows, **options())


def test_too_few_rows_to_hold_some_out_are_refused(model, tokenizer, rows):
    with pytest.raises(ValueError, match="at least 20 rows"):
        train_sae(model, tokenizer, rows[:10], **options())
