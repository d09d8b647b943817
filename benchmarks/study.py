"""What the studies of real data share: rows read once by the embedded model and kept on disk, and what is trained.

Three tasks, each with a performance that takes a second to measure, because only a head is trained on hidden states:

toxicity: rows with text and label. Average precision of a logistic head on the mean hidden state, at 10 % prevalence.
preference: "Human:/Assistant:" transcripts, chosen and rejected. Accuracy of a logistic reward head on the difference
    of the two mean hidden states of the last answer.
instructions: prompt and completion. Loss on held-out completions of a low-rank adapter on the last hidden states, in
    front of the model's own output matrix (cut to the tokens that occur); the performance is minus the loss.

`read_rows` splits the rows, by a fixed seed, into a development and a held-out half; each half into a pool that
training sets are drawn from, a labelled anchor set, and a test set.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

PREVALENCE = 0.1
POSITIVE = 1
SPLIT = {"pool": 0.5, "anchor": 0.15, "test": 0.35}
TASKS = ("toxicity", "preference", "instructions")
MAX_TOKENS = {"toxicity": 96, "preference": 320, "instructions": 160}
COMPLETION_TOKENS = 48
STEPS, STEP_TOKENS, TEST_ROWS = 20, 256, 240  # of the instructions task


@dataclass
class Rows:
    """Rows of one half of a task, as the embedded model reads them.

    records: the rows as they stand in the file. labels: int [n], 0 or 1; zeros where the task has none. groups: str
    [n], source or class. activations: csr [n, d_sae], native, the maximum over content tokens; of preference pairs
    those of the chosen side, and `rejected` those of the other. tokens: int [n]. units: [n, d], mean hidden states of
    length 1. inputs: [n, d], what a head is trained on: mean hidden states, or differences of them (preference).
    parts: row numbers of pool, anchor and test. states, targets, owners (instructions): the last hidden state before
    each completion token, its place in `vocabulary`, its row. vocabulary, head: the ids of all tokens that occur in
    completions of the data, ascending, and the model's output matrix for them.
    """

    records: list[dict]
    labels: np.ndarray
    groups: np.ndarray
    activations: sp.csr_array
    tokens: np.ndarray
    units: np.ndarray
    inputs: np.ndarray
    parts: dict[str, np.ndarray]
    rejected: sp.csr_array | None = None
    states: np.ndarray | None = None
    targets: np.ndarray | None = None
    owners: np.ndarray | None = None
    vocabulary: np.ndarray | None = None
    head: np.ndarray | None = None

    @property
    def texts(self) -> list[str]:
        """The content of each row."""
        return [row.get("text") or row.get("chosen") or f"{row['prompt']}\n{row['completion']}" for row in self.records]


WRITTEN = {"action": "append", "default": [], "metavar": "NAME=FILE", "help": "rows of written_rows.py, a way more"}


def study_options(description: str, tasks: tuple[str, ...] = TASKS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tasks, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="read so many rows only")
    parser.add_argument("--output", type=Path, default=Path("runs/predictors"), help="folder of what was read, results")
    return parser


def read_rows(task: str, data: Path, folder: Path, *, limit: int | None = None) -> dict[str, Rows]:
    """Returns the development and the held-out half, read by the model or from what an earlier run kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))[:limit]
    rows = [rows[i] for i in order]
    kept = folder / f"{task}-{len(rows)}-{zlib.crc32(data.read_bytes()):08x}.npz"
    if not kept.exists():
        start = time.perf_counter()
        arrays = _read(task, rows)
        np.savez(kept.with_suffix(".tmp.npz"), **arrays)
        kept.with_suffix(".tmp.npz").rename(kept)
        print(f"{task}: {len(rows):,} rows read in {time.perf_counter() - start:.0f} s")
    arrays = dict(np.load(kept))
    half = len(rows) // 2
    return {
        "development": _half(task, rows, arrays, np.arange(half)),
        "held out": _half(task, rows, arrays, np.arange(half, len(rows))),
    }


