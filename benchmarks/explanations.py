"""What explanations of features are worth, through a real endpoint: `transformers serve` with the embedded model.

    python benchmarks/explanations.py [--features 50] [--seed 0] [--output runs/explanations]
    python benchmarks/explanations.py --base-url https://my-server/v1 --model my-model --form json --key-env MY_KEY

Features of the embedded dictionary with ten spans are drawn by seed, explained from five of them and verified; then the
same model must tell the other five from spans of other features, by the feature's own explanation and by another
feature's. Where the second does as well, explanations say nothing; or the judge cannot tell: so it is also given, as
an explanation, the tokens that were strongest in the five. A run that was stopped goes on where it was.
"""

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from scipy import stats

from hf_fac import EndpointChat, detect, explain
from hf_fac.embedded.loader import load_dictionary, model_folder

PORT = 8471  # always the same: kept answers are filed under the server's address
# It ends with the process that holds its standard input, however that one ends.
SERVE = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from transformers.cli.transformers import main
main()
"""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--features", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("runs/explanations"))
parser.add_argument("--form", default="text", choices=["text", "json"])
parser.add_argument("--base-url", help="another server, instead of the one that is started here")
parser.add_argument("--model", help="the model's name there")
parser.add_argument("--key-env", help="the environment variable that holds the key")


@contextmanager
def local_server(log: Path):
    """The address of `transformers serve` with the embedded model, and the model's name."""
    folder = str(model_folder())
    arguments = ["serve", folder, "--device", "cpu", "--host", "127.0.0.1", "--port", str(PORT)]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, *arguments],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).read()
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"The server ended:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{PORT}/v1", folder
    finally:
        server.kill()
        server.wait()


def mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values}"
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return f"{np.mean(values):.3f} (95 % interval {low:.3f} to {high:.3f}, {len(values)} features)"


def by_tokens(row: dict) -> dict:
    """An explanation without a model: the tokens that activate the feature in the spans that explanations come from."""
    tokens = dict.fromkeys(span["token"].strip() for span in row["spans"][::2])
    words = ", ".join(f'"{token}"' for token in tokens if token)
    return {"explanation": f"The text contains {words}.", "explanation_state": "explained"}


def run(base_url: str, model: str, options: argparse.Namespace) -> None:
    whole = load_dictionary()
    spans = np.array([len(part) for part in whole.dataset["spans"]])
    pool = whole.features[spans >= 10]
    features = np.sort(np.random.default_rng(options.seed).choice(pool, options.features, replace=False)).tolist()
    key = os.environ[options.key_env] if options.key_env else None
    chat = EndpointChat(model, base_url=base_url, token=key, max_concurrency=2, cache_dir=options.output, timeout=300)
    print(f"{chat}: {len(features)} of {len(pool):,} features with ten spans, seed {options.seed}")
    start = time.monotonic()
    how = {"features": features, "seed": options.seed, "batch_size": 8, "attempts": 2}
    found = explain(whole, chat, prompt_format=options.form, cache_dir=options.output, **how)
    other = detect(found, chat, shuffled=True, cache_dir=options.output, **how)
    lexical = whole.updated({i: by_tokens(whole[i]) for i in features})
    control = detect(lexical, chat, cache_dir=options.output, **how)
    rows = [found[i] for i in features]
    found.select(features).save(options.output / "dictionary")
    print(f"explanations: {dict(Counter(row['explanation_state'] for row in rows))}")
    print(f"verified: {dict(Counter(row['verification'] for row in rows))}")
    for row in rows[:5]:
        print(f"  {row['feature']}: {row['explanation']}")
    true = {row["feature"]: row["detection"] for row in rows if row["detection"] is not None}
    shuffled = {i: other[i].score for i in other if other[i].score is not None}
    both = sorted(true.keys() & shuffled.keys())
    print(f"detection (0.5 is chance) by the feature's own explanation: {mean(list(true.values()))}")
    print(f"detection by the explanation of another feature:            {mean(list(shuffled.values()))}")
    tokens = [one.score for one in control.values() if one.score is not None]
    print(f"detection by the tokens of the spans that were shown:       {mean(tokens)}")
    print(f"own minus other, feature by feature:                        {mean([true[i] - shuffled[i] for i in both])}")
    print(f"{chat.spent}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.base_url:
        run(options.base_url, options.model, options)
    else:
        with local_server(options.output / "server.log") as address:
            run(*address, options)
