"""A Hub on 127.0.0.1 for tests, with the standard library only: the routes that the real `huggingface_hub` client uses,
repos in memory, tokens of different rights, failures on demand. `HubServer` is a context manager (by hand: `python
tests/hub_server.py --port N`); `run_with_hub` runs a snippet in a child process, as HF_ENDPOINT is read at import."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE_TOKEN = "hf_localServerTokenThatMayWrite0000000"
READ_TOKEN = "hf_localServerTokenThatMayRead00000000"
NO_RIGHTS_TOKEN = "hf_localServerTokenWithoutRights000000"
UNKNOWN_TOKEN = "hf_localServerNeverIssuedThisToken0000"

DATE = "2025-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".pkl", ".npz", ".arrow")


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: Mapping[str, Blob]
    parent: str | None


@dataclass
class Repo:
    kind: str  # "models", "datasets" or "spaces"
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch, tag or "refs/pr/N" -> commit
    tags: set[str] = field(default_factory=set)
    pull_requests: int = 0

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, ref: str, title: str, files: Mapping[str, Blob]) -> Commit:
        parent = self.refs.get(ref)
        oid = hashlib.sha1(f"{self.kind}/{self.id}/{len(self.commits)}/{title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, dict(files), parent)
        self.refs[ref] = oid
        return self.commits[oid]


@dataclass
class Fault:
    on: str
    times: int
    status: int  # 0: the connection is dropped without an answer
    headers: dict[str, str]
    after: bool  # True: the request is carried out, and only its answer is lost
    message: str


@dataclass(frozen=True)
class Request:
    route: str
    method: str
    path: str
    status: int


class Refusal(Exception):
    def __init__(self, status: int, error: str, code: str | None = None, **headers: str):
        super().__init__(error)
        self.status, self.error, self.code, self.headers = status, error, code, headers


class HubServer:
    """A running server; `.endpoint` is its address.

    Args:
        port: 0 takes a free one.
        page_size: entries of a page of a file listing.
    """

    def __init__(self, port: int = 0, *, page_size: int = 1000):
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read", NO_RIGHTS_TOKEN: "none"}
        self.page_size = page_size
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.stated_sizes: dict[str, int] = {}  # path -> a size that listings claim whatever the file holds
        self.stated_etags: dict[str, str] = {}
        self._faults: list[Fault] = []
        self._before_commit: list[Callable[[], object]] = []
        self._lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._http.daemon_threads = True
        self._http.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def create(self, repo_id: str, kind: str = "models", *, private: bool = False) -> Repo:
        """A new repo with one commit that holds .gitattributes, as the Hub makes them."""
        with self._lock:
            repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
            repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
            return repo

    def put(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        kind: str = "models",
        *,
        ref: str = "main",
        **options: Any,
    ) -> str:
        """The commit made of these files past the API: None deletes one, names are taken as they are."""
        with self._lock:
            repo = self.repos.get((kind, repo_id)) or self.create(repo_id, kind, **options)
            merged: dict[str, Blob] = dict(repo.commits[repo.refs.get(ref, repo.refs["main"])].files)
            for path, data in files.items():
                if data is None:
                    merged.pop(path, None)
                else:
                    merged[path] = Blob(data, path.endswith(LFS_SUFFIXES))
            return repo.commit(ref, "put", merged).oid

    def files(self, repo_id: str, kind: str = "models", *, revision: str = "main") -> dict[str, bytes]:
        """What a repo holds at a revision: path -> bytes."""
        commit = self.repos[kind, repo_id].resolve(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return {path: blob.data for path, blob in commit.files.items()}

    def history(self, repo_id: str, kind: str = "models", *, revision: str = "main") -> list[str]:
        """Commit titles, newest first."""
        repo, titles = self.repos[kind, repo_id], []
        commit = repo.resolve(revision)
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
        retry_after: float | str | None = None,
        after: bool = False,
        message: str = "injected failure",
    ) -> None:
        """Lets the next `times` requests on a route (see `ROUTES`) fail with `status`; 0 drops the connection."""
        assert on in {name for name, *_ in ROUTES}, f"no route {on!r}"
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self._faults.append(Fault(on, times, status, headers, after, message))

    def before_next_commit(self, action: Callable[[], object]) -> None:
        """Runs an action, once, just before the next commit is looked at: someone else was faster."""
        self._before_commit.append(action)

    def heal(self) -> None:
        """Forgets the failures that were asked for and have not happened yet."""
        with self._lock:
            self._faults.clear()
            self._before_commit.clear()

    def reset(self) -> None:
        """Forgets repos, faults and the log."""
        with self._lock:
            self.heal()
            for store in (self.repos, self.uploads, self.log, self.stated_sizes, self.stated_etags):
                store.clear()

    def count(self, route: str) -> int:
        """How many requests a route has had since the last reset."""
        return sum(request.route == route for request in self.log)

    def _fault(self, route: str, *, after: bool) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.on == route and fault.after == after and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def _rights(self, authorization: str | None) -> str | None:
        if not authorization:
            return None
        rights = self.tokens.get(authorization.removeprefix("Bearer "))
        if rights is None:
            message = "Invalid credentials in Authorization header"
            raise Refusal(401, message, **{"X-Error-Message": message})
        return rights

    def _repo(self, kind: str, repo_id: str, rights: str | None, *, write: bool = False) -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and rights not in ("read", "write")):
            # As the Hub does: without a token a missing repo and a hidden one look the same.
            if rights is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            _need_write(rights)
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


def _need_write(rights: str | None) -> None:
    if rights is None:
        raise Refusal(401, "Invalid username or password.")
    if rights != "write":
        raise Refusal(403, "You don't have the rights to write to this namespace")


def _whoami(hub: HubServer, call: _Call) -> Any:
    if call.rights is None:
        raise Refusal(401, "Invalid username or password.")
    return {"name": "user", "type": "user", "auth": {"accessToken": {"role": call.rights}}}


def _create(hub: HubServer, call: _Call) -> Any:
    wanted = call.json()
    _need_write(call.rights)
    kind, repo_id = f"{wanted.get('type') or 'model'}s", f"{wanted.get('organization') or 'user'}/{wanted['name']}"
    url = f"{hub.endpoint}/{_prefix(kind)}{repo_id}"
    if (kind, repo_id) in hub.repos:
        raise _Answered(409, {"error": "You already created this model repo", "url": url})
    private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
    hub.create(repo_id, kind, private=private)
    return {"url": url, "name": repo_id}


def _info(hub: HubServer, call: _Call) -> Any:
    repo = call.repo()
    commit = hub._at(repo, call.part("rev") or "main")
    siblings = [{"rfilename": path, "size": len(blob.data)} for path, blob in sorted(commit.files.items())]
    return {
        "_id": commit.oid[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.oid,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": DATE,
        "lastModified": DATE,
        "siblings": siblings,
    }


def _entry(hub: HubServer, path: str, blob: Blob, expand: bool) -> dict[str, Any]:
    size = hub.stated_sizes.get(path, len(blob.data))
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.git_oid, "size": size}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": size, "pointerSize": 130}
    if expand:
        entry["lastCommit"] = {"id": "0" * 40, "title": "", "date": DATE}
    return entry


def _folders(files: Mapping[str, Blob]) -> list[str]:
    return sorted({path[:at] for path in files for at in (m.start() for m in re.finditer("/", path)) if at})


def _tree(hub: HubServer, call: _Call) -> Any:
    commit = hub._at(call.repo(), call.part("rev"))
    top = call.part("path").strip("/")
    prefix = f"{top}/" if top else ""
    recursive, expand = call.flag("recursive"), call.flag("expand")
    entries = [
        {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0}
        for folder in _folders(commit.files)
    ]
    entries += [_entry(hub, path, blob, expand) for path, blob in sorted(commit.files.items())]
    entries = [
        e for e in entries if e["path"].startswith(prefix) and (recursive or "/" not in e["path"][len(prefix) :])
    ]
    if top and not entries:
        raise Refusal(404, f"{top} does not exist on {call.part('rev')!r}", "EntryNotFound")
    start = int(call.query.get("cursor", ["0"])[0])
    rest = start + hub.page_size
    if rest < len(entries):
        base = f"{hub.endpoint}{urlsplit(call.path).path}"
        flags = "".join(f"&{name}=True" for name in ("recursive", "expand") if call.flag(name))
        call.answer_headers["Link"] = f'<{base}?cursor={rest}{flags}>; rel="next"'
    return entries[start:rest]


def _paths_info(hub: HubServer, call: _Call) -> Any:
    commit = hub._at(call.repo(), call.part("rev"))
    form = parse_qs(call.body.decode())
    expand = form.get("expand", ["False"])[0] in ("True", "true", "1")
    folders = set(_folders(commit.files))
    found = [_entry(hub, path, commit.files[path], expand) for path in form.get("paths", []) if path in commit.files]
    wanted = [path for path in form.get("paths", []) if path in folders]
    return found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in wanted]


def _refs(hub: HubServer, call: _Call) -> Any:
    repo = call.repo()
    named = {True: [], False: []}
    for name, oid in repo.refs.items():
        if not name.startswith("refs/"):
            kind = "tags" if name in repo.tags else "heads"
            named[name in repo.tags].append({"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid})
    requests = [{"name": n, "ref": n, "targetCommit": o} for n, o in repo.refs.items() if n.startswith("refs/")]
    return {"branches": named[False], "tags": named[True], "converts": [], "pullRequests": requests}


def _commits(hub: HubServer, call: _Call) -> Any:
    repo, listed = call.repo(), []
    commit: Commit | None = hub._at(repo, call.part("rev"))
    while commit is not None:
        listed.append({"id": commit.oid, "title": commit.title, "message": "", "authors": [], "date": DATE})
        commit = repo.commits.get(commit.parent or "")
    return listed


def _branch(hub: HubServer, call: _Call) -> Any:
    repo = call.repo(write=True)
    if call.part("rev") in repo.refs:
        raise Refusal(409, f"Reference already exists: {call.part('rev')}")
    start = call.json().get("startingPoint") or "main"
    repo.refs[call.part("rev")] = hub._at(repo, start).oid


def _tag(hub: HubServer, call: _Call) -> Any:
    repo = call.repo(write=True)
    tag = call.json()["tag"]
    if tag in repo.refs:
        raise Refusal(409, f"Reference already exists: {tag}")
    repo.refs[tag] = hub._at(repo, call.part("rev")).oid
    repo.tags.add(tag)


def _preupload(hub: HubServer, call: _Call) -> Any:
    repo = call.repo(write=not call.flag("create_pr"))
    known = hub._at(repo, call.part("rev")).files
    modes = []
    for wanted in call.json()["files"]:
        path = wanted["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) or wanted["size"] > 10_000_000 else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in known:
            answer["oid"] = known[path].etag
        modes.append(answer)
    return {"files": modes}


def _lfs_batch(hub: HubServer, call: _Call) -> Any:
    call.repo(write="ref" in call.json())
    objects = []
    for wanted in call.json()["objects"]:
        actions = {"actions": {"upload": {"href": f"{hub.endpoint}/_lfs/{wanted['oid']}", "header": {}}}}
        objects.append(
            {"oid": wanted["oid"], "size": wanted["size"], **({} if wanted["oid"] in hub.uploads else actions)}
        )
    return {"transfer": "basic", "objects": objects}


def _lfs_put(hub: HubServer, call: _Call) -> Any:
    if hashlib.sha256(call.body).hexdigest() != call.part("oid"):
        raise Refusal(400, "the content's hash is not the one announced")
    hub.uploads[call.part("oid")] = call.body


def _commit(hub: HubServer, call: _Call) -> Any:
    as_request = call.flag("create_pr")
    repo = call.repo(write=not as_request)
    if as_request and call.rights is None:
        raise Refusal(401, "Invalid username or password.")
    if hub._before_commit:
        hub._before_commit.pop(0)()
    ref = call.part("rev")
    head = hub._at(repo, ref)
    files, title = dict(head.files), ""
    for line in call.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, head.oid):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        elif item["key"] == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif item["key"] == "lfsFile":
            if value["oid"] not in hub.uploads:
                raise Refusal(400, f"LFS object {value['oid']} was never uploaded")
            files[value["path"]] = Blob(hub.uploads[value["oid"]], True)
        elif item["key"] == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        elif item["key"] == "deletedFolder":
            files = {p: b for p, b in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
    url = f"{hub.endpoint}/{_prefix(repo.kind)}{repo.id}"
    answer: dict[str, Any] = {"success": True, "pullRequestUrl": None}
    if as_request:
        repo.pull_requests += 1
        ref = f"refs/pr/{repo.pull_requests}"
        repo.refs[ref] = head.oid
        answer["pullRequestUrl"] = f"{url}/discussions/{repo.pull_requests}"
    oid = repo.commit(ref, title, files).oid
    return {**answer, "commitUrl": f"{url}/commit/{oid}", "commitOid": oid}


def _resolve(hub: HubServer, call: _Call) -> Any:
    repo = call.repo()
    commit = hub._at(repo, call.part("rev"))
    if repo.gated:
        raise Refusal(403 if call.rights else 401, f"Access to {repo.id} is restricted", "GatedRepo")
    call.answer_headers["X-Repo-Commit"] = commit.oid
    path = call.part("path")
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
    blob = commit.files[path]
    call.answer_headers |= {"ETag": f'"{hub.stated_etags.get(path, blob.etag)}"', "Accept-Ranges": "bytes"}
    return blob.data


def _prefix(kind: str) -> str:
    return "" if kind == "models" else f"{kind}/"


API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+?)"
REV = r"(?P<rev>[^/]+)"
ROUTES: list[tuple[str, str, str, Callable[[HubServer, _Call], Any]]] = [
    ("whoami", "GET", r"/api/whoami-v2", _whoami),
    ("create", "POST", r"/api/repos/create", _create),
    ("validate-yaml", "POST", r"/api/validate-yaml", lambda hub, call: {"warnings": [], "errors": []}),
    ("info", "GET", rf"{API}(?:/revision/{REV})?", _info),
    ("tree", "GET", rf"{API}/tree/{REV}(?:/(?P<path>.*))?", _tree),
    ("paths-info", "POST", rf"{API}/paths-info/{REV}", _paths_info),
    ("refs", "GET", rf"{API}/refs", _refs),
    ("commits", "GET", rf"{API}/commits/{REV}", _commits),
    ("branch", "POST", rf"{API}/branch/{REV}", _branch),
    ("tag", "POST", rf"{API}/tag/{REV}", _tag),
    ("preupload", "POST", rf"{API}/preupload/{REV}", _preupload),
    ("commit", "POST", rf"{API}/commit/{REV}", _commit),
    ("lfs-batch", "POST", rf"{GIT}\.git/info/lfs/objects/batch", _lfs_batch),
    ("lfs-put", "PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", _lfs_put),
    ("head", "HEAD", rf"{GIT}/resolve/{REV}/(?P<path>.+)", _resolve),
    ("resolve", "GET", rf"{GIT}/resolve/{REV}/(?P<path>.+)", _resolve),
]


class _Answered(Exception):
    def __init__(self, status: int, body: Any):
        super().__init__(status)
        self.status, self.body = status, body


@dataclass
class _Call:
    hub: HubServer
    path: str
    parts: dict[str, str | None]
    body: bytes
    rights: str | None
    answer_headers: dict[str, str] = field(default_factory=dict)

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0] in ("1", "True", "true")

    def part(self, name: str) -> str:
        return unquote(self.parts.get(name) or "")

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def repo(self, *, write: bool = False) -> Repo:
        return self.hub._repo(self.parts.get("kind") or "models", self.part("id"), self.rights, write=write)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Requests go to `HubServer.log` instead of stderr."""

    def _serve(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        body = self._read_body()
        route, match, function = "unknown", None, None
        for name, method, pattern, candidate in ROUTES:
            found = re.fullmatch(pattern, urlsplit(self.path).path)
            if method == self.command and found:
                route, match, function = name, found, candidate
                break
        status, headers, content = self._answer(hub, route, function, match, body)
        hub.log.append(Request(route, self.command, self.path, status))
        if status == 0:
            self.close_connection = True
            return
        if (
            status == 200
            and route == "resolve"
            and (asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")))
        ):
            start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            status, content = 206, content[start : end + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(
        self, hub: HubServer, route: str, function: Any, match: re.Match[str] | None, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if fault := hub._fault(route, after=False):
            return fault.status, fault.headers, json.dumps({"error": fault.message}).encode()
        try:
            if match is None:
                raise Refusal(404, f"this server has no {self.command} {self.path}")
            # A signed upload address carries its own right, so the storage sees no token.
            rights = None if route == "lfs-put" else hub._rights(self.headers.get("Authorization"))
            call = _Call(hub, self.path, match.groupdict(), body, rights)
            with hub._lock:
                answer = function(hub, call)
        except Refusal as refusal:
            headers = {"Content-Type": "application/json", **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            headers["X-Error-Message"] = refusal.error
            return refusal.status, headers, json.dumps({"error": refusal.error}).encode()
        except _Answered as answered:
            return answered.status, {"Content-Type": "application/json"}, json.dumps(answered.body).encode()
        if fault := hub._fault(route, after=True):
            return fault.status, fault.headers, json.dumps({"error": fault.message}).encode()
        if isinstance(answer, bytes):
            return 200, {"Content-Type": "application/octet-stream", **call.answer_headers}, answer
        return 200, {"Content-Type": "application/json", **call.answer_headers}, json.dumps(answer).encode()

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
    timeout: float = 120,
) -> Any:
    """What a Python snippet left in its variable `result`, run in a child process whose Hub is `server`.

    Args:
        code: the snippet; it finds `args` (anything JSON can carry) as a variable.
        token: becomes HF_TOKEN; None runs as nobody.
        home: folder for HF_HOME (`home/hf`) and the child's output (`home/output.txt`); None takes a passing one.
        env: further environment variables.
        timeout: seconds.

    Raises:
        AssertionError: the snippet failed; the message holds its output.
    """
    if home is None:
        with tempfile.TemporaryDirectory() as fresh:
            return run_with_hub(server, code, token=token, args=args, home=fresh, env=env, timeout=timeout)
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
    with (home / "output.txt").open("w+") as output:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            cwd=home,
            env={**inherited, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
    said = (home / "output.txt").read_text()
    assert child.returncode == 0, f"the snippet ended with {child.returncode}:\n{said}"
    return json.loads((home / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    with HubServer(parser.parse_args().port) as server:
        print(f"HF_ENDPOINT={server.endpoint} HF_HUB_DISABLE_XET=1 NO_PROXY=127.0.0.1", flush=True)
        print(f"HF_TOKEN: {WRITE_TOKEN} (write), {READ_TOKEN} (read), {NO_RIGHTS_TOKEN} (none)", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
