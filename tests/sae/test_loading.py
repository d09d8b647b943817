import json
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_CONFIG_GETTERS
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

import hf_fac.sae.loading
from hf_fac.hub.errors import HubError
from hf_fac.sae.loading import check_sae, find_sae, fold_input_scale, fvu, load_sae, read_settings, save_sae

D_IN, D_SAE, K = 8, 24, 3
ARCHITECTURES = {
    "topk": (TopKSAE, TopKSAEConfig, {"k": K}),
    "topk, rescaled": (TopKSAE, TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
}


def make_sae(architecture="topk", *, metadata=None, **options):
    """A real SAE in which every parameter counts: random, none of them 0 or 1."""
    sae_class, config_class, own = ARCHITECTURES[architecture]
    metadata = SAEMetadata(**({"hook_name": "blocks.1.hook_resid_post"} if metadata is None else metadata))
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **own, **options))
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return sae


@pytest.fixture
def x():
    return 3 + 5 * torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))


def write_sparsify(folder, *, dtype=torch.float32, **options):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    tensors = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K}
    config |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN} | options
    (folder / "cfg.json").write_text(json.dumps(config))
    return tensors


def write_checkpoint(path, **config):
    generator = torch.Generator().manual_seed(3)
    weight = {
        "mask": torch.ones(D_SAE),
        "W_enc": torch.randn(D_IN, D_SAE, generator=generator),
        "b_enc": torch.randn(D_SAE, generator=generator),
        "b_dec": torch.randn(D_IN, generator=generator),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": weight, "config": {"d_inp": D_IN, "d_hide": D_SAE, "topK": K} | config}, path)
    return weight


def top_k(pre_activations):
    """relu of the k largest, written out."""
    features = torch.zeros_like(pre_activations)
    for row, values in enumerate(pre_activations.tolist()):
        for column in sorted(range(len(values)), key=lambda c: -values[c])[:K]:
            features[row, column] = max(values[column], 0.0)
    return features


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts files where a finished download of a Hub repository lies; nothing else can be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def repository(repo, *, revision="main"):
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        commit = f"{len(list(root.glob('snapshots/*'))):040x}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        return snapshot

    return repository


# Saving and loading


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_sae_computes_the_same_in_plain_saelens_and_here(architecture, tmp_path, x):
    sae = make_sae(architecture)
    folder = save_sae(sae, tmp_path / "new" / "sae")
    for loaded in (SAE.load_from_disk(folder), load_sae(folder), load_sae(str(folder))):
        assert type(loaded) is type(sae)
        torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=0, atol=0)
        torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=0)
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_half_size_weights_are_half_the_size_and_compute_in_float32_everywhere(tmp_path, x):
    sae = make_sae()
    full, half = save_sae(sae, tmp_path / "full"), save_sae(sae, tmp_path / "half", dtype=torch.float16)
    stored = load_file(half / "sae_weights.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert sum(t.nbytes for t in stored.values()) * 2 == sum(t.nbytes for t in sae.state_dict().values())
    assert json.loads((half / "cfg.json").read_text()) == json.loads((full / "cfg.json").read_text())
    for loaded in (SAE.load_from_disk(half), load_sae(half)):
        assert loaded.dtype == loaded.W_enc.dtype == loaded(x).dtype == torch.float32
        torch.testing.assert_close(loaded.W_enc.data, sae.W_enc.data.half().float(), rtol=0, atol=0)


def test_the_dtype_asked_for_is_the_dtype_computed_in(tmp_path, x):
    folder = save_sae(make_sae(), tmp_path / "sae")
    for dtype in (torch.bfloat16, "bfloat16"):
        sae = load_sae(folder, dtype=dtype)
        assert sae.dtype == sae.W_dec.dtype == sae.encode(x).dtype == torch.bfloat16


def test_our_metadata_survives_plain_saelens(tmp_path):
    own = {"layer": 5, "sink_norm": 1560.0, "fvu": 0.15, "training_data": {"name": "chat", "tokens": 3}, "l0": 31.5}
    sae = make_sae(metadata={"model_name": "user/model", "prepend_bos": True, "hf_fac": own})
    sae = SAE.load_from_disk(save_sae(sae, tmp_path / "first"))
    sae.save_model(tmp_path / "second")
    sae = load_sae(tmp_path / "second")
    assert sae.cfg.metadata["hf_fac"] == own
    settings = read_settings(sae)
    assert (settings.layer, settings.sink_norm, settings.fvu) == (5, 1560.0, 0.15)
    assert (settings.model_name, settings.prepend_bos, settings.center) == ("user/model", True, False)


def test_a_training_sae_is_saved_as_its_inference_sae(tmp_path, x):
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    sae.topk_threshold.fill_(0.5)
    sae.cfg.metadata.hf_fac = {"layer": 2}
    loaded = load_sae(save_sae(sae, tmp_path / "sae"))
    assert type(loaded) is JumpReLUSAE
    assert read_settings(loaded).layer == 2
    _, pre = sae.encode_with_hidden_pre(x)
    torch.testing.assert_close(loaded.encode(x), pre * (pre > 0.5))


def test_a_saved_sae_can_be_read_by_whom_the_umask_lets(tmp_path):
    folder = save_sae(make_sae(), tmp_path / "sae")
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_failed_save_leaves_what_was_there(tmp_path, x):
    sae = make_sae()
    folder = save_sae(sae, tmp_path / "sae")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    broken = make_sae()
    broken.W_dec.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="W_dec holds NaN or infinite values; train it again"):
        save_sae(broken, folder)
    broken.W_dec.data[3, 4] = 1e6
    with pytest.raises(ValueError, match=r"W_dec holds NaN or infinite values; .* wider dtype"):
        save_sae(broken, folder, dtype="float16")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("moves", [0, 1])
