"""A synthesis that was saved is read as it was."""

import math

import numpy as np
from datasets import Dataset

from hf_fac.synthesis.baseline import PermutationBaseline
from hf_fac.synthesis.report import SynthesisReport, SynthesisResult


def test_a_report_without_samples_and_with_infinite_ratios_is_read_as_it_was_saved(tmp_path) -> None:
    nan = math.nan
    baseline = PermutationBaseline(3, 4, 0.5, 0.1, (nan, 1.0), 0.2, 0.0, math.inf, (1.0, math.inf))
    report = SynthesisReport(
        features=np.array([7, 2]), activated=np.array([], np.int64), exhausted=np.array([2]), samples=0,
        fac_before=nan, fac_after=nan, covered=np.array([], np.int64), curve=np.array([0.0]), kl_before=nan,
        kl_after=nan, frequency_cosine_before=nan, frequency_cosine_after=nan, jensen_shannon_before=nan,
        jensen_shannon_after=nan, methods={"two_step": baseline}, copied=0.5, dropped={"loop": 1}, requests=4,
        prompt_tokens=9, completion_tokens=8, seconds=1.5, ended=None, chat_failed=False,
    )  # fmt: skip
    nothing = Dataset.from_dict({"text": []})
    SynthesisResult(nothing, report, nothing).save(tmp_path)
    found = SynthesisResult.load(tmp_path).report
    assert str(found) == str(report)
    np.testing.assert_equal(vars(found), vars(report))
    assert found.activated.dtype == found.features.dtype == np.int64