def conversation(task: str, row: dict, side: str = "chosen") -> dict:
    """A row as a featurizer reads it."""
    if task == "toxicity":
        return {"text": row["text"]}
    if task == "preference":
        from hf_fac import transcript_to_messages

        return {"messages": transcript_to_messages(row[side])}
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def _read(task: str, rows: list[dict]) -> dict[str, np.ndarray]:
    from hf_fac.embedded import load_featurizer

    featurizer = load_featurizer(max_length=MAX_TOKENS[task], on_error="skip")
    conversations = [conversation(task, row) for row in rows]
    read = featurizer.read(conversations)
    arrays = {
        "data": read.activations.data, "indices": read.activations.indices, "indptr": read.activations.indptr,
        "shape": np.array(read.activations.shape), "tokens": read.tokens,
    }  # fmt: skip
    arrays["inputs"] = arrays["units"] = featurizer.mean_hidden_states(conversations)
    if task == "preference":
        answers = featurizer.with_settings(pool_over="assistant")
        other = [conversation(task, row, "rejected") for row in rows]
        arrays["inputs"] = answers.mean_hidden_states(conversations) - answers.mean_hidden_states(other)
        rejected = featurizer.read(other).activations
        arrays |= {"r_data": rejected.data, "r_indices": rejected.indices, "r_indptr": rejected.indptr}
    if task == "instructions":
        arrays |= _completion_states(featurizer, rows)
    return arrays