def test_a_save_cut_short_never_mixes_two_saes(tmp_path, monkeypatch, moves):
    folder, replace, done = save_sae(make_sae(), tmp_path / "sae"), hf_fac.sae.loading.os.replace, []

    def cut(source, destination):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(destination)
        replace(source, destination)

    monkeypatch.setattr(hf_fac.sae.loading.os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        save_sae(make_sae("standard"), folder)
    with pytest.raises(FileNotFoundError, match="holds no single SAE"):
        load_sae(folder)


# Layouts of others


@pytest.mark.parametrize("normalize_decoder", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sparsify_folder_computes_what_sparsify_does(tmp_path, x, normalize_decoder, dtype):
    folder = tmp_path / "run" / "layers.15"
    t = {key: value.float() for key, value in write_sparsify(folder, dtype=dtype).items()}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "user/model"}))
    sae = load_sae(folder)
    features = top_k((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    assert type(sae) is TopKSAE
    torch.testing.assert_close(sae.encode(x), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), features @ t["W_dec"] + t["b_dec"], rtol=1e-4, atol=1e-3)
    settings = read_settings(sae)
    assert (settings.layer, settings.model_name, settings.prepend_bos) == (16, "user/model", False)
    again = SAE.load_from_disk(save_sae(sae, tmp_path / "again"))
    torch.testing.assert_close(again(x), sae(x), rtol=0, atol=0)
    assert read_settings(again) == settings


def test_sparsify_folders_are_found_by_hookpoint_and_seed(tmp_path, monkeypatch):
    for hookpoint in ("h.3", "embed_tokens", "layers.3/seed1"):
        write_sparsify(tmp_path / "run" / hookpoint)
    layers = {id_: read_settings(load_sae(tmp_path / "run", sae_id=id_)).layer for id_ in ("h.3", "embed_tokens")}
    assert layers == {"h.3": 4, "embed_tokens": 0}
    assert read_settings(load_sae(f"{tmp_path}/run:layers.3/seed1")).layer == 4
    monkeypatch.chdir(tmp_path / "run" / "h.3")
    assert read_settings(load_sae(".")).layer == 4
    with pytest.raises(FileNotFoundError, match=r"choose with sae_id= from h\.3, embed_tokens, layers\.3/seed1"):
        load_sae(tmp_path / "run")


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("layers.3", {"transcode": True}, "its option transcode makes it no plain autoencoder"),
        ("layers.3", {"skip_connection": True}, "its option skip_connection makes it no plain autoencoder"),
        ("layers.3", {"activation": "groupmax"}, "SAELens has no 'groupmax' activation"),
        ("layers.3", {"num_latents": 99}, r"size mismatch for W_enc: .*\[8, 24\].*\[8, 99\]"),
        ("layers.3.mlp", {}, r"reads 'layers\.3\.mlp', hf_fac reads the residual stream between blocks"),
    ],
)
def test_sparsify_saes_that_cannot_be_honoured_are_refused(tmp_path, folder, options, message):
    write_sparsify(tmp_path / folder, **options)
    with pytest.raises(ValueError, match=message):
        load_sae(tmp_path / folder)


