"""The real `huggingface_hub` client over HTTP against the server of `hub_server.py`: what is pushed comes back, nothing
is there half, what is pulled was checked, and every refusal is a sentence that helps."""

from __future__ import annotations

import json
import random
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from hub_server import NO_RIGHTS_TOKEN, READ_TOKEN, UNKNOWN_TOKEN, WRITE_TOKEN, HubServer, run_with_hub
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fac.hub.cards import merge_card

# Sleeping is recorded instead of done, both in the client's own retries and in ours.
PRELUDE = """
import json, os, time
from pathlib import Path
from hf_fac.hub.repo import HubError, pull_folder, push_folder, update_card

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
def running() -> Any:
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
    result = child(
        server,
        """
folder, repo = Path(args["folder"]), "user/sae"
first = push_folder(folder, repo)
again = push_folder(folder, repo)
(folder / "config.json").write_text("changed")
second = push_folder(folder, repo, commit_message="better")
third = push_folder(folder / "deep", repo, path_in_repo="more/deep/")
branch = push_folder(folder / "deep", repo, revision="trial")
part = contents(pull_folder(repo, subfolder="deep", allow_patterns="*.parquet").path)
now, old = pull_folder(repo), pull_folder(repo, revision=first.rsplit("/", 1)[1])
result = {
    "urls": [first, again, second, third, branch], "now": contents(now.path), "old": contents(old.path),
    "part": part, "commits": [now.commit, old.commit], "same": now.path.name == now.commit,
}
""",
        args={"folder": str(folder)},
    )
    first, again, second, third, branch = result["urls"]
    assert again == first
    assert len({first, second, third, branch}) == 4
    assert first.startswith(f"{server.endpoint}/user/sae/commit/")
    assert server.history("user/sae") == [
        "Upload more/deep with hf_fac",
        "better",
        "Upload folder with hf_fac",
        "initial commit",
    ]
    assert result["commits"] == [third.rsplit("/", 1)[1], first.rsplit("/", 1)[1]]

    local = {path: data.hex() for path, data in held(folder).items()}
    now, old = result["now"], result["old"]
    assert {path: now[path] for path in local} == local
    assert {path.removeprefix("more/") for path in now if path.startswith("more/")} == {
        path for path in local if path.startswith("deep/")
    }
    assert old == {**local, "config.json": b'{"d_sae": 64}'.hex(), ".gitattributes": now[".gitattributes"]}
    assert list(result["part"]) == ["er/rows.parquet"]
    assert "er/rows.parquet" in server.files("user/sae", revision="trial")
    assert "er/rows.parquet" not in server.files("user/sae")
    assert result["same"]


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
    assert not any(fault.times for fault in server._faults)
    if status == 429:
        assert sum(7 <= seconds <= 9 for seconds in slept) >= len(routes) - 1  # the client adds a second of its own


def test_a_commit_whose_answer_was_lost_is_not_made_twice(server: HubServer, folder: Path) -> None:
    server.fail(1, 500, on="commit", after=True)
    url = child(server, 'result = push_folder(args["folder"], "user/x")', args={"folder": str(folder)})
    assert len(server.history("user/x")) == 2
    assert url.endswith(server.repos["models", "user/x"].refs["main"])

    server.fail(1, 502, on="commit", after=True)
    code = 'result = refusal(push_folder, args["folder"], "user/x", path_in_repo="new", create_pr=True)'
    status, message = child(server, code, args={"folder": str(folder)})
    assert status == 502
    assert "user/x/discussions first" in message
    assert server.repos["models", "user/x"].pull_requests == 1


def test_a_push_that_fails_leaves_nothing_and_can_be_repeated(server: HubServer, folder: Path) -> None:
    server.fail(99, 500, on="commit")
    code = 'result = refusal(push_folder, args["folder"], "user/x", card=({}, "# Card"))'
    status, message = child(server, code, args={"folder": str(folder)})
    assert status == 500
    assert "repeat it later" in message
    assert set(server.files("user/x")) == {".gitattributes"}
    assert server.count("commit") == 5
    sent = server.count("lfs-put")
    assert sent == 2

    server.heal()
    child(server, 'push_folder(args["folder"], "user/x", card=({}, "# Card"))', args={"folder": str(folder)})
    assert {*held(folder), "README.md", ".gitattributes"} == set(server.files("user/x"))
    assert len(server.history("user/x")) == 2
    assert server.count("lfs-put") == sent


@pytest.mark.parametrize("where", ["upload", "commit", "answer"])
def test_a_push_killed_anywhere_leaves_nothing_half_and_is_repeated(
    server: HubServer, folder: Path, where: str
) -> None:
    code = """
