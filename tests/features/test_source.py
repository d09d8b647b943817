"""A featurizer of files that were loaded before knows what it measures without loading, and notices every change."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, load_from_disk
from datasets.fingerprint import Hasher
from hub_server import READ_TOKEN, HubServer, run_with_hub
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import byte_level_tokenizer
from tiny_models import save_tiny, tiny_model

from hf_fac.features import source
from hf_fac.features.featurizer import SAEFeaturizer
from hf_fac.features.scoring import FACScorer

pytestmark = pytest.mark.filterwarnings("ignore:The SAE leaves")

ROWS = ["The river rises in the hills north of the town.", "hello world"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = save_tiny(tmp_path_factory.mktemp("saved"))
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(root / "adapter")
    byte_level_tokenizer().save_pretrained(root / "adapter")
    return root


@pytest.fixture
def folders(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "home"))
    shutil.copytree(saved, tmp_path / "files")
    config = tmp_path / "files" / "adapter" / "adapter_config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps(written | {"base_model_name_or_path": str(tmp_path / "files" / "model")}))
    return tmp_path / "files"


def load(folders, model="model", **settings):
    return SAEFeaturizer.from_pretrained(folders / model, sae=folders / "sae", device="cpu", **settings)


def is_loaded(featurizer):
    return featurizer._loaded is not None


def map_key(featurizer):
    return Hasher.hash(FACScorer(featurizer))


# What a second process does


def test_a_second_map_in_a_new_process_needs_neither_the_model_nor_torch(folders, tmp_path):
    Dataset.from_dict({"text": ROWS * 10}).save_to_disk(tmp_path / "rows")
    featurizer = SAEFeaturizer.from_pretrained(folders / "model", sae=folders / "sae", keep_above=0.1)
    scored = load_from_disk(tmp_path / "rows").map(FACScorer(featurizer), batched=True)
    assert len(scored[0]["fac_features"])
    assert is_loaded(featurizer)
    program = (
        "import sys\n"
        "from datasets import load_from_disk\n"
        "from datasets.fingerprint import Hasher\n"
        "from hf_fac import FACScorer, SAEFeaturizer\n"
        "files, rows = sys.argv[1:]\n"
        "featurizer = SAEFeaturizer.from_pretrained(files + '/model', sae=files + '/sae', keep_above=0.1)\n"
        "scorer = FACScorer(featurizer)\n"
        "scored = load_from_disk(rows).map(scorer, batched=True)\n"
        "print(featurizer.fingerprint(), Hasher.hash(scorer), scored._fingerprint, 'torch' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program, str(folders), str(tmp_path / "rows")],
        env={**os.environ, "HF_ASSETS_CACHE": str(tmp_path / "home")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    same = [featurizer.fingerprint(), map_key(featurizer), scored._fingerprint]
    assert done.stdout.split()[-4:] == [*same, "False"]
    # The processor's time, which does not depend on what else runs.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_what_is_known_without_loading_is_what_is_loaded(folders):
    first, again = load(folders, features=[5, 3]), load(folders, features=[3, 5])
    assert is_loaded(first)
    assert (again.measurement, again.fingerprint()) == (first.measurement, first.fingerprint())
    assert again.feature_fingerprint() == first.feature_fingerprint()
    assert (again.layer, again.d_sae, again.keep_above, again.fvu) == (first.layer, first.d_sae, 0.0, None)
    assert again.names() == first.names()
    assert map_key(again) == map_key(first)
    assert not is_loaded(again)
    assert (again(ROWS) != first(ROWS)).nnz == 0
    assert is_loaded(again)


def test_settings_given_as_their_defaults_are_the_same_map(folders):
    assert map_key(load(folders)) == map_key(load(folders, activation="native", keep_above=0.0, dtype="auto"))


def test_a_pickle_of_what_is_not_loaded_does_not_load(folders):
    load(folders)
    again = pickle.loads(pickle.dumps(load(folders)))
    assert not is_loaded(again)
    assert (again(ROWS) != load(folders)(ROWS)).nnz == 0


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"preset": "mine"}, "preset is 'mine'"),
        ({"keep_above": -1.0}, "keep_above is -1.0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"features": [1, 1]}, "feature 1 more than once"),
        ({"strides": 1}, "unexpected keyword argument 'strides'"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_loaded(settings, error, tmp_path):
    with pytest.raises((ValueError, TypeError), match=error):
        SAEFeaturizer.from_pretrained(tmp_path / "none", sae=tmp_path / "none", **settings)


# Whatever changes the result is a miss


def change_tensor(file):
    """Changes one number of a file of the same size, and leaves the file's time as it was."""
    before, tensors = file.stat(), load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    name = next(name for name in sorted(tensors) if "embed" in name or "W_dec" in name or "lora_B" in name)
    tensors[name].view(-1)[7] += 0.25
    save_file(tensors, file, metadata=metadata)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def add_token(folder):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["river"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda files: change_tensor(files / "model" / "model.safetensors"), id="weights"),
        pytest.param(lambda files: change_json(files / "model" / "config.json", rms_norm_eps=1e-3), id="architecture"),
        pytest.param(lambda files: change_tensor(files / "sae" / "sae_weights.safetensors"), id="SAE tensors"),
        pytest.param(lambda files: change_json(files / "sae" / "cfg.json", k=3), id="SAE settings"),
        pytest.param(lambda files: add_token(files / "model"), id="tokenizer"),
        pytest.param(
            lambda files: (files / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}"),
            id="template",
        ),
    ],
)
def test_another_file_under_the_same_name_is_computed_anew(change, folders):
    first = load(folders)
    before = first.fingerprint(), map_key(first)
    assert not is_loaded(load(folders))
    change(folders)
    changed = load(folders)
    assert is_loaded(changed)
    assert changed.fingerprint() != before[0]
    assert map_key(changed) != before[1]


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "model/model.safetensors"])
def test_another_adapter_or_base_model_is_computed_anew(file, folders):
    before = load(folders, model="adapter").fingerprint()
    assert before != load(folders).fingerprint()
    assert not is_loaded(load(folders, model="adapter"))
    change_tensor(folders / file)
    changed = load(folders, model="adapter")
    assert is_loaded(changed)
    assert changed.fingerprint() != before