def test_a_checkpoint_of_the_paper_computes_what_its_code_does(tmp_path, x):
    path = tmp_path / "TopK7_l16_h65536_epoch5.pth"
    w = write_checkpoint(path)
    features = top_k((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    for name in (path, tmp_path):
        sae = load_sae(name)
        assert type(sae) is TopKSAE
        assert read_settings(sae).layer == 16
        torch.testing.assert_close(sae.encode(x), features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae(x), features @ w["W_enc"].T + w["b_dec"], rtol=1e-4, atol=1e-3)
    again = SAE.load_from_disk(save_sae(sae, tmp_path / "again"))
    torch.testing.assert_close(again(x), sae(x), rtol=0, atol=0)
    assert read_settings(again).layer == 16


def test_a_checkpoint_that_does_not_name_its_layer_has_none(tmp_path):
    write_checkpoint(tmp_path / "sae.pth")
    assert read_settings(load_sae(tmp_path / "sae.pth")).layer is None


def test_one_of_several_checkpoints_is_chosen_by_name(tmp_path):
    for epoch, k in ((1, 2), (2, 5)):
        write_checkpoint(tmp_path / f"TopK7_l4_h24_epoch{epoch}.pth", topK=k)
    assert load_sae(tmp_path, sae_id="TopK7_l4_h24_epoch2.pth").cfg.k == 5
    with pytest.raises(FileNotFoundError, match=r"choose with sae_id= from TopK7_l4_h24_epoch1\.pth, TopK7_l4_h24_e"):
        load_sae(tmp_path)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path, save):
    path, target = tmp_path / "TopK7_l16_h24_epoch5.pth", tmp_path / "ran"
    content = {"weight": Malicious(target), "config": {"d_inp": D_IN, "d_hide": D_SAE, "topK": K}}
    if save == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="holds more than tensors, and hf_fac unpickles nothing: ask for safetensors"):
        load_sae(path)
    assert not target.exists()
    torch.load(path, weights_only=False) if save == "torch" else pickle.loads(path.read_bytes())
    assert target.exists(), "the file was harmless, so the test showed nothing"


# Files that are not what they should be