import signal
import huggingface_hub._commit_api as client

def die(*positional, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def die_after(function):
    return lambda *positional, **options: (function(*positional, **options), die())

if args["where"] == "upload":
    client.lfs_upload = die_after(client.lfs_upload)
elif args["where"] == "commit":
    client._send_commit = die
elif args["where"] == "answer":
    client._send_commit = die_after(client._send_commit)
push_folder(args["folder"], "user/x", card=({}, "# Card"))
"""
    with pytest.raises(AssertionError, match="ended with -9"):
        child(server, code, args={"folder": str(folder), "where": where})
    uploaded = server.count("lfs-put")
    assert uploaded == 2 or where == "upload"
    whole = {*held(folder), "README.md", ".gitattributes"}
    assert set(server.files("user/x")) == (whole if where == "answer" else {".gitattributes"})
    child(server, code, args={"folder": str(folder), "where": "nowhere"})
    assert set(server.files("user/x")) == whole
    assert len(server.history("user/x")) == 2
    assert where == "upload" or server.count("lfs-put") == uploaded, "what was uploaded is not uploaded again"


def test_a_concurrent_change_is_kept(server: HubServer, folder: Path) -> None:
    server.put("user/x", {"README.md": b"# Old\n"})
    server.before_next_commit(lambda: server.put("user/x", {"README.md": b"# Written meanwhile\n", "other": b"1"}))
    code = 'push_folder(args["folder"], "user/x", card=({"tags": ["fac"]}, "ours"))'
    child(server, code, args={"folder": str(folder)})
    card = server.files("user/x")["README.md"].decode()
    assert "# Written meanwhile" in card
    assert "\nours\n" in card
    assert server.files("user/x")["other"] == b"1"

    for turn in range(9):
        server.before_next_commit(lambda turn=turn: server.put("user/x", {"other": b"%d" % turn}))
    status, message = child(server, 'result = refusal(update_card, "user/x", section="s", body="b")')
    assert status == 412
    assert "Someone else committed first, 5 times" in message


def test_refusals_say_what_was_found_and_what_to_do(server: HubServer, folder: Path) -> None:
    server.put("user/model", {"config.json": b"{}", "sae/cfg.json": b"{}"})
    server.repos["models", "user/model"].refs["v1"] = server.repos["models", "user/model"].refs["main"]
    server.put("user/rows", {"a.txt": b"1"}, "datasets")
    server.put("user/secret", {"a.txt": b"1"}, private=True)
    server.put("user/gated", {"a.txt": b"1"})
    server.repos["models", "user/gated"].gated = True
    result = child(
        server,
        """
folder = args["folder"]
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
    "no subfolder": refusal(pull_folder, "user/model", subfolder="saes"),
    "no match": refusal(pull_folder, "user/model", allow_patterns=["*.csv"]),
    "no such id": refusal(pull_folder, "user//model"),
    "public": refusal(push_folder, folder, "user/model", private=True),
    "no folder": refusal(push_folder, folder + "/nowhere", "user/model"),
    "bad place": refusal(push_folder, folder, "user/model", path_in_repo="a/../../b"),
    "bad subfolder": refusal(pull_folder, "user/model", subfolder="/etc"),
    "PR on a branch": refusal(push_folder, folder, "user/model", revision="v1", create_pr=True),
    "PR on nothing": refusal(push_folder, folder, "user/nothing", create_pr=True),
}
""",
        args={"folder": str(folder), "read": READ_TOKEN, "none": NO_RIGHTS_TOKEN, "unknown": UNKNOWN_TOKEN},
    )
    expected: dict[str, tuple[int | None, tuple[str, ...]]] = {
        "anonymous push": (401, ("no token was given", "hf auth login", "write to 'user'", "'user/model'")),
        "anonymous pull": (401, ("does not exist, or is private", "no token was given", "read this repo")),
        "bad token": (401, ("mistyped, expired or revoked", "/settings/tokens")),
        "no right": (403, ("may not do this", "role 'write'", "write to 'user'")),
        "no right to make": (403, ("may not do this", "role 'write'")),
        "hidden": (404, ("does not exist, or is private", "another token")),
        "gated": (403, ("It is gated", f"ask for access at {server.endpoint}/user/gated")),
        "no repo": (404, ("model repo 'user/nothing'", "Check the name and repo_type")),
        "no repo for a card": (404, ("Cannot update the card of", "'user/nothing'")),
        "other kind": (404, ("did you mean repo_type='dataset'",)),
        "no revision": (404, ("no revision 'v2'", "there are: main, v1")),
        "no subfolder": (None, ("nothing matches ['saes/*']", "There is: .gitattributes, config.json, sae/cfg.json")),
        "no match": (None, ("nothing matches ['*.csv']", "config.json")),
        "no such id": (None, ("'user//model'",)),
        "public": (None, ("it is public", "private=True")),
        "no folder": (None, ("not a folder with files in it",)),
        "bad place": (None, ("'a/../../b'", "without '..'")),
        "bad subfolder": (None, ("'/etc'",)),
        "PR on a branch": (None, ("always against main",)),
        "PR on nothing": (404, ("does not exist",)),
    }
    assert set(result) == set(expected)
    for case, (status, words) in expected.items():
        found, message = result[case]
        assert found == status, (case, message)
        for word in words:
            assert word in message, case
    assert len(server.history("user/model")) == 2
    assert ("models", "user/nothing") not in server.repos


def test_a_hub_in_trouble_is_told_apart(server: HubServer) -> None:
    server.put("user/x", {"a.txt": b"1"})
    server.fail(5, 409, on="commit")
    server.fail(5, 503, on="commit", retry_after=2)
    server.fail(1, 429, on="commit", retry_after=3600)
    server.fail(1, 400, on="commit", message="the name is reserved")
    server.fail(1, 503, on="commit", retry_after=formatdate(time.time() + 100, usegmt=True))
    result = child(
        server,
        """