@pytest.mark.parametrize(
    "setting",
    [
        {"layer": 1}, {"activation": "relu"}, {"features": [1, 2]}, {"keep_above": 0.5}, {"pool_over": "user"},
        {"side": "rejected"}, {"max_length": 100}, {"max_length": 100, "stride": 5}, {"sink_norm": 50.0},
        {"preset": "paper"}, {"dtype": "bfloat16"},
    ],
    ids=str,
)  # fmt: skip
def test_another_setting_is_computed_anew(setting, folders):
    before = map_key(load(folders))
    other = load(folders, **setting)
    assert is_loaded(other)
    assert map_key(other) != before
    again = load(folders, **setting)
    assert not is_loaded(again)
    assert map_key(again) == map_key(other)


def test_another_version_of_the_package_is_computed_anew(folders, monkeypatch):
    before = load(folders).fingerprint()
    monkeypatch.setattr(source, "VERSION", source.VERSION + 1)
    monkeypatch.setattr("hf_fac.features.parts.VERSION", source.VERSION)
    assert is_loaded(after := load(folders))
    assert after.fingerprint() != before


def test_another_version_of_a_library_loads_again(folders, monkeypatch):
    before = load(folders)
    monkeypatch.setattr(source, "version", lambda name: "another")
    assert is_loaded(after := load(folders))
    assert after.fingerprint() == before.fingerprint()


def test_a_file_that_changes_nothing_is_the_same_map(folders):
    before = map_key(load(folders))
    (folders / "model" / "README.md").write_text("A card.")
    assert map_key(load(folders)) == before


def test_a_model_that_was_trained_after_loading_is_another(folders):
    load(folders)
    featurizer = load(folders)
    before = map_key(featurizer), featurizer.measurement
    with torch.no_grad():
        featurizer.model.model.layers[0].mlp.up_proj.weight.add_(1e-3)
    assert map_key(featurizer) != before[0]
    assert featurizer.measurement != before[1]
    assert load(folders).measurement == before[1]


def test_files_that_change_before_they_are_loaded_are_refused_once(folders):
    load(folders)
    featurizer = load(folders)
    change_tensor(folders / "model" / "model.safetensors")
    with pytest.raises(RuntimeError, match="changed on disk"):
        featurizer(ROWS)
    assert load(folders)(ROWS).nnz


def test_without_a_place_to_keep_it_the_model_is_loaded_each_time(folders, tmp_path):
    (tmp_path / "home").write_text("a file is in the way")
    assert is_loaded(load(folders))
    assert is_loaded(load(folders))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"measurement": {}}'])
def test_a_damaged_record_is_no_record(content, folders, tmp_path):
    expected = load(folders).measurement
    [record] = (tmp_path / "home" / "hf-fac" / "measurements").iterdir()
    record.write_text(content)
    assert is_loaded(load(folders))
    assert not is_loaded(again := load(folders))
    assert again.measurement == expected


def test_remote_code_and_releases_of_saelens_are_always_loaded(folders):
    arguments = {"model": str(folders / "model"), "sae": str(folders / "sae")}
    assert source.PretrainedSource(**arguments).contents(None) is not None
    assert source.PretrainedSource(**arguments, trust_remote_code=True).contents(None) is None
    assert source.PretrainedSource(model=arguments["model"], sae="gpt2-small-res-jb:layer").contents(None) is None


# The Hub


@pytest.mark.slow
def test_a_commit_of_the_hub_is_known_by_its_name_and_another_is_not(folders, tmp_path):
    code = """
import sys
from hf_fac import SAEFeaturizer
result = []
for revision in args["revisions"]:
    found = SAEFeaturizer.from_pretrained("user/model", sae="user/sae", device="cpu", revision=revision)
    result.append([found._loaded is not None, found.fingerprint()])
    if args["read"]:
        assert found(["hello world"]).nnz
result.append("torch" in sys.modules)
"""
    files = {name: {file.name: file.read_bytes() for file in (folders / name).iterdir()} for name in ("model", "sae")}

    def child(*revisions, read=True, **env):
        return run_with_hub(
            server, code, token=READ_TOKEN, home=tmp_path, env=env, args={"revisions": revisions, "read": read}
        )

    with HubServer() as server:
        commit, _ = (server.put(f"user/{name}", files[name]) for name in ("model", "sae"))
        [[is_first_loaded, first], [is_second_loaded, second], _] = child(None, None)
        assert (is_first_loaded, is_second_loaded) == (True, False)
        assert first == second
        change_tensor(folders / "model" / "model.safetensors")
        server.put("user/model", {"model.safetensors": (folders / "model" / "model.safetensors").read_bytes()})
        # The first commit is loaded, which its fingerprint shows, though another is the newest now.
        [[is_newest_loaded, newest], pinned, _] = child(None, commit)
        assert is_newest_loaded
        assert newest != first
        assert pinned == [False, first]
    # Without a network the cache says what the name stands for.
    assert child(None, read=False, HF_HUB_OFFLINE="1") == [[False, newest], False]