def test_missing_files_are_named(tmp_path):
    folder = save_sae(make_sae(), tmp_path / "sae")
    (folder / "cfg.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected cfg\.json with sae_weights.*found sae_weights\.safetensors;"
    ):
        load_sae(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'empty'.* no local path, no SAELens release .* no Hub repository"):
        load_sae("empty")
    with pytest.raises(FileNotFoundError, match=r"empty' holds no single SAE: expected .*; give the folder or file"):
        load_sae(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"empty:nowhere' holds no single SAE"):
        load_sae(tmp_path / "empty", sae_id="nowhere")
    (tmp_path / "cfg.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"found cfg\.txt; give the folder or file that holds it"):
        load_sae(tmp_path / "cfg.txt")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = save_sae(make_sae(), tmp_path / "sae")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["b_enc"][2] = float("nan")
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="sae: b_enc holds NaN or infinite values; the file is damaged"):
        load_sae(folder)
    tensors["b_enc"][2] = 1e6
    save_file(tensors, folder / "sae_weights.safetensors")
    load_sae(folder)
    with pytest.raises(ValueError, match=r"b_enc holds NaN or infinite values; .* the dtype too small"):
        load_sae(folder, dtype="float16")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sae_weights.safetensors", b"", "cannot be read as an SAE: .*header"),
        ("sae_weights.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "cannot be read as an SAE: .*Missing key"),
        ("cfg.json", b"{", "cannot be read as an SAE: cfg.json: Invalid JSON: EOF"),
        ("cfg.json", b"{}", "cannot be read as an SAE: cfg.json: d_in: Field required; download the SAE again"),
        ("cfg.json", None, "cannot be read as an SAE: missing or unknown to SAELens: 'batchtopk'"),
    ],
)
def test_damaged_files_are_errors_that_say_what_is_wrong(tmp_path, file, content, message):
    folder = save_sae(make_sae(), tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text()) | {"architecture": "batchtopk"}
    (folder / file).write_bytes(json.dumps(config).encode() if content is None else content)
    with pytest.raises(ValueError, match=message):
        load_sae(folder)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4 cut off"])
