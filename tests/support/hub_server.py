"""A Hub on 127.0.0.1 for tests, with the standard library only: the routes that the real `huggingface_hub` client uses,
repos in memory, tokens of different rights, failures on demand. `HubServer` is a context manager; `run_with_hub` runs a
snippet in a child process, as HF_ENDPOINT is read at import."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE_TOKEN = "hf_localServerTokenThatMayWrite0000000"
READ_TOKEN = "hf_localServerTokenThatMayRead00000000"
NO_RIGHTS_TOKEN = "hf_localServerTokenWithoutRights000000"
UNKNOWN_TOKEN = "hf_localServerNeverIssuedThisToken0000"
RIGHTS = {WRITE_TOKEN: "write", READ_TOKEN: "read", NO_RIGHTS_TOKEN: "none"}

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".pth", ".npz", ".arrow")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else git_oid(data)


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: Mapping[str, bytes]
    parent: str | None


@dataclass
class Repo:
    kind: str  # "models" or "datasets"
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch or "refs/pr/N" -> commit
    pull_requests: int = 0

    @property
    def path(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def at(self, revision: str) -> Commit:
        commit = self.commits.get(self.refs.get(revision, revision))
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, ref: str, title: str, files: Mapping[str, bytes]) -> Commit:
        oid = hashlib.sha1(f"{self.path}/{len(self.commits)}/{title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, dict(files), self.refs.get(ref))
        self.refs[ref] = oid
        return self.commits[oid]


@dataclass
class Fault:
    route: str
    times: int
    status: int  # 0: the connection is dropped without an answer
    headers: dict[str, str]
    after: bool  # True: the request is carried out, and only its answer is lost
    message: str


class Refusal(Exception):
    def __init__(self, status: int, error: str, code: str | None = None, **body: str):
        super().__init__(error)
        self.status, self.body = status, {"error": error, **body}
        self.headers = {"X-Error-Message": error, **({"X-Error-Code": code} if code else {})}


class HubServer:
    """A running server; `.endpoint` is its address. seconds: each answer takes as long."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []  # route and path of each request
        self.faults: list[Fault] = []
        self._before_commit: list[Callable[[], object]] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def create(self, repo_id: str, kind: str = "models", *, private: bool = False) -> Repo:
        """A new repo with one commit that holds .gitattributes, as the Hub makes them."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repo

    def put(self, repo_id: str, files: Mapping[str, bytes], kind: str = "models", **options: Any) -> str:
        """The commit on main made of these files past the API: names are taken as they are."""
        with self.lock:
            repo = self.repos.get((kind, repo_id)) or self.create(repo_id, kind, **options)
            return repo.commit("main", "put", {**repo.at("main").files, **files}).oid

    def files(self, repo_id: str, kind: str = "models", *, revision: str = "main") -> dict[str, bytes]:
        """What a repo holds at a revision: path -> bytes."""
        return dict(self.repos[kind, repo_id].at(revision).files)

    def history(self, repo_id: str, kind: str = "models") -> list[str]:
        """Commit titles of main, newest first."""
        repo, titles = self.repos[kind, repo_id], []
        commit: Commit | None = repo.at("main")
        while commit is not None:
            titles.append(commit.title)
            commit = repo.commits.get(commit.parent or "")
        return titles

    def fail(
        self,
        times: int,
        status: int,
        *,
        on: str,
        retry_after: int | None = None,
        after: bool = False,
        message: str = "injected failure",
    ) -> None:
        """Lets the next `times` requests on a route (see `ROUTES`) fail with `status`; 0 drops the connection."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self.faults.append(Fault(on, times, status, headers, after, message))

    def before_next_commit(self, action: Callable[[], object]) -> None:
        """Runs an action, once, just before the next commit is looked at: someone else was faster."""
        self._before_commit.append(action)

    def reset(self) -> None:
        """Forgets repos, failures and the log."""
        for store in (self.repos, self.uploads, self.log, self.faults, self._before_commit):
            store.clear()

    def count(self, route: str) -> int:
        """How many requests a route has had since the last reset."""
        return sum(name == route for name, _ in self.log)

    def fault(self, route: str, *, after: bool) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.route == route and fault.after == after and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


