import json
import re

import pandas as pd
import pytest
from command_line import model_options, run

pytestmark = pytest.mark.filterwarnings("ignore:The SAE leaves", "ignore:FAC")


def test_diversity_prints_metrics_beside_fac_and_writes_them(folders, tmp_path) -> None:
    data, options = folders / "data.jsonl", model_options(folders)
    alone = run("diversity", data, *options)
    assert "FAC │ - │ closer to the anchor │ │ anchor, both scored │" in alone
    assert "facility location │ - │ closer to the anchor │ │ anchor │" in alone
    said = run("diversity", data, "--anchor", folders / "anchor.jsonl", "-o", tmp_path / "table.csv", *options)
    assert re.search(r"FAC │ 0\.\d+ │ closer to the anchor │ 12 │", said)
    assert "words a row. More rows and longer ones" in said
    table = pd.read_csv(tmp_path / "table.csv", index_col="metric")
    value = table.loc["facility location", "value"]
    assert 0 < value < 1
    assert f"facility location │ {value:.4g} │ closer to the anchor │ 12 │" in said


def test_a_scored_folder_is_not_scored_again_and_labels_are_read(folders, tmp_path) -> None:
    options = model_options(folders)
    for name in ("data", "anchor"):
        rows = [json.loads(line) for line in (folders / f"{name}.jsonl").read_text().splitlines()]
        labelled = [row | {"kind": len(row["text"]) % 2} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, labelled)))
        run("score", tmp_path / f"{name}.jsonl", "-o", tmp_path / name, *options)
    command = ["diversity", tmp_path / "data", "--anchor", tmp_path / "anchor"]
    assert "nearest-neighbour accuracy │ 0." in run(*command, "--label-column", "kind", *options)
    assert "has no column 'class'" in run(*command, "--label-column", "class", *options, fails=True)
    other = run(*command, *options, "--activation", "relu", fails=True)
    assert "was not measured as these options say" in other
