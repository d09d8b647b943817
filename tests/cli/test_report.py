"""`hf-fac report` and `hf-fac compare`: the same pages from rows, coverages and what other commands saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import model_options, results, run
from flaky_server import FlakyServer

from hf_fac import FACReport, SynthesisResult
from hf_fac.dictionary.dictionary import FeatureDictionary

THRESHOLD = ["--threshold", 0.1]


@pytest.fixture(scope="module")
def measured(folders, tmp_path_factory) -> Path:
    """A folder with scored rows and the report of them."""
    root = tmp_path_factory.mktemp("measured")
    for name in ("data", "anchor"):
        run("score", folders / f"{name}.jsonl", "-o", root / name, *model_options(folders))
    run("missing", root / "data", root / "anchor", *THRESHOLD, "-o", root / "report.json")
    return root


def page(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_report_is_the_same_page_from_rows_coverages_and_a_saved_report(measured, tmp_path) -> None:
    files = [measured / name / "coverage.safetensors" for name in ("data", "anchor")]
    run("report", measured / "report.json", "-o", tmp_path / "saved.html")
    run("report", files[0], "--anchor", files[1], *THRESHOLD, "-o", tmp_path / "coverage.html")
    assert page(tmp_path / "saved.html") == page(tmp_path / "coverage.html")
    rows = [measured / "data", "--anchor", measured / "anchor", *THRESHOLD]
    run("report", *rows, "--title", "With <rows>", "-o", tmp_path / "rows.html")
    kept = ["--data", measured / "data", "--anchor", measured / "anchor", "--title", "With <rows>"]
    found = results("report", measured / "report.json", *kept, "-o", tmp_path / "kept.html")
    assert page(tmp_path / "rows.html") == page(tmp_path / "kept.html") != page(tmp_path / "saved.html")
    assert "With &lt;rows&gt;" in page(tmp_path / "rows.html")
    assert found["fac"] == FACReport.load(measured / "report.json").fac


def test_a_report_shows_what_features_mean_and_what_was_written(measured, folders, dictionary_folder, tmp_path) -> None:
    known = FeatureDictionary.load(dictionary_folder)
    explained = {"explanation": "words about rivers", "explanation_state": "explained"}
    known.updated(dict.fromkeys(known.features.tolist(), explained)).save(tmp_path / "d")
    with FlakyServer() as server:
        run("synthesize", measured / "data", measured / "anchor", "-o", tmp_path / "out", *THRESHOLD, "--dictionary",
            tmp_path / "d", "--base-url", server.url, "--prompt-format", "text", "--max-samples", 2,
            *model_options(folders))  # fmt: skip
    written = SynthesisResult.load(tmp_path / "out")
    assert written.report.to_dict() == json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(written.dataset) == 2
    options = ["--dictionary", tmp_path / "d", "--synthesis", tmp_path / "out"]
    run("report", measured / "report.json", *options, "-o", tmp_path / "new" / "page.html")
    for text in ("words about rivers", "New samples"):
        assert text in page(tmp_path / "new" / "page.html")
    (tmp_path / "out" / "report.json").write_text('{"samples": 2}')
    said = run("report", measured / "report.json", *options, "-o", tmp_path / "page.html", fails=True)
    assert "report.json: features: Field required, activated: Field required" in said


def test_compare_prints_each_data_set_beside_the_anchor_and_writes_a_page(measured, tmp_path) -> None:
    data = [measured / "data", measured / "anchor" / "coverage.safetensors"]
    command = ["compare", *data, "--anchor", measured / "anchor", *THRESHOLD]
    said = run(*command, "--html", tmp_path / "page.html")
    fac = FACReport.load(measured / "report.json").fac
    assert f"{measured / 'data'} │ 12 │" in said
    assert f" {fac:.3f} " in said
    assert " 1.000 " in said
    assert "coverage.safetensors" in page(tmp_path / "page.html")
    own, whole = results(*command)["data_sets"]
    assert (own["fac"], own["alone"], whole["missing"]) == (fac, 0, 0)
