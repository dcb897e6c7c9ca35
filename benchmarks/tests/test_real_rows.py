"""The script that looks at rows as they come, on made-up rows and a tiny model."""

import json
import sys

import harness
import numpy as np
import real_rows
from tiny import make_model, make_tokenizer


def test_the_last_number_or_the_end_counts():
    answers = {"so 1,204": "#### 1204", "12 of 3": "12", r"is $\frac{1}{2}$.": r"\frac{1}{2}", "a": "b", "": None}
    completions = [[{"content": text}] for text in answers]
    assert real_rows.right(completions, [*answers.values()]) == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_features_tell_classes_that_they_hold():
    values = np.arange(200) % 4
    x = np.column_stack([np.ones(200), np.eye(4)[values]])
    found = real_rows.told(x, values, values)
    assert found["right"] == found["of_kinds"] == 1.0 and found["most_common"] == 0.25
    assert found["of_shuffled_kinds"] < 0.4


def test_the_script_runs_on_made_up_rows(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = {
        "gsm8k": [{"question": f"Is it {i}?", "answer": f"so #### {i}"} for i in range(70)],
        "math": [
            {
                "problem": f"Find {i}",
                "answer": str(i) if i else None,
                "level": i % 6,
                "type": ("Algebra", "Geometry")[i % 2],
            }
            for i in range(130)
        ],
    }
    for name, own in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    arguments = {"dataset_path": "gsm8k", "math_path": "math", "model": "model", "output_dir": "out"}
    monkeypatch.setattr(sys, "argv", ["", *(f"--{name}={tmp_path / path}" for name, path in arguments.items())])
    real_rows.main()
    found = harness.read(tmp_path / "real_rows.json")
    draws, errors = found["draws"], [text for _, text in found["refused"]]
    assert found["rows"] == 130 and sum(found["features"]["sizes"]) == 200
    assert draws["GSM8K"]["groups"] + draws["MATH"]["groups"] == 64
    assert found["where"] == {
        "level >= 4": 42,
        "type == 'Algebra' and level <= 2": 44,
        "answer is not None": 129,
        "level > 0 and characters < 150": 108,
    }
    assert found["quotas"][1]["counts"] == {"Algebra": 65, "Geometry": 65}
    assert sum("no column 'subject'" in text or "another value" in text for text in errors) == 3