@dataclass
class Call:
    hub: HubServer
    parts: dict[str, str]
    query: dict[str, list[str]]
    body: bytes
    rights: str | None  # "write", "read", "none"; None without a token
    answer_headers: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def repo(self, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get((self.parts.get("kind") or "models", self.parts["id"]))
        if repo is None or (repo.private and self.rights not in ("read", "write")):
            # As the Hub does: without a token a missing repo and a hidden one look the same.
            if self.rights is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self.need_write()
        return repo

    def need_write(self) -> None:
        if self.rights is None:
            raise Refusal(401, "Invalid username or password.")
        if self.rights != "write":
            raise Refusal(403, "You don't have the rights to write to this namespace")

    def commit(self) -> Commit:
        return self.repo().at(self.parts.get("rev") or "main")

    @property
    def as_pull_request(self) -> bool:
        return "create_pr" in self.query


def create(call: Call) -> Any:
    call.need_write()
    wanted = call.json()
    kind, repo_id = f"{wanted.get('type') or 'model'}s", f"{wanted.get('organization') or 'user'}/{wanted['name']}"
    if (kind, repo_id) in call.hub.repos:
        raise Refusal(409, "You already created this repo", url=f"{call.hub.endpoint}/{repo_id}")
    repo = call.hub.create(repo_id, kind, private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
    return {"url": f"{call.hub.endpoint}/{repo.path}", "name": repo_id}


def info(call: Call) -> Any:
    repo, commit = call.repo(), call.commit()
    siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(commit.files.items())]
    return {"id": repo.id, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}


def entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "oid": git_oid(data), "size": len(data)}
    if path.endswith(LFS_SUFFIXES):
        found["lfs"] = {"oid": etag(path, data), "size": len(data), "pointerSize": 130}
    return found


