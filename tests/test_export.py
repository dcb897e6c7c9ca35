"""The chosen rows in the files of verl, OpenRLHF and slime, read as these read them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from datasets import Dataset, load_dataset
from test_cli import make_folder
from tiny import config, make_dataset, make_tokenizer, make_trainer

from trl_learnalign import Selection, select_prompts
from trl_learnalign.cli import main as cli


SUFFIX = {"verl": "parquet", "openrlhf": "jsonl", "slime": "jsonl"}


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """A selection of conversational prompts, whose answers are numbers in a nested column."""
    rows = make_dataset(24, conversational=True).to_list()
    rows = [row | {"extra": {"answer": row["row"] % 7}, "tests": [f"assert {row['row']}"]} for row in rows]
    dataset = Dataset.from_list(rows)
    choice = config(score="learnability", warmup_prompts=0)
    return dataset, select_prompts(make_trainer(tmp_path_factory.mktemp("run"), dataset=dataset), choice)


@pytest.fixture
def written(selected, tmp_path):
    dataset, selection = selected

    def write(kind, rows=dataset, answers="extra.answer", **settings):
        return selection.export(rows, tmp_path / f"chosen.{SUFFIX[kind]}", kind, answers, **settings)

    return write


def loaded(path):
    """By `datasets`, as verl's RLHFDataset and OpenRLHF's `blending_datasets` do."""
    kind = {".parquet": "parquet", ".jsonl": "json"}[path.suffix]
    return load_dataset(kind, data_files=str(path), cache_dir=str(path.parent / "cache"))["train"]


def test_rows_for_verl(selected, written):
    dataset, selection = selected
    rows = loaded(written("verl", source="me/sums", split="hard"))
    table = selection.to_pandas()
    assert rows.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert len(rows) == len(selection.indices) == 8
    for row, index in zip(rows, selection.indices, strict=True):
        assert (row["data_source"], row["ability"]) == ("me/sums", "unknown")
        assert row["prompt"] == dataset[index]["prompt"]
        assert make_tokenizer().apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        assert row["reward_model"] == {"style": "rule", "ground_truth": str(index % 7)}
        assert row["extra_info"] == {
            "index": index,
            "split": "hard",
            "learnalign_score": table.loc[index, "score"],
            "success_rate": table.loc[index, "success_rate"],
        }


def test_rows_for_openrlhf(selected, written):
    dataset, selection = selected
    rows = loaded(written("openrlhf", source="me/sums"))
    for row, index in zip(rows, selection.indices, strict=True):
        assert (row["prompt"], row["label"]) == (dataset[index]["prompt"], str(index % 7))
        assert (row.get("datasource", "default"), row["index"], row["split"]) == ("me/sums", index, "train")


def test_rows_for_slime(selected, written):
    """By lines, and by pandas, as slime before 2026 does. Answers that are no texts are JSON."""
    dataset, selection = selected
    path = written("slime", answers="tests")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    frame = pd.read_json(path, lines=True, dtype={"label": str})
    assert frame.to_dict("records") == lines and {type(label) for label in frame["label"]} == {str}
    for line, index in zip(lines, selection.indices, strict=True):
        assert line["prompt"] == dataset[index]["prompt"] and json.loads(line["label"]) == dataset[index]["tests"]
        assert line["metadata"]["index"] == index and line["metadata"]["source_name"] == "learnalign"


@pytest.mark.parametrize("kind", SUFFIX)
def test_the_trainers_own_readers(selected, written, kind):
    dataset, selection = selected
    tokenizer, path = make_tokenizer(), written(kind)
    if kind == "verl":
        module = pytest.importorskip("verl.utils.dataset.rl_dataset", reason="verl is not installed")
        from omegaconf import OmegaConf

        settings = OmegaConf.create({"cache_dir": str(path.parent), "filter_overlong_prompts": False})
        rows = module.RLHFDataset(str(path), tokenizer, settings)
        found = [(row["raw_prompt"], row["reward_model"]["ground_truth"]) for row in map(rows.__getitem__, range(8))]
        expected = dataset.select(selection.indices)["prompt"][:]
    else:
        if kind == "openrlhf":
            module = pytest.importorskip("openrlhf.datasets.prompts_dataset", reason="OpenRLHF is not installed")
            args = {"input_key": "prompt", "label_key": "label", "apply_chat_template": True}
            args = SimpleNamespace(data=SimpleNamespace(**args))
            strategy = SimpleNamespace(args=args, is_rank_0=lambda: True)
            rows = module.PromptDataset(loaded(path), tokenizer, strategy)
            found = list(zip(rows.prompts, rows.labels, strict=True))
        else:
            module = pytest.importorskip("slime.utils.data", reason="slime is not installed")
            names = {"prompt_key": "prompt", "label_key": "label", "apply_chat_template": True}
            rows = module.Dataset(str(path), tokenizer, None, None, **names)
            found = [(sample.prompt, sample.label) for sample in rows.samples]
        expected = [
            tokenizer.apply_chat_template(dataset[index]["prompt"], add_generation_prompt=True, tokenize=False)
            for index in selection.indices
        ]
    assert found == list(zip(expected, [str(index % 7) for index in selection.indices], strict=True))


def test_what_cannot_be_written_is_named(selected, written):
    dataset, selection = selected
    for settings, message in (
        ({"answers": None}, "Rows for slime have the right answers, but `answer_column` is not set"),
        ({"answers": "solution"}, "`answer_column` is 'solution', but the training dataset has no column 'solution'"),
        ({"rows": make_dataset(23)}, "not the one that the selection was made from"),
    ):
        with pytest.raises(ValueError, match=message):
            written("slime", **settings)
    with pytest.raises(ValueError, match="`kind` is 'trl', but rows are written for verl, openrlhf, slime"):
        selection.export(dataset, "out.jsonl", "trl", "row")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("answer", None, "`answer_column` is 'answer', but row 0 has no answer there"),
        ("answer", "", "row 0 has no answer there"),
        ("image", "a.png", "has a column 'image', but rows for verl are written without images"),
        ("prompt", [{"role": "user", "content": "1", "name": "x"}], "row 0 has a message that is more than a role"),
    ],
)
def test_rows_that_cannot_be_written(tmp_path, column, value, message):
    rows = Dataset.from_list([{"prompt": "1+1=", "answer": "2"} | {column: value}])
    scores = {"index": [0], "score": [0.5], "success_rate": [None], "rank": [0]}
    selection = Selection([0], pd.DataFrame(scores), {})
    selection.to_pandas = lambda: selection.scores.set_index("index")
    selection.to_dataset = lambda dataset: dataset
    with pytest.raises(ValueError, match=message):
        selection.export(rows, tmp_path / "out.parquet", "verl", "answer")


def test_the_command_writes_them(tmp_path, monkeypatch, capsys):
    """With the names and the values of the file: texts stay texts, and columns say of which source a row is."""
    monkeypatch.chdir(make_folder(tmp_path))
    rows = [
        {"question": f"{row}+1=", "right": f"0{row}" if row else 1, "data_source": "a/b", "ability": "sums"}
        for row in range(12)
    ]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--config", "run.yaml", "--dataset_name", "own.jsonl", "--prompt_column", "question", "--score", "random"]
    with pytest.raises(SystemExit, match="Rows for verl have the right answers, but `answer_column` is not set"):
        cli.main(["select", *more, "--format", "verl"])
    for kind, suffix in SUFFIX.items():
        cli.main(["select", *more, "--answer_column", "right", "--format", kind])
        assert f"5 rows: out/learnalign/selected.{kind}.{suffix}" in capsys.readouterr().out
    selection = Selection.load("out/learnalign/step-000000")
    answers = [str(rows[index]["right"]) for index in selection.indices]
    found = loaded(tmp_path / "out/learnalign/selected.verl.parquet")
    for row, index, answer in zip(found, selection.indices, answers, strict=True):
        assert row["prompt"] == [{"role": "user", "content": rows[index]["question"]}]
        assert row["reward_model"]["ground_truth"] == answer and row["extra_info"]["success_rate"] is None
        assert (row["data_source"], row["ability"]) == ("a/b", "sums")
    for kind in ("openrlhf", "slime"):
        lines = Path(f"out/learnalign/selected.{kind}.jsonl").read_text().splitlines()
        assert [json.loads(line)["label"] for line in lines] == answers
        assert [json.loads(line)["prompt"] for line in lines] == [
            rows[index]["question"] for index in selection.indices
        ]