result = [refusal(update_card, "user/x", section="s", body="b") for _ in range(4)]
update_card("user/x", section="s", body="b")
result.append(slept)
""",
    )
    *refusals, slept = result
    assert [status for status, _ in refusals] == [409, 503, 429, 400]
    texts = [message for _, message in refusals]
    assert "Another change of the repo is under way" in texts[0]
    assert "Nothing is there half" in texts[1]
    assert "Repeat in 3600 s" in texts[2]
    assert "the name is reserved" in texts[3]
    assert slept[:-1] == [1, 2, 4, 8, 2, 2, 2, 2]  # an hour is more patience than we have
    assert 50 < slept[-1] <= 100


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
folder, repo = args["folder"], "user/saes"
push_folder(folder, repo, path_in_repo="l5", card=({"tags": ["saelens"], "library_name": "saelens"}, "FVU 0.2"))
push_folder(folder, repo, path_in_repo="l9", card=({"tags": ["saelens", "fac"], "library_name": "saelens"}, "FVU 0.3"))
update_card(repo, section="l5", body="FVU 0.1", metadata={"base_model": "HuggingFaceTB/SmolLM2-135M"})
update_card(repo, section="l5", body="FVU 0.1", metadata={"base_model": "HuggingFaceTB/SmolLM2-135M"})
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


def test_a_folder_with_a_readme_is_the_start_of_the_card(server: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("# From the folder\n")
    child(
        server,
        """