def tree(call: Call) -> Any:
    files, top = call.commit().files, call.parts.get("path", "")
    prefix = f"{top}/" if top else ""
    folders = {path[: m.start()] for path in files for m in re.finditer("/", path) if m.start()}
    entries = [{"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0} for path in folders]
    entries += [entry(path, data) for path, data in files.items()]
    recursive = call.query.get("recursive", ["false"])[0].lower() in ("1", "true")
    entries = [
        e for e in entries if e["path"].startswith(prefix) and (recursive or "/" not in e["path"][len(prefix) :])
    ]
    if top and not entries:
        raise Refusal(404, f"{top} does not exist", "EntryNotFound")
    return sorted(entries, key=lambda e: e["path"])


def branch(call: Call) -> Any:
    repo = call.repo(write=True)
    repo.refs[call.parts["rev"]] = repo.at(call.json().get("startingPoint") or "main").oid


def preupload(call: Call) -> Any:
    call.repo(write=not call.as_pull_request)
    known, modes = call.commit().files, []
    for path in (wanted["path"] for wanted in call.json()["files"]):
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        oid = {"oid": etag(path, known[path])} if path in known else {}
        modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
    return {"files": modes}


def lfs_batch(call: Call) -> Any:
    wanted = call.json()
    call.repo(write="ref" in wanted)
    objects = []
    for file in wanted["objects"]:
        upload = {"actions": {"upload": {"href": f"{call.hub.endpoint}/_lfs/{file['oid']}", "header": {}}}}
        known = file["oid"] in call.hub.uploads
        objects.append({"oid": file["oid"], "size": file["size"], **({} if known else upload)})
    return {"transfer": "basic", "objects": objects}


def lfs_put(call: Call) -> Any:
    assert hashlib.sha256(call.body).hexdigest() == call.parts["oid"]
    call.hub.uploads[call.parts["oid"]] = call.body


def make_commit(call: Call) -> Any:
    repo = call.repo(write=not call.as_pull_request)
    if call.hub._before_commit:
        call.hub._before_commit.pop(0)()
    ref = call.parts["rev"]
    head = repo.at(ref)
    files, title = dict(head.files), ""
    for item in map(json.loads, call.body.splitlines()):
        value = item["value"]
        match item["key"]:
            case "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                files[value["path"]] = call.hub.uploads[value["oid"]]
            case "deletedFile":
                del files[value["path"]]
    url = f"{call.hub.endpoint}/{repo.path}"
    answer: dict[str, Any] = {"success": True, "pullRequestUrl": None}
    if call.as_pull_request:
        repo.pull_requests += 1
        ref = f"refs/pr/{repo.pull_requests}"
        repo.refs[ref] = head.oid
        answer["pullRequestUrl"] = f"{url}/discussions/{repo.pull_requests}"
    oid = repo.commit(ref, title, files).oid
    return {**answer, "commitUrl": f"{url}/commit/{oid}", "commitOid": oid}


def resolve(call: Call) -> Any:
    repo, commit, path = call.repo(), call.commit(), call.parts["path"]
    if repo.gated:
        raise Refusal(403, f"Access to {repo.id} is restricted", "GatedRepo")
    call.answer_headers["X-Repo-Commit"] = commit.oid
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    call.answer_headers["ETag"] = f'"{etag(path, commit.files[path])}"'
    return commit.files[path]


API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+?)"
REV = r"(?P<rev>[^/]+)"
ROUTES: list[tuple[str, str, str, Callable[[Call], Any]]] = [
    ("create", "POST", r"/api/repos/create", create),
    ("validate-yaml", "POST", r"/api/validate-yaml", lambda call: {"warnings": [], "errors": []}),
    ("info", "GET", rf"{API}(?:/revision/{REV})?", info),
    ("tree", "GET", rf"{API}/tree/{REV}(?:/(?P<path>.*))?", tree),
    ("branch", "POST", rf"{API}/branch/{REV}", branch),
    ("preupload", "POST", rf"{API}/preupload/{REV}", preupload),
    ("commit", "POST", rf"{API}/commit/{REV}", make_commit),
    ("lfs-batch", "POST", rf"{GIT}\.git/info/lfs/objects/batch", lfs_batch),
    ("lfs-put", "PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("head", "HEAD", rf"{GIT}/resolve/{REV}/(?P<path>.+)", resolve),
    ("resolve", "GET", rf"{GIT}/resolve/{REV}/(?P<path>.+)", resolve),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Requests go to `HubServer.log` instead of stderr."""

    def _serve(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        body, url = self._read_body(), urlsplit(self.path)
        name, match, function = "unknown", None, None
        for name, method, pattern, function in ROUTES:  # noqa: B007
            if method == self.command and (match := re.fullmatch(pattern, url.path)):
                break
        else:
            name = "unknown"
        hub.log.append((name, self.path))
        time.sleep(hub.seconds)
        fault = hub.fault(name, after=False)
        if fault is None:
            parts = {key: unquote(value or "") for key, value in (match.groupdict() if match else {}).items()}
            call = Call(hub, parts, parse_qs(url.query), body, None)
            answer = self._answer(call, name, function if match else None)
            fault = hub.fault(name, after=True)
        if fault is not None:
            answer = fault.status, fault.headers, {"error": fault.message}
        status, headers, content = answer
        if status == 0:
            self.close_connection = True
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, call: Call, name: str, function: Callable[[Call], Any] | None) -> tuple[int, dict[str, str], Any]:
        try:
            if function is None:
                raise Refusal(404, f"this server has no {self.command} {self.path}")
            if (token := self.headers.get("Authorization", "").removeprefix("Bearer ")) and name != "lfs-put":
                if token not in RIGHTS:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                call.rights = RIGHTS[token]
            with call.hub.lock:
                return 200, call.answer_headers, function(call)
        except Refusal as refusal:
            return refusal.status, {**call.answer_headers, **refusal.headers}, refusal.body

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


_CHILD = """
import json, os, sys
scope = {"args": json.loads(os.environ["HUB_TEST_ARGS"])}
exec(compile(open(os.environ["HUB_TEST_CODE"]).read(), "snippet", "exec"), scope)
json.dump(scope.get("result"), open(os.environ["HUB_TEST_RESULT"], "w"))
"""


def run_with_hub(
    server: HubServer,
    code: str,
    *,
    token: str | None = None,
    args: Mapping[str, Any] | None = None,
    home: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Any:
    """What a Python snippet left in its variable `result`, run in a child process whose Hub is `server`.

    Args:
        code: the snippet; it finds `args` (anything JSON can carry) as a variable.
        token: becomes HF_TOKEN; None runs as nobody.
        home: folder for HF_HOME (`home/hf`) and the child's output (`home/output.txt`); None takes a passing one.
        env: further environment variables.

    Raises:
        AssertionError: the snippet failed; the message holds its output.
    """
    if home is None:
        with tempfile.TemporaryDirectory() as fresh:
            return run_with_hub(server, code, token=token, args=args, home=fresh, env=env)
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    (home / "snippet.py").write_text(code)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    settings = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "HUB_TEST_ARGS": json.dumps(dict(args or {})),
        "HUB_TEST_CODE": str(home / "snippet.py"),
        "HUB_TEST_RESULT": str(home / "result.json"),
        **({"HF_TOKEN": token} if token else {}),
        **(env or {}),
    }
    with (home / "output.txt").open("w") as output:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            cwd=home,
            env={**inherited, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
    said = (home / "output.txt").read_text()
    assert child.returncode == 0, f"the snippet ended with {child.returncode}:\n{said}"
    return json.loads((home / "result.json").read_text())
