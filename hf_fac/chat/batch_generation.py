"""Many texts written by one causal language model in a batch that stays full: token ids in, token ids out.

A row that is finished leaves its place to the next text. A prompt is read once for all its texts, and what all prompts
begin with is read once for all of them. Each text carries its own random numbers.
"""

from __future__ import annotations

import inspect
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..inputs.hidden_states import evaluation_mode, pack

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_HEADROOM = 128  # columns that the cache has in reserve for tokens to come
_WORTH_SHARING = 16  # tokens that all prompts must begin with before they are read apart
_CANDIDATES = 128  # most likely tokens looked at first; rows whose nucleus is wider are sorted whole


def check_can_write(model: PreTrainedModel) -> None:
    """Raises: ValueError when the model keeps more of its past than keys and values, which cannot be moved by rows."""
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise ValueError(
                f"{type(model).__name__} keeps more of its past than keys and values ({type(layer).__name__}), so "
                "LocalChat cannot write with it. Serve it (`transformers serve`, vLLM) and use EndpointChat."
            )


@dataclass(eq=False)
class Text:
    """A text on its way.

    prompt: token ids, at least one.
    uniforms: float64 [room], in [0, 1): all its randomness, one number for each token that may come.
    room: the most tokens it may have.
    tag: what else its writer is told of it.
    ids: the tokens written, the one that ended it among them.
    finish: "stop", "length" or "failed" once it has ended, and then `error` says why.
    """

    prompt: tuple[int, ...]
    uniforms: np.ndarray
    room: int
    tag: Hashable = None
    ids: list[int] = field(default_factory=list)
    finish: str = ""
    error: str | None = None

    @property
    def n_past(self) -> int:
        """Tokens that its next one attends to, itself not counted: it is read when the next is written."""
        return len(self.prompt) + len(self.ids) - 1

    def end(self, finish: str, error: str | None = None) -> None:
        self.finish, self.error = finish, error


class _Prompt(NamedTuple):
    """What was read: per layer its keys and values [1, heads, length, d], None where a layer keeps none."""

    states: list[tuple[Tensor, Tensor] | None]
    length: int


