"""The nine GLUE tasks: official files, the hub's data sets, and the real rows if SPARSEGRAD_DATA is set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from sparsegrad_lab.tasks.glue import GLUE, from_hub_splits, load_glue

DATA = os.environ.get("SPARSEGRAD_DATA")
NAMES = list(GLUE)

# Task -> header, two rows (with quotation marks, which are text in GLUE), text of the first row, both labels.
OFFICIAL: dict[str, tuple[str, list[str], tuple[str, ...], list[float]]] = {
    "cola": (
        "",
        ['gj04\t1\t\tHe said "no.', "gj04\t0\t*\tHim said no."],
        ('He said "no.',),
        [1, 0],
    ),
    "sst2": ("sentence\tlabel", ['a "fine film\t1', "dull , dull\t0"], ('a "fine film',), [1, 0]),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t70\t71\t"I am here, he said.\tHe said he was here.', "0\t72\t73\tOne.\tTwo."],
        ('"I am here, he said.', "He said he was here."),
        [1, 0],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        [
            '0\tmain-captions\tMSRvid\t2012test\t1\tnone\tnone\tA "plane.\tAn air plane.\t4.750',
            "1\tmain-captions\tMSRvid\t2012test\t2\tnone\tnone\tA man.\tA dog.\t0.000",
        ],
        ('A "plane.', "An air plane."),
        [4.75, 0.0],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["0\t1\t2\tWhat is \"it?\tWhat's it?\t1", "1\t3\t4\tWho?\tWhy?\t0"],
        ('What is "it?', "What's it?"),
        [1, 0],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        [
            '0\t1\t1c\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tThe "new rights.\tRights.\tneutral\tcontradiction',
            "1\t2\t2n\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tYes.\tNo.\tneutral\tneutral",
        ],
        ('The "new rights.', "Rights."),
        [2, 1],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ['0\tWhen "was it?\tIt was then.\tnot_entailment', "1\tWho?\tHe.\tentailment"],
        ('When "was it?', "It was then."),
        [1, 0],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ['0\tNo "weapons.\tWeapons.\tnot_entailment', "1\tHe came.\tHe came.\tentailment"],
        ('No "weapons.', "Weapons."),
        [1, 0],
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel",
        ['0\tI "stuck a pin.\tIt had a hole.\t1', "1\tHe ate.\tShe ate.\t0"],
        ('I "stuck a pin.', "It had a hole."),
        [1, 0],
    ),
}


def write_official(root: Path, name: str, rows: list[str] | None = None) -> Path:
    """Write all files of a task below root/glue, with the same rows in each."""
    header, both, _, _ = OFFICIAL[name]
    folder = root / "glue" / GLUE[name].folder
    folder.mkdir(parents=True)
    lines = [*([header] if header else []), *(both if rows is None else rows)]
    for file in ("train", "dev_matched", "dev_mismatched") if name == "mnli" else ("train", "dev"):
        (folder / f"{file}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_official_files(name: str, tmp_path: Path) -> None:
    folder = write_official(tmp_path, name)
    _, _, text, labels = OFFICIAL[name]
    task = load_glue(name, tmp_path)
    assert task.name == f"glue/{name}"
    expected = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    assert task.evaluation_splits == expected
    for split in ("train", *expected):
        data = task.splits[split]
        assert data.column_names == [*task.text, "label"]
        assert tuple(data[0][column] for column in task.text) == text
        assert data["label"][:] == labels
    for root in (tmp_path / "glue", folder):  # the folder may also be the archive's, or the task's
        assert load_glue(name, root).splits["train"]["label"][:] == labels


def test_folder_of_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path, "rte")
    monkeypatch.setenv("SPARSEGRAD_DATA", str(tmp_path))
    assert load_glue("rte").source == str(tmp_path / "glue" / "RTE")


def test_mnli_with_one_evaluation_file_only(tmp_path: Path) -> None:
    folder = write_official(tmp_path, "mnli")
    (folder / "dev_mismatched.tsv").unlink()
    assert load_glue("mnli", tmp_path).evaluation_splits == ["validation_matched"]


def test_ragged_rows_of_qqp_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_official(tmp_path, "qqp", [*OFFICIAL["qqp"][1], "2\t5\t6\tHalf a row"])
    task = load_glue("qqp", tmp_path)
    assert len(task.splits["train"]) == 2
    assert "train.tsv: skipped 1 rows" in caplog.text


# Class names in the hub's order. Other libraries number the classes in this order.
HUB_LABELS = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "stsb": None,
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_hubs_data_sets(name: str, tmp_path: Path) -> None:
    task = GLUE[name]
    names = HUB_LABELS[name]
    assert (names is None) == (task.labels is None)
    labels = [0.0, 4.75] if names is None else list(range(len(names)))
    rows = Dataset.from_dict(
        {**{column: [f"{column} {i}" for i in range(len(labels))] for column in task.text}, "label": labels,
         "idx": list(range(len(labels)))}
    )  # fmt: skip
    found = {"train": rows, **dict.fromkeys(task.validation, rows), "test": rows}
    loaded = from_hub_splits(name, found)
    assert list(loaded.splits) == ["train", *task.validation]
    assert loaded.splits["train"].column_names == [*task.text, "label"]
    assert loaded.splits["train"]["label"][:] == labels
    # The same layout as from the files.
    write_official(tmp_path, name)
    of_files = load_glue(name, tmp_path)
    assert (of_files.text, of_files.labels, of_files.metrics) == (loaded.text, loaded.labels, loaded.metrics)
    if name in ("mnli", "qnli", "rte"):
        assert list(task.labels or ()) == names
    elif names is not None:
        assert task.labels == ("0", "1")  # numbers in the official files too


COUNTS = {
    "cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "rte": (2490, 277),
    "wnli": (635, 71), "qnli": (None, 5463), "mnli": (None, 9815),
}  # fmt: skip


@pytest.mark.skipif(DATA is None, reason="SPARSEGRAD_DATA names no folder with GLUE")
@pytest.mark.parametrize("name", list(COUNTS))
def test_real_rows(name: str) -> None:
    assert DATA is not None
    if not (Path(DATA) / "glue" / GLUE[name].folder).is_dir():
        pytest.skip(f"SPARSEGRAD_DATA has no {GLUE[name].folder}")
    task = load_glue(name)
    train, validation = COUNTS[name]
    assert len(task.splits[task.evaluation_splits[0]]) == validation
    if train is not None:
        assert len(task.splits["train"]) == train
    assert all(task.splits[task.evaluation_splits[0]][column][0] for column in task.text)


@pytest.mark.skipif(DATA is None, reason="SPARSEGRAD_DATA names no folder with few-shot rows")
@pytest.mark.parametrize(("name", "folder", "rows"), [("qnli", "QNLI", 32), ("qqp", "QQP", 32), ("mnli", "MNLI", 48)])
def test_real_few_shot_rows(name: str, folder: str, rows: int) -> None:
    root = Path(str(DATA)) / "fewshot" / folder / "16-13"
    if not root.is_dir():
        pytest.skip("SPARSEGRAD_DATA has no few-shot rows")
    task = load_glue(name, root)
    assert len(task.splits["train"]) == rows
    assert sorted(set(task.splits["train"]["label"])) == list(range(rows // 16))


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match=r"expected a GLUE task, one of cola, .*wnli; found 'ax'"):
        load_glue("ax")


def test_folder_without_the_task(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected train.tsv and dev.tsv of RTE, in .*glue/RTE"):
        load_glue("rte", tmp_path)


def test_nothing_to_evaluate_on(tmp_path: Path) -> None:
    folder = write_official(tmp_path, "rte")
    (folder / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected rows to evaluate on, in .*dev.tsv or .*dev.jsonl"):
        load_glue("rte", tmp_path)


def test_label_outside_the_set(tmp_path: Path) -> None:
    write_official(tmp_path, "rte", [*OFFICIAL["rte"][1], "2\ta\tb\tperhaps"])
    with pytest.raises(ValueError, match=r"line 4: expected one of 'entailment', 'not_entailment' as 'label', found"):
        load_glue("rte", tmp_path)


def test_missing_column(tmp_path: Path) -> None:
    folder = tmp_path / "RTE"
    folder.mkdir()
    for file in ("train", "dev"):
        (folder / f"{file}.tsv").write_text("index\tsentence1\tlabel\n0\ta\tentailment\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a column 'sentence2', found 'index', 'sentence1', 'label'"):
        load_glue("rte", tmp_path)


def test_hub_that_cannot_be_reached() -> None:
    """Without a folder and without a network, the error says where to put the files."""
    code = "from sparsegrad_lab.tasks.glue import load_glue\ntry: load_glue('rte')\nexcept OSError as e: print(e)"
    environment = {key: value for key, value in os.environ.items() if key != "SPARSEGRAD_DATA"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": os.devnull},
    )  # fmt: skip
    assert "glue/rte could not be loaded from the hub" in done.stdout, done.stderr
    assert "RTE/train.tsv and dev.tsv, in data.folder or in $SPARSEGRAD_DATA" in done.stdout


def test_val_size_splits_the_evaluation_rows(tmp_path: Path) -> None:
    """The training file is not read, and no row is in both parts."""
    folder = tmp_path / "QNLI"
    folder.mkdir()
    lines = [f"{row}\tq{row}\ts{row}\t{'entailment' if row % 2 else 'not_entailment'}" for row in range(20)]
    (folder / "dev.tsv").write_text("\n".join(["index\tquestion\tsentence\tlabel", *lines]) + "\n")
    (folder / "train.tsv").write_text("not read\n")
    splits = load_glue("qnli", tmp_path, val_size=0.2).splits
    assert list(splits) == ["train", "validation"]
    assert len(splits["validation"]) == 4
    questions = [*splits["train"]["question"], *splits["validation"]["question"]]
    assert sorted(questions) == sorted(f"q{row}" for row in range(20))


@pytest.mark.skipif(not DATA, reason="SPARSEGRAD_DATA is not set")
@pytest.mark.parametrize(("name", "train", "held"), [("qnli", 3832, 1631), ("mnli", 7855, 1960)])
def test_val_size_of_the_real_dev_sets(name: str, train: int, held: int) -> None:
    """The rows of the experiment `glue`, before `train_rows`: no two of its three parts share a text."""
    task = load_glue(name, val_size={"qnli": 0.3, "mnli": 0.2}[name])
    assert [len(rows) for rows in task.splits.values()] == [train, held]
    parts = task.with_development_split(0.5).splits.values()
    texts = [{text for column in task.text for text in rows[column]} for rows in parts]
    assert len(texts) == 3
    assert len(set.union(*texts)) == sum(map(len, texts))
