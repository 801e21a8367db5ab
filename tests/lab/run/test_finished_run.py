"""Evaluate, predict and merge with a finished run. Wrong input is refused before the model is loaded."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.cli.predict import main as predict_command
from sparsegrad_lab.run.finished_run import evaluate, load_adapter, merge, open_run, predict, read_run, write_csv
from sparsegrad_lab.run.folder import RunFolder
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train

TEXTS = [("the warm film was fine",), ("a dull one again",), ("quiet",)]
Arguments = Callable[..., RunArguments]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def gone(run: Path) -> Path:
    """A run with damaged weights: any other error shows that the input was checked before the model was loaded."""
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(Exception, match=r"deserializing header"):
        open_run(run)
    return run


def test_evaluate_a_split(finished_run: Path) -> None:
    scores = evaluate(finished_run)
    assert scores.keys() == {"validation"}
    assert evaluate(finished_run, "validation") == scores
    on_train = evaluate(finished_run, "train")
    assert on_train.keys() == {"train"}
    # The same from the predictions.
    config = RunFolder(finished_run).read_arguments()
    rows = predict(finished_run, config["data"]["train_file"])
    assert on_train["train"]["accuracy"] == sum(row["prediction"] == row["label"] for row in rows) / len(rows)
    found = Counter((row["label"], row["prediction"]) for row in rows)
    names = ["bad", "good"]
    assert on_train["train"]["confusion"] == [[found[label, prediction] for prediction in names] for label in names]
    assert on_train["train"]["classes"]["good"]["recall"] == found["good", "good"] / 24


def test_evaluate_an_unknown_split(gone: Path) -> None:
    with pytest.raises(ValueError, match=r"train has splits train, validation; found 'test'"):
        evaluate(gone, "test")


def test_evaluate_after_the_rows_have_changed(gone: Path, tmp_path: Path) -> None:
    """Labels that the run was not trained with, and a file that is gone."""
    config = RunFolder(gone).read_arguments()
    other = tmp_path / "other.csv"
    other.write_text("text,other,label,score\nwarm,x,yes,1\ndull,x,no,0\n", encoding="utf-8")
    config["data"] |= {"train_file": str(other), "validation_file": str(other)}
    (gone / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    words = r"other.csv: expected the labels that the run was trained with, \('bad', 'good'\); found \('no', 'yes'\)"
    with pytest.raises(ValueError, match=words):
        evaluate(gone)
    other.unlink()
    with pytest.raises(FileNotFoundError, match=r"other.csv: no such file"):
        evaluate(gone)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
def test_predict_a_file(kind: str, finished_run: Path, tmp_path: Path) -> None:
    """Rows keep their columns and get the class and its probabilities, the softmax of the logits."""
    rows = [{"id": str(number), "text": text} for number, (text,) in enumerate(TEXTS)]
    file = tmp_path / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        file.write_text("\n".join([f"id{mark}text", *(f"{row['id']}{mark}{row['text']}" for row in rows)]) + "\n")
    else:
        file.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    found = predict(finished_run, file)
    probabilities = torch.from_numpy(open_run(finished_run).logits(TEXTS)).softmax(-1)
    for number, row in enumerate(found):
        assert {name: row[name] for name in ("id", "text")} == rows[number]
        assert row["p(bad)"] == pytest.approx(float(probabilities[number, 0]), abs=1e-6)
        assert row["p(good)"] == pytest.approx(float(probabilities[number, 1]), abs=1e-6)
        assert row["prediction"] == ("good" if row["p(good)"] > row["p(bad)"] else "bad")
    # A single row has no padding, which must not matter.
    (alone,) = predict(finished_run, texts=["quiet"])
    assert alone["p(good)"] == pytest.approx(found[2]["p(good)"], abs=1e-5)
    write_csv(tmp_path / "new" / "predictions.csv", found)
    with (tmp_path / "new" / "predictions.csv").open(encoding="utf-8", newline="") as saved:
        assert list(csv.DictReader(saved)) == [{name: str(value) for name, value in row.items()} for row in found]


@pytest.mark.parametrize(
    ("content", "texts", "expected"),
    [
        ("text\nwarm\n", ["warm"], r"expected either a file or texts, found both"),
        (None, [], r"expected either a file or texts, found neither"),
        ("sentence,label\nwarm,good\n", [], r"rows.csv, line 2: expected a column 'text', found 'sentence', 'label'"),
        ("text\n", [], r"rows.csv: expected rows, found none"),
        ("text,prediction\nwarm,good\n", [], r"rows.csv: found a column 'prediction', which predictions would replace"),
        ("text,p(good)\nwarm,7\n", [], r"rows.csv: found a column 'p\(good\)', which predictions would replace"),
    ],
)
def test_predict_refuses(content: str | None, texts: list[str], expected: str, gone: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=expected):
        predict(gone, None if content is None else file, texts)


def test_a_run_without_its_weights(gone: Path) -> None:
    """Their names would be looked up on the hub."""
    adapter = gone / "adapter"
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged or cut off \(.*expected a peft_type"):
        load_adapter(nn.Linear(2, 2), adapter)
    shutil.rmtree(adapter)
    with pytest.raises(FileNotFoundError, match=r"holds scores and no weights: adapter/ and model/ are gone"):
        predict(gone, texts=["warm"])


def test_predictions_never_replace_the_rows(gone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text\nwarm\n", encoding="utf-8")
    for output, message in ((file, "is the file with the rows"), (tmp_path / "found.json", "expected a .csv file")):
        with pytest.raises(SystemExit):
            predict_command([str(gone), "--file", str(file), "--output", str(output)])
        assert message in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "text\nwarm\n"


def test_predict_without_the_file(gone: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv: no such file"):
        predict(gone, "nowhere.csv")


def test_regression(arguments: Arguments, tmp_path: Path) -> None:
    """The prediction is the model's single output."""
    run = tmp_path / "run"
    train(arguments(run, "--data.label", "score", "--data.regression", "true"), progress=False)
    file = tmp_path / "rows.csv"
    file.write_text("text\n" + "".join(f"{text}\n" for (text,) in TEXTS), encoding="utf-8")
    logits = open_run(run).logits(TEXTS)
    assert logits.shape == (3, 1)
    expected = [{"text": text, "prediction": float(value)} for (text,), (value,) in zip(TEXTS, logits, strict=True)]
    assert predict(run, file) == expected
    assert len({row["prediction"] for row in expected}) == 3
    folder, made = merge(run)
    assert made
    check_logits(folder, run)


