"""File formats of SAEs: SAELens' and EleutherAI sparsify's folders, and the .pth files of the paper (arXiv 2602.10388).

In: a path, or the name of a Hub repository. Out: a SAELens SAE. Nothing is unpickled. A download is refused when it is
larger than the SAE's own config says.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AliasChoices, Field, PositiveFloat, PositiveInt, model_validator

from ..storage.validation import Strict, Width, checked

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE

    Parts = tuple[dict[str, Any], dict[str, torch.Tensor]]

CONFIG, SAELENS_WEIGHTS, SPARSIFY_WEIGHTS = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
LAYOUTS = f"{CONFIG} with {SAELENS_WEIGHTS} (SAELens) or {SPARSIFY_WEIGHTS} (sparsify), or one .pth file of the paper"
ELSEWHERE = "take one that find_sae(model_id) lists, or train one with train_sae"
_REPAIR = "download the SAE again from where it was made, or correct that file"
_CONFIG_BYTES = 1 << 20
_BYTES_EACH = 32  # of [d_sae, d_in]: twice the two float64 matrices
_MOST_BYTES = 64 << 30


class OwnMetadata(Strict):
    """What hf_fac keeps with an SAE; see `sae.read_settings`."""

    layer: Annotated[int, Field(ge=0)] | None = None
    sink_norm: PositiveFloat | None = None
    fvu: float | None = None


class _Metadata(Strict):
    model_name: str | None = None
    prepend_bos: bool | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    hf_fac: OwnMetadata | None = None


class SAEConfig(Strict):
    """The config of an SAE, as SAELens, sparsify and the paper's code write it."""

    d_in: Width = Field(validation_alias=AliasChoices("d_in", "d_inp"))
    d_sae: Width | None = Field(None, validation_alias=AliasChoices("d_sae", "d_hide"))
    num_latents: Annotated[int, Field(ge=0, le=1 << 24)] | None = None  # sparsify's 0: by the expansion factor
    expansion_factor: PositiveInt | None = None
    k: PositiveInt | None = Field(None, validation_alias=AliasChoices("k", "topK"))
    metadata: _Metadata = _Metadata()

    @property
    def features(self) -> int:
        return self.d_sae or self.num_latents or self.d_in * (self.expansion_factor or 0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.features:
            raise ValueError("it does not say its width, d_sae")
        if self.k is not None and self.k > self.features:
            raise ValueError(f"k = {self.k} is more than its {self.features} features")
        return self


class _Run(Strict):
    model: str | None = None


class _Checkpoint(Strict):
    config: SAEConfig
    weight: dict[str, Any]


def split_name(name: str, sae_id: str | None) -> tuple[str, str | None]:
    """Returns an SAE's name and id: "a:b" without an id is a with the id b, unless it is a local path."""
    if sae_id is None and ":" in name and not Path(name).expanduser().exists():
        name, sae_id = name.split(":", 1)
    return name, sae_id


def read_sae(path: Path, label: str, options: dict[str, str]) -> SAE[Any]:
    """Returns the SAE of a folder or .pth file. Raises: FileNotFoundError, ValueError."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
    from safetensors import SafetensorError

    folder = path.parent if path.is_file() else path
    names = [path.name] if path.is_file() else [file.name for file in path.glob("*") if file.is_file()]
    weights = _weights(names)
    if weights is None:
        patterns = ("*", "*/*.pth", f"*/{CONFIG}", f"*/*/{CONFIG}")
        inside = [file.relative_to(path).as_posix() for pattern in patterns for file in path.glob(pattern)]
        raise _no_sae(label, inside or [path.name])
    converters = {SAELENS_WEIGHTS: sae_lens_disk_loader, SPARSIFY_WEIGHTS: _convert_sparsify}
    try:
        if weights in converters:
            checked(SAEConfig, (folder / CONFIG).read_bytes(), CONFIG, _REPAIR)
            return SAE.load_from_disk(folder, converter=converters[weights], **options)
        return SAE.load_from_disk(folder / weights, converter=_convert_checkpoint, **options)
    except LookupError as error:
        raise ValueError(f"{label!r} cannot be read as an SAE: missing or unknown to SAELens: {error}.") from error
    except (AttributeError, EOFError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        # PyTorch's messages have several lines.
        reason = " ".join(str(error).split()) or "it is empty, or cut off"
        raise ValueError(f"{label!r} cannot be read as an SAE: {reason}") from error


def pull_sae(repo: str, sae_id: str | None, revision: str | None, token: str | bool | None) -> Path:
    """Returns the folder or .pth file of an SAE in a local snapshot of a Hub repository.

    Without `sae_id` it is the SAE at the top, or the only one. The weights are fetched after the config, and only when
    they are no larger than it says.

    Raises: FileNotFoundError where there is no such SAE, or several; HubError when the repository cannot be read or the
        weights are too large; ValueError for a config without widths.
    """
    from ..hub.errors import HubError
    from ..hub.repo import list_files, pull_folder

    cached = None
    try:
        commit, sizes = list_files(repo, revision=revision, token=token)
        files = list(sizes)
    except HubError as error:
        cached = _cached(repo, revision) if error.status is None else None
        if cached is None:
            text = f"{repo!r} is no local path and did not come from the Hub: {error}"
            raise HubError(text, status=error.status) from error
        files = [file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()]
    weights = _choose(files, sae_id)
    if weights is None:
        raise _no_sae(f"{repo}:{sae_id}" if sae_id else repo, files)
    folder = weights.rpartition("/")[0]
    target = weights if weights.endswith(".pth") else folder
    if cached is not None:
        return cached / target

    def pull(*paths: str, max_bytes: int) -> Path:
        wanted = [glob.escape(path) for path in paths]
        # A .pth file is fetched only when a pattern names it, and only tensors are read from it.
        return pull_folder(repo, revision=commit, token=token, allow_patterns=wanted, max_bytes=max_bytes).path

    if target == weights:
        return pull(weights, max_bytes=_MOST_BYTES) / target
    config = f"{folder}/{CONFIG}".lstrip("/")
    root = pull(config, *({"config.json"} & set(files)), max_bytes=2 * _CONFIG_BYTES)
    found = checked(SAEConfig, (root / config).read_bytes(), f"{repo}: {config}", _REPAIR)
    most = _BYTES_EACH * found.features * found.d_in + _CONFIG_BYTES
    return pull(weights, max_bytes=min(most, _MOST_BYTES)) / target


def _choose(files: Collection[str], sae_id: str | None) -> str | None:
    """The path of an SAE's weights among those of a repository; None when there is no such SAE, or several."""
    if sae_id is not None and sae_id.endswith(".pth"):
        return sae_id if sae_id in files else None
    folders: dict[str, set[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        folders.setdefault(folder, set()).add(name)
    found = {folder: name for folder, names in folders.items() if (name := _weights(names))}
    folder = (sae_id or "").strip("/")
    if sae_id is None and "" not in found and len(found) == 1:
        folder = next(iter(found))
    return f"{folder}/{found[folder]}".lstrip("/") if folder in found else None


def _weights(names: Collection[str]) -> str | None:
    """The file in a folder that holds an SAE's weights, safetensors first; None when there is no single one."""
    if CONFIG in names and (found := [name for name in (SAELENS_WEIGHTS, SPARSIFY_WEIGHTS) if name in names]):
        return found[0]
    checkpoints = [name for name in names if name.endswith(".pth")]
    return checkpoints[0] if len(checkpoints) == 1 else None


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot in the Hub's cache, for use without network; None when there is none."""
    from huggingface_hub import snapshot_download

    with suppress(OSError):
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    return None


def _no_sae(label: str, files: list[str]) -> FileNotFoundError:
    inside = [file.removesuffix(f"/{CONFIG}") for file in files if file.endswith((f"/{CONFIG}", ".pth"))]
    inside.sort(key=lambda name: (len(name), name))
    remedy = f"choose with sae_id= from {some(inside)}" if inside else "give the folder or file that holds it"
    top = sorted({file.split("/", 1)[0] for file in files})
    return FileNotFoundError(f"{label!r} holds no single SAE: expected {LAYOUTS}, found {some(top)}; {remedy}.")


def some(names: list[str]) -> str:
    """Returns the first few names, for a message."""
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "nothing"


def layer_of_hook(hook: str) -> int:
    """Returns the layer that a hook's name means. Raises: ValueError for other places than the residual stream."""
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook):
        return int(match[1]) + (match[2] == "post")
    if match := re.fullmatch(r"(?:.*\.)?(?:layers|layer|h|blocks)\.(\d+)(?:\.output)?", hook):
        return int(match[1]) + 1
    if re.fullmatch(r"hook_embed|(?:.*\.)?(?:embed_tokens|embed_in)", hook):
        return 0
    raise ValueError(f"This SAE reads {hook!r}, hf_fac reads the residual stream between blocks: {ELSEWHERE}.")


def hook_of_layer(layer: int) -> str:
    """Returns TransformerLens' name for a layer."""
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "hook_embed"


def _convert_sparsify(folder: Path, device: str, cfg_overrides: dict[str, Any]) -> Parts:
    """SAELens' config and tensors of a folder of EleutherAI sparsify, which is named after its hookpoint ("layers.15").

    SAELens' own converter gives other features. It transposes the decoder. It subtracts b_dec from the input only for
    some settings of normalize_decoder, sparsify always.
    """
    from safetensors.torch import load_file

    config = checked(SAEConfig, (folder / CONFIG).read_bytes(), CONFIG, _REPAIR)
    others = config.model_extra
    for option in ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed"):
        if others.get(option):
            raise ValueError(f"its option {option} makes it no plain autoencoder of one place: {ELSEWHERE}.")
    if others.get("activation", "topk") != "topk":
        raise ValueError(f"SAELens has no {others['activation']!r} activation, only 'topk': {ELSEWHERE}.")
    tensors = load_file(folder / SPARSIFY_WEIGHTS, device=device)
    folder = folder.absolute()  # "." has no name
    hookpoint = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    # A downloaded folder may have any name, which then does not say the layer.
    named = re.search(r"\.\d+(\.|$)|^embed", hookpoint.name)
    run = hookpoint.parent / "config.json"
    own = {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"]}
    return _topk_parts(
        config,
        {"device": device, **cfg_overrides},
        own | {key: tensors[key] for key in ("W_dec", "b_dec")},
        layer=layer_of_hook(hookpoint.name) if named else None,
        model_name=checked(_Run, run.read_bytes(), run.name, _REPAIR).model if run.is_file() else None,
    )


def _convert_checkpoint(path: Path, device: str, cfg_overrides: dict[str, Any]) -> Parts:
    """SAELens' config and tensors of a .pth file of the paper's released code, whose name says its layer."""
    import torch

    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except UnpicklingError:
        # PyTorch's own message says how to run the code in the file.
        raise ValueError("it holds more than tensors, and hf_fac unpickles nothing: ask for safetensors.") from None
    found = checked(_Checkpoint, checkpoint, "it", f"take {LAYOUTS}")
    layer = re.search(r"_l(\d+)(?=[_.])", path.name)
    # Its "mask" is for editing a model; encoding does not use it.
    tensors = {key: found.weight[key] for key in ("W_enc", "b_enc", "b_dec")}
    return _topk_parts(
        found.config,
        {"device": device, **cfg_overrides},
        tensors | {"W_dec": tensors["W_enc"].T},
        layer=int(layer[1]) if layer else None,
    )


def _topk_parts(
    config: SAEConfig,
    options: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    layer: int | None,
    model_name: str | None = None,
) -> Parts:
    import torch
    from sae_lens import TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.util import str_to_dtype

    metadata = SAEMetadata(model_name=model_name, hook_name=None if layer is None else hook_of_layer(layer))
    topk = TopKSAEConfig(d_in=config.d_in, d_sae=config.features, k=config.k, metadata=metadata, **options)
    dtype = str_to_dtype(topk.dtype)
    # Copies: safetensors stores neither views nor tensors that share memory.
    own = {key: tensor.to(dtype).clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    return topk.to_dict(), own
