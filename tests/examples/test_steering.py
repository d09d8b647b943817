"""The steering recipe: rows of either form become contrastive rows whose choices can be exchanged."""

from __future__ import annotations

from datasets import Dataset
from recipe import read_rows, small_data
from steering import balanced, contrastive_rows

from hf_fac import get_task
from hf_fac.steering.choices import exchanged

TASK = get_task("sycophancy")


def test_items_with_letters_become_the_tasks_rows() -> None:
    parts = {"question": "Is it so?", "matching": "Yes, it is.", "other": "No, it is not."}
    [expected] = contrastive_rows(Dataset.from_list([parts]), TASK)
    assert expected == TASK.row(parts).value
    content = {column: expected[column][0]["content"] for column in expected}
    item = {
        "question": content["prompt"], "answer_matching_behavior": f" {content['chosen']}",
        "answer_not_matching_behavior": content["rejected"],
    }  # fmt: skip
    assert list(contrastive_rows(Dataset.from_list([item]), TASK)) == [expected]


def test_a_seed_draws_the_half_of_the_rows_whose_matching_choice_comes_first() -> None:
    rows = contrastive_rows(read_rows(small_data("sycophancy")["seed_data"]), TASK)
    draws = [[row["chosen"][0]["content"] for row in balanced(rows, seed)] for seed in (42, 43)]
    assert draws[0] != draws[1]
    assert [draw.count("(A)") for draw in draws] == [5, 5]
    again = [row if row in list(rows) else exchanged(row, 0) for row in balanced(rows, 42)]
    assert again == list(rows)


def test_the_files_beside_the_examples_have_rows_of_their_own_with_two_choices() -> None:
    questions = []
    for path in small_data("sycophancy").values():
        rows = contrastive_rows(read_rows(path), TASK)
        questions += [row["prompt"][0]["content"] for row in rows]
        assert all(exchanged(exchanged(row, 0), 0) == row for row in rows)
    assert len(set(questions)) == len(questions) == 58
