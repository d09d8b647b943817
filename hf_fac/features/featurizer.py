"""Rows in, sparse feature activations out: g_i(x), the maximum of feature i over a row's content tokens (arXiv
2602.10388).

It costs one forward pass to the SAE's layer and the encoder's product for the features asked for. Pieces (rows, or
windows of long ones) are read in order of length, equal ones once, and [tokens x features] never exists as a whole.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from ..inputs.hidden_states import Batch, check_layer, default_batch_tokens, hidden_states, is_causal, to_device
from ..inputs.pieces import UniquePieces, unique_pieces
from ..inputs.prefix_states import can_share, longest_shared, tree_states
from ..inputs.prefixes import PrefixTrees, prefix_trees, whole_pieces
from ..inputs.rows import ConversationReader, OnError, PoolOver, RowError, Side, TokenizedRows, as_rows
from ..inputs.token_context import MarkedSpan, cut_span
from ..sae.loading import SAESettings, check_sae, load_sae, read_settings
from ..storage.validation import check_counts
from .calibration import FitCheck, calibrate_sinks
from .encoder import Encoder
from .fingerprint import TensorHash, change_marks, model_settings, parameters_up_to, tokenizer_settings
from .pooling import BatchMaxima, FeatureActivations, LeftOut, NodeMaxima, PieceMaxima, mean_states

if TYPE_CHECKING:
    from sae_lens import SAE
    from scipy.sparse import csr_array
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Part of every fingerprint: raise it whenever the same rows give other activations than before.
VERSION = 2

_IMPORTED_BY = os.getpid()  # a forked process has another number
_NOT_LOADABLE = (
    "This featurizer was made from loaded objects, so another process cannot load it again: make it with "
    "SAEFeaturizer.from_pretrained(...), or use one process (num_proc=None)."
)


@dataclass(frozen=True)
class FeaturizerSettings:
    """How a featurizer measures. Its reader and its encoder hold further settings.

    sink_norm: tokens with a larger norm are sinks.
    calibrated: sink_norm was measured on built-in sentences, because neither the caller nor the SAE gave one.
    center: the mean over d_in is subtracted from each hidden state first.
    causal: a token's hidden state does not depend on later tokens.
    The others are arguments of `SAEFeaturizer`.
    """

    layer: int
    activation: Literal["native", "relu"]
    keep_above: float
    sink_norm: float
    calibrated: bool
    batch_tokens: int
    preset: Literal["paper"] | None
    center: bool
    causal: bool


class SAEFeaturizer:
    """Computes which features of a sparse autoencoder each row activates.

        featurizer = SAEFeaturizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", sae="user/repo")
        activations = featurizer(rows)          # scipy.sparse.csr_array [n, d_sae] float32

    Args:
        model, tokenizer: of transformers; the model's head is never run.
        sae: a SAELens SAE of the residual stream; it is moved to the model's device and must not change afterwards.
        layer: 0 is the embedding, L the output of the L-th block; None takes the SAE's own.
        activation: "native" is the SAE's own; "relu", the paper's measuring mode, leaves out top-k and threshold
            and is element-wise.
        features: compute and report these ids only (the columns keep their numbers); saves the encoder's product for
            the rest where the activation is element-wise.
        keep_above: the floor; activations at or below it are not stored.
        pool_over: whose tokens count: "all" content, "user", "assistant" or "completion".
        side: which completion of a preference pair is read, "chosen" or "rejected".
        max_length: most tokens of a row, by default what the model takes. Longer rows are truncated and counted.
        stride: read longer rows in windows instead; neighbouring windows share this many tokens.
        sink_norm: tokens with a larger norm are attention sinks and do not count. None takes the SAE's own value, or
            10 x the median norm of a few built-in sentences where it has none.
        batch_tokens: tokens in one forward pass.
        on_error: "raise" a RowError, or "skip" a row that cannot be read.
        preset: "paper" measures as the paper's released code does: relu, every token but the first 31, no sink cut-off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: SAE,
        *,
        layer: int | None = None,
        activation: Literal["native", "relu"] = "native",
        features: Sequence[int] | None = None,
        keep_above: float = 0.0,
        pool_over: PoolOver = "all",
        side: Side = "chosen",
        max_length: int | None = None,
        stride: int | None = None,
        sink_norm: float | None = None,
        batch_tokens: int | None = None,
        on_error: OnError = "raise",
        preset: Literal["paper"] | None = None,
    ) -> None:
        if preset not in (None, "paper"):
            raise ValueError(f'preset is {preset!r}; the only one is "paper".')
        check_counts(batch_tokens=batch_tokens)
        _check_numbers(keep_above, sink_norm)
        expected = read_settings(sae)
        if (layer := expected.layer if layer is None else layer) is None:
            raise ValueError("The SAE does not say which layer it reads: give layer=.")
        blocks = check_layer(model, layer)
        check_sae(sae, d_in=model.config.get_text_config().hidden_size)
        if preset == "paper":
            activation, sink_norm = "relu", float("inf")
        self.model, self.tokenizer = model, tokenizer
        self.sae = (sae if sae.W_dec.dtype == torch.float32 else deepcopy(sae).to(dtype=torch.float32)).to(model.device)
        self.encoder = Encoder(self.sae, activation=activation, features=features)
        self.reader = ConversationReader(
            tokenizer,
            pool_over=pool_over,
            side=side,
            max_length=_max_length(model, tokenizer, max_length),
            stride=stride,
            prepend_bos=_prepends_bos(expected, tokenizer),
            skip_first=31 if preset == "paper" else None,
            on_error=on_error,
        )
        causal = is_causal(model, layer)
        known_cutoff = sink_norm or expected.sink_norm
        self.settings = FeaturizerSettings(
            layer=layer,
            activation=activation,
            keep_above=float(keep_above),
            sink_norm=known_cutoff or calibrate_sinks(model, self.reader, layer, causal=causal),
            calibrated=known_cutoff is None,
            batch_tokens=batch_tokens or default_batch_tokens(model.device),
            preset=preset,
            # TransformerLens centres what is written into the stream of models with LayerNorm only.
            center=expected.center and any(isinstance(module, torch.nn.LayerNorm) for module in blocks.modules()),
            causal=causal,
        )
        self._fit = FitCheck(self.sae, expected=expected.fvu, layer=layer)
        self._source: dict[str, Any] | None = None
        self._shares: bool | None = None
        self._weights_hash = TensorHash()
        self.left_out = LeftOut()

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        sae: str,
        *,
        sae_id: str | None = None,
        revision: str | None = None,
        sae_revision: str | None = None,
        token: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> SAEFeaturizer:
        """Returns a featurizer loaded from names. Only such a featurizer can be pickled to other processes.

        Args:
            model: a model's Hub id or folder, read at `revision`.
            sae: anything that `load_sae` takes: a Hub repo, "release:sae_id" of SAELens, a folder, a .pth of the paper.
            token: for a private repo. It is not pickled: other processes use the stored login.
            device: by default the GPU if there is one.
            dtype: of the model; the SAE is always float32.
            settings: those of `SAEFeaturizer`.
        """
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        chosen = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        hub = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(model, **hub)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **hub)
        except ValueError as error:
            # An encoder has no language-model head. (Adapters have no config to ask, so loading is tried.)
            if "Unrecognized configuration class" not in str(error):
                raise
            loaded = AutoModel.from_pretrained(model, dtype=dtype, **hub)
        loaded_sae = load_sae(sae, sae_id=sae_id, revision=sae_revision, token=token, device=chosen)
        featurizer = cls(loaded.to(chosen), tokenizer, loaded_sae, **settings)
        featurizer._source = {
            "model": str(model), "sae": str(sae), "sae_id": sae_id, "revision": revision, "sae_revision": sae_revision,
            "device": device and chosen, "dtype": dtype, "trust_remote_code": trust_remote_code, **settings,
        }  # fmt: skip
        return featurizer

    def with_settings(self, **changes: Any) -> SAEFeaturizer:
        """Returns a featurizer of the same model, tokenizer, SAE and layer that differs in these settings alone.

        The weights are shared, a calibrated sink cut-off is kept, and the fit of the SAE is checked only once.
        """
        own, reader = self.settings, self.reader
        same = {
            "activation": own.activation, "features": self.encoder.columns, "keep_above": own.keep_above,
            "pool_over": reader.pool_over, "side": reader.side, "max_length": reader.max_length,
            "stride": reader.stride, "sink_norm": own.sink_norm, "batch_tokens": own.batch_tokens,
            "on_error": reader.on_error, "preset": own.preset,
        }  # fmt: skip
        made = SAEFeaturizer(self.model, self.tokenizer, self.sae, layer=own.layer, **same | changes)
        if own.calibrated and made.settings.sink_norm == own.sink_norm:
            made.settings = replace(made.settings, calibrated=True)
        made._fit, made._weights_hash, made._shares = self._fit, self._weights_hash, self._shares
        if self._source is not None:
            made._source = self._source | changes
        return made

    @property
    def layer(self) -> int:
        return self.settings.layer

    @property
    def keep_above(self) -> float:
        return self.settings.keep_above

    @property
    def d_sae(self) -> int:
        return self.sae.cfg.d_sae

    @property
    def fvu(self) -> float | None:
        """The SAE's fraction of variance unexplained on the first 2,000 content tokens; None until they were read."""
        return self._fit.fvu

    def __call__(self, rows: Any) -> csr_array:
        """Returns the activations of the rows, csr_array [n, d_sae] float32. `read` returns token counts as well.

        Args:
            rows: a `datasets.Dataset`, a list of dicts or strings, or a dict of columns.
        """
        return self.read(rows).activations

    def read(self, rows: Any, *, positions: bool = False, first_row: int = 0) -> FeatureActivations:
        """Returns the activations of the rows, with counts of tokens and of skipped and truncated rows.

        Args:
            positions: also return which token reaches each maximum.
            first_row: number of the first row, in messages.
        Raises: RowError for a row that cannot be read or whose hidden states are not finite.
        """
        [result] = self._read([self.reader(rows, first_row=first_row)], positions=positions, first_row=first_row)
        return result

    def read_sides(self, rows: Any, *, first_row: int = 0) -> tuple[FeatureActivations, FeatureActivations]:
        """Returns the activations of the chosen and of the rejected sides of preference rows.

        It reads what both sides begin with once. The arguments and errors are those of `read`.
        """
        rows = list(as_rows(rows))
        sides = [replace(self.reader, side=side)(rows, first_row=first_row) for side in get_args(Side)]
        chosen, rejected = self._read(sides, positions=False, first_row=first_row)
        return chosen, rejected

    def _read(self, tables: list[TokenizedRows], *, positions: bool, first_row: int) -> list[FeatureActivations]:
        """The activations of each table; the pieces of all are read together."""
        unique = unique_pieces(tables, causal=self.settings.causal)
        shared = prefix_trees(unique, longest=longest_shared(self.model)) if self.settings.causal else []
        is_shared = any(trees.is_shared for trees in shared) and self._can_share()
        maxima = self._piece_maxima(shared if is_shared else [whole_pieces(unique)], unique, positions)
        # What is not finite may spoil its neighbours in a line.
        if is_shared and not maxima.is_finite:
            maxima = self._piece_maxima([whole_pieces(unique)], unique, positions)
        owners = np.split(unique.owner, np.cumsum([len(table.ids) for table in tables])[:-1])
        results = []
        for tokenized, owner in zip(tables, owners, strict=True):
            result, not_finite = maxima.of_rows(tokenized, owner, d_sae=self.d_sae, positions=positions)
            for index in not_finite.tolist():
                result.skipped[index] = self._refuse_not_finite(tokenized, index, first_row)
            self.left_out.add(result, first_row)
            results.append(result)
        return results

    def mean_hidden_states(self, rows: Any) -> np.ndarray:
        """Returns the mean hidden state at the SAE's layer over each row's content tokens, float32 [n, d_in].

        The tokens are those that count for features: no sinks, no tokens beyond `max_length`. Zeros for a row without
        any, or skipped. Rows are read 1,000 at a time.
        Raises: RowError as `read` does.
        """
        rows, means, first_row = iter(as_rows(rows)), [np.zeros((0, self.sae.cfg.d_in), np.float32)], 0
        while some := list(islice(rows, 1000)):
            means.append(self._mean_states(some, first_row))
            first_row += len(some)
        return np.concatenate(means)

    def _mean_states(self, rows: list[Any], first_row: int) -> np.ndarray:
        tokenized = self.reader(rows, first_row=first_row)
        unique = unique_pieces([tokenized], causal=self.settings.causal)
        batches = hidden_states(
            self.model, unique.ids, self.layer, batch_tokens=self.settings.batch_tokens, causal=self.settings.causal
        )
        means, not_finite = mean_states(
            batches, tokenized, unique, d_in=self.sae.cfg.d_in, sink_norm=self.settings.sink_norm,
            overlap=self.reader.stride or 0,
        )  # fmt: skip
        for index in not_finite.tolist():
            self._refuse_not_finite(tokenized, index, first_row)
        return means

    def _refuse_not_finite(self, tokenized: TokenizedRows, index: int, first_row: int) -> str:
        """The reason why a row is skipped. Raises: RowError where rows are not to be skipped."""
        reason = "it has hidden states that are NaN or infinite"
        if self.reader.on_error == "raise":
            start = self.tokenizer.decode(tokenized.ids[tokenized.row.index(index)][:20])
            raise RowError(
                f"Row {first_row + index} cannot be measured: {reason}. Check the model's weights, or load it in "
                f"float32. The row begins: {start!a}"
            )
        return reason

    def _can_share(self) -> bool:
        if self._shares is None:
            self._shares = can_share(self.model, self.layer)
        return self._shares

    def _piece_maxima(self, forest: list[PrefixTrees], unique: UniquePieces, positions: bool) -> PieceMaxima:
        own = self.settings
        found = PieceMaxima(len(unique.ids), keep_above=own.keep_above, columns=self.encoder.columns)
        for trees in forest:
            nodes = NodeMaxima(trees)
            batches = (
                tree_states(self.model, trees, own.layer, batch_tokens=own.batch_tokens)
                if trees.is_shared
                else hidden_states(self.model, trees.ids, own.layer, batch_tokens=own.batch_tokens, causal=own.causal)
            )
            for batch in batches:
                found.add(nodes.of_pieces(self._node_maxima(batch, trees, positions)))
        return found

    def _node_maxima(self, batch: Batch, trees: PrefixTrees, positions: bool) -> BatchMaxima:
        """The maxima over each node's own tokens; `batch.pieces` are lines of the trees."""
        device, overlap = self.sae.W_dec.device, self.reader.stride or 0
        lines = [trees.lines[line] for line in batch.pieces]
        nodes = np.concatenate(lines)
        # Where the node's first token is in the batch.
        sizes = [np.array([len(trees.ids[node]) for node in line]) for line in lines]
        offset = np.concatenate([n * batch.hidden.shape[1] + np.cumsum(s) - s for n, s in enumerate(sizes)])
        content = [np.flatnonzero(trees.content[node]) for node in nodes]
        lengths = np.array([len(c) for c in content])
        node, token = np.repeat(np.arange(len(nodes)), lengths), np.concatenate(content)
        at = np.array([trees.start[n] for n in nodes])[node] + token
        # A token in the overlap was counted in the window before.
        continues = np.array([trees.continues[n] for n in nodes])
        is_new = at >= np.where(continues, overlap, 0)[node]
        where, node, at, is_new = to_device(np.stack([offset[node] + token, node, at, is_new]), batch.hidden.device)
        x = batch.hidden.flatten(0, 1)[where].to(device, torch.float32)
        node, is_new = node.to(device), is_new.to(device).bool()
        norms = x.norm(dim=-1)
        finite = norms.isfinite()
        is_counted = finite & (norms <= self.settings.sink_norm)
        if self.settings.center:
            x = x - x.mean(-1, keepdim=True)
        self._fit.add(x, is_counted)
        values, first_token = self.encoder.maxima(x, is_counted, lengths, positions=positions)
        if first_token is not None and len(at):
            first_token = at.to(device)[first_token]
        kinds = torch.stack([is_counted & is_new, finite & ~is_counted & is_new, ~finite], dim=1)
        counts = torch.zeros(len(nodes), 3, device=device).index_add_(0, node, kinds.float())
        return BatchMaxima(nodes, values, first_token, counts)

    def span(self, row: Any, position: int, *, before: int = 10, after: int = 5) -> MarkedSpan:
        """Returns a token of a row with the text around it.

        The text stays within the message that holds the token, without words of the chat template.

        Args:
            position: index of the token in the row's token ids.
            before, after: most tokens on each side.
        Raises: ValueError for a position outside the row.
        """
        text, offsets, contents = self.reader.render(row)
        if not 0 <= position < len(offsets):
            raise ValueError(f"Position {position} is not in the row, which has {len(offsets)} tokens.")
        return cut_span(text, offsets, contents, position, before, after)

    @property
    def measurement(self) -> dict[str, Any]:
        """What identifies a measurement, as JSON values: rows scored under equal ones can be merged and compared."""
        return {
            "model": self.model.config._name_or_path or type(self.model).__name__,
            "layer": self.layer,
            "d_sae": self.d_sae,
            "activation": self.settings.activation,
            "pool_over": self.reader.pool_over,
            "side": self.reader.side,
            "keep_above": self.keep_above,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Returns a hash of all that activations depend on: version, weights up to the layer, SAE, tokenizer, settings.

        It changes when the model is trained or gets an adapter. It is the same in every process.
        """
        reader, elsewhere = self.reader, ("metadata", "device", "dtype")
        settings = {
            "version": VERSION, "weights": self._weights_hash(self._tensors()), "layer": self.layer,
            "model": model_settings(self.model), "tokenizer": tokenizer_settings(self.tokenizer),
            "sae": {key: value for key, value in self.sae.cfg.to_dict().items() if key not in elsewhere},
            "activation": self.settings.activation, "keep_above": self.keep_above,
            # A calibrated cut-off follows from the other values, except for its last digits.
            "sink_norm": "calibrated" if self.settings.calibrated else self.settings.sink_norm,
            "features": None if self.encoder.columns is None else self.encoder.columns.tolist(),
            "pool_over": reader.pool_over, "side": reader.side, "max_length": reader.max_length,
            "stride": reader.stride, "prepend_bos": reader.prepend_bos, "skip_first": reader.skip_first,
            "center": self.settings.center,
        }  # fmt: skip
        return _digest(settings)

    def feature_fingerprint(self) -> str:
        """Returns a hash of what defines each feature: the weights up to the layer, adapters, and the SAE.

        Settings, tokenizer and template are left out. So a dictionary of features can be used under other settings than
        it was collected with.
        """
        parts = {
            "weights": self._weights_hash(self._tensors()), "adapters": model_settings(self.model)["adapters"],
            "layer": self.layer, "architecture": self.sae.cfg.architecture(), "center": self.settings.center,
        }  # fmt: skip
        return _digest(parts)

    def change_marks(self) -> list[Any]:
        """Change detector, far cheaper than `fingerprint`: other values when the model was trained on, got other
        weights, or switched its adapters, or the template changed. A few numbers edited through `.data` are missed."""
        marks = change_marks([tensor.detach() for _, tensor in self._tensors()], most=256)
        return [marks, model_settings(self.model)["adapters"], self.tokenizer.chat_template]

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [*parameters_up_to(self.model, self.layer), *self.sae.state_dict(prefix="sae.").items()]

    def source(self) -> dict[str, Any] | None:
        """Returns the arguments that load this featurizer again, and its fingerprint; None when it was made from loaded
        objects."""
        if self._source is None:
            return None
        columns = self.encoder.columns
        features = {} if columns is None else {"features": columns.tolist()}
        return self._source | features | {"fingerprint": self.fingerprint()}

    @classmethod
    def restored(cls, source: dict[str, Any] | None, *, rank: int | None = None) -> SAEFeaturizer:
        """Returns the featurizer that `source()` describes; where there are several GPUs, on that of the rank.

        A forked process (those of `map`) computes with one thread from here on: PyTorch's other threads did not survive
        the fork, and waiting for them never ends.
        Raises: RuntimeError when there are no names, or they now lead to another model or SAE.
        """
        if source is None:
            raise RuntimeError(_NOT_LOADABLE)
        if os.getpid() != _IMPORTED_BY:
            torch.set_num_threads(1)
        arguments = {name: value for name, value in source.items() if name not in ("loader", "fingerprint")}
        if rank is not None and torch.cuda.is_available() and arguments.get("device") != "cpu":
            arguments["device"] = f"cuda:{rank % torch.cuda.device_count()}"
        fresh = (source.get("loader") or cls.from_pretrained)(**arguments)
        if fresh.fingerprint() != source["fingerprint"]:
            raise RuntimeError(
                "The model or the SAE loaded again from its name is not the one that was pickled (it was trained on, "
                "or changed on disk): save it to a folder and load the featurizer from there."
            )
        return fresh

    def __reduce__(self) -> tuple[Any, ...]:
        source = self.source()
        if source is None:
            raise TypeError(_NOT_LOADABLE)
        return SAEFeaturizer.restored, (source,)


def _digest(parts: dict[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def _check_numbers(keep_above: float, sink_norm: float | None) -> None:
    if not 0 <= keep_above < float("inf"):
        raise ValueError(f"keep_above is {keep_above}; it must be a number from 0 up (activations are not negative).")
    if sink_norm is not None and not sink_norm > 0:
        raise ValueError(f"sink_norm is {sink_norm}; it must be a positive number (inf leaves every token in).")


def _max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: int | None) -> int | None:
    """The most tokens of a row: the number given, or what model and tokenizer can take."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if None not in (limit, given) and given > limit:
        raise ValueError(f"max_length is {given}; {type(model).__name__} takes at most {limit} tokens.")
    if given is not None:
        return given
    # A tokenizer that knows no limit says 10**30.
    return min((n for n in (limit, tokenizer.model_max_length) if n is not None and n < 10**9), default=None)


def _prepends_bos(expected: SAESettings, tokenizer: PreTrainedTokenizerBase) -> bool:
    if expected.prepend_bos and tokenizer.bos_token_id is None:
        warnings.warn(
            "The SAE was trained with a BOS token in front of every text, but this tokenizer has none: texts are read "
            "without it.",
            stacklevel=3,
        )
    return expected.prepend_bos and tokenizer.bos_token_id is not None
