"""What scoring and training are held against: the forward pass of a plain script, stopped at the SAE's layer, and
SAELens' activation store; and times in pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_fac.embedded.loader import LAYER, load_model


class Stop(Exception):
    pass


def bare_pass(model, tokenizer, pieces: list[list[int]], budget: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields hidden states [n, length, d_in] and the mask of each batch: sorted, padded, `budget` tokens at most."""

    def hook(_module, _inputs, output):
        raise Stop(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[LAYER - 1].register_forward_hook(hook)
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))
    with torch.no_grad():
        while order:
            batch = order[: max(1, budget // len(pieces[order[0]]))]
            order = order[len(batch) :]
            padded = tokenizer.pad({"input_ids": [pieces[i] for i in batch]}, return_tensors="pt", padding_side="right")
            padded = padded.to(model.device)
            try:
                model(**padded, use_cache=False)
            except Stop as stop:
                yield stop.args[0], padded["attention_mask"].bool()
    handle.remove()


def activation_store(texts: list[str], *, context: int, batch: int, device: str = "cpu"):
    """SAELens' store over the texts, which it joins. Its model wrapper hooks every module, so it gets a model of its
    own."""
    from datasets import Dataset
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore

    model, tokenizer = load_model(device=device)
    hook = f"model.layers.{LAYER - 1}"
    return ActivationsStore(
        model=HookedProxyLM(model, tokenizer, [hook]), dataset=Dataset.from_dict({"text": texts * 50}), streaming=False,
        hook_name=hook, hook_head_index=None, context_size=context, d_in=model.config.hidden_size,
        n_batches_in_buffer=8, total_training_tokens=10**9, store_batch_size_prompts=batch,
        train_batch_size_tokens=1024, prepend_bos=False, normalize_activations="none", device=torch.device(device),
        dtype="float32",
    )  # fmt: skip


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_pairs(one: Callable[[], object], other: Callable[[], object], pairs: int) -> list[tuple[float, float]]:
    """Returns the seconds of both jobs in each pair. Which goes first alternates, so that a drift of the machine
    cancels."""
    times = []
    for number in range(pairs):
        if number % 2 == 0:
            times.append((seconds(one), seconds(other)))
        else:
            last = seconds(other)
            times.append((seconds(one), last))
    return times


def times_of_first(jobs: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Runs all jobs one after the other, in alternating order. Returns for each other job its time in each run, as a
    multiple of the first one's."""
    names, ratios = list(jobs), []
    for run in range(runs):
        times = {name: seconds(jobs[name]) for name in (names if run % 2 == 0 else names[::-1])}
        ratios.append([times[name] / times[names[0]] for name in names[1:]])
    return dict(zip(names[1:], map(list, zip(*ratios, strict=True)), strict=True))


def best_budget(job: Callable[[int], object], device: str) -> int:
    """Returns the token budget with which the job is fastest."""
    budgets = (1024, 2048, 4096) if device == "cpu" else (16384, 65536, 131072)
    return min(budgets, key=lambda budget: min(seconds(lambda: job(budget)) for _ in range(2)))