def check_logits(folder: Path, run: Path) -> None:
    """Check that a merged folder, loaded with transformers alone, gives the run's logits."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert not hasattr(model, "peft_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found = model(**tokenizer([text for (text,) in TEXTS], padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(found, torch.from_numpy(open_run(run).logits(TEXTS)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["sparsegrad", "lora", "meprop"])
def test_merged_is_the_adapter(method: str, arguments: Arguments, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(arguments(run, "--method", method, "--rest", "train", "--training.epochs", "1"), progress=False)
    assert merge(run) == (run / "merged", True)
    check_logits(run / "merged", run)
    saved = json.loads((run / "merged" / "config.json").read_text(encoding="utf-8"))
    assert saved["id2label"] == {"0": "bad", "1": "good"}


def test_merging_is_done_once(run: Path) -> None:
    folder, made = merge(run)
    assert made
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert merge(run) == (folder, False)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    (run / "adapter" / "adapter_model.safetensors").touch()  # as after training again
    assert merge(run) == (folder, True)


def test_merge_where_the_weights_were_trained(arguments: Arguments, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(arguments(run, "--method", "full", "--training.epochs", "1"), progress=False)
    with pytest.raises(ValueError, match=r"has no adapter to merge; .*run/model is a plain model already"):
        merge(run)
    assert not (run / "merged").exists()
    model: Any = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    with torch.no_grad():
        plain = model(**tokenizer([text for (text,) in TEXTS], padding=True, return_tensors="pt")).logits
    assert torch.equal(plain, torch.from_numpy(open_run(run).logits(TEXTS)))


@pytest.mark.parametrize("use", [evaluate, lambda run: predict(run, texts=["warm"]), merge, open_run])
def test_an_unfinished_run(use: Callable[[Path], Any], run: Path) -> None:
    (run / "result.json").unlink()
    words = r"holds a run that is not finished; resume it: sparsegrad train --config .*run/config.yaml"
    with pytest.raises(FileNotFoundError, match=words):
        use(run)
    assert not (run / "merged").exists()
    (run / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"run is not a run folder \(no config.yaml\)"):
        use(run)


def test_a_run_whose_model_is_gone(run: Path, tmp_path: Path) -> None:
    config = RunFolder(run).read_arguments()
    config["model"] = str(tmp_path / "nowhere")
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        open_run(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings: settings.pop("data"), "data"),
        (lambda settings: settings.update(extra=1), "extra"),
        (lambda settings: settings["data"].update(max_length="sixteen"), "sixteen"),
    ],
)
def test_settings_that_were_changed_by_hand(
    change: Callable[[Any], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[2] / "samples" / "finished_run", folder)
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    change(settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)config.yaml: expected the settings of a run.*" + message):
        read_run(folder)
    assert main(["evaluate", str(folder)]) == 1
    assert "config.yaml: expected the settings of a run" in capsys.readouterr().err


def test_evaluate_changed_rows(
    arguments: Arguments, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A part that is held out from changed rows has rows that the run has trained on; a dev set only has other rows."""
    held_out = ["--data.validation_file", "null", "--val_size", "0.25"]
    for name, more in {"held-out": held_out, "dev": []}.items():
        file = shutil.copy(rows / "dev.csv", tmp_path / f"{name}.csv")
        given = ["--data.train_file", str(file)] if more else ["--data.validation_file", str(file)]
        train(arguments(tmp_path / name, "--method", "lora", *given, *more), progress=False)
        header, first, *others = file.read_text(encoding="utf-8").splitlines()
        file.write_text("\n".join([header, *others, first]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"have changed since the run \(validation\), and data.val_size divides them"):
        evaluate(tmp_path / "held-out")
    assert evaluate(tmp_path / "dev")["validation"]["accuracy"] >= 0
    assert "dev: the rows have changed since the run: validation" in caplog.text
