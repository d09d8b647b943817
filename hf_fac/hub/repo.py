"""Files and cards to and from the Hugging Face Hub; knows no SAE. In: a folder, a card's metadata and text, a repo id.
Out: the URL of one commit, or a local snapshot whose size was checked before the download. A refusal is a `HubError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors, get_cached_repo_tree
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from .cards import merge_card
from .errors import HubRequest, with_retries


class Pulled(NamedTuple):
    """What `pull_folder` fetched."""

    path: Path  # the snapshot's folder in the cache
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
    """Pushes all files of a folder and the card in one commit, and returns its URL, or that of the pull request.

    Where nothing changed it is the URL of the last commit. A push that failed has changed no file and can be repeated;
    uploaded files are not uploaded again.

    Args:
        folder: everything below it is pushed, except `.git` and `.cache/huggingface`.
        path_in_repo: the folder in the repo; its root by default.
        card: metadata and Markdown for `cards.merge_card`, as the section named `path_in_repo` (or "main"). Without it
            a README.md in the folder is a file like any other.
        delete_patterns: files below `path_in_repo` that match and are not in the folder are deleted in the same
            commit, except README.md and .gitattributes.
        revision: the branch, made from main when missing; not together with `create_pr`.
        private: whether a repo made by this call is private; True also refuses to push to a public one.
        token: None takes that of `hf auth login` or HF_TOKEN.

    Raises:
        HubError: no files, no right to push, no network, or the Hub kept failing.
    """
    request = HubRequest("push to", repo_id, repo_type, revision, token, create_pr)
    folder, place = Path(folder), (path_in_repo or "").strip("/")
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    files = {name: folder / name for name in filter_repo_objects(names, ignore_patterns=DEFAULT_IGNORE_PATTERNS)}
    if not files:
        raise request.error(f"{folder} is not a folder with files in it. Save there first, or name another folder.")
    return _commit(
        request,
        {f"{place}/{name}".lstrip("/"): file for name, file in files.items()},
        section=(place or "main", *card) if card is not None else None,
        message=commit_message or f"Upload {place or folder.resolve().name} with hf_fac",
        place=place,
        delete_patterns=delete_patterns,
        private=private,
        create=not create_pr,
    )


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
    """Puts a section into an existing repo's card (`cards.merge_card`), and returns the URL of the commit.

    For a pull request it is the URL of that; where nothing changed, of the last commit.

    Raises:
        HubError: as `push_folder`, and when the repo or the revision does not exist.
    """
    request = HubRequest("update the card of", repo_id, repo_type, revision, token, create_pr)
    message = commit_message or f"Update {section} in the card with hf_fac"
    return _commit(request, {}, section=(section, metadata or {}, body), message=message)


def list_files(
    repo_id: str, *, repo_type: str = "model", revision: str | None = None, token: str | bool | None = None
) -> tuple[str, dict[str, int]]:
    """Returns the commit (40 hex digits) that a revision means, and the size in bytes of each of its files by path.

    Without a network the cache answers, if it holds the listing.

    Raises:
        HubError: no such repo or revision, no right to read, or no network and no listing in the cache.
    """
    request = HubRequest("pull from", repo_id, repo_type, revision, token)

    def attempt() -> tuple[str, dict[str, int]]:
        commit = request.api.resolve_revision(**request.repo, revision=revision).resolved
        return commit, _sizes(request, commit)

    return with_retries(attempt, request)


def pull_folder(
    repo_id: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
    allow_patterns: str | list[str] | None = None,
    max_bytes: int | None = None,
) -> Pulled:
    """Returns a local snapshot of a repo's files and its commit. It is the cache's own: do not write to it.

    Without a network the cache answers.

    Args:
        allow_patterns: shell patterns of paths; None is everything.
        max_bytes: refuse, before the download, files that are larger in total.

    Raises:
        HubError: nothing matches, too many bytes, no such repo or revision, no right to read, a path that would leave
            the cache, or no network and no complete copy in the cache.
    """
    request = HubRequest("pull from", repo_id, repo_type, revision, token)
    commit, sizes = list_files(repo_id, repo_type=repo_type, revision=revision, token=token)
    wanted = list(filter_repo_objects(sizes, allow_patterns=allow_patterns))
    if not wanted:
        raise request.error(f"nothing matches {allow_patterns}. There is: {', '.join(list(sizes)[:8])}.")
    if max_bytes is not None and (total := sum(sizes[path] for path in wanted)) > max_bytes:
        raise request.error(f"its files are {total:,} bytes; at most {max_bytes:,} were expected. Nothing was fetched.")
    what = {**request.repo, "revision": commit, "allow_patterns": allow_patterns}
    return Pulled(Path(with_retries(lambda: request.api.snapshot_download(**what), request)), commit)


def _commit(
    request: HubRequest,
    files: Mapping[str, Path],
    *,
    section: tuple[str, Mapping[str, Any], str] | None,
    message: str,
    place: str = "",
    delete_patterns: str | list[str] | None = None,
    private: bool | None = None,
    create: bool = False,
) -> str:
    if request.create_pr and request.revision not in (None, "main"):
        raise request.error("a pull request is always against main. Leave out revision, or create_pr.")

    def attempt() -> str:
        # New objects in each attempt: an operation remembers what the repo held when it was first looked at.
        plain = files.keys() - {"README.md"} if section is not None else files.keys()
        operations: list[Any] = [CommitOperationAdd(path, files[path]) for path in sorted(plain)]
        head = _head(request, private=private, create=create)
        if section is not None:
            name, metadata, body = section
            text = _card_text(request, head, files.get("README.md"))
            card = merge_card(text, metadata=metadata, section=name, body=body)
            operations.append(CommitOperationAdd("README.md", card.encode()))
        if delete_patterns is not None:
            stale = _matching(_sizes(request, head), place, delete_patterns) - files.keys()
            operations += [CommitOperationDelete(path, is_folder=False) for path in sorted(stale)]
        # `upload_folder` may split a folder into several commits. The parent's name makes the Hub refuse a commit that
        # would undo another's, or repeat one whose answer was lost.
        done = request.api.create_commit(
            **request.repo,
            operations=operations,
            commit_message=message,
            revision=request.revision,
            create_pr=request.create_pr,
            parent_commit=head,
        )
        return done.pr_url or done.commit_url

    return with_retries(attempt, request)


def _head(request: HubRequest, *, private: bool | None, create: bool) -> str:
    """The commit to build upon. `create` makes a missing repo or branch."""

    def look() -> str:
        info = request.api.repo_info(**request.repo, revision=request.revision)
        if private and info.private is False:
            raise request.error("it is public, and private=True was asked for. Make it private in its settings first.")
        return info.sha

    try:
        return look()
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        if not create or isinstance(error, errors.GatedRepoError):
            raise
        if isinstance(error, errors.RepositoryNotFoundError):
            request.api.create_repo(**request.repo, private=private, exist_ok=True)
    if request.revision not in (None, "main"):
        request.api.create_branch(**request.repo, branch=request.revision, exist_ok=True)
    return look()


def _card_text(request: HubRequest, commit: str, default: Path | None) -> str:
    try:
        file = Path(request.api.hf_hub_download(**request.repo, filename="README.md", revision=commit))
    except errors.RemoteEntryNotFoundError:
        file = default
    return file.read_bytes().decode("utf-8-sig") if file else ""


def _sizes(request: HubRequest, commit: str) -> dict[str, int]:
    try:
        entries = get_cached_repo_tree(**request.repo, revision=commit)
    except errors.CachedRepoTreeNotFoundError:
        entries = request.api.list_repo_tree(**request.repo, recursive=True, revision=commit)
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def _matching(paths: Mapping[str, int], place: str, patterns: str | list[str]) -> set[str]:
    below = f"{place}/" if place else ""
    inside = [path for path in paths if path.startswith(below) and path not in ("README.md", ".gitattributes")]
    return set(filter_repo_objects(inside, allow_patterns=patterns, key=lambda path: path.removeprefix(below)))
