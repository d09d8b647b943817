"""Find, load, convert, check and save sparse autoencoders (SAEs) of the residual stream.

In: the name of a Hub repository, a SAELens release, a local folder (SAELens' or EleutherAI sparsify's layout) or a .pth
file of the paper (arXiv 2602.10388). Out: a SAELens SAE, whatever the format. An SAE that hf_fac does not support is
refused with the reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.files import try_output, whole_files
from ..storage.validation import checked
from .formats import (
    CONFIG,
    ELSEWHERE,
    SAELENS_WEIGHTS,
    OwnMetadata,
    hook_of_layer,
    layer_of_hook,
    pull_sae,
    read_sae,
    some,
    split_name,
)

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from sae_lens import SAE


@dataclass(frozen=True)
class SAESettings:
    """What an SAE expects of its input, from its metadata.

    None stands for what the metadata does not say.

    Attributes:
        layer: 0 is the embedding, L the output of the L-th block.
        model_name: the model it was trained on, as its maker wrote it.
        prepend_bos: the SAE was trained with a BOS token in front of every sequence; False also when unknown.
        center: the mean over d_in is subtracted from each activation first (TransformerLens' centred writing weights).
            Ignore it for models with RMSNorm: TransformerLens centres models with LayerNorm only.
        sink_norm: tokens whose activation has a larger L2 norm (raw units) are sinks and left out.
        fvu: fraction of variance unexplained on the data it was made for.
    """

    layer: int | None
    model_name: str | None
    prepend_bos: bool
    center: bool
    sink_norm: float | None
    fvu: float | None


def load_sae(
    name: str | os.PathLike[str],
    *,
    sae_id: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> SAE[Any]:
    """Returns the SAE with this name as a SAELens inference SAE on `device`, computing in `dtype`.

    Args:
        name: a local path, a SAELens release or a Hub repository `user/repo`; the first of these that there is. "a:b"
            means name="a", sae_id="b".
        sae_id: subfolder (or .pth file) of a folder or repository, or the SAE's id in a SAELens release. Not needed for
            the only SAE of a repository.
        revision: branch, tag or commit of a Hub repository.
        token: for a Hub repository; releases are downloaded by SAELens with the stored login.

    Raises:
        FileNotFoundError: nothing of that name, or no SAE in it.
        HubError: a repository that cannot be read, or weights larger than its config says.
        ValueError: not readable as an SAE, weights that are not finite, or refused by `check_sae`.
    """
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from sae_lens.util import dtype_to_str, str_to_dtype

    from ..hub.cards import is_repo_id

    options = {"device": str(device), "dtype": dtype_to_str(str_to_dtype(dtype))}
    name, sae_id = split_name(os.fspath(name), sae_id)
    path, label = Path(name).expanduser(), f"{name}:{sae_id}" if sae_id else name
    releases = {} if path.exists() else get_pretrained_saes_directory()
    is_repo = not path.exists() and name not in releases and is_repo_id(name)
    if revision is not None and not is_repo:
        raise ValueError(f"revision={revision!r} is for a Hub repository, which {name!r} is not: leave it out.")

    with warnings.catch_warnings():
        # SAELens advises to load the model with these arguments; read_settings reads the one that matters.
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        if path.exists() or is_repo:
            local = pull_sae(name, sae_id, revision, token) if is_repo else path / (sae_id or "")
            sae = read_sae(local, label, options)
        elif name in releases:
            if sae_id not in (ids := list(releases[name].saes_map)):
                raise ValueError(
                    f"{sae_id!r} is none of the {len(ids)} SAEs of the SAELens release {name!r}: say '{name}:<id>', "
                    f"where <id> is one of {some(ids)}."
                )
            sae = SAE.from_pretrained(name, sae_id, **options)
        else:
            raise FileNotFoundError(
                f"{name!r} is no local path, no SAELens release (find_sae lists them), no Hub repository 'user/repo'."
            )
    _require_finite(sae.state_dict(), label, "the file is damaged, or the dtype too small for it")
    check_sae(sae)
    return sae


def save_sae(sae: SAE[Any], folder: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None) -> Path:
    """Writes the SAE in SAELens' layout, which plain `SAE.load_from_disk(folder)` opens, and returns the folder.

    Files appear whole or not at all; an SAE that was there is replaced. A training SAE is saved as the inference SAE.

    Args:
        dtype: of the stored weights, e.g. float16 for half the size. cfg.json keeps the dtype that the SAE computes in;
            SAELens converts stored weights to it.

    Raises: ValueError for weights that are not finite, or too large for `dtype`.
    """
    from sae_lens.util import str_to_dtype
    from safetensors.torch import save_file

    folder, (config, tensors) = Path(folder).expanduser(), inference_parts(sae)
    if dtype is not None:
        tensors = {key: tensor.to(str_to_dtype(dtype)) for key, tensor in tensors.items()}
    _require_finite(tensors, "The SAE", "train it again, or store it in a wider dtype")
    try_output(folder, folder=True)
    # cfg.json comes first: without it a folder does not count as an SAE.
    with whole_files(folder / CONFIG, folder / SAELENS_WEIGHTS) as (config_file, weights_file):
        config_file.write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, weights_file)
    return folder


def inference_parts(sae: SAE[Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns the config and tensors that SAELens would write; for a training SAE, those of its inference SAE."""
    from sae_lens import TrainingSAE

    tensors = sae.state_dict()
    if isinstance(sae, TrainingSAE):
        sae.process_state_dict_for_saving_inference(tensors)
        return sae.cfg.get_inference_sae_cfg_dict(), tensors
    sae.process_state_dict_for_saving(tensors)
    return sae.cfg.to_dict(), tensors


def find_sae(model: str, *, layer: int | None = None) -> pd.DataFrame:
    """Returns the SAEs of SAELens' directory that read the residual stream of `model`, by layer; empty when none do.

    Columns: name ("release:sae_id", for load_sae), layer (as in SAESettings), hook_name, release, sae_id. `model` is a
    Hub id, its last part, or TransformerLens' name for it, in any case. The directory ships inside SAELens: no network.
    Left out: transcoders, attention and MLP outputs, the middle of a block, and what check_sae is known to refuse.
    """
    import pandas as pd
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    wanted, rows = _model_key(model), []
    for release, entry in get_pretrained_saes_directory().items():
        normalized = (entry.config_overrides or {}).get("normalize_activations", "none") != "none"
        if normalized or entry.conversion_func == "temporal" or _model_key(entry.model) != wanted:
            continue
        for sae_id, path in entry.saes_map.items():
            if hook := _directory_hook(f"{release}/{sae_id}/{path}"):
                rows.append((f"{release}:{sae_id}", layer_of_hook(hook), hook, release, sae_id))
    found = pd.DataFrame(rows, columns=["name", "layer", "hook_name", "release", "sae_id"])
    if layer is not None:
        found = found[found.layer == layer]
    return found.sort_values("layer", kind="stable", ignore_index=True)


def read_settings(sae: SAE[Any]) -> SAESettings:
    """Returns what the SAE expects of its input. Raises: ValueError when it does not read the residual stream.

    hf_fac keeps a dict of its own in `sae.cfg.metadata["hf_fac"]`, which SAELens saves and loads: layer,
    model_revision, sink_norm, training_data, fvu, l0, dead_share, loss_recovered. Any may be absent. The layer is that
    of the hook's name when it is not there.
    """
    metadata = sae.cfg.metadata
    own = checked(OwnMetadata, metadata.hf_fac or {}, "metadata['hf_fac'] of the SAE", "set it right, or leave it out")
    layer = own.layer
    if layer is None and metadata.hook_name is not None:
        layer = layer_of_hook(metadata.hook_name)
    return SAESettings(
        layer=layer,
        model_name=metadata.model_name,
        prepend_bos=bool(metadata.prepend_bos),
        center=bool((metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights")),
        sink_norm=own.sink_norm,
        fvu=own.fvu,
    )


def check_sae(sae: SAE[Any], *, d_in: int | None = None) -> None:
    """Checks that hf_fac supports the SAE, on a model of hidden size `d_in`. Raises: ValueError when it does not."""
    cfg, metadata = sae.cfg, sae.cfg.metadata
    architecture, hook, decoder = cfg.architecture(), metadata.hook_name, list(sae.W_dec.shape)
    refusals = {
        f"is a transcoder from {hook} to {metadata.hook_name_out}, hf_fac needs an autoencoder of one place": (
            "transcoder" in architecture or metadata.hook_name_out
        ),
        f"is a crosscoder (reads {hook}, decoder {decoder}), hf_fac needs an autoencoder of one place": (
            not isinstance(hook, str | None) or decoder != [cfg.d_sae, cfg.d_in]
        ),
        "is a temporal SAE, which reads whole sequences, hf_fac gives it single tokens": architecture == "temporal",
        f"reads attention heads ({hook}), hf_fac reads the residual stream": cfg.reshape_activations != "none",
        f"expects normalised inputs (normalize_activations={cfg.normalize_activations!r}), hf_fac gives it raw ones": (
            cfg.normalize_activations != "none"
        ),
    }
    for found, refused in refusals.items():
        if refused:
            raise ValueError(f"This SAE {found}: {ELSEWHERE}.")
    read_settings(sae)
    if d_in is not None and cfg.d_in != d_in:
        raise ValueError(
            f"This SAE reads activations of width {cfg.d_in}, the model's hidden size is {d_in}: use the model it was "
            f"made for ({metadata.model_name or 'unknown'}), or {ELSEWHERE}."
        )


def fold_input_scale(sae: SAE[Any], scale: float) -> SAE[Any]:
    """Returns the SAE, which was trained on x / scale, changed in place to take and reconstruct raw x.

    W_enc is divided by scale, W_dec and b_dec are multiplied by it. Features keep their units, so thresholds, k and FVU
    stay valid.

    Raises: ValueError for a scale that is not positive and finite, or an SAE for which this does not hold.
    """
    from sae_lens import TopKSAE, TopKTrainingSAE

    architecture, normalization = sae.cfg.architecture(), sae.cfg.normalize_activations
    foldable = ("standard", "topk", "abstopk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"The input scale must be positive and finite, not {scale}.")
    if architecture not in foldable or normalization not in ("none", "expected_average_only_in"):
        raise ValueError(
            f"An input scale cannot be folded into a {architecture} SAE with normalize_activations={normalization!r}: "
            f"train one of {', '.join(foldable)} without normalisation."
        )
    if isinstance(sae, TopKSAE | TopKTrainingSAE) and sae.cfg.rescale_acts_by_decoder_norm:
        # These features are in units of decoder norms, which the scale changes: make the norms 1 first.
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    sae.fold_activation_norm_scaling_factor(1 / scale)
    return sae


def fvu(sae: SAE[Any], x: torch.Tensor) -> float:
    """Returns the fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2.

    `x` is [n, d_in], as the SAE takes it (raw; centred when its settings say so), of any floating dtype and device.

    Raises: ValueError for values without variance.
    """
    import torch

    x = x.detach().to("cpu", torch.float64)
    mean, unexplained = x.mean(0), 0.0
    with torch.no_grad():
        # SAELens holds a few arrays [tokens, d_sae], here of 32 MB each.
        for chunk in x.split(max(1, (1 << 23) // sae.cfg.d_sae)):
            reconstruction = sae(chunk.to(sae.device, sae.dtype)).to("cpu", torch.float64)
            unexplained += (chunk - reconstruction).square().sum().item()
    total = (x - mean).square().sum().item()
    if total == 0:
        raise ValueError(f"FVU needs activations that differ, not {len(x)} without variance.")
    return unexplained / total


def _directory_hook(entry: str) -> str | None:
    """The residual hook that an entry of SAELens' directory, "release/id/path", stands for; None for other places."""
    if match := re.search(r"/(blocks\.\d+\.hook_resid_(?:pre|post))[_/]", entry):
        return match[1]
    if re.search(r"-res(?:-canonical)?/embedding/", entry):
        return hook_of_layer(0)
    conventions = (
        r"-res(?:-canonical)?/layer_(\d+)/",  # Gemma Scope
        r"/resid_post(?:_all)?[/_]layer_(\d+)[/_]",  # Gemma Scope 2, dictionary_learning
        r"[-/]L(\d+)R(?:-|$)",  # Llama Scope: A, M and R for attention, MLP and residual
        r"/layer(\d+)\.sae\.pt$",  # Qwen Scope
        r"-SAE-l(\d+)\.pth?$",  # Goodfire
    )
    matches = (re.search(convention, entry) for convention in conventions)
    return next((hook_of_layer(int(match[1]) + 1) for match in matches if match), None)


def _model_key(model: str) -> str:
    """The same key for all names of a model, such as "gpt2-small", "gpt2" and "openai-community/gpt2"."""
    from transformer_lens.supported_models import MODEL_ALIASES

    def last(name: str) -> str:
        return name.rstrip("/").rsplit("/", 1)[-1].lower().removeprefix("meta-")

    aliases = {last(alias): last(official) for official, names in MODEL_ALIASES.items() for alias in names}
    return aliases.get(last(model), last(model))


def _require_finite(tensors: dict[str, torch.Tensor], label: str, remedy: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{label}: {key} holds NaN or infinite values; {remedy}.")