def test_damaged_checkpoints_are_errors(tmp_path, content):
    (tmp_path / "sae.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"sae\.pth' cannot be read as an SAE"):
        load_sae(tmp_path / "sae.pth")


@pytest.mark.parametrize("content", ["text", [1], {"weight": {}, "config": {"d_inp": 8}}, {"W_enc": 1}])
def test_checkpoints_of_another_kind_are_errors(tmp_path, content):
    torch.save(content, tmp_path / "sae.pth")
    with pytest.raises(ValueError, match=r"sae\.pth' cannot be read as an SAE"):
        load_sae(tmp_path / "sae.pth")


WRONG = [
    ({"k": 0}, "k: Input should be greater than 0, got 0"),
    ({"k": "4"}, "k: Input should be a valid integer, got '4'"),
    ({"k": 4000}, "k = 4000 is more than its "),
    ({"d_in": 8.5}, "d_in: Input should be a valid integer"),
    ({"d_sae": -1}, "d_sae: Input should be greater than or equal to 1"),
    ({"metadata": 3}, "metadata: Input should be "),
    ({"metadata": {"model_name": 3}}, "metadata.model_name: Input should be a valid string"),
    ({"metadata": {"hf_fac": [1]}}, "metadata.hf_fac: Input should be "),
    ({"metadata": {"hf_fac": {"layer": "15"}}}, "metadata.hf_fac.layer: Input should be a valid integer, got '15'"),
    ({"metadata": {"hf_fac": {"layer": -1}}}, "metadata.hf_fac.layer: Input should be greater than or equal to 0"),
    (
        {"metadata": {"hf_fac": {"sink_norm": float("nan")}}},
        "hf_fac.sink_norm: Input should be greater than 0",
    ),
    ({"metadata": {"hf_fac": {"sink_norm": -1.0}}}, "hf_fac.sink_norm: Input should be greater than 0"),
    ({"metadata": {"hf_fac": {"sink_norm": "high"}}}, "metadata.hf_fac.sink_norm: Input should be a valid number"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_config_that_would_measure_wrongly_names_file_field_and_remedy(tmp_path, change, message):
    file = save_sae(make_sae(), tmp_path / "sae") / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(
        ValueError, match=r"sae' cannot be read as an SAE: cfg\.json: .*download the SAE again"
    ) as caught:
        load_sae(tmp_path / "sae")
    assert message in str(caught.value)


def test_deep_nesting_and_wrong_weights_are_errors(tmp_path):
    file = save_sae(make_sae(), tmp_path / "sae") / "cfg.json"
    file.write_text('{"d_in": ' + "[" * 10**5)
    with pytest.raises(ValueError, match=r"cfg\.json: Invalid JSON: recursion limit"):
        load_sae(tmp_path / "sae")
    checkpoint = {"config": {"d_inp": 8, "d_hide": 16, "topK": 2}, "weight": {"W_enc": 1, "b_enc": 2, "b_dec": 3}}
    torch.save(checkpoint, tmp_path / "sae.pth")
    with pytest.raises(ValueError, match=r"sae\.pth' cannot be read as an SAE"):
        load_sae(tmp_path / "sae.pth")


@pytest.mark.parametrize("own", [{"sink_norm": float("nan")}, {"sink_norm": -1.0}, {"layer": "15"}])
def test_metadata_that_was_set_wrongly_is_refused(own):
    with pytest.raises(ValueError, match=r"metadata\['hf_fac'\] of the SAE: (sink_norm|layer): .*set it right"):
        read_settings(make_sae(metadata={"hf_fac": own}))


# Names


def test_a_hub_repository_is_read_at_its_revision(hub, x):
    first, second = make_sae(), make_sae("standard")
    save_sae(first, hub("user/repo"))
    save_sae(second, hub("user/repo", revision="v2"))
    torch.testing.assert_close(load_sae("user/repo")(x), first(x), rtol=0, atol=0)
    torch.testing.assert_close(load_sae("user/repo", revision="v2")(x), second(x), rtol=0, atol=0)
    with pytest.raises(HubError, match="'user/repo' is no local path and did not come from the Hub"):
        load_sae("user/repo", revision="v3")


def test_hub_repositories_hold_every_layout_and_subfolders(hub):
    write_checkpoint(hub("user/paper") / "TopK7_l16_h65536_epoch5.pth")
    assert read_settings(load_sae("user/paper")).layer == 16
    assert read_settings(load_sae("user/paper:TopK7_l16_h65536_epoch5.pth")).layer == 16
    repo = hub("user/sparsify")
    write_sparsify(repo / "layers.7")
    (repo / "config.json").write_text(json.dumps({"model": "user/model"}))
    by_option, by_name = load_sae("user/sparsify", sae_id="layers.7"), load_sae("user/sparsify:layers.7")
    assert read_settings(by_option) == read_settings(by_name)
    assert (read_settings(by_name).layer, read_settings(by_name).model_name) == (8, "user/model")
    assert read_settings(load_sae("user/sparsify")).layer == 8, "the only SAE of a repository needs no name"
    write_sparsify(repo / "layers.8")
    with pytest.raises(FileNotFoundError, match=r"holds no single SAE: .* sae_id= from layers\.7, layers\.8\."):
        load_sae("user/sparsify")
    with pytest.raises(FileNotFoundError, match=r"'user/sparsify:layers\.9' holds no single SAE"):
        load_sae("user/sparsify", sae_id="layers.9")


def test_a_local_path_wins_over_hub_and_release(hub, tmp_path, monkeypatch):
    save_sae(make_sae(), hub("user/repo"))
    monkeypatch.chdir(tmp_path)
    for name in ("user/repo", "gpt2-small-res-jb:blocks.0.hook_resid_pre"):
        save_sae(make_sae("standard"), tmp_path / name)
        assert type(load_sae(name)) is StandardSAE
    with pytest.raises(ValueError, match="revision='v2' is for a Hub repository, which 'user/repo' is not"):
        load_sae("user/repo", revision="v2")


def test_a_release_of_saelens_is_read_with_its_settings(hub, x):
    sae = make_sae("standard", metadata={"model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre"})
    save_sae(sae, hub("jbloom/GPT2-Small-SAEs-Reformatted") / "blocks.8.hook_resid_pre")
    config = next(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("cfg.json"))
    old = {k: v for k, v in json.loads(config.read_text()).items() if k not in ("metadata", "architecture")}
    config.write_text(json.dumps(old | {"hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}))
    loaded = load_sae("gpt2-small-res-jb:blocks.8.hook_resid_pre")
    torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=0)
    settings = read_settings(loaded)
    assert (settings.layer, settings.model_name) == (8, "gpt2-small")
    assert settings.center, "these SAEs were trained on centred writing weights"
    assert settings.prepend_bos, "SAEs of that age were trained with a BOS"
    with pytest.raises(ValueError, match=r"'blocks\.99' is none of the 13 SAEs of .*'gpt2-small-res-jb:<id>', where"):
        load_sae("gpt2-small-res-jb:blocks.99")
    with pytest.raises(ValueError, match="None is none of the 13 SAEs"):
        load_sae("gpt2-small-res-jb")


def test_a_release_with_normalised_inputs_is_refused(hub):
    sae = make_sae("standard", metadata={"hook_name": "blocks.8.hook_resid_pre"})
    save_sae(sae, hub("JoshEngels/Mistral-7B-Residual-Stream-SAEs") / "mistral_7b_layer_8")
    with pytest.raises(
        ValueError, match=r"expects normalised inputs .*constant_norm_rescale.* raw ones: take one that"
    ):
        load_sae("mistral-7b-res-wg:blocks.8.hook_resid_pre")


# Checks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize_activations": "layer_norm"}, r"normalised inputs \(normalize_activations='layer_norm'\)"),
        (
            {"metadata": {"hook_name": "blocks.1.attn.hook_z"}},
            r"reads 'blocks\.1\.attn\.hook_z', hf_fac reads the resi",
        ),
        (
            {"metadata": {"hook_name": "blocks.1.attn.hook_z"}, "reshape_activations": "hook_z"},
            r"attention heads \(blocks\.1\.attn\.hook_z\), hf_fac reads the residual stream: take one",
        ),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_out"}}, r"reads 'blocks\.1\.hook_mlp_out', hf_fac reads the"),
        ({"metadata": {"hook_name": "blocks.1.hook_attn_out"}}, r"reads 'blocks\.1\.hook_attn_out', hf_fac reads"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_mid"}}, r"reads 'blocks\.1\.hook_resid_mid', hf_fac reads"),
        ({"metadata": {"hook_name": "model.layers.1.mlp"}}, r"reads 'model\.layers\.1\.mlp', hf_fac reads"),
        ({"metadata": {"hook_name": ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]}}, "is a crosscoder"),
        (
            {"metadata": {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}},
            r"transcoder from blocks\.1\.hook_mlp_in to blocks\.1\.hook_mlp_out, hf_fac needs an autoencoder",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_on_loading(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        load_sae(save_sae(make_sae("standard", **change), tmp_path / "sae"))
    assert str(error.value).endswith("take one that find_sae(model_id) lists, or train one with train_sae.")


def test_a_transcoder_is_refused(tmp_path):
    config = TranscoderConfig(d_in=D_IN, d_sae=D_SAE, d_out=D_IN, apply_b_dec_to_input=False)
    config.metadata.hook_name = "blocks.1.hook_mlp_in"
    Transcoder(config).save_model(tmp_path / "sae")
    with pytest.raises(ValueError, match=r"is a transcoder from blocks\.1\.hook_mlp_in to None"):
        load_sae(tmp_path / "sae")


def test_a_model_of_another_size_is_refused():
    sae = make_sae(metadata={"model_name": "user/model", "hook_name": "blocks.4.hook_resid_post"})
    check_sae(sae)
    check_sae(sae, d_in=D_IN)
    with pytest.raises(ValueError, match=r"width 8, the model's hidden size is 9: use .*\(user/model\), or take one"):
        check_sae(sae, d_in=9)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("hook_embed", 0),
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.7.hook_resid_pre", 7),
        ("blocks.7.hook_resid_post", 8),
        ("model.layers.15", 16),
        ("layers.15", 16),
        ("model.language_model.layers.30.output", 31),
        ("transformer.h.0", 1),
        ("gpt_neox.layers.5", 6),
        ("bert.encoder.layer.11", 12),
        ("model.embed_tokens", 0),
        (None, None),
    ],
)
def test_the_layer_is_read_from_the_hook(hook, layer):
    sae = make_sae(metadata={} if hook is None else {"hook_name": hook})
    assert read_settings(sae).layer == layer
    sae.cfg.metadata.hf_fac = {"layer": 3}
    assert read_settings(sae).layer == 3, "our own metadata wins"


@pytest.mark.parametrize(
    ("kwargs", "center"),
    [(None, False), ({}, False), ({"center_writing_weights": False}, False), ({"center_writing_weights": True}, True)],
)
def test_only_saes_of_centred_models_ask_for_centring(kwargs, center):
    sae = make_sae()
    sae.cfg.metadata.model_from_pretrained_kwargs = kwargs
    assert read_settings(sae).center is center


# The directory


def directory():
    return [
        (release, sae_id, path, entry)
        for release, entry in get_pretrained_saes_directory().items()
        for sae_id, path in entry.saes_map.items()
    ]


def test_hooks_are_those_that_saelens_configures():
    checked = 0
    for release, sae_id, path, entry in directory():
        if entry.conversion_func in ("gemma_2", "goodfire", "qwen_scope"):  # the loaders that ask no network
            config = NAMED_PRETRAINED_SAE_CONFIG_GETTERS[entry.conversion_func](entry.repo_id, path, "cpu")
            found = hf_fac.sae.loading._directory_hook(f"{release}/{sae_id}/{path}")
            expected = config["hook_name"]
            assert found == (expected if "resid" in expected or expected == "hook_embed" else None), (release, sae_id)
            checked += 1
    assert checked > 2000


def test_every_residual_release_is_found_and_nothing_else_is():
    releases = {}
    for release, sae_id, path, _ in directory():
        releases.setdefault(release, set()).add(
            hf_fac.sae.loading._directory_hook(f"{release}/{sae_id}/{path}") is not None
        )
    other = ("transcoder", "-mlp", "-att", "_lxa_", "_lxm_", "hook-z", "resid-mid", "-clt-")
    assert {release: {not any(word in release for word in other)} for release in releases} == releases


@pytest.mark.parametrize(
    ("names", "release"),
    [
        (("gpt2", "openai-community/gpt2", "GPT2-small", "/models/gpt2/"), "gpt2-small-res-jb"),
        (("google/gemma-2-2b", "gemma-2-2b"), "gemma-scope-2b-pt-res-canonical"),
        (("google/gemma-3-270m",), "gemma-scope-2-270m-pt-res"),
        (("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped"), "pythia-70m-deduped-res-sm"),
        (("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B", "LLAMA-3.1-8B"), "llama_scope_lxr_8x"),
        (("meta-llama/Llama-3.1-8B-Instruct",), "goodfire-llama-3.1-8b-instruct"),
        (("Qwen/Qwen3-1.7B-Base",), "qwen-scope-3-1.7b-base-w32k-l50"),
    ],
)
def test_a_model_is_found_under_each_of_its_names(names, release):
    first, *others = [find_sae(name) for name in names]
    assert release in set(first.release)
    assert all(other.equals(first) for other in others)


def test_the_table_of_saes():
    found = find_sae("gpt2", layer=8)
    assert list(found.columns) == ["name", "layer", "hook_name", "release", "sae_id"]
    assert set(found.layer) == {8}
    assert "gpt2-small-res-jb:blocks.8.hook_resid_pre" in set(found.name)
    assert "gpt2-small-resid-post-v5-32k:blocks.7.hook_resid_post" in set(found.name)
    everything = find_sae("gpt2")
    assert everything.layer.is_monotonic_increasing
    assert everything[everything.layer == 8].reset_index(drop=True).equals(found)
    assert not everything.name.str.contains("mlp|attn|hook_z|mid").any()
    assert find_sae("mistralai/Mistral-7B-v0.1").empty, "its only release expects normalised inputs"
    assert find_sae("user/unknown").empty
    assert list(find_sae("user/unknown").columns) == list(found.columns)


# Scale and FVU


def slow_fvu(sae, x):
    mean = [sum(row[j] for row in x.tolist()) / len(x) for j in range(D_IN)]
    unexplained = total = 0.0
    for row, back in zip(x.tolist(), sae(x).tolist(), strict=True):
        unexplained += sum((a - b) ** 2 for a, b in zip(row, back, strict=True))
        total += sum((a - b) ** 2 for a, b in zip(row, mean, strict=True))
    return unexplained / total


def test_fvu_of_a_wide_sae_encodes_few_tokens_at_a_time():
    sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=1 << 18, k=2))
    tokens, x = [], torch.randn(100, D_IN)
    sae.register_forward_pre_hook(lambda _, inputs: tokens.append(len(inputs[0])))
    found = fvu(sae, x)
    assert sum(tokens) == 100
    assert max(tokens) << 18 <= 1 << 23
    assert found == pytest.approx(slow_fvu(sae, x), rel=1e-4)


def test_fvu_is_its_definition(x):
    sae = make_sae()
    assert fvu(sae, x) == pytest.approx(slow_fvu(sae, x), rel=1e-5)
    many = x.repeat(50, 1)
    assert fvu(sae, many) == pytest.approx(fvu(sae, x), rel=1e-6), "chunks change nothing"
    assert fvu(sae, 3000 * x.half()) == pytest.approx(slow_fvu(sae, 3000 * x.half().float()), rel=1e-2)
    sae.W_dec.data.zero_()
    sae.b_dec.data = x.mean(0)
    assert fvu(sae, x) == pytest.approx(1.0), "the mean explains nothing"


def test_fvu_of_what_it_cannot_measure_is_an_error(x):
    sae = make_sae()
    for alike in (x[:1], x[:0], x[:1].repeat(5, 1)):
        with pytest.raises(ValueError, match=f"activations that differ, not {len(alike)} without variance"):
            fvu(sae, alike)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folded_scale_keeps_features_and_fvu(architecture, apply_b_dec_to_input, tmp_path, x):
    sae, scale = make_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input), 37.5
    features, unfolded = sae.encode(x), fvu(sae, x)
    reconstruction = sae(x)
    assert (features > 0).any()
    folded = fold_input_scale(sae, scale)
    assert folded is sae
    torch.testing.assert_close(folded.encode(scale * x), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded(scale * x), scale * reconstruction, rtol=1e-4, atol=1e-2)
    plain = SAE.load_from_disk(save_sae(folded, tmp_path / "sae"))
    assert fvu(plain, scale * x) == pytest.approx(unfolded, rel=1e-5)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_scale_of_a_training_sae_is_folded_too(rescale, tmp_path, x):
    options = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "rescale_acts_by_decoder_norm": rescale}
    for sae_class, config_class in (
        (TopKTrainingSAE, TopKTrainingSAEConfig),
        (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    ):
        sae = sae_class(config_class(**options))
        if sae_class is BatchTopKTrainingSAE:
            sae.topk_threshold.fill_(0.1)
        before = fvu(load_sae(save_sae(sae, tmp_path / "before")), x)
        after = load_sae(save_sae(fold_input_scale(sae, 0.02), tmp_path / "after"))
        assert fvu(after, 0.02 * x) == pytest.approx(before, rel=1e-5)


def test_a_scale_that_cannot_be_folded_is_refused(x):
    pursuit = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=D_IN, d_sae=D_SAE))
    with pytest.raises(
        ValueError, match=r"cannot be folded into a matching_pursuit SAE .*: train one of standard, topk"
    ):
        fold_input_scale(pursuit, 2.0)
    with pytest.raises(ValueError, match="into a topk SAE with normalize_activations='layer_norm'"):
        fold_input_scale(make_sae(normalize_activations="layer_norm"), 2.0)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be positive and finite, not"):
            fold_input_scale(make_sae(), scale)


def test_importing_the_room_loads_nothing_heavy():
    check = "import sys, hf_fac.sae; assert not {'torch', 'sae_lens', 'pandas', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