push_folder(args["folder"], "user/plain")
push_folder(args["folder"], "user/merged", card=({"license": "mit"}, "ours"))
""",
        args={"folder": str(folder)},
    )
    assert server.files("user/plain")["README.md"] == b"# From the folder\n"
    merged = server.files("user/merged")["README.md"].decode()
    assert merged.startswith("---\nlicense: mit\n---\n\n# From the folder\n")
    assert "<!-- hf_fac:main start -->\nours\n" in merged


text = st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n"), max_size=60)


@settings(deadline=None)
@given(before=text, after=text, old=text, new=text, name=st.sampled_from(["main", "blocks.5/é x"]))
def test_a_section_is_replaced_and_nothing_around_it(before: str, after: str, old: str, new: str, name: str) -> None:
    card = merge_card(f"# {before}", metadata={}, section=name, body=old) + after
    changed = merge_card(card, metadata={}, section=name, body=new)
    start, end = f"<!-- hf_fac:{name} start -->", f"<!-- hf_fac:{name} end -->"
    assert changed == card.split(start)[0] + f"{start}\n{new.strip()}\n{end}" + card.split(end)[1]
    assert merge_card(changed, metadata={}, section=name, body=new) == changed


def test_a_mark_inside_a_section_does_not_end_it() -> None:
    body = "a span: <!-- hf_fac:main end --> and on"
    card = merge_card(merge_card("", metadata={}, section="main", body=body), metadata={}, section="main", body="new")
    assert card == "<!-- hf_fac:main start -->\nnew\n<!-- hf_fac:main end -->\n"


def test_card_metadata_is_united() -> None:
    old = {
        "configs": [{"config_name": "a", "data_files": "a/*"}],
        "tags": "x",
        "dataset_info": {"n": 1},
        "license": "mit",
    }
    new = {
        "configs": [{"config_name": "b", "data_files": "b/*"}, {"config_name": "a", "data_files": "c/*"}],
        "tags": ["x", "y"],
        "dataset_info": {"m": 2},
        "license": "apache-2.0",
        "base_model": None,
    }
    once = merge_card("", metadata=old, section="s", body="")
    twice = merge_card(once, metadata=new, section="s", body="")
    assert twice == merge_card(twice, metadata=new, section="s", body="")
    assert twice.startswith(
        "---\nconfigs:\n- config_name: a\n  data_files: c/*\n- config_name: b\n  data_files: b/*\n"
        "tags:\n- x\n- y\ndataset_info:\n  n: 1\n  m: 2\nlicense: apache-2.0\n---\n"
    )


def test_metadata_that_changes_nothing_is_left_as_written() -> None:
    card = "---\r\ntags: [a,   b] # why\r\nlanguage: no\r\n---\r\nWords\r\n"
    assert merge_card(card, metadata={"tags": ["b"]}, section="s", body="x").startswith(card.rstrip())


@pytest.mark.parametrize(
    ("card", "section", "words"),
    [
        ("---\ntags: [\n---\n", "s", "not YAML"),
        ("---\n- a\n---\n", "s", "list, not a mapping"),
        ("<!-- hf_fac:s start -->\nhalf", "s", "once each"),
        ("<!-- hf_fac:s end -->\n<!-- hf_fac:s start -->", "s", "once each"),
        ("", "s -->", "cannot name a section"),
    ],
)
def test_a_card_that_cannot_be_merged_is_refused(card: str, section: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        merge_card(card, metadata={"a": 1}, section=section, body="b")


def test_a_broken_card_is_refused_before_anything_is_committed(server: HubServer, folder: Path) -> None:
    server.put("user/yaml", {"README.md": b"---\ntags: [\n---\n"})
    server.put("user/latin", {"README.md": "é".encode("latin-1")})
    result = child(
        server,
        'result = [refusal(push_folder, args["folder"], f"user/{r}", card=({}, "b")) for r in ("yaml", "latin")]',
        args={"folder": str(folder)},
    )
    assert "'user/yaml': the metadata of README.md is not YAML" in result[0][1]
    assert "'user/latin': README.md is not UTF-8" in result[1][1]
    assert server.count("commit") == 0


def test_what_is_pulled_is_checked_first(server: HubServer, tmp_path: Path) -> None:
    strange = ["../evil.txt", "/abs.txt", "a/../../evil.txt", "a\\..\\evil.txt", "C:evil.txt", "a//b.txt", "a\nb.txt"]
    for number, name in enumerate(strange):
        server.put(f"user/strange{number}", {name: b"1", "fine.txt": b"1"})
    server.put("user/big", {"sae/a.safetensors": b"x" * 600, "sae/b.safetensors": b"x" * 401, "other": b"x" * 9999})
    files = {
        "cfg.json": b"{}",
        "model.bin": b"1",
        "a/x.pkl": b"1",
        "a/y.PT": b"1",
        "z.pth": b"1",
        "w.safetensors": b"1",
    }
    server.put("user/pickles", files)
    server.put("user/only", {"model.pkl": b"1"})
    result = child(
        server,
        """
