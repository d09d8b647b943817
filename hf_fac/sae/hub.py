"""Push an SAE to the Hub in SAELens' layout, so that plain SAELens opens it. The model card says what the SAE reads,
how well it fits and how to load it. In: an SAE and a repo id. Out: the commit's URL. `load_sae` pulls it."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from ..hub.cards import PAPER, base_model, table
from ..hub.repo import push_folder
from .loading import read_settings, save_sae

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE

_STALE = ["sae.safetensors", "sparsity.safetensors"]  # of an older SAE in that folder; SAELens would read them
_FIGURES = {
    "fvu": "fraction of variance unexplained",
    "l0": "active features per token (L0)",
    "dead_share": "share of dead features",
    "loss_recovered": "loss recovered",
    "eval_tokens": "tokens measured",
}
_TRAINING = {
    "training_data": "training data",
    "training_tokens": "training tokens",
    "sink_norm": "tokens with a larger norm are sinks, and left out",
    "seed": "seed",
}


def push_sae_to_hub(
    sae: SAE[Any],
    repo_id: str,
    *,
    sae_id: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Puts an SAE and its section of the model card into a repo, which may hold several. Returns the commit's URL.

    `SAE.from_pretrained(repo_id, sae_id)` of SAELens and `load_sae(f"{repo_id}:{sae_id}")` open it.

    Args:
        sae_id: the SAE's folder in the repo; by default its hook's name ("blocks.14.hook_resid_post").
        dtype: the dtype of the stored weights, as in `save_sae`: float16 for half the size.
        revision, private, token, commit_message, create_pr: as in `hub.push_folder`.

    Raises:
        HubError: the push was refused or failed.
        ValueError: weights that are not finite or too large for `dtype`, an SAE that does not read the residual stream,
            or one without a hook name when `sae_id` is not given.
    """
    sae_id = (sae_id or sae.cfg.metadata.hook_name or "").strip("/")
    if not sae_id:
        raise ValueError("The SAE has no hook name: give sae_id, the folder in the repo.")
    metadata = _metadata(read_settings(sae).model_name)
    with tempfile.TemporaryDirectory() as folder:
        save_sae(sae, folder, dtype=dtype)
        return push_folder(
            folder,
            repo_id,
            path_in_repo=sae_id,
            card=(metadata, _card(sae, repo_id, sae_id)),
            delete_patterns=_STALE,
            revision=revision,
            private=private,
            token=token,
            commit_message=commit_message or f"Upload the SAE {sae_id} with hf_fac",
            create_pr=create_pr,
        )


def _metadata(model: str | None) -> dict[str, Any]:
    return {
        "library_name": "saelens",
        "tags": ["saelens", "sparse-autoencoder", "interpretability", "hf-fac"],
        "base_model": base_model(model),
    }


def _card(sae: SAE[Any], repo_id: str, sae_id: str) -> str:
    cfg, settings = sae.cfg, read_settings(sae)
    own = {key: value for key, value in (cfg.metadata.hf_fac or {}).items() if value is not None}
    k = f", k = {cfg.k}" if hasattr(cfg, "k") else ""
    model = settings.model_name or "an unnamed model"
    at = f" at {own['model_revision']}" if "model_revision" in own else ""
    rows = {
        "reads": f"{model}{at}, layer {settings.layer} (0 is the embedding; `{cfg.metadata.hook_name}`)",
        "architecture": f"{cfg.architecture()}, {cfg.d_sae:,} features of width {cfg.d_in:,}{k}",
        **{label: own[key] for key, label in _TRAINING.items() if key in own},
    }
    figures = {label: own[key] for key, label in _FIGURES.items() if key in own}
    limits = [
        "Features have no labels. What one responds to is a reading of the texts that activate it.",
        "Activations are in the units of this SAE: thresholds of another one mean nothing here.",
        f"It was made for the weights of {model}. A fine-tuned model has other hidden states.",
    ]
    if "training_data" in own:
        limits.append("On texts unlike its training data it fits less well than the figures say.")
    fit = f" It leaves {own['fvu']:.1%} of the variance unexplained on held-out tokens." if "fvu" in own else ""
    parts = [
        f"# Sparse autoencoder for {model}, layer {settings.layer}",
        f"A sparse autoencoder (SAE) of the residual stream of {model}: {cfg.d_sae:,} features of the hidden states at "
        f"layer {settings.layer}, in the folder `{sae_id}` of this repo.{fit} Made with hf-fac "
        f"([arXiv 2602.10388]({PAPER})), in SAELens' format.",
        "## Use",
        f'```python\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo_id}", "{sae_id}")\n```',
        "To see which features a data set activates, with hf-fac:",
        "```python\nfrom datasets import load_dataset\nfrom hf_fac import FACScorer, SAEFeaturizer\n\n"
        f'featurizer = SAEFeaturizer.from_pretrained(\n    "{model}", sae="{repo_id}:{sae_id}"\n)\n'
        'rows = load_dataset("json", data_files="train.jsonl", split="train")\n'
        "rows = rows.map(FACScorer(featurizer), batched=True)  # + fac_features, fac_activations\n```",
        *(["## Figures", table(("on held-out tokens", "value"), figures.items())] if figures else []),
        "## Settings",
        table(("setting", "value"), rows.items()),
        "## Limits",
        "\n".join(f"- {limit}" for limit in limits),
    ]
    return "\n\n".join(parts)
