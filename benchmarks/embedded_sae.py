"""Make the SAE that ships with the package: SmolLM2-135M-Instruct, layer 15, 4,096 features.

    python benchmarks/embedded_sae.py DATA --output runs/sae

DATA is a folder with instructions.jsonl (prompt, completion), preference.jsonl (chosen: a "Human: ... Assistant: ..."
transcript) and toxicity.jsonl (text). About an hour on two cores; a run that was stopped goes on where it was.
"""

import argparse
import json
import random
import re
from pathlib import Path

from datasets import Dataset

from hf_fac.embedded.loader import LAYER, load_model
from hf_fac.sae.training import train_sae


def turns(transcript: str) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant): ?", transcript)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c} for r, c in zip(parts[1::2], parts[2::2], strict=True) if c.strip()]


def chat_rows(folder: Path) -> list[dict]:
    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    rows = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]
        for r in read("instructions.jsonl")
    ]
    rows += [turns(r["chosen"]) for r in read("preference.jsonl")]
    rows += [[{"role": "user", "content": r["text"]}] for r in read("toxicity.jsonl")[:4000]]
    random.Random(0).shuffle(rows)
    return [{"messages": messages} for messages in rows if messages]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", type=Path)
parser.add_argument("--output", type=Path, default=Path("runs/sae"))
parser.add_argument("--k", type=int, default=32)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--rows", type=int, help="use the first so many rows only")
options = parser.parse_args()
data = Dataset.from_list(chat_rows(options.data)[: options.rows])
data.info.dataset_name = (
    "P3/T0 prompts and GPTeacher instructions with completions, Anthropic hh-rlhf harmless-base dialogues, "
    "4,000 messages of hate-speech-and-offensive-language"
)
model, tokenizer = load_model()
sae = train_sae(
    model,
    tokenizer,
    data,
    layer=LAYER,
    d_sae=4096,
    k=options.k,
    epochs=options.epochs,
    batch_size=1024,
    buffer_tokens=2**21,
    output_dir=options.output,
)
print(json.dumps(sae.cfg.metadata["hf_fac"], indent=1))
