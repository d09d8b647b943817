"""What a featurizer is loaded from: the names, what they stand for now, and what an earlier load of the same measured.

In: names of a model and an SAE, and settings. Out: the objects, when they are needed, and before that the identity of
the measurement. It needs no torch: a new process whose rows are in the cache of `datasets.map` loads nothing.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..inputs.rows import OnError, PoolOver, Side
from ..storage.cache import content_key
from ..storage.feature_ids import check_feature_ids
from ..storage.files import write_whole
from ..storage.validation import WholeMeasurement, check_counts, checked

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Part of every fingerprint: raise it whenever the same rows give other activations than before.
VERSION = 3

NOT_LOADABLE = (
    "This featurizer was made from loaded objects, so another process cannot load it again: make it with "
    "SAEFeaturizer.from_pretrained(...), or use one process (num_proc=None)."
)
_IMPORTED_BY = os.getpid()  # a forked process has another number
# What a library makes of the same files may change with its version.
_LIBRARIES = ("transformers", "tokenizers", "sae-lens", "peft", "torch")
_BLOCK = 2**24

PAPER_LENGTH = 512
# What the preset "paper" decides: the values that a caller may give beside it, its own last.
_PAPER: dict[str, tuple[Any, ...]] = {
    "activation": ("native", "relu"),  # the first is the default
    "pool_over": ("all",),
    "max_length": (None, PAPER_LENGTH),
    "stride": (None,),
    "sink_norm": (None, float("inf")),
}


class _Kept(WholeMeasurement):
    feature_fingerprint: str


@dataclass(frozen=True)
class Arguments:
    """The settings of `SAEFeaturizer`, as the caller gives them; features in ascending order.

    Raises: ValueError for what no model allows.
    """

    layer: int | None = None
    activation: Literal["native", "relu"] = "native"
    features: Sequence[int] | None = None
    keep_above: float = 0.0
    pool_over: PoolOver = "all"
    side: Side = "chosen"
    max_length: int | None = None
    stride: int | None = None
    sink_norm: float | None = None
    batch_tokens: int | None = None
    on_error: OnError = "raise"
    preset: Literal["paper"] | None = None

    def __post_init__(self) -> None:
        if self.preset not in (None, "paper"):
            raise ValueError(f'preset is {self.preset!r}; the only one is "paper".')
        for name, allowed in _PAPER.items() if self.preset else ():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(
                    f'{name} is {value!r}, but preset="paper" measures as the paper\'s released code does, which is '
                    f"{name}={allowed[-1]!r}: leave out {name} or the preset."
                )
        check_counts(batch_tokens=self.batch_tokens)
        if not 0 <= self.keep_above < float("inf"):
            raise ValueError(
                f"keep_above is {self.keep_above}; it must be a number from 0 up (activations are not negative)."
            )
        if self.sink_norm is not None and not self.sink_norm > 0:
            raise ValueError(
                f"sink_norm is {self.sink_norm}; it must be a positive number (inf leaves every token in)."
            )
        if self.features is not None:
            object.__setattr__(self, "features", sorted(check_feature_ids(self.features, None).tolist()))

    def given(self) -> dict[str, Any]:
        """Returns the settings that differ from their defaults, as JSON values."""
        own = asdict(self)
        return {f.name: own[f.name] for f in fields(self) if own[f.name] != f.default}


@dataclass(frozen=True)
class Source(ABC):
    """Names that a model, its tokenizer and an SAE are loaded from; device None is the GPU if there is one."""

    device: str | None = None

    @abstractmethod
    def contents(self, token: str | None) -> dict[str, Any] | None:
        """Returns what the names stand for now: JSON values that differ when the files differ.

        None where that cannot be told without loading.
        """

    @abstractmethod
    def load(
        self, device: str, *, token: str | None, contents: Mapping[str, Any] | None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, SAE]:
        """Returns model, tokenizer and SAE on the device. Commits that `contents` names are loaded, whatever came
        after them."""

    def names(self) -> dict[str, Any]:
        """Returns the names, without the device, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "device"}


@dataclass(frozen=True)
class PretrainedSource(Source):
    """The arguments of `SAEFeaturizer.from_pretrained`."""

    model: str = ""
    sae: str = ""
    sae_id: str | None = None
    revision: str | None = None
    sae_revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    def contents(self, token: str | None) -> dict[str, Any] | None:
        if self.trust_remote_code:
            return None  # the code may lie anywhere
        parts = {"model": _model_contents(self.model, self.revision, token), "sae": self._sae_contents(token)}
        return None if None in parts.values() else parts

    def _sae_contents(self, token: str | None) -> dict[str, Any] | None:
        from ..hub.cards import is_repo_id
        from ..sae.formats import split_name

        name, sae_id = split_name(self.sae, self.sae_id)
        path = Path(name).expanduser()
        if path.exists():
            place = path / (sae_id or "")
            files = hashes_of_files(place.iterdir() if place.is_dir() else [place])
            return {"files": files} if files else None
        # A release of SAELens has no slash; its files are found with SAELens alone.
        return _commit(name, self.sae_revision, token) if is_repo_id(name) else None

    def load(
        self, device: str, *, token: str | None, contents: Mapping[str, Any] | None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, SAE]:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        from ..sae.loading import load_sae

        known = contents or {"model": {}, "sae": {}}
        hub = {
            "revision": known["model"].get("commit", self.revision), "token": token,
            "trust_remote_code": self.trust_remote_code,
        }  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(self.model, **hub)
        try:
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype, **hub)
        except ValueError as error:
            # An encoder has no language-model head. (Adapters have no config to ask, so loading is tried.)
            if "Unrecognized configuration class" not in str(error):
                raise
            model = AutoModel.from_pretrained(self.model, dtype=self.dtype, **hub)
        commit = known["sae"].get("commit", self.sae_revision)
        return (
            model.to(device),
            tokenizer,
            load_sae(self.sae, sae_id=self.sae_id, revision=commit, token=token, device=device),
        )