pull = lambda *a, **k: sorted(contents(pull_folder(*a, **k).path))
result = {
    "strange": [refusal(pull_folder, f"user/strange{n}") for n in range(args["strange"])],
    "too big": refusal(pull_folder, "user/big", subfolder="sae", max_bytes=1000),
    "fits": pull("user/big", subfolder="sae", max_bytes=1001),
    "safe": pull("user/pickles"),
    "only pickles": refusal(pull_folder, "user/only", allow_patterns=["model*", "*.json"]),
    "asked for": pull("user/only", allow_patterns="model.pkl"),
}
""",
        args={"strange": len(strange)},
        home=tmp_path / "home",
    )
    for name, (status, message) in zip(strange, result["strange"], strict=True):
        assert status is None
        assert f"{name!r}, which would leave" in message
    assert not list((tmp_path / "home").rglob("fine.txt"))
    assert "1,001 bytes; at most 1,000" in result["too big"][1]
    assert result["fits"] == ["a.safetensors", "b.safetensors"]
    assert result["safe"] == [".gitattributes", "cfg.json", "w.safetensors"]
    assert result["asked for"] == ["model.pkl"]
    assert "can run code" in result["only pickles"][1]
    fetched = {request.path.rsplit("/", 1)[1] for request in server.log if request.route == "resolve"}
    assert not fetched & {"model.bin", "x.pkl", "y.PT", "z.pth"}


def test_what_is_pulled_is_checked_again_on_disk(server: HubServer, tmp_path: Path) -> None:
    server.put("user/links", {"a.txt": b"outside"})
    server.stated_etags["a.txt"] = "../../../../outside.txt"
    server.put("user/lies", {"b.txt": b"x" * 5000})
    server.stated_sizes["b.txt"] = 10
    result = child(
        server,
        'result = [refusal(pull_folder, "user/links"), refusal(pull_folder, "user/lies", max_bytes=100)]',
        home=tmp_path / "home",
    )
    assert "outside the cache" in result[0][1]
    assert "5,000 of 10 bytes" in result[1][1]


def test_a_private_repo_is_for_those_with_a_token(server: HubServer, folder: Path) -> None:
    count = child(
        server,
        """
push_folder(args["folder"], "user/p", private=True)
push_folder(args["folder"], "user/p", private=True)
result = len(contents(pull_folder("user/p", token=args["read"]).path))
""",
        args={"folder": str(folder), "read": READ_TOKEN},
    )
    assert server.repos["models", "user/p"].private
    assert count == len(held(folder)) + 1


def test_a_reader_may_open_a_pull_request(server: HubServer, folder: Path) -> None:
    server.put("user/x", {"a.txt": b"1"})
    push, card = child(
        server,
        """
push = push_folder(args["folder"], "user/x", create_pr=True)
result = push, update_card("user/x", section="coverage", body="0.4", create_pr=True)
""",
        token=READ_TOKEN,
        args={"folder": str(folder)},
    )
    assert [push, card] == [f"{server.endpoint}/user/x/discussions/{number}" for number in (1, 2)]
    assert set(server.files("user/x")) == {".gitattributes", "a.txt"}
    assert set(server.files("user/x", revision="refs/pr/1")) == {".gitattributes", "a.txt", *held(folder)}
    assert b"0.4" in server.files("user/x", revision="refs/pr/2")["README.md"]


def test_without_a_network_the_cache_answers(folder: Path, tmp_path: Path) -> None:
    files = {f"saes/{number}.json": b"%d" % number for number in range(7)}
    with HubServer(page_size=3) as server:
        commit = server.put("user/x", files)
        child(server, 'result = contents(pull_folder("user/x", subfolder="saes").path)', home=tmp_path / "home")
        assert server.count("tree") > 2
    code = """
