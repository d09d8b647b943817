"""Files and cards to and from the Hugging Face Hub; knows no SAE. In: a folder, a card's metadata and text, a repo id;
out: the URL of one commit, or a local snapshot that was checked before anyone opens it. A refusal is a `HubError` in
plain words."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fac.hub.cards import merge_card
from hf_fac.hub.errors import Goal, HubError, patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ResolvedRevision

__all__ = ["HubError", "Pulled", "list_files", "pull_folder", "push_folder", "update_card"]

# Opening one of these can run code, so they are fetched only when a pattern of the caller ends in the suffix itself.
_CAN_RUN_CODE = (".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib")


@dataclass(frozen=True)
class Pulled:
    """What `pull_folder` fetched."""

    path: Path  # the local folder; the subfolder's when one was asked for
    commit: str  # 40 hex digits


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    path_in_repo: str | None = None,
    card: tuple[Mapping[str, Any], str] | None = None,
    delete_patterns: str | list[str] | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """The URL of the one commit (or pull request) with all files of a folder and the card; of the last one if nothing
    changed. A push that failed has changed no file and can be repeated; what was uploaded is not uploaded again.

    Args:
        folder: everything below it is pushed, except `.git` and `.cache/huggingface`.
        path_in_repo: where it goes; the repo's root by default.
        card: metadata and Markdown for `cards.merge_card`, as the section named `path_in_repo` (or "main"). Without it
            a README.md in the folder is a file like any other.
        delete_patterns: what lies below `path_in_repo`, matches and is not in the folder is removed in the same commit.
        revision: the branch, made from main when missing; not together with `create_pr`.
        private: whether a repo made by this call is private; True also refuses to push to a public one.
        token: None takes that of `hf auth login` or HF_TOKEN.

    Raises:
        HubError: no files, no right to push, no network, or the Hub kept failing.
    """
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    goal = Goal("push to", repo_id, repo_type, revision, token, create_pr)
    folder, below = Path(folder), _folder_in_repo(goal, path_in_repo)
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    names = list(filter_repo_objects(names, ignore_patterns=DEFAULT_IGNORE_PATTERNS))
    if not names:
        raise goal.error(f"{folder} is not a folder with files in it. Save there first, or name another folder.")
    files = {below + name: folder / name for name in names}
    section = (below.rstrip("/") or "main", *card) if card is not None else None
    message = commit_message or f"Upload {below.rstrip('/') or folder.resolve().name} with hf_fac"
    return _commit(goal, files, section, message, below=below, delete=delete_patterns, private=private, create=True)


def update_card(
    repo_id: str,
    *,
    section: str,
    body: str,
    metadata: Mapping[str, Any] | None = None,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """The URL of the commit (or pull request) that puts a section into an existing repo's card, see `cards.merge_card`;
    of the last commit if nothing changed.

    Raises:
        HubError: as `push_folder`, and when the repo or the revision does not exist.
    """
    goal = Goal("update the card of", repo_id, repo_type, revision, token, create_pr)
    message = commit_message or f"Update {section} in the card with hf_fac"
    return _commit(goal, {}, (section, metadata or {}, body), message)


def list_files(
    repo_id: str, *, repo_type: str = "model", revision: str | None = None, token: str | bool | None = None
) -> tuple[str, dict[str, int]]:
    """The commit (40 hex digits) that a revision means, and the size in bytes of each of its files by path. Without a
    network the cache answers, if it holds the listing.

    Raises:
        HubError: no such repo or revision, no right to read, or no network and no listing in the cache.
    """
    goal = Goal("pull from", repo_id, repo_type, revision, token)

    def attempt() -> tuple[str, dict[str, int]]:
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="hf_fac")
        commit = _resolved(api, goal).resolved
        return commit, _listing(api, goal, commit)

    return patiently(attempt, goal)


def pull_folder(
    repo_id: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    allow_patterns: str | list[str] | None = None,
    max_bytes: int | None = None,
) -> Pulled:
    """A local snapshot of a repo or one of its folders, and its commit. It is the cache's own: do not write to it.
    Names and sizes are checked before anything is fetched, the files again on disk. Without a network the cache
    answers.

    Args:
        subfolder: fetch only this folder.
        allow_patterns: shell patterns on paths below `subfolder`; None is everything. Files that can run code when
            opened (.pkl, .bin, .pt, .pth and their kin) are left out unless a pattern ends in that suffix.
        max_bytes: refuse when the files are larger in all.

    Raises:
        HubError: nothing matches, a path leaves its folder, too many bytes, no such repo or revision, no right to read,
            or no network and no complete copy in the cache.
    """
    goal = Goal("pull from", repo_id, repo_type, revision, token)
    below = _folder_in_repo(goal, subfolder)
    patterns = [allow_patterns] if isinstance(allow_patterns, str) else allow_patterns or ["*"]
    unsafe = [suffix for suffix in _CAN_RUN_CODE if not any(p.lower().endswith(suffix) for p in patterns)]
    filters = {
        "allow_patterns": [glob.escape(below) + pattern for pattern in patterns],
        "ignore_patterns": ["*." + "".join(f"[{c}{c.upper()}]" for c in suffix[1:]) for suffix in unsafe],
    }

    def attempt() -> Pulled:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import filter_repo_objects

        api = HfApi(token=token, library_name="hf_fac")
        resolved = _resolved(api, goal)
        commit = resolved.resolved
        everything = _listing(api, goal, commit)
        sizes = {path: size for path, size in everything.items() if path.startswith(below)}
        if strange := [path for path in sizes if _leaves_its_folder(path)]:
            raise goal.error(f"it lists {strange[0]!r}, which would leave the snapshot's folder. Nothing was fetched.")
        wanted = {path: sizes[path] for path in filter_repo_objects(sizes, **filters)}
        if not wanted:
            note = f" ({', '.join(unsafe)} can run code: only by a pattern that ends so)" if unsafe else ""
            held = ", ".join(sorted(sizes or everything)[:8]) or "no file"
            raise goal.error(f"nothing matches {filters['allow_patterns']}{note}. There is: {held}.")
        if max_bytes is not None and (total := sum(wanted.values())) > max_bytes:
            raise goal.error(
                f"its files are {total:,} bytes; at most {max_bytes:,} were expected. Nothing was fetched."
            )
        root = Path(api.snapshot_download(**goal.repo, revision=resolved, **filters))
        _check_on_disk(goal, root, commit, wanted)
        return Pulled(root / below, commit)

    return patiently(attempt, goal)


def _commit(
    goal: Goal,
    files: Mapping[str, Path],
    section: tuple[str, Mapping[str, Any], str] | None,
    message: str,
    *,
    below: str = "",
    delete: str | list[str] | None = None,
    private: bool | None = None,
    create: bool = False,
) -> str:
    if goal.create_pr and goal.revision not in (None, "main"):
        raise goal.error("a pull request is always against main. Leave out revision, or create_pr.")

    def attempt() -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.utils import filter_repo_objects

        api = HfApi(token=goal.token, library_name="hf_fac")
        head = _head(api, goal, private, create and not goal.create_pr)
        contents: dict[str, Path | bytes] = dict(files)
        if section is not None:
            name, metadata, body = section
            text = _card_text(api, goal, head, files.get("README.md"))
            contents["README.md"] = merge_card(text, metadata=metadata, section=name, body=body).encode()
        # Made anew in each attempt: an operation remembers what the repo held when it was first looked at.
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in contents.items()]
        if delete is not None:
            there = {path for path in _listing(api, goal, head) if path.startswith(below)}
            there -= {*contents, "README.md", ".gitattributes"}
            stale = filter_repo_objects(there, allow_patterns=delete, key=lambda path: path.removeprefix(below))
            operations += [CommitOperationDelete(path, is_folder=False) for path in sorted(stale)]
        # With its parent named, a commit that would undo another's, or repeat one whose answer got lost, is refused.
        done = api.create_commit(
            **goal.repo,
            operations=operations,
            commit_message=message,
            revision=goal.revision,
            create_pr=goal.create_pr,
            parent_commit=head,
        )
        return done.pr_url or done.commit_url

    return patiently(attempt, goal)


def _head(api: HfApi, goal: Goal, private: bool | None, create: bool) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def look() -> str:
        info = api.repo_info(**goal.repo, revision=goal.revision)
        if private and info.private is False:
            raise goal.error("it is public, and private=True was asked for. Make it private in its settings first.")
        return info.sha

    try:
        return look()
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if not create or isinstance(error, GatedRepoError):
            raise
        if isinstance(error, RepositoryNotFoundError):
            api.create_repo(**goal.repo, private=private, exist_ok=True)
    if goal.revision not in (None, "main"):
        api.create_branch(**goal.repo, branch=goal.revision, exist_ok=True)
    return look()


def _card_text(api: HfApi, goal: Goal, commit: str, otherwise: Path | None) -> str:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        file: Path | None = Path(api.hf_hub_download(**goal.repo, filename="README.md", revision=commit))
    except RemoteEntryNotFoundError:
        file = otherwise
    try:
        return file.read_bytes().decode("utf-8-sig") if file else ""
    except UnicodeDecodeError as error:
        raise goal.error(f"README.md is not UTF-8 ({error}). Save it as UTF-8, then repeat.") from None


def _resolved(api: HfApi, goal: Goal) -> ResolvedRevision:
    resolved = api.resolve_revision(**goal.repo, revision=goal.revision)
    if not re.fullmatch(r"[0-9a-f]{40}", resolved.resolved):
        raise goal.error(f"it answers {resolved.resolved!r} where a commit of 40 hex digits was expected.")
    return resolved


def _listing(api: HfApi, goal: Goal, commit: str) -> dict[str, int]:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = get_cached_repo_tree(**goal.repo, revision=commit)
    except CachedRepoTreeNotFoundError:
        entries = api.list_repo_tree(**goal.repo, recursive=True, revision=commit)
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def _check_on_disk(goal: Goal, root: Path, commit: str, wanted: Mapping[str, int]) -> None:
    cache = root.parents[2].resolve()  # root is <cache>/<repo>/snapshots/<commit>; its files are links into the cache
    if root.name != commit:
        raise goal.error(f"the snapshot lies at {root}, where one of commit {commit} was expected.")
    for path, size in wanted.items():
        file = (root / path).resolve()
        if not file.is_relative_to(cache):
            raise goal.error(f"{path!r} came to lie at {file}, outside the cache {cache}. Do not use what was fetched.")
        held = file.stat().st_size if file.is_file() else -1
        if held != size:
            found = f"has {held:,} of {size:,} bytes" if held >= 0 else "is missing"
            raise goal.error(f"{path!r} {found} after the download. Delete {root.parents[1]}, then repeat.")


def _leaves_its_folder(path: str) -> bool:
    has_drive = path[1:2] == ":"
    return has_drive or "\\" in path or not path.isprintable() or not {"", ".", ".."}.isdisjoint(path.split("/"))


def _folder_in_repo(goal: Goal, path: str | None) -> str:
    if path is None or path in ("", ".", "./"):
        return ""
    path = path.removesuffix("/")
    if _leaves_its_folder(path):
        raise goal.error(f"{path!r} is no folder of a repo: expected a relative path without '..' or backslashes.")
    return path + "/"
