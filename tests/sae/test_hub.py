"""SAEs on the local Hub server: plain SAELens opens what was pushed, the card says what it is, and `load_sae` checks
what it pulls. Failing pushes and refusals of the Hub are in tests/hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import WRITE_TOKEN, HubServer, run_with_hub
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save

from hf_fac.sae.hub import _metadata, push_sae_to_hub
from hf_fac.sae.loading import save_sae

PRELUDE = """
from hf_fac import load_sae, push_sae_to_hub

def refusal(function, *positional, **options):
    try:
        return [None, f"no refusal but {function(*positional, **options)}"]
    except Exception as error:
        return [getattr(error, "status", None), f"{type(error).__name__}: {error}"]

def same(a, b):
    import torch
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
"""

HUMAN_CARD = b"---\nlicense: mit\ntags: [mine]\n---\n\n# My SAEs\n"


def make_sae(kind: str = "topk", **metadata: Any) -> TopKSAE | StandardSAE:
    own = {"layer": 5, "fvu": 0.125, "l0": 4.0, "training_data": "rows | of\nours", "training_tokens": 12345}
    metadata = SAEMetadata(
        **{"hook_name": "blocks.4.hook_resid_post", "model_name": "org/model", "hf_fac": own} | metadata
    )
    torch.manual_seed(0)
    sizes = {"d_in": 8, "d_sae": 32, "metadata": metadata}
    sae = TopKSAE(TopKSAEConfig(k=4, **sizes)) if kind == "topk" else StandardSAE(StandardSAEConfig(**sizes))
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape)
    return sae


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    saes = {"one": make_sae(), "two": make_sae("standard", hook_name="blocks.6.hook_resid_post")}
    return {name: str(save_sae(sae, tmp_path / name)) for name, sae in saes.items()}


def child(server: HubServer, code: str, **args: Any) -> Any:
    """Loading SAELens takes seconds, so one child process does many things."""
    return run_with_hub(server, PRELUDE + code, token=WRITE_TOKEN, args=args)


def test_saes_in_one_repo_open_in_plain_saelens_and_each_has_its_place_on_the_card(
    server: HubServer, folders: dict[str, str]
) -> None:
    old = {"two/sae.safetensors": b"1", "two/sparsity.safetensors": b"2", "two/notes.txt": b"3"}
    server.put("user/others", {**old, "b/sae.safetensors": b"4", "README.md": HUMAN_CARD})
    result = child(
        server,
        """
from sae_lens import SAE
one, two = (load_sae(args[name]) for name in ("one", "two"))
first = push_sae_to_hub(one, "user/saes", private=True)
alone = same(load_sae("user/saes"), one)
push_sae_to_hub(two, "user/saes", sae_id="layer_7/standard", commit_message="the second")
result = {
    "alone": alone,
    "plain": same(SAE.from_pretrained("user/saes", "blocks.4.hook_resid_post"), one),
    "plain second": same(SAE.from_pretrained("user/saes", "layer_7/standard"), two),
    "ours": same(load_sae("user/saes:blocks.4.hook_resid_post"), one),
    "ours second": same(load_sae("user/saes", sae_id="layer_7/standard"), two),
    "then": same(load_sae("user/saes", revision=first.rsplit("/", 1)[1]), one),
    "which": refusal(load_sae, "user/saes"),
    "kept": load_sae("user/saes", sae_id="layer_7/standard").cfg.metadata["hf_fac"],
}
for sae, sae_id in ((one, None), (two, "two"), (one, None)):
    push_sae_to_hub(sae, "user/others", sae_id=sae_id)
