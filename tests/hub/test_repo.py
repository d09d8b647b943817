"""The real `huggingface_hub` client over HTTP against the server of `hub_server.py`: what is pushed comes back, nothing
is there half, the size of what is pulled is checked first, and every refusal is a sentence that helps."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import NO_RIGHTS_TOKEN, READ_TOKEN, UNKNOWN_TOKEN, WRITE_TOKEN, HubServer, run_with_hub

# Sleeping is recorded instead of done, both in the client's own retries and in ours.
PRELUDE = """
import json, time
from pathlib import Path
from hf_fac.hub.errors import HubError
from hf_fac.hub.repo import pull_folder, push_folder, update_card

slept = []
time.sleep = slept.append

def refusal(function, *positional, **options):
    try:
        return [None, f"no refusal but {function(*positional, **options)}"]
    except HubError as error:
        return [error.status, str(error)]

def contents(folder):
    files = [f for f in sorted(Path(folder).rglob("*")) if f.is_file()]
    return {f.relative_to(folder).as_posix(): f.read_bytes().hex() for f in files}
"""


@pytest.fixture(scope="module")
def running() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def server(running: HubServer) -> HubServer:
    running.reset()
    return running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files: text and large-file suffixes, nested, with an empty one and names that need quoting."""
    root = tmp_path / "folder"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "config.json").write_text('{"d_sae": 64}')
    (root / "weights.safetensors").write_bytes(random.Random(0).randbytes(70_000))
    (root / "deep" / "er" / "rows.parquet").write_bytes(random.Random(1).randbytes(3_000))
    (root / "deep" / "empty.txt").write_bytes(b"")
    (root / "deep" / "über & so [1].txt").write_bytes(b"\r\n\x00\xff")
    return root