class Writer:
    """Writes texts with a model whose forward pass is called plainly: hooks on its blocks work.

    Args:
        batch_size: rows written at the same time.
        batch_tokens: the most prompt tokens read in one forward pass.
        temperature: 0 takes the likeliest token.
        ends: token ids that end a text.
        has_stop: whether the text ends for what it says, asked after each token.
        on_end: called when a text has ended.
        stepping: what surrounds the forward passes that write a token of each row, called with the rows' texts (None
            for a row that waits); those that read prompts are outside it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_size: int,
        batch_tokens: int,
        temperature: float,
        top_p: float,
        ends: set[int],
        has_stop: Callable[[Text], bool],
        on_end: Callable[[], object],
        stepping: Callable[[Sequence[Text | None]], AbstractContextManager[object]] = nullcontext,
    ):
        self.model, self.device = model, model.device
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.temperature, self.top_p = temperature, top_p
        self.ends, self.has_stop, self.on_end, self.stepping = ends, has_stop, on_end, stepping
        # Of a wrapped model (PEFT) the outermost signature does not tell.
        taken = {name for part in model.modules() for name in inspect.signature(type(part).forward).parameters}
        self.takes_positions, self.takes_kept_logits = "position_ids" in taken, "logits_to_keep" in taken

    def write(self, texts: Sequence[Text]) -> None:
        """Write the texts to their ends, in evaluation mode and without gradients."""
        with evaluation_mode(self.model):
            self._write(texts)

    def _write(self, texts: Sequence[Text]) -> None:
        # Neighbours of like length waste no columns. The longest first: a text then never needs more columns for its
        # prompt than the rows already have.
        self.waiting = deque(sorted(texts, key=lambda text: -len(text.prompt)))
        self.unplaced = Counter(text.prompt for text in texts)
        self.read: dict[tuple[int, ...], _Prompt] = {}
        self.rows: list[Text | None] = []
        self.shared = self._read_shared(list(self.unplaced))
        slots = _Slots(self.device)
        while self.waiting or any(self.rows):
            free = [row for row, text in enumerate(self.rows) if text is None]
            # Several rows at a time: each reading of prompts, and each copy of the cache, then serves all of them.
            if self.waiting and (not self.rows or len(free) >= max(1, len(self.rows) // 16)):
                self._fill(slots, free)
            elif not self.waiting and len(free) >= max(1, len(self.rows) // 8):
                keep = [row for row, text in enumerate(self.rows) if text is not None]
                self.rows = [self.rows[row] for row in keep]
                slots.rebuild(keep=keep)
            slots.trim(max(text.n_past for text in self.rows if text))
            self._step(slots)

    def _step(self, slots: _Slots) -> None:
        """One more token for every row; a row that waits for its next text goes along and is not looked at."""
        settings: dict[str, Any] = {"attention_mask": slots.next_mask()}
        if self.takes_positions:
            position = [text.n_past if text else 0 for text in self.rows]
            settings["position_ids"] = torch.tensor(position, device=self.device)[:, None]
        last = [(text.ids or text.prompt)[-1] if text else 0 for text in self.rows]
        ids = torch.tensor(last, device=self.device)[:, None]
        with self.stepping(self.rows):
            logits = self.model(input_ids=ids, past_key_values=slots, use_cache=True, **settings).logits[:, -1]
        slots.end += 1
        for row, (text, token) in enumerate(zip(self.rows, self._choose(logits), strict=True)):
            if text and self._ends_with(text, token):
                self.rows[row] = None
                self.on_end()

    def _fill(self, slots: _Slots, free: list[int]) -> None:
        """Put waiting texts into free rows, or make the rows."""
        if not self.rows:
            free = list(range(min(len(self.waiting), self.batch_size)))
            self.rows = [None] * len(free)
        rows: dict[tuple[int, ...], list[int]] = {}
        for row in free[: len(self.waiting)]:
            self.rows[row] = text = self.waiting.popleft()
            rows.setdefault(text.prompt, []).append(row)
        self._read([prompt for prompt in rows if prompt not in self.read])
        slots.place(len(self.rows), [(self.read[prompt], taken) for prompt, taken in rows.items()])
        for prompt, taken in rows.items():
            self.unplaced[prompt] -= len(taken)
            if not self.unplaced[prompt]:
                del self.read[prompt]

    def _read(self, prompts: list[tuple[int, ...]]) -> None:
        """Read all but the last token of each prompt: that one goes in as the rows' first step."""
        past = self.shared.length
        lengths = [len(prompt) - 1 - past for prompt in prompts]
        self.read.update((prompt, self.shared) for prompt, length in zip(prompts, lengths, strict=True) if not length)
        for batch in pack(lengths, self.batch_tokens):
            # Padding stands on the right here, where causal attention does not see it, so no mask is needed.
            ids = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long)
            for place, i in enumerate(batch):
                ids[place, : lengths[i]] = torch.tensor(prompts[i][past:-1])
            layers = self._forward(ids)
            for place, i in enumerate(batch):
                length = past + lengths[i]
                states = [pair and tuple(part[place : place + 1, :, :length] for part in pair) for pair in layers]
                self.read[prompts[i]] = _Prompt(states, length)

    def _forward(self, ids: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Per layer the keys and values of what is shared and of what follows, the ids given."""
        cache = DynamicCache()
        for layer, states in enumerate(self.shared.states):
            if states is not None:
                cache.update(*(part.expand(len(ids), -1, -1, -1) for part in states), layer)
        settings = {"logits_to_keep": 1} if self.takes_kept_logits else {}
        self.model(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, **settings)
        return [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]

    def _read_shared(self, prompts: list[tuple[int, ...]]) -> _Prompt:
        """What all prompts begin with, if that is worth it."""
        self.shared = _Prompt([], 0)
        # Of sorted prompts the first and the last have in common what all have.
        first, last = min(prompts, default=()), max(prompts, default=())
        most = min(map(len, prompts), default=0) - 1
        length = next((i for i in range(most) if first[i] != last[i]), most)
        if len(prompts) < 2 or length < _WORTH_SHARING:
            return self.shared
        return _Prompt(self._forward(torch.tensor([first[:length]])), length)

    def _choose(self, logits: Tensor) -> list[int]:
        """The next token of each row, -1 where the logits are no numbers."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature == 0:
            best, tokens = logits.max(dim=-1)
            return torch.where(best.isfinite(), tokens, -1).tolist()
        uniforms = [text.uniforms[len(text.ids)] if text else 0.0 for text in self.rows]
        uniforms = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
        return sample(logits / self.temperature, self.top_p, uniforms).tolist()

    def _ends_with(self, text: Text, token: int) -> bool:
        if token < 0:
            text.end("failed", "The model's logits are NaN or infinite. In float16? Load it in bfloat16 or float32.")
            return True
        text.ids.append(token)
        if token in self.ends or self.has_stop(text):
            text.end("stop")
        elif len(text.ids) == text.room:
            text.end("length")
        return bool(text.finish)


def sample(logits: Tensor, top_p: float, uniforms: Tensor) -> Tensor:
    """Returns one token per row, int64 [n], drawn from the nucleus by inverting its distribution function.

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p. A row depends on its own
    logits and its own uniform number only; -1 where its logits are no numbers.

    Args:
        logits: float32 or float64 [n, vocabulary], divided by the temperature already.
        uniforms: float64 [n], in [0, 1).
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    usable = total[:, 0].isfinite()
    if top_p >= 1:
        return torch.where(usable, _invert((logits - total).exp(), uniforms)[:, 0], -1)
    values, order = logits.topk(min(_CANDIDATES, logits.shape[-1]))
    tokens, complete = _from_nucleus((values - total).exp(), order, top_p, uniforms)
    wide = (usable & ~complete).nonzero()[:, 0]
    if len(wide):
        values, order = logits[wide].sort(dim=-1, descending=True)
        tokens[wide] = _from_nucleus((values - total[wide]).exp(), order, top_p, uniforms[wide])[0]
    return torch.where(usable, tokens, -1)


def _from_nucleus(probabilities: Tensor, order: Tensor, top_p: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens drawn, and whether those given, the likeliest in falling order, hold the whole nucleus."""
    reached = probabilities.cumsum(dim=-1, dtype=torch.float64)
    probabilities = torch.where(reached - probabilities < top_p, probabilities, 0)
    # By id: two tokens of all but equal probability then keep their places, whatever the last bit says.
    order, by_id = order.sort(dim=-1)
    return order.gather(-1, _invert(probabilities.gather(-1, by_id), uniforms))[:, 0], reached[:, -1] >= top_p


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Which entry of each row, int64 [n, 1], the uniform number falls on."""
    reached = weights.cumsum(dim=-1, dtype=torch.float64)
    at = torch.searchsorted(reached, uniforms[:, None] * reached[:, -1:], right=True)
    return at.clamp(max=weights.shape[-1] - 1)


class _SlotLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, columns, d], some columns in reserve; `slots` says which are used."""

    def __init__(self, slots: _Slots):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.slots.mask.shape
        self.keys, self.values = (
            part.new_zeros(rows, part.shape[1], columns, part.shape[3]) for part in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.slots.start, self.slots.end
        self.keys[:, :, end] = key_states[:, :, 0]
        self.values[:, :, end] = value_states[:, :, 0]
        return self.keys[:, :, start : end + 1], self.values[:, :, start : end + 1]

    def get_seq_length(self) -> int:
        return self.slots.end - self.slots.start


class _Slots(Cache):
    """The past of all rows. Every row ends in the same column; the columns before its beginning are masked.

    A new text is written into the columns before the common end. Columns `start` to `end` are in use. Writing a token
    in place spares the copy of the whole past that a growing cache makes for every token.
    """

    def __init__(self, device: torch.device):
        super().__init__(layer_class_to_replicate=lambda: _SlotLayer(self))
        self.start = self.end = 0
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=device)

    def next_mask(self) -> Tensor:
        """Returns which columns each row attends to when it writes a token, int64 [rows, end - start + 1]."""
        if self.end == self.mask.shape[1]:
            self.rebuild()
        self.mask[:, self.end] = 1
        return self.mask[:, self.start : self.end + 1]

    def trim(self, longest: int) -> None:
        """Leave out columns that no row needs, when the longest has so many tokens."""
        self.start = self.end - longest

    def place(self, n_rows: int, prompts: list[tuple[_Prompt, list[int]]]) -> None:
        """Put prompts into rows; what was there is forgotten. None may be longer than those of the first time."""
        if not len(self.mask):
            self.end = max(prompt.length for prompt, _ in prompts)
            self.mask = self.mask.new_zeros(n_rows, self.end + _HEADROOM)
        for prompt, rows in prompts:
            begin = self.end - prompt.length
            self.mask[rows] = 0
            self.mask[rows, begin : self.end] = 1
            for number, states in enumerate(prompt.states):
                if number == len(self.layers):
                    self.layers.append(_SlotLayer(self))
                layer = self.layers[number]
                if states is not None:
                    if not layer.is_initialized:
                        layer.lazy_initialization(*states)
                    layer.keys[rows, :, begin : self.end], layer.values[rows, :, begin : self.end] = states

    def rebuild(self, *, keep: list[int] | None = None) -> None:
        """Copy the columns in use, of these rows, to a new place with columns in reserve."""
        width = self.end - self.start

        def moved(part: Tensor, dim: int) -> Tensor:
            used = part.narrow(dim, self.start, width)
            used = used if keep is None else used[keep]
            shape = list(used.shape)
            shape[dim] += _HEADROOM
            fresh = part.new_zeros(shape)
            fresh.narrow(dim, 0, width).copy_(used)
            return fresh

        self.mask = moved(self.mask, 1)
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = moved(layer.keys, 2), moved(layer.values, 2)
        self.start, self.end = 0, width
