"""SAEs on the local Hub server: plain SAELens opens what was pushed, `load_sae` checks what it pulls, and a push that
was refused leaves nothing half. (A push that is killed: see test_hub.py.)"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import NO_RIGHTS_TOKEN, READ_TOKEN, UNKNOWN_TOKEN, WRITE_TOKEN, HubServer, run_with_hub
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save

from hf_fac.sae.hub import push_sae_to_hub
from hf_fac.sae.loading import save_sae

PRELUDE = """
import time
from hf_fac import load_sae
from hf_fac.hub.repo import HubError
from hf_fac.sae.hub import push_sae_to_hub

time.sleep = lambda seconds: None

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


def child(server: HubServer, code: str, *, token: str | None = WRITE_TOKEN, **options: Any) -> Any:
    return run_with_hub(server, PRELUDE + code, token=token, **options)


def test_plain_saelens_opens_each_of_two_saes_in_a_repo(server: HubServer, folders: dict[str, str]) -> None:
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
""",
        args=folders,
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


def test_the_card_says_what_each_sae_is_and_how_it_is_loaded(server: HubServer, folders: dict[str, str]) -> None:
    server.put("user/saes", {"README.md": b"---\nlicense: mit\ntags: [mine]\n---\n\n# My SAEs\n"})
    code = """
for name, at in (("one", None), ("two", "two"), ("one", None)):
    push_sae_to_hub(load_sae(args[name]), "user/saes", sae_id=at)
"""
    child(server, code, args=folders)
    card = server.files("user/saes")["README.md"].decode()
    head, text = card.split("---\n")[1:3]
    for line in ("license: mit", "library_name: saelens", "- mine", "- sparse-autoencoder", "- org/model"):
        assert line in head
    assert head.count("org/model") == 1
    assert "# My SAEs" in text
    for sae_id in ("blocks.4.hook_resid_post", "two"):
        assert text.count(f'SAE.from_pretrained("user/saes", "{sae_id}")') == 1
        assert f'sae="user/saes:{sae_id}"' in text
    assert "| reads | org/model, layer 5 (0 is the embedding; `blocks.4.hook_resid_post`) |" in text
    assert "| architecture | topk, 32 features of width 8, k = 4 |" in text
    assert "| training data | rows \\| of ours |" in text
    assert "| training samples | 12,345 |" in text
    assert "| fraction of variance unexplained | 0.125 |" in text


def test_what_another_sae_left_in_the_folder_goes(server: HubServer, folders: dict[str, str]) -> None:
    old = {"a/sae.safetensors": b"1", "a/sparsity.safetensors": b"2", "a/notes.txt": b"3", "b/sae.safetensors": b"4"}
    server.put("user/saes", old)
    child(server, 'push_sae_to_hub(load_sae(args["one"]), "user/saes", sae_id="a")', args=folders)
    held = set(server.files("user/saes")) - {".gitattributes", "README.md"}
    assert held == {"a/cfg.json", "a/sae_weights.safetensors", "a/notes.txt", "b/sae.safetensors"}


def test_a_model_that_is_no_repo_is_not_named_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cards = []
    monkeypatch.setattr("hf_fac.sae.hub.push_folder", lambda *positional, card, **options: cards.append(card))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    for name in ("org/model", "/home/me/model", "runs/model", "gpt2-small", None):
        push_sae_to_hub(make_sae(model_name=name), "user/x")
    assert [metadata["base_model"] for metadata, _ in cards] == [["org/model"], None, None, None, None]


def test_an_sae_without_a_place_needs_an_id() -> None:
    with pytest.raises(ValueError, match="give sae_id, the folder in the repo"):
        push_sae_to_hub(make_sae(hook_name=None), "user/x")


def test_refusals_come_in_words(server: HubServer, folders: dict[str, str]) -> None:
    server.put("user/rows", {"a.txt": b"1"}, "datasets")
    server.put("user/none", {"README.md": b"# nothing"})
    for times, status in ((5, 409), (5, 412), (1, 429), (5, 500)):
        server.fail(times, status, on="commit", retry_after=3600 if status == 429 else None)
    tokens = {"unknown": UNKNOWN_TOKEN, "read": READ_TOKEN, "none": NO_RIGHTS_TOKEN}
    code = """
sae = load_sae(args["one"])
result = {
    "unknown": refusal(push_sae_to_hub, sae, "user/x", token=args["unknown"]),
    "reader": refusal(push_sae_to_hub, sae, "user/x", token=args["read"]),
    "outside": refusal(push_sae_to_hub, sae, "user/x", sae_id="../up"),
    "rows": refusal(load_sae, "user/rows"),
    "nothing": refusal(load_sae, "user/nothing"),
    "none": refusal(load_sae, "user/none"),
    "revision": refusal(load_sae, "user/none", revision="v9"),
    "in trouble": [refusal(push_sae_to_hub, sae, "user/none", sae_id="a")[0] for _ in range(4)],
}
"""
    result = child(server, code, args={**folders, **tokens})
    assert result.pop("in trouble") == [409, 412, 429, 500]
    assert set(server.files("user/none")) == {"README.md", ".gitattributes"}
    expected = {
        "unknown": (401, "mistyped, expired or revoked"),
        "reader": (403, "may not do this"),
        "outside": (None, "HubError"),
        "rows": (404, "'user/rows' is no local path and did not come from the Hub: .*did you mean repo_type='dataset'"),
        "nothing": (404, "no local path"),
        "none": (None, "FileNotFoundError: 'user/none' holds no single SAE"),
        "revision": (404, "no revision 'v9'"),
    }
    for case, (status, words) in expected.items():
        assert result[case][0] == status, (case, result[case])
        assert all(word in result[case][1] for word in words.split(".*")), (case, result[case])
    assert ("models", "user/x") not in server.repos


def test_what_is_pulled_is_no_larger_than_the_config_says_and_runs_no_code(
    server: HubServer, folders: dict[str, str]
) -> None:
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
    names = ["large", "claims", "widths", "config", "code", "pickle", "other"]
    code = """
from pathlib import Path
result = {name: refusal(load_sae, f"user/{name}")[1] for name in args["names"]}
result["path"] = refusal(load_sae, "user/path", sae_id="a/../..")[1]
result["files"] = [p.name for p in Path(".").rglob("*") if p.suffix in (".pt", ".pth") or p.name == "hacked"]
"""
    result = child(server, code, args={"names": names})
    assert f"its files are {len(weights) + (3 << 20):,} bytes; at most" in result["large"]
    assert "cfg.json: d_sae: Input should be less than or equal to 16777216" in result["claims"]
    assert "cfg.json: Input should be an object, got [1]" in result["widths"]
    assert "at most 2,097,152 were expected. Nothing was fetched" in result["config"]
    assert "hf_fac unpickles nothing" in result["code"] or "cannot be read as an SAE" in result["code"]
    assert "holds no single SAE" in result["pickle"]
    assert "cannot be read as an SAE: " in result["other"]
    assert "would leave the snapshot's folder" in result["path"]
    assert "hacked" not in result["files"]
    assert not [name for name in result["files"] if name.endswith(".pt")]
    requested = [request.path for request in server.log if request.route == "resolve"]
    assert not any("user/large" in path and "safetensors" in path for path in requested)