def held(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def child(server: HubServer, code: str, *, token: str | None = WRITE_TOKEN, **options: Any) -> Any:
    return run_with_hub(server, PRELUDE + code, token=token, **options)


def test_a_pushed_folder_comes_back_byte_for_byte_at_every_revision(server: HubServer, folder: Path) -> None:
    local = held(folder)
    result = child(
        server,
        """
folder, repo = Path(args["folder"]), "user/sae"
first = push_folder(folder, repo, private=True)
again = push_folder(folder, repo, private=True)
(folder / "config.json").write_text("changed")
second = push_folder(folder, repo, commit_message="better")
third = push_folder(folder / "deep", repo, path_in_repo="more/deep/")
branch = push_folder(folder / "deep", repo, revision="trial")
reader = {"token": args["reader"]}
pulled = {
    "now": pull_folder(repo, **reader), "old": pull_folder(repo, revision=first.rsplit("/", 1)[1]),
    "part": pull_folder(repo, revision="trial", allow_patterns="er/*"),
}
result = [first, again, second, third, branch], {name: [p.commit, contents(p.path)] for name, p in pulled.items()}
""",
        args={"folder": str(folder), "reader": READ_TOKEN},
    )
    (first, again, second, third, branch), pulled = result
    assert again == first
    assert len({first, second, third, branch}) == 4
    assert first.startswith(f"{server.endpoint}/user/sae/commit/")
    titles = ["Upload more/deep with hf_fac", "better", "Upload folder with hf_fac", "initial commit"]
    assert server.history("user/sae") == titles
    for name, url in (("now", third), ("old", first), ("part", branch)):
        commit, files = pulled[name]
        assert commit == url.rsplit("/", 1)[1]
        there = server.files("user/sae", revision=commit)
        assert {p: bytes.fromhex(data) for p, data in files.items()} == {
            p: data for p, data in there.items() if name != "part" or p.startswith("er/")
        }
    attributes = {".gitattributes": server.files("user/sae")[".gitattributes"]}
    deep = {path: data for path, data in local.items() if path.startswith("deep/")}
    assert server.files("user/sae", revision=first.rsplit("/", 1)[1]) == local | attributes
    assert server.files("user/sae") == {
        **local, "config.json": b"changed", **{f"more/{path}": data for path, data in deep.items()}, **attributes
    }  # fmt: skip
    assert server.repos["models", "user/sae"].private


def test_files_that_the_folder_no_longer_has_are_removed_only_on_request(server: HubServer, folder: Path) -> None:
    old = {"data/old.parquet": b"1", "data/old.txt": b"2", "other/old.parquet": b"3", "README.md": b"# Mine\n"}
    server.put("user/d", old, "datasets")
    server.put("user/all", old, "datasets")
    child(
        server,
        """
push_folder(args["folder"], "user/d", repo_type="dataset", path_in_repo="data")
push_folder(args["folder"], "user/d", repo_type="dataset", path_in_repo="data", delete_patterns="*.parquet")
push_folder(args["folder"], "user/all", repo_type="dataset", delete_patterns="*")
""",
        args={"folder": str(folder)},
    )
    expected = {f"data/{path}": data for path, data in held(folder).items()} | old
    del expected["data/old.parquet"]
    attributes = {".gitattributes": server.files("user/d", "datasets")[".gitattributes"]}
    assert server.files("user/d", "datasets") == expected | attributes
    assert server.files("user/all", "datasets") == held(folder) | attributes | {"README.md": b"# Mine\n"}
    assert len(server.history("user/d", "datasets")) == 4


@pytest.mark.parametrize("status", [429, 500, 0])
def test_a_passing_failure_anywhere_ends_in_one_whole_commit(server: HubServer, folder: Path, status: int) -> None:
    routes = ["info", "validate-yaml", "preupload", "lfs-batch", "lfs-put", "commit", "head", "resolve", "tree"]
    if status != 0:
        routes.append("create")  # where nothing is answered, one more is beyond the five attempts
    for route in routes:
        server.fail(1, status, on=route, retry_after=7 if status == 429 else None)
    pulled, slept = child(
        server,
        """
push_folder(args["folder"], "user/x", card=({"tags": ["a"]}, "# Card"))
result = contents(pull_folder("user/x").path), slept
""",
        args={"folder": str(folder)},
    )
    assert {p: bytes.fromhex(data) for p, data in pulled.items()} == server.files("user/x")
    assert {*held(folder), "README.md", ".gitattributes"} == set(pulled)
    assert len(server.history("user/x")) == 2
    assert not any(fault.times for fault in server.faults)
    if status == 429:
        assert sum(7 <= seconds <= 9 for seconds in slept) >= len(routes) - 1  # the client adds a second of its own


def test_a_push_that_fails_leaves_nothing_and_can_be_repeated(server: HubServer, folder: Path) -> None:
    server.fail(5, 500, on="commit")
    code = """
failed = refusal(push_folder, args["folder"], "user/x", card=({}, "# Card"))
there = contents(pull_folder("user/x").path)
push_folder(args["folder"], "user/x", card=({}, "# Card"))
result = failed, list(there)
"""
    (status, message), there = child(server, code, args={"folder": str(folder)})
    assert status == 500
    assert "try again later" in message
    assert there == [".gitattributes"]
    assert {*held(folder), "README.md", ".gitattributes"} == set(server.files("user/x"))
    assert len(server.history("user/x")) == 2
    assert server.count("commit") == 6
    assert server.count("lfs-put") == 2, "what was uploaded is not uploaded again"


def test_a_concurrent_change_is_kept(server: HubServer, folder: Path) -> None:
    server.put("user/x", {"README.md": b"# Old\n"})
    for turn in range(5):
        server.before_next_commit(lambda turn=turn: server.put("user/x", {"other": b"%d" % turn}))
    server.before_next_commit(lambda: server.put("user/x", {"README.md": b"# Written meanwhile\n", "more": b"1"}))
    code = """
result = refusal(update_card, "user/x", section="s", body="b")
push_folder(args["folder"], "user/x", card=({"tags": ["fac"]}, "ours"))
"""
    status, message = child(server, code, args={"folder": str(folder)})
    assert status == 412
    assert "Someone else committed first, 5 times" in message
    card = server.files("user/x")["README.md"].decode()
    assert "# Written meanwhile" in card
    assert "\nours\n" in card
    assert server.files("user/x")["more"] == b"1"


def test_a_lost_answer_makes_no_second_commit_and_no_second_pull_request(server: HubServer, folder: Path) -> None:
    server.fail(1, 500, on="commit", after=True)
    server.fail(1, 502, on="commit", after=True)
    url, lost, push, card = child(
        server,
        """
folder, repo, request = args["folder"], "user/x", {"create_pr": True, "token": args["reader"]}
url = push_folder(folder, repo)
lost = refusal(push_folder, folder, repo, path_in_repo="new", **request)
push = push_folder(folder, repo, path_in_repo="new", **request)
result = url, lost, push, update_card(repo, section="coverage", body="0.4", **request)
""",
        args={"folder": str(folder), "reader": READ_TOKEN},
    )
    assert len(server.history("user/x")) == 2
    assert url.endswith(server.repos["models", "user/x"].refs["main"])
    assert lost[0] == 502
    assert "user/x/discussions first" in lost[1]
    assert [push, card] == [f"{server.endpoint}/user/x/discussions/{number}" for number in (2, 3)]
    assert set(server.files("user/x")) == {".gitattributes", *held(folder)}
    assert f"new/{next(iter(held(folder)))}" in server.files("user/x", revision="refs/pr/2")
    assert b"0.4" in server.files("user/x", revision="refs/pr/3")["README.md"]


def test_refusals_say_what_was_found_and_what_to_do(server: HubServer, folder: Path, tmp_path: Path) -> None:
    server.put("user/model", {"config.json": b"{}", "sae/cfg.json": b"{}"})
    server.put("user/rows", {"a.txt": b"1"}, "datasets")
    server.put("user/secret", {"a.txt": b"1"}, private=True)
    server.put("user/gated", {"a.txt": b"1"})
    server.repos["models", "user/gated"].gated = True
    server.put("user/big", {"sae/a.safetensors": b"x" * 600, "sae/b.safetensors": b"x" * 401, "other": b"x" * 9999})
    server.put("user/up", {"../../../../../evil.txt": b"1"})
    server.put("user/root", {"/evil.txt": b"1"})
    server.put("user/yaml", {"README.md": b"---\ntags: [\n---\n"})
    server.put("user/latin", {"README.md": "é".encode("latin-1")})
    result = child(
        server,
        """
folder = args["folder"]
card = {"card": ({}, "b")}
result = {
    "anonymous push": refusal(push_folder, folder, "user/model", token=False),
    "anonymous pull": refusal(pull_folder, "user/secret", token=False),
    "bad token": refusal(pull_folder, "user/model", token=args["unknown"]),
    "no right": refusal(push_folder, folder, "user/model", token=args["read"]),
    "no right to make": refusal(push_folder, folder, "user/new", token=args["read"]),
    "hidden": refusal(pull_folder, "user/secret", token=args["none"]),
    "gated": refusal(pull_folder, "user/gated"),
    "no repo": refusal(pull_folder, "user/nothing"),
    "no repo for a card": refusal(update_card, "user/nothing", section="s", body="b"),
    "other kind": refusal(pull_folder, "user/rows"),
    "no revision": refusal(pull_folder, "user/model", revision="v2"),
    "no match": refusal(pull_folder, "user/model", allow_patterns=["*.csv"]),
    "no such id": refusal(pull_folder, "user//model"),
    "public": refusal(push_folder, folder, "user/model", private=True),
    "no folder": refusal(push_folder, folder + "/nowhere", "user/model"),
    "bad place": refusal(push_folder, folder, "user/nothing", path_in_repo="a/../../b"),
    "PR on a branch": refusal(push_folder, folder, "user/model", revision="v1", create_pr=True),
    "PR on nothing": refusal(push_folder, folder, "user/nothing", create_pr=True),
    "card is no YAML": refusal(push_folder, folder, "user/yaml", **card),
    "card is no UTF-8": refusal(push_folder, folder, "user/latin", **card),
    "too big": refusal(pull_folder, "user/big", allow_patterns="sae/*", max_bytes=1000),
    "leads up": refusal(pull_folder, "user/up"),
    "leads to the root": refusal(pull_folder, "user/root"),
}
fits = contents(pull_folder("user/big", allow_patterns="sae/*", max_bytes=1001).path)
assert list(fits) == ["sae/a.safetensors", "sae/b.safetensors"]
""",
        args={"folder": str(folder), "read": READ_TOKEN, "none": NO_RIGHTS_TOKEN, "unknown": UNKNOWN_TOKEN},
        home=tmp_path / "deep" / "home",
    )
    expected: dict[str, tuple[int | None, tuple[str, ...]]] = {
        "anonymous push": (401, ("no token was given", "hf auth login", "write to 'user'", "'user/model'")),
        "anonymous pull": (401, ("does not exist, is not a model repo, or is private", "no token", "read this repo")),
        "bad token": (401, ("mistyped, expired or revoked", "/settings/tokens")),
        "no right": (403, ("may not do this", "role 'write'", "write to 'user'")),
        "no right to make": (403, ("may not do this", "role 'write'")),
        "hidden": (404, ("is private", "another token")),
        "gated": (403, ("It is gated", f"ask for access at {server.endpoint}/user/gated")),
        "no repo": (404, ("model repo 'user/nothing'", "Check the name")),
        "no repo for a card": (404, ("Cannot update the card of", "'user/nothing'")),
        "other kind": (404, ("is not a model repo",)),
        "no revision": (404, ("no revision 'v2'", f"{server.endpoint}/user/model lists branches")),
        "no match": (None, ("nothing matches ['*.csv']", "There is: .gitattributes, config.json, sae/cfg.json")),
        "no such id": (None, ("'user//model'",)),
        "public": (None, ("it is public", "private=True")),
        "no folder": (None, ("not a folder with files in it",)),
        "bad place": (None, ("Cannot push", "a/../../b")),
        "PR on a branch": (None, ("always against main",)),
        "PR on nothing": (404, ("does not exist",)),
        "card is no YAML": (None, ("'user/yaml': the metadata of README.md is not YAML",)),
        "card is no UTF-8": (None, ("'user/latin'", "utf-8")),
        "too big": (None, ("1,001 bytes; at most 1,000", "Nothing was fetched")),
        "leads up": (None, ("evil.txt", "cannot contain a '..'")),
        "leads to the root": (None, ("evil.txt", "cannot be an absolute")),
    }
    assert set(result) == set(expected)
    for case, (status, words) in expected.items():
        found, message = result[case]
        assert found == status, (case, message)
        for word in words:
            assert word in message, (case, message)
    assert len(server.history("user/model")) == 2
    assert server.count("commit") == 0
    assert ("models", "user/nothing") not in server.repos
    assert not list(tmp_path.rglob("evil.txt"))
    fetched = [path for route, path in server.log if route == "resolve" and "user/big" in path]
    assert len(fetched) == 2, "what is too big is not fetched"


def test_a_hub_in_trouble_is_told_apart(server: HubServer) -> None:
    server.put("user/x", {"a.txt": b"1"})
    server.fail(5, 409, on="commit")
    server.fail(5, 503, on="commit", retry_after=2)
    server.fail(1, 429, on="commit", retry_after=3600)
    server.fail(1, 400, on="commit", message="the name is reserved")
    result = child(
        server, 'result = [refusal(update_card, "user/x", section="s", body="b") for _ in range(4)] + [slept]'
    )
    *refusals, slept = result
    assert [status for status, _ in refusals] == [409, 503, 429, 400]
    texts = [message for _, message in refusals]
    assert "Another change of the repo is under way" in texts[0]
    assert "Nothing was half done" in texts[1]
    assert "Try again in 3600 s" in texts[2]
    assert "the name is reserved" in texts[3]
    assert len(slept) == 8, "neither an hour's wait nor a bad request is retried"
    assert all(0 <= seconds <= most for seconds, most in zip(slept, (1, 2, 4, 8, 2, 2, 2, 2), strict=True))
    assert slept[4:] == [2] * 4


def test_tokens_appear_nowhere(server: HubServer, folder: Path, tmp_path: Path) -> None:
    tokens = {"write": WRITE_TOKEN, "read": READ_TOKEN, "unknown": UNKNOWN_TOKEN, "other": "a token of another shape"}
    server.fail(5, 500, on="commit", message=f"cannot serve Bearer {WRITE_TOKEN}")
    server.fail(1, 400, on="info", message=f"cannot serve {tokens['other']}, try {WRITE_TOKEN}")
    result = child(
        server,
        """
import logging, traceback
logging.basicConfig(level=logging.DEBUG)
folder = args["folder"]
result = []
try:
    pull_folder("user/x", token=args["other"])
except HubError:
    result.append(traceback.format_exc())
result += [refusal(push_folder, folder, "user/x"), refusal(push_folder, folder, "user/x", token=args["read"])]
result.append(refusal(pull_folder, "user/x", token=args["unknown"]))
push_folder(folder, "user/x", token=args["write"], card=({}, "# Card"))
result.append(str(pull_folder("user/x", token=args["read"])))
""",
        args={"folder": str(folder), **tokens},
        home=tmp_path / "home",
    )
    written = [file for file in (tmp_path / "home").rglob("*") if file.is_file()]
    assert any(file.name == "output.txt" and file.stat().st_size > 0 for file in written)
    assert "cannot serve ***, try hf_***" in result[0]
    assert [status for status, _ in result[1:4]] == [500, 403, 401]
    for token in tokens.values():
        assert token not in json.dumps(result)
        assert not [file for file in written if token.encode() in file.read_bytes()]
        assert not [path for path, data in server.files("user/x").items() if token.encode() in data]


def test_a_card_keeps_what_others_wrote(server: HubServer, folder: Path) -> None:
    human = (
        b"---\n# my own comment\nlanguage: no\ntags:\n- mine\nlicense: mit\n---\n\n# My title\n\nMy words.\n"
        b"<!-- a remark of mine -->\n"
    )
    server.put("user/saes", {"README.md": human})
    child(
        server,
        """
folder, repo = Path(args["folder"]), "user/saes"
push_folder(folder, repo, path_in_repo="l5", card=({"tags": ["saelens"], "library_name": "saelens"}, "FVU 0.2"))
push_folder(folder, repo, path_in_repo="l9", card=({"tags": ["saelens", "fac"], "library_name": "saelens"}, "FVU 0.3"))
update_card(repo, section="l5", body="FVU 0.1", metadata={"base_model": "HuggingFaceTB/SmolLM2-135M"})
update_card(repo, section="l5", body="FVU 0.1", metadata={"base_model": "HuggingFaceTB/SmolLM2-135M"})

(folder / "README.md").write_text("# From the folder\\n")
push_folder(folder, "user/plain")
push_folder(folder, "user/merged", card=({"license": "mit"}, "ours"))
""",
        args={"folder": str(folder)},
    )
    card = server.files("user/saes")["README.md"].decode()
    assert card == (
        "---\nlanguage: 'no'\ntags:\n- mine\n- saelens\n- fac\nlicense: mit\nlibrary_name: saelens\n"
        "base_model: HuggingFaceTB/SmolLM2-135M\n---\n\n# My title\n\nMy words.\n<!-- a remark of mine -->\n\n"
        "<!-- hf_fac:l5 start -->\nFVU 0.1\n<!-- hf_fac:l5 end -->\n\n"
        "<!-- hf_fac:l9 start -->\nFVU 0.3\n<!-- hf_fac:l9 end -->\n"
    )
    assert len(server.history("user/saes")) == 5

    assert server.files("user/plain")["README.md"] == b"# From the folder\n"
    merged = server.files("user/merged")["README.md"].decode()
    assert merged.startswith("---\nlicense: mit\n---\n\n# From the folder\n")
    assert "<!-- hf_fac:main start -->\nours\n" in merged


def test_without_a_network_the_cache_answers(folder: Path, tmp_path: Path) -> None:
    files = {f"saes/{number}.json": b"%d" % number for number in range(7)}
    with HubServer() as server:
        commit = server.put("user/x", files)
        child(server, 'pull_folder("user/x", allow_patterns="saes/*", max_bytes=7)', home=tmp_path / "home")
    code = """
pulled = pull_folder("user/x", allow_patterns="saes/*", max_bytes=7)
result = {
    "commit": pulled.commit, "files": list(contents(pulled.path)), "rest": refusal(pull_folder, "user/x"),
    "none": refusal(pull_folder, "user/y"), "push": refusal(update_card, "user/x", section="s", body="b"),
}
"""
    for env in ({"HF_HUB_OFFLINE": "1"}, {}):
        result = child(server, code, home=tmp_path / "home", env=env)
        assert result["commit"] == commit
        assert result["files"] == list(files)
        for case in ("rest", "none", "push"):
            assert f"{server.endpoint} was not reached" in result[case][1], case