pulled = pull_folder("user/x", subfolder="saes")
result = {
    "commit": pulled.commit, "files": len(contents(pulled.path)), "rest": refusal(pull_folder, "user/x"),
    "none": refusal(pull_folder, "user/y"), "push": refusal(update_card, "user/x", section="s", body="b"),
}
"""
    for env in ({"HF_HUB_OFFLINE": "1"}, {}):
        result = child(server, code, home=tmp_path / "home", env=env)
        assert result["commit"] == commit
        assert result["files"] == 7
        for case in ("rest", "none", "push"):
            assert f"{server.endpoint} was not reached" in result[case][1], case


def test_saelens_reads_what_was_pushed(server: HubServer, tmp_path: Path) -> None:
    same, names = child(
        server,
        """
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
torch.manual_seed(0)
sae = TopKSAE(TopKSAEConfig(d_in=8, d_sae=32, k=4, dtype="float32", device="cpu"))
sae.save_model("made")
push_folder("made", "user/saes", path_in_repo="layer_5/topk", card=({"library_name": "saelens"}, "A tiny SAE"))
back = SAE.from_pretrained("user/saes", "layer_5/topk", device="cpu")
pulled = SAE.load_from_disk(pull_folder("user/saes", subfolder="layer_5/topk").path)
ours = sae.state_dict()
result = [
    all(torch.equal(ours[name], other.state_dict()[name]) for name in ours for other in (back, pulled)),
    sorted(ours),
]
""",
    )
    assert same
    assert "W_enc" in names
    assert b"library_name: saelens" in server.files("user/saes")["README.md"]


def test_datasets_reads_what_was_pushed(server: HubServer, tmp_path: Path) -> None:
    rows = child(
        server,
        """
from datasets import Dataset, load_dataset
table = {"feature": [3, 5], "spans": [["a"], []]}
Path("made/data").mkdir(parents=True)
Dataset.from_dict(table).to_parquet("made/data/train-00000-of-00001.parquet")
configs = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
url = push_folder("made", "user/dictionary", repo_type="dataset", card=({"configs": configs, "tags": ["fac"]}, "# It"))
update_card("user/dictionary", repo_type="dataset", section="coverage", body="FAC 0.4", metadata={"tags": ["coverage"]})
loaded = load_dataset("user/dictionary", split="train")
streamed = load_dataset("user/dictionary", split="train", streaming=True)
result = [table, loaded.to_dict(), {key: [row[key] for row in streamed] for key in table}, url]
""",
        token=WRITE_TOKEN,
    )
    table, loaded, streamed, url = rows
    assert loaded == streamed == table
    assert url.startswith(f"{server.endpoint}/datasets/user/dictionary/commit/")
    assert b"FAC 0.4" in server.files("user/dictionary", "datasets")["README.md"]


def test_the_server_answers_ranges_and_refuses_half_an_upload(server: HubServer) -> None:
    server.put("user/x", {"a.txt": b"0123456789"})
    asked = Request(f"{server.endpoint}/user/x/resolve/main/a.txt", headers={"Range": "bytes=2-4"})
    with urlopen(asked) as answer:
        assert (answer.status, answer.read()) == (206, b"234")
    line = {"key": "lfsFile", "value": {"path": "b.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    commit = Request(
        f"{server.endpoint}/api/models/user/x/commit/main",
        data=json.dumps(line).encode(),
        headers={"Authorization": f"Bearer {WRITE_TOKEN}"},
    )
    with pytest.raises(OSError, match="400"):
        urlopen(commit)
    assert "b.bin" not in server.files("user/x")
