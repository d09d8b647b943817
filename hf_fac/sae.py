"""Find, load, convert, check and save sparse autoencoders (SAEs) of the residual stream.

A name goes in: a Hub repository, a SAELens release, a local folder (SAELens' or EleutherAI sparsify's layout) or a .pth
file of the paper (arXiv 2602.10388). A SAELens SAE comes out, so that all later code sees one type; what hf_fac cannot
honour is refused with the reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    Parts = tuple[dict[str, Any], dict[str, torch.Tensor]]

CONFIG, SAELENS_WEIGHTS, SPARSIFY_WEIGHTS = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
LAYOUTS = f"{CONFIG} with {SAELENS_WEIGHTS} (SAELens) or {SPARSIFY_WEIGHTS} (sparsify), or one .pth file of the paper"
ELSEWHERE = "take one that find_sae(model_id) lists, or train one with train_sae"


@dataclass(frozen=True)
class SAESettings:
    """What an SAE expects of its input, from its metadata.

    Attributes:
        layer: the layer read: 0 is the embedding, L the output of the L-th block; None when the SAE does not say.
        model_name: the model it was trained on, as its maker wrote it; None when unknown.
        prepend_bos: the SAE was trained with a BOS token in front of every sequence; False also when unknown.
        center: the mean over d_in is subtracted from each activation first (TransformerLens' centred writing weights;
            it centres models with LayerNorm only, so ignore this for RMSNorm).
        sink_norm: tokens whose activation has a larger L2 norm (raw units) are sinks and left out; None when unknown.
        fvu: fraction of variance unexplained on the data it was made for; None when unknown.
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
    """The SAE that `name` means, as a SAELens inference SAE on `device`, computing in `dtype`.

    A local path that exists wins; then `a:b` is SAE b of the SAELens release a, or folder b of the Hub repository a;
    then `user/repo` is a Hub repository. Weights are converted from the dtype they are stored in. Nothing is unpickled.

    Args:
        sae_id: subfolder (or .pth file) of a folder or repository, or the SAE's id in a SAELens release.
        revision: branch, tag or commit of a Hub repository.
        token: for a Hub repository; releases are downloaded by SAELens with the stored login.

    Raises:
        FileNotFoundError: nothing of that name, or no SAE in it.
        ValueError: not readable as an SAE, weights that are not finite, or refused by `check_sae`.
    """
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from sae_lens.util import dtype_to_str, str_to_dtype

    name, options = os.fspath(name), {"device": str(device), "dtype": dtype_to_str(str_to_dtype(dtype))}
    if sae_id is None and ":" in name and not Path(name).expanduser().exists():
        name, sae_id = name.split(":", 1)
    path, label = Path(name).expanduser(), f"{name}:{sae_id}" if sae_id else name
    releases = {} if path.exists() else get_pretrained_saes_directory()
    is_repo = not path.exists() and name not in releases and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None
    if revision is not None and not is_repo:
        raise ValueError(f"revision={revision!r} is for a Hub repository, which {name!r} is not: leave it out.")

    with warnings.catch_warnings():
        # SAELens advises to load the model with these arguments; read_settings honours the one that matters.
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        if path.exists() or is_repo:
            folder = _download(name, sae_id, revision, token) if is_repo else path
            sae = _read(folder / sae_id if sae_id else folder, label, options)
        elif name in releases:
            if sae_id not in (ids := list(releases[name].saes_map)):
                raise ValueError(
                    f"{sae_id!r} is none of the {len(ids)} SAEs of the SAELens release {name!r}: say '{name}:<id>', "
                    f"where <id> is one of {_some(ids)}."
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
    """The folder, now holding the SAE in SAELens' layout: plain `SAE.load_from_disk(folder)` opens it.

    Files appear whole or not at all; an SAE that was there is replaced. A training SAE is saved as the inference SAE.

    Args:
        dtype: what the weights are stored in, e.g. float16 for half the size. cfg.json keeps the dtype that the SAE
            computes in, which SAELens converts stored weights to.

    Raises:
        ValueError: weights that are not finite, or too large for `dtype`.
    """
    from sae_lens import TrainingSAE
    from sae_lens.util import str_to_dtype
    from safetensors.torch import load_file, save_file

    folder = Path(folder).expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        write = sae.save_inference_model if isinstance(sae, TrainingSAE) else sae.save_model
        weights, config = write(temporary)
        tensors = load_file(weights)
        if dtype is not None:
            tensors = {key: tensor.to(str_to_dtype(dtype)) for key, tensor in tensors.items()}
            save_file(tensors, weights)
        _require_finite(tensors, "The SAE", "train it again, or store it in a wider dtype")
        folder.mkdir(exist_ok=True)
        # Without its cfg.json a folder holds no SAE, so at no moment do old and new files pass for one.
        (folder / CONFIG).unlink(missing_ok=True)
        os.replace(weights, folder / SAELENS_WEIGHTS)
        os.replace(config, folder / CONFIG)
    return folder


def find_sae(model: str, *, layer: int | None = None) -> pd.DataFrame:
    """The SAEs of SAELens' directory that read the residual stream of `model`, by layer; empty when there are none.

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
                rows.append((f"{release}:{sae_id}", _layer_of_hook(hook), hook, release, sae_id))
    found = pd.DataFrame(rows, columns=["name", "layer", "hook_name", "release", "sae_id"])
    if layer is not None:
        found = found[found.layer == layer]
    return found.sort_values("layer", kind="stable", ignore_index=True)


def read_settings(sae: SAE[Any]) -> SAESettings:
    """What the SAE expects of its input. Raises ValueError when it does not read the residual stream between blocks.

    Our own metadata, `sae.cfg.metadata["hf_fac"]`, is a dict that survives saving and SAELens: layer (wins over the
    hook's name), model_revision, sink_norm, training_data, fvu, l0, dead_share, loss_recovered; any may be absent.
    """
    metadata = sae.cfg.metadata
    own = metadata.hf_fac or {}
    return SAESettings(
        layer=_layer(metadata),
        model_name=metadata.model_name,
        prepend_bos=bool(metadata.prepend_bos),
        center=bool((metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights")),
        sink_norm=own.get("sink_norm"),
        fvu=own.get("fvu"),
    )


def check_sae(sae: SAE[Any], *, d_in: int | None = None, n_layers: int | None = None) -> None:
    """Nothing, when hf_fac can honour the SAE on a model of hidden size `d_in` with `n_layers` blocks.

    Raises:
        ValueError: in one sentence, what was found, what was expected and what to do.
    """
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
    layer = _layer(metadata)
    remedy = f"use the model it was made for ({metadata.model_name or 'unknown'}), or {ELSEWHERE}"
    if d_in is not None and cfg.d_in != d_in:
        raise ValueError(
            f"This SAE reads activations of width {cfg.d_in}, the model's hidden size is {d_in}: {remedy}."
        )
    if layer is not None and n_layers is not None and not 0 <= layer <= n_layers:
        raise ValueError(
            f"This SAE reads layer {layer}, the model has layers 0 (the embedding) to {n_layers}: {remedy}."
        )


def fold_input_scale(sae: SAE[Any], scale: float) -> SAE[Any]:
    """The same SAE, changed in place: trained on x / scale, it now takes raw x and reconstructs raw x.

    Features keep the units they were trained in, so thresholds and k mean what they meant, and FVU is the same. W_enc
    is divided by scale, W_dec and b_dec are multiplied by it, whether or not b_dec is taken off the input.

    Raises:
        ValueError: scale not positive and finite, or an SAE for which this does not hold.
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
        # These features are measured in decoder norms, which the scale changes: make the norms 1 first.
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    sae.fold_activation_norm_scaling_factor(1 / scale)
    return sae


def fvu(sae: SAE[Any], x: torch.Tensor) -> float:
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2.

    `x` is [n, d_in], as the SAE takes it (raw; centred when its settings say so), of any floating dtype and device.

    Raises:
        ValueError: another shape, values that are not finite, or no variance.
    """
    import torch

    if x.ndim != 2 or x.shape[1] != sae.cfg.d_in:
        raise ValueError(f"FVU takes activations of shape [n, {sae.cfg.d_in}], not {list(x.shape)}.")
    if not x.isfinite().all():
        raise ValueError("The activations hold NaN or infinite values, so FVU is undefined: leave those tokens out.")
    x = x.detach().to("cpu", torch.float64)
    mean, unexplained = x.mean(0), 0.0
    with torch.no_grad():
        for chunk in x.split(1024):  # keeps [tokens, d_sae] small
            reconstruction = sae(chunk.to(sae.device, sae.dtype)).to("cpu", torch.float64)
            unexplained += (chunk - reconstruction).square().sum().item()
    total = (x - mean).square().sum().item()
    if total == 0:
        raise ValueError(f"FVU needs activations that differ, not {len(x)} without variance.")
    return unexplained / total


def _layer(metadata: SAEMetadata) -> int | None:
    own = (metadata.hf_fac or {}).get("layer")
    return own if own is not None or metadata.hook_name is None else _layer_of_hook(metadata.hook_name)


def _layer_of_hook(hook: str) -> int:
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook):
        return int(match[1]) + (match[2] == "post")
    if match := re.fullmatch(r"(?:.*\.)?(?:layers|layer|h|blocks)\.(\d+)(?:\.output)?", hook):
        return int(match[1]) + 1
    if re.fullmatch(r"hook_embed|(?:.*\.)?(?:embed_tokens|embed_in)", hook):
        return 0
    raise ValueError(f"This SAE reads {hook!r}, hf_fac reads the residual stream between blocks: {ELSEWHERE}.")


def _hook_of_layer(layer: int) -> str:
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "hook_embed"


def _directory_hook(entry: str) -> str | None:
    """The residual hook of "release/id/path", all that SAELens' directory says of an SAE; None for other places."""
    if match := re.search(r"/(blocks\.\d+\.hook_resid_(?:pre|post))[_/]", entry):
        return match[1]
    if re.search(r"-res(?:-canonical)?/embedding/", entry):
        return _hook_of_layer(0)
    conventions = (
        r"-res(?:-canonical)?/layer_(\d+)/",  # Gemma Scope
        r"/resid_post(?:_all)?[/_]layer_(\d+)[/_]",  # Gemma Scope 2, dictionary_learning
        r"[-/]L(\d+)R(?:-|$)",  # Llama Scope: A, M and R for attention, MLP and residual
        r"/layer(\d+)\.sae\.pt$",  # Qwen Scope
        r"-SAE-l(\d+)\.pth?$",  # Goodfire
    )
    matches = (re.search(convention, entry) for convention in conventions)
    return next((_hook_of_layer(int(match[1]) + 1) for match in matches if match), None)


def _model_key(model: str) -> str:
    """What the names of one model share: "gpt2-small", "gpt2" and "openai-community/gpt2" have the same key."""
    from transformer_lens.supported_models import MODEL_ALIASES

    def last(name: str) -> str:
        return name.rstrip("/").rsplit("/", 1)[-1].lower().removeprefix("meta-")

    aliases = {last(alias): last(official) for official, names in MODEL_ALIASES.items() for alias in names}
    return aliases.get(last(model), last(model))


def _download(repo: str, sae_id: str | None, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    files, unwanted = [CONFIG, SAELENS_WEIGHTS, SPARSIFY_WEIGHTS, "*.pth"], ["*/*"]
    if sae_id is not None:
        files, unwanted = [sae_id, *(f"{sae_id}/{file}" for file in files)], None
    try:
        # A sparsify run keeps its model's name in a config.json above its SAEs.
        options = {"revision": revision, "token": token, "allow_patterns": [*files, "config.json"]}
        path = Path(snapshot_download(repo, ignore_patterns=unwanted, **options))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{repo!r} is no local path and did not come from the Hub: {reason}") from error
    if _weights(path / (sae_id or "")) is None:
        listing = [file.relative_to(path).as_posix() for file in path.rglob("*")]
        with suppress(OSError):  # Offline the message names what is here.
            listing = HfApi(token=token).list_repo_files(repo, revision=revision)
        raise _no_sae(f"{repo}:{sae_id}" if sae_id else repo, listing)
    return path


def _weights(path: Path) -> Path | None:
    """The file with an SAE's weights at a folder or .pth file, safetensors first; None when there is no single one."""
    if path.is_file():
        return path if path.suffix == ".pth" else None
    if (path / CONFIG).is_file():
        for file in (SAELENS_WEIGHTS, SPARSIFY_WEIGHTS):
            if (path / file).is_file():
                return path / file
    checkpoints = list(path.glob("*.pth"))
    return checkpoints[0] if len(checkpoints) == 1 else None


def _no_sae(label: str, files: list[str]) -> FileNotFoundError:
    inside = [file.removesuffix(f"/{CONFIG}") for file in files if file.endswith((f"/{CONFIG}", ".pth"))]
    inside.sort(key=lambda name: (len(name), name))
    remedy = f"choose with sae_id= from {_some(inside)}" if inside else "give the folder or file that holds it"
    top = sorted({file.split("/", 1)[0] for file in files})
    return FileNotFoundError(f"{label!r} holds no single SAE: expected {LAYOUTS}, found {_some(top)}; {remedy}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "nothing"


def _read(path: Path, label: str, options: dict[str, str]) -> SAE[Any]:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
    from safetensors import SafetensorError

    weights = _weights(path)
    if weights is None:
        patterns = ("*", "*/*.pth", f"*/{CONFIG}", f"*/*/{CONFIG}")
        inside = [file.relative_to(path).as_posix() for pattern in patterns for file in path.glob(pattern)]
        raise _no_sae(label, inside or [path.name])
    converters = {SAELENS_WEIGHTS: sae_lens_disk_loader, SPARSIFY_WEIGHTS: _convert_sparsify}
    folder_converter = converters.get(weights.name)
    try:
        if folder_converter is not None:
            return SAE.load_from_disk(weights.parent, converter=folder_converter, **options)
        return SAE.load_from_disk(weights, converter=_convert_checkpoint, **options)
    except LookupError as error:
        raise ValueError(f"{label!r} cannot be read as an SAE: missing or unknown to SAELens: {error}.") from error
    except (EOFError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        # PyTorch spreads its reasons over lines.
        raise ValueError(f"{label!r} cannot be read as an SAE: {' '.join(str(error).split())}") from error


def _convert_sparsify(folder: Path, device: str, cfg_overrides: dict[str, Any]) -> Parts:
    """SAELens' config and tensors of a folder of EleutherAI sparsify, which is named after its hookpoint ("layers.15").

    SAELens' own converter does not fit it: it transposes the decoder, and takes b_dec off the input or not by
    normalize_decoder, where sparsify always does.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text())
    for option in ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed"):
        if config.get(option):
            raise ValueError(f"its option {option} makes it no plain autoencoder of one place: {ELSEWHERE}.")
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"SAELens has no {config['activation']!r} activation, only 'topk': {ELSEWHERE}.")
    tensors = load_file(folder / SPARSIFY_WEIGHTS, device=device)
    folder = folder.absolute()  # "." has no name
    hookpoint = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    # A folder of another name, such as a download's, says nothing about the layer.
    named = re.search(r"\.\d+(\.|$)|^embed", hookpoint.name)
    run = hookpoint.parent / "config.json"
    d_sae = config.get("num_latents") or config["d_in"] * config["expansion_factor"]
    return _topk_parts(
        {"d_in": config["d_in"], "d_sae": d_sae, "k": config["k"], "device": device, **cfg_overrides},
        {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"]}
        | {key: tensors[key] for key in ("W_dec", "b_dec")},
        layer=_layer_of_hook(hookpoint.name) if named else None,
        model_name=json.loads(run.read_text()).get("model") if run.is_file() else None,
    )


def _convert_checkpoint(path: Path, device: str, cfg_overrides: dict[str, Any]) -> Parts:
    """SAELens' config and tensors of a .pth file of the paper's released code, whose name says its layer."""
    import torch

    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except UnpicklingError:
        # PyTorch's own message tells how to run the code.
        raise ValueError("it holds more than tensors, and hf_fac unpickles nothing: ask for safetensors.") from None
    config, tensors = checkpoint["config"], checkpoint["weight"]
    layer = re.search(r"_l(\d+)(?=[_.])", path.name)
    # Its "mask" takes part only when that code edits a model, never in encoding.
    return _topk_parts(
        {"d_in": config["d_inp"], "d_sae": config["d_hide"], "k": config["topK"], "device": device, **cfg_overrides},
        {key: tensors[key] for key in ("W_enc", "b_enc", "b_dec")} | {"W_dec": tensors["W_enc"].T},
        layer=int(layer[1]) if layer else None,
    )


def _topk_parts(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], *, layer: int | None, model_name: str | None = None
) -> Parts:
    import torch
    from sae_lens import TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.util import str_to_dtype

    metadata = SAEMetadata(model_name=model_name, hook_name=None if layer is None else _hook_of_layer(layer))
    dtype = str_to_dtype(config["dtype"])
    # Own memory for each: safetensors stores neither views nor tensors that share it.
    own = {key: tensor.to(dtype).clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    return TopKSAEConfig(**config, metadata=metadata).to_dict(), own


def _require_finite(tensors: dict[str, torch.Tensor], label: str, remedy: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{label}: {key} holds NaN or infinite values; {remedy}.")