@dataclass
class Names:
    """All that loads a featurizer.

    source: None when it was made from loaded objects.
    contents: what the names stood for when the featurizer was made; None where that is not known.
    rank: of the process, when a GPU is to be chosen by it.
    """

    source: Source | None
    arguments: Arguments
    token: str | None = None
    contents: dict[str, Any] | None = None
    rank: int | None = None

    def key(self) -> str | None:
        """Returns the key of what a load measures; None where the contents are not known."""
        if self.contents is None:
            return None
        libraries = [version(name) for name in _LIBRARIES]
        # The contents say what a revision stood for.
        names = {name: value for name, value in self.source.names().items() if "revision" not in name}
        kind = type(self.source).__name__
        return content_key(VERSION, libraries, kind, names, self.arguments.given(), self.contents)

    def changed(self) -> bool:
        """Whether the names stand for something else now."""
        return self.source.contents(self.token) != self.contents

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, SAE]:
        """Returns model, tokenizer and SAE.

        A forked process (those of `map`) computes with one thread from there on: PyTorch's other threads did not
        survive the fork, and waiting for them never ends.
        Raises: RuntimeError when there are no names.
        """
        if self.source is None:
            raise RuntimeError(NOT_LOADABLE)
        import torch

        if os.getpid() != _IMPORTED_BY:
            torch.set_num_threads(1)
        device = self.source.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.rank is not None and torch.cuda.is_available() and device != "cpu":
            device = f"cuda:{self.rank % torch.cuda.device_count()}"
        return self.source.load(device, token=self.token, contents=self.contents)


def hashes_of_files(paths: Iterable[Path]) -> dict[str, str]:
    """Returns a hash of each file's content, by path; folders among the paths are left out."""
    return {str(path): _hash_of_file(path) for path in sorted(paths) if path.is_file()}


def files_of_model(folder: Path) -> list[Path]:
    """Returns the files of a folder that transformers loads a model and a tokenizer from.

    Other sub-folders hold other models, such as the checkpoints of a training run.
    """
    return [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]


def kept_measurement(key: str) -> dict[str, Any] | None:
    """Returns the measurement that `keep_measurement` kept under the key, or None."""
    with suppress(OSError, ValueError):
        content = _record(key).read_bytes()
        checked(_Kept, content, "a kept measurement", "it is made again")
        return json.loads(content)
    return None


def keep_measurement(key: str, measurement: dict[str, Any]) -> None:
    """Keeps a measurement for later processes, in the Hugging Face cache; where nothing can be written, nothing is."""
    with suppress(OSError):
        _record(key).parent.mkdir(parents=True, exist_ok=True)
        write_whole(_record(key), json.dumps(measurement))


def forget_measurement(key: str) -> None:
    with suppress(OSError):
        _record(key).unlink()


def _record(key: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "hf-fac" / "measurements" / f"{key}.json"


def _hash_of_file(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(_BLOCK))
        while n := file.readinto(block):
            digest.update(block[:n])
    return digest.hexdigest()


def _model_contents(name: str, revision: str | None, token: str | None) -> dict[str, Any] | None:
    folder = Path(name)
    if folder.is_dir():
        found = {"files": hashes_of_files(files_of_model(folder))}
        adapter = folder / "adapter_config.json"
        return _with_base(found, adapter if adapter.exists() else None, token)
    found = _commit(name, revision, token)
    try:
        return found and _with_base(found, _adapter_config(name, found["commit"], token), token)
    except OSError:  # no network, and the cache does not know
        return None


def _with_base(found: dict[str, Any], adapter_config: Path | None, token: str | None) -> dict[str, Any] | None:
    """The contents with those of the model that an adapter is for."""
    if adapter_config is None:
        return found
    try:
        config = json.loads(adapter_config.read_bytes())
        base = _model_contents(config["base_model_name_or_path"], config.get("revision"), token)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return base and found | {"base": base}


def _adapter_config(name: str, commit: str, token: str | None) -> Path | None:
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "adapter_config.json", revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:
        return None  # known not to be there
    try:
        return Path(hf_hub_download(name, "adapter_config.json", revision=commit, token=token))
    except errors.RemoteEntryNotFoundError:
        return None


def _commit(name: str, revision: str | None, token: str | None) -> dict[str, str] | None:
    from huggingface_hub import HfApi, errors

    try:
        return {"commit": HfApi(token=token).resolve_revision(name, revision=revision).resolved}
    except (OSError, ValueError, errors.RevisionResolutionError):  # what loads it says what is wrong
        return None