def _completion_states(featurizer, rows: list[dict]) -> dict[str, np.ndarray]:
    """The model's last hidden states before the first completion tokens of each row, in half precision."""
    import torch

    model, tokenizer = featurizer.model, featurizer.tokenizer
    states, targets, owners = [], [], []
    for number, row in enumerate(rows):
        turn = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"][
            -(MAX_TOKENS["instructions"] - COMPLETION_TOKENS) :
        ]
        completion = tokenizer(row["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + completion[:COMPLETION_TOKENS]])
        with torch.no_grad():
            hidden = model.model(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        states.append(hidden.half().numpy())
        targets.append(ids[0, len(prompt) :].numpy())
        owners.append(np.full(len(hidden), number))
    head = model.get_output_embeddings().weight.detach()
    vocabulary = np.unique(np.concatenate(targets))
    return {
        "states": np.concatenate(states), "targets": np.concatenate(targets), "owners": np.concatenate(owners),
        "vocabulary": vocabulary, "head": head[torch.from_numpy(vocabulary)].half().numpy(),
    }  # fmt: skip


def _table(arrays: dict[str, np.ndarray], side: str = "") -> sp.csr_array:
    """The activations among the arrays; those of the rejected side with "r_"."""
    parts = (arrays[side + "data"], arrays[side + "indices"], arrays[side + "indptr"])
    return sp.csr_array(parts, shape=arrays["shape"])


def _half(task: str, rows: list[dict], arrays: dict, chosen: np.ndarray) -> Rows:
    usable = np.flatnonzero(arrays["units"].any(1) & arrays["inputs"].any(1))
    chosen = np.intersect1d(chosen, usable)
    units = arrays["units"][chosen]
    groups = [str(rows[i].get("class") or rows[i].get("source") or "") for i in chosen]
    order = np.random.default_rng(1).permutation(len(chosen))
    cuts = np.cumsum([int(share * len(chosen)) for share in SPLIT.values()])[:-1]
    made = Rows(
        records=[rows[i] for i in chosen],
        labels=np.array([rows[i].get("label", 0) for i in chosen]),
        groups=np.array(groups),
        activations=_table(arrays)[chosen],
        tokens=arrays["tokens"][chosen],
        units=units / np.linalg.norm(units, axis=1, keepdims=True),
        inputs=arrays["inputs"][chosen],
        parts={name: np.sort(part) for name, part in zip(SPLIT, np.split(order, cuts), strict=True)},
    )
    if "r_data" in arrays:
        made.rejected = _table(arrays, "r_")[chosen]
    if "states" in arrays:
        inside = np.isin(arrays["owners"], chosen)
        made.vocabulary, made.head = arrays["vocabulary"], arrays["head"]
        made.states, made.targets = (
            arrays["states"][inside],
            np.searchsorted(made.vocabulary, arrays["targets"][inside]),
        )
        made.owners = np.searchsorted(chosen, arrays["owners"][inside])
    return made


def followed(task: str, rows: Rows) -> np.ndarray:
    """The rows of the pool that ways choose among: of toxicity the positive ones."""
    pool = rows.parts["pool"]
    return pool[rows.labels[pool] == POSITIVE] if task == "toxicity" else pool


def add_written(task: str, rows: Rows, file: Path) -> np.ndarray:
    """Adds rows that were written for a task to `rows`; returns their numbers."""
    new = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    arrays = _read(task, new)
    if not (arrays["units"].any(1) & arrays["inputs"].any(1)).all():
        raise SystemExit(f"{file} has rows that cannot be read.")
    first, units = len(rows.records), arrays["units"]
    rows.records += new
    rows.labels = np.r_[rows.labels, [row.get("label", 0) for row in new]]
    rows.groups = np.r_[rows.groups, np.full(len(new), "written")]
    rows.activations = sp.vstack([rows.activations, _table(arrays)], format="csr")
    rows.tokens = np.r_[rows.tokens, arrays["tokens"]]
    rows.units = np.concatenate([rows.units, units / np.linalg.norm(units, axis=1, keepdims=True)])
    rows.inputs = np.concatenate([rows.inputs, arrays["inputs"]])
    if rows.rejected is not None:
        rows.rejected = sp.vstack([rows.rejected, _table(arrays, "r_")], format="csr")
    if rows.vocabulary is not None:  # a token that the data does not have cannot be learned
        known = np.isin(arrays["targets"], rows.vocabulary)
        rows.states = np.concatenate([rows.states, arrays["states"][known]])
        rows.targets = np.r_[rows.targets, np.searchsorted(rows.vocabulary, arrays["targets"][known])]
        rows.owners = np.r_[rows.owners, first + arrays["owners"][known]]
    return np.arange(first, len(rows.records))


def add_all_written(task: str, rows: Rows, files: list[str]) -> dict[str, np.ndarray]:
    """Adds the rows of files, told as NAME=FILE; returns their numbers by name."""
    named = dict(item.split("=", 1) for item in files)
    return {name: add_written(task, rows, Path(file)) for name, file in named.items()}


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision as it would be where 10 % of the rows are positive."""
    from sklearn.metrics import average_precision_score

    share = labels.mean()
    weights = np.where(labels == POSITIVE, PREVALENCE / share, (1 - PREVALENCE) / (1 - share))
    return float(average_precision_score(labels, scores, sample_weight=weights))


class Performance:
    """What a training set of a task brings: `Performance(task, rows)(indices)`, higher is better."""

    def __init__(self, task: str, rows: Rows):
        self.task, self.rows = task, rows
        pool = rows.inputs[rows.parts["pool"]]
        self.mean, self.scale = (0.0 if task == "preference" else pool.mean(0)), pool.std(0) + 1e-6
        test = rows.parts["test"]
        self.test_inputs, self.test_labels = (rows.inputs[test] - self.mean) / self.scale, rows.labels[test]

    def __call__(self, indices: np.ndarray) -> float:
        return getattr(self, f"_{self.task}")(np.asarray(indices))

    def _toxicity(self, indices: np.ndarray) -> float:
        from sklearn.linear_model import LogisticRegression

        inputs = (self.rows.inputs[indices] - self.mean) / self.scale
        head = LogisticRegression(C=0.01, max_iter=200).fit(inputs, self.rows.labels[indices])
        return average_precision(self.test_labels, head.decision_function(self.test_inputs))

    def _preference(self, indices: np.ndarray) -> float:
        from sklearn.linear_model import LogisticRegression

        inputs = self.rows.inputs[indices] / self.scale
        both, labels = np.concatenate([inputs, -inputs]), np.repeat([1, 0], len(inputs))
        head = LogisticRegression(C=0.001, max_iter=200, fit_intercept=False).fit(both, labels)
        return float(np.mean(self.test_inputs @ head.coef_[0] > 0))

    def _instructions(self, indices: np.ndarray) -> float:
        """Minus the loss a token on the test rows of a rank-16 adapter h + B A h, trained with Adam."""
        import torch

        rows = self.rows
        torch.manual_seed(0)
        head = torch.from_numpy(rows.head).float()
        d = head.shape[1]
        down = (torch.randn(16, d) / d**0.5).requires_grad_()
        up = torch.zeros(d, 16, requires_grad=True)
        adam = torch.optim.Adam([down, up], lr=2e-3)

        def loss_of(of_rows: np.ndarray, step: int | None = None) -> torch.Tensor:
            at = np.flatnonzero(np.isin(rows.owners, of_rows))
            if step is not None:
                at = np.random.default_rng(step).choice(at, min(STEP_TOKENS, len(at)), replace=False)
            states = torch.from_numpy(rows.states[at]).float()
            return torch.nn.functional.cross_entropy(
                (states + states @ down.T @ up.T) @ head.T, torch.from_numpy(rows.targets[at]).long()
            )

        for step in range(STEPS):
            adam.zero_grad()
            loss_of(indices, step).backward()
            adam.step()
        with torch.no_grad():
            parts = np.array_split(rows.parts["test"][:TEST_ROWS], 8)
            return -float(np.mean([loss_of(part).item() for part in parts]))