""",
        **folders,
    )
    assert result.pop("which")[1].endswith("choose with sae_id= from layer_7/standard, blocks.4.hook_resid_post.")
    assert result.pop("kept")["fvu"] == 0.125
    assert all(result.values()), result
    assert server.repos["models", "user/saes"].private
    assert server.history("user/saes")[:2] == ["the second", "Upload the SAE blocks.4.hook_resid_post with hf_fac"]
    files = server.files("user/saes")
    for name, at in (("one", "blocks.4.hook_resid_post"), ("two", "layer_7/standard")):
        for file in ("cfg.json", "sae_weights.safetensors"):
            assert files[f"{at}/{file}"] == (Path(folders[name]) / file).read_bytes()

    held = set(server.files("user/others"))
    assert not held & {"two/sae.safetensors", "two/sparsity.safetensors"}, "what an older SAE left is removed"
    assert held > {"two/cfg.json", "two/sae_weights.safetensors", "two/notes.txt", "b/sae.safetensors"}
    _, head, text = server.files("user/others")["README.md"].decode().split("---\n", 2)
    for line in ("license: mit", "library_name: saelens", "- mine", "- sparse-autoencoder", "- org/model"):
        assert line in head
    assert head.count("org/model") == 1
    assert "# My SAEs" in text
    for sae_id in ("blocks.4.hook_resid_post", "two"):
        assert text.count(f'SAE.from_pretrained("user/others", "{sae_id}")') == 1
        assert f'sae="user/others:{sae_id}"' in text
    assert "| reads | org/model, layer 5 (0 is the embedding; `blocks.4.hook_resid_post`) |" in text
    assert "| architecture | topk, 32 features of width 8, k = 4 |" in text
    assert "| training data | rows \\| of ours |" in text
    assert "| training tokens | 12,345 |" in text
    assert "| fraction of variance unexplained | 0.125 |" in text


@pytest.mark.parametrize(
    ("model", "base"),
    [("org/model", ["org/model"]), ("/home/me/model", None), ("runs/model", None), ("gpt2-small", None), (None, None)],
)
def test_a_model_that_is_no_repo_is_not_named_as_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str | None, base: list[str] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert _metadata(model)["base_model"] == base


def test_an_sae_without_a_hook_name_needs_an_id() -> None:
    with pytest.raises(ValueError, match="give sae_id, the folder in the repo"):
        push_sae_to_hub(make_sae(hook_name=None), "user/x")


def test_what_is_no_sae_is_refused_and_no_more_is_pulled_than_the_config_says(
    server: HubServer, folders: dict[str, str]
) -> None:
    server.put("user/rows", {"a.txt": b"1"}, "datasets")
    server.put("user/none", {"README.md": b"# nothing"})
    config = (Path(folders["one"]) / "cfg.json").read_bytes()
    weights = (Path(folders["one"]) / "sae_weights.safetensors").read_bytes()
    many = json.dumps(json.loads(config) | {"d_sae": 10**9}).encode()
    server.put("user/large", {"cfg.json": config, "sae_weights.safetensors": weights + bytes(3 << 20)})
    server.put("user/claims", {"cfg.json": many, "sae_weights.safetensors": weights})
    server.put("user/widths", {"cfg.json": b"[1]", "sae_weights.safetensors": weights})
    server.put("user/config", {"cfg.json": config + b" " * (3 << 20), "sae_weights.safetensors": weights})
    server.put("user/code", {"sae.pth": b"cos\nsystem\n(S'touch hacked'\ntR."})
    server.put("user/pickle", {"cfg.json": config, "sae_weights.pt": b"1"})
    server.put("user/other", {"cfg.json": config, "sae_weights.safetensors": save({"W": torch.zeros(3)})})
    server.put("user/path", {"a/../../cfg.json": config, "a/../../sae_weights.safetensors": weights})
    result = child(
        server,
        """
from pathlib import Path
result = {name: refusal(load_sae, f"user/{name}") for name in args["names"]}
result["outside"] = refusal(push_sae_to_hub, load_sae(args["one"]), "user/x", sae_id="../up")
result["revision"] = refusal(load_sae, "user/none", revision="v9")
result["path"] = refusal(load_sae, "user/path", sae_id="a/../..")
result["files"] = [p.name for p in Path(".").rglob("*") if p.suffix in (".pt", ".pth") or p.name == "hacked"]
""",
        names=["rows", "nothing", "none", "large", "claims", "widths", "config", "code", "pickle", "other"],
        **folders,
    )
    assert not {"hacked", "sae_weights.pt"} & set(result.pop("files"))
    expected = {
        "outside": (None, "HubError"),
        "rows": (404, "'user/rows' is no local path and did not come from the Hub: .*is not a model repo"),
        "nothing": (404, "no local path"),
        "none": (None, "FileNotFoundError: 'user/none' holds no single SAE"),
        "revision": (404, "no revision 'v9'"),
        "large": (None, f"its files are {len(weights) + (3 << 20):,} bytes; at most"),
        "claims": (None, "cfg.json: d_sae: Input should be less than or equal to 16777216"),
        "widths": (None, r"cfg.json: Input should be an object, got \[1\]"),
        "config": (None, "at most 2,097,152 were expected. Nothing was fetched"),
        "code": (None, "hf_fac unpickles nothing|cannot be read as an SAE"),
        "pickle": (None, "holds no single SAE"),
        "other": (None, "cannot be read as an SAE: "),
        "path": (None, "cannot contain a '..' path segment"),
    }
    assert set(result) == set(expected)
    for case, (status, words) in expected.items():
        assert result[case][0] == status, (case, result[case])
        assert re.search(words, result[case][1]), (case, result[case])
    assert ("models", "user/x") not in server.repos
    assert not any("user/large" in path and "safetensors" in path for route, path in server.log if route == "resolve")
