"""The `sparsegrad` command: output, files and error messages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from filelock import FileLock

from sparsegrad_lab.cli.main import VERBS, main
from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.aliases import ALIASES
from sparsegrad_lab.run.presets import preset_names
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_peft import __version__

Words = Callable[..., list[str]]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    """Return a function that runs a command: words -> (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(words)
        except SystemExit as end:  # the parser's way out
            status = int(end.code or 0)
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return status, found.out, found.err

    return run


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return found


def file_of(folder: Path, content: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def plain(words: str) -> str:
    """Return the text with single spaces in place of line breaks."""
    return re.sub(r"\s+", " ", words)


# Help.


def test_a_process_of_its_own() -> None:
    """Exit code, stdout and stderr as a shell sees them."""
    command = [sys.executable, "-m", "sparsegrad_lab.cli.main"]
    wrong = subprocess.run([*command, "trian"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "sparsegrad: no subcommand 'trian'; did you mean train?\n"
    found = subprocess.run([*command, "presets"], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == preset_names()
    assert found.stderr == ""


@pytest.mark.parametrize("buffering", [1, 100_000], ids=["while it prints", "at the end"])
def test_a_reader_that_leaves(
    buffering: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `sparsegrad presets | head -1`: no message, also when the process closes its output."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering) as output:
        monkeypatch.setattr("sys.stdout", output)
        assert main(["presets"]) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_names_each_verb_and_a_first_run(words: tuple[str, ...], run: Run) -> None:
    status, out, _ = run(*words)
    assert status == 0
    for verb, meaning in VERBS.items():
        assert f"{verb} {meaning}" in plain(out)
    assert out.rstrip().endswith("sparsegrad demo")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(verb: str, run: Run) -> None:
    """It starts with the command and says what the command prints or writes."""
    status, out, _ = run(verb, "--help")
    assert status == 0
    example = plain(out).partition(f"example: sparsegrad {verb}")[2]
    assert "prints" in example or "writes" in example


@pytest.mark.parametrize("verb", ["train", "search", "figures", "bench"])
def test_verbs_that_need_arguments_print_their_help(verb: str, run: Run) -> None:
    """Their defaults would start a long run."""
    status, out, _ = run(verb)
    assert status == 0
    assert f"example: sparsegrad {verb}" in plain(out)


def test_help_of_train_describes_every_setting(run: Run) -> None:
    _, out, _ = run("train", "--help")
    settings = asdict(RunArguments())
    names = {f"{group}.{name}" for group, inner in settings.items() if isinstance(inner, dict) for name in inner}
    names |= {name for name, value in settings.items() if not isinstance(value, dict)}
    assert len(names) > 40
    names |= set(ALIASES)
    assert {name for name in names if not re.search(rf"--{re.escape(name)}[ ,]", out)} == set()


def test_help_is_quick() -> None:
    """It imports no heavy library."""
    code = (
        "import sys; from sparsegrad_lab.cli.main import main\ntry: main(['train', '--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_version(run: Run) -> None:
    assert run("--version") == run("-V") == (0, f"{__version__}\n", "")


def test_a_verb_like_no_other(run: Run) -> None:
    assert run("xyzzy") == (2, "", f"sparsegrad: no subcommand 'xyzzy'; expected one of {', '.join(VERBS)}\n")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sparsegrad tr", {"train "}),
        ("sparsegrad train --learning", {"--learning_rate "}),
        ("sparsegrad train --task glue/m", {"glue/mrpc", "glue/mnli"}),
        ("sparsegrad train --report_to ", {"none", "tensorboard", "wandb", "trackio"}),
        ("sparsegrad report --o", {"--output "}),
    ],
)
def test_completion(line: str, offered: set[str], tmp_path: Path) -> None:
    """As the function that register-python-argcomplete gives a shell asks for it."""
    variables = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE": "1", "IFS": "\v",
                 "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered")}  # fmt: skip
    command = [sys.executable, "-m", "sparsegrad_lab.cli.main"]
    subprocess.run(command, env={**os.environ, **variables}, check=True, cwd=tmp_path)
    assert set((tmp_path / "offered").read_text().split("\v")) == offered


def test_presets(run: Run) -> None:
    status, out, _ = run("presets", "--show", "paper/bert-base/rte")
    assert status == 0
    found = yaml.safe_load(out)
    assert (found["task"], found["model"], found["rest"]) == ("glue/rte", "bert-base-uncased", "train")
    assert (found["training"]["batch_size"], found["training"]["learning_rate"]) == (16, 6.81e-5)
    status, _, err = run("presets", "--show", "paper/bert-base/nope")
    assert status == 1
    assert err.startswith(
        "sparsegrad presets: no preset 'paper/bert-base/nope'; expected one of paper/bert-base/stsb, "
    )
    assert "roberta" not in err  # those that are near


def test_every_preset_is_valid() -> None:
    names = list(preset_names())
    assert len(names) > 20
    for name in names:
        parse(["--preset", name]).check()


# Settings from files, presets and the command line.


def test_config_file_and_command_line(words: Words, run: Run, tmp_path: Path) -> None:
    """Command-line values override the file; the run folder records the result."""
    given = parse(words(tmp_path / "run")[1:]).as_dict()
    given["training"] |= {"epochs": 1, "batch_size": 4}
    file = file_of(tmp_path, {name: value for name, value in given.items() if name != "calibration"})
    more = ["--training.batch_size", "24", "--calibration.n_steps", "1", "--seeds", "[5]"]
    status, out, err = run("train", "--config", file, *more)
    assert status == 0
    expected = {**given, "seeds": [5], "calibration": {**asdict(RunArguments().calibration), "n_steps": 1}}
    expected["training"]["batch_size"] = 24
    assert config_of(tmp_path / "run") == expected
    assert f"train (48 train, 24 validation rows), sparsegrad on {given['model']}, seed 5: {tmp_path / 'run'}\n" in err
    assert re.search(r"^epoch 1.00, step 2: accuracy 0\.\d{4}, loss 0\.\d{4}  best so far$", err, re.M)
    assert re.search(r"^train, sparsegrad, seed 5: accuracy 0\.\d{4} \(step 2 of 2\)$", out, re.M)
    assert "trained entries: 512 in the adapter, 818 in all" in out

    # The next command that it prints is one that can be typed.
    following = out.rpartition("next:")[2].split()
    status, out, _ = run(*following[1:])
    assert status == 0
    score = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["score"]
    assert json.loads(out)["validation"]["accuracy"] == score
    assert re.search(r'^ *"confusion": \[\n *\[ \d+, \d+ \],\n *\[ \d+, \d+ \]\n', out, re.M)


def test_preset_cut_down(tiny_bert: Path, run: Run, tmp_path: Path) -> None:
    """A preset with some settings overridden: the others stay."""
    folder = tmp_path / "RTE"
    folder.mkdir()
    for name, count in (("train", 20), ("dev", 8)):
        lines = [
            f"{i}\tthe {'warm' if i % 2 else 'dull'} film\ta film\t{'not_' * (i % 2)}entailment" for i in range(count)
        ]
        (folder / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")
    words = ["--preset", "paper/bert-base/rte", "--model", str(tiny_bert), "--data.folder", str(tmp_path)]
    words += ["--data.train_rows", "16", "--data.max_length", "20", "--seeds", "[1]", "--training.epochs", "2"]
    status, out, _ = run("train", *words, "--output", str(tmp_path / "{task}" / "{method}"))
    assert status == 0
    assert "glue/rte, sparsegrad, seed 1" in out
    assert "trained entries: 2,048 in the adapter" in out  # complete bases: as many as the layers have
    found = config_of(tmp_path / "glue-rte" / "sparsegrad")
    assert (found["task"], found["model"], found["method"], found["rest"]) == (
        "glue/rte", str(tiny_bert), "sparsegrad", "train",
    )  # fmt: skip
    assert (found["adapter"]["c"], found["adapter"]["r"], found["adapter"]["density"]) == ("full", "full", 0.01)
    assert found["calibration"] == {
        "n_steps": 30, "walk": None, "normalize": False, "mean_gradient": False, "refresh": None,
    }  # fmt: skip
    training = found["training"]
    assert (training["batch_size"], training["learning_rate"], training["patience"]) == (16, 6.81e-5, 3)
    assert (training["epochs"], found["seeds"], found["data"]["train_rows"]) == (2, [1], 16)


def test_the_command_line_goes_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    settings = {"preset": "paper/bert-base/rte", "seeds": [7], "training": {"learning_rate": 1e-3, "epochs": 9}}
    found = parse(["--config", file_of(tmp_path, settings), "--training.epochs", "2"])
    assert (found.task, found.training.batch_size) == ("glue/rte", 16)
    assert (found.seeds, found.training.learning_rate, found.training.epochs) == ([7], 1e-3, 2)
    other = parse(["--preset", "paper/roberta-large/cola", "--config", file_of(tmp_path, settings)])
    assert (other.task, other.model, other.training.learning_rate) == ("glue/cola", "roberta-large", 1e-3)


# Output folders that exist.


def test_train_again(finished_run: Path, words: Words, run: Run) -> None:
    status, out, err = run(*words(finished_run))
    assert status == 0
    assert err == f"{finished_run}: this run is finished; nothing to do\n"
    assert "(step " in out


def test_quiet(finished_run: Path, words: Words, run: Run) -> None:
    status, out, err = run(*words(finished_run, "--quiet"))
    assert (status, err) == (0, "")
    assert "(step " in out


def test_train_another_in_its_folder(finished_run: Path, words: Words, run: Run) -> None:
    status, out, err = run(*words(finished_run, "--training.batch_size", "4", "--rest", "train"))
    assert (status, out) == (1, "")
    differing = r"rest \(freeze there, train here\), training.batch_size \(8 there, 4 here\)"
    assert re.search(rf"holds another run, which differs in {differing}; choose another output folder, or remove", err)


def test_merge_again(finished_run: Path, run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    assert run("merge", str(folder)) == (0, f"merged: {folder / 'merged'}\n", "")
    assert run("merge", str(folder)) == (0, f"already merged: {folder / 'merged'}\n", "")


def test_predict(finished_run: Path, run: Run, tmp_path: Path) -> None:
    status, out, _ = run("predict", str(finished_run), "--text", "the warm film")
    row = json.loads(out)
    assert (status, row["text"], row.keys()) == (0, "the warm film", {"text", "prediction", "p(bad)", "p(good)"})
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "warm"}\n{"text": "the warm film"}\n', encoding="utf-8")
    status, out, _ = run("predict", str(finished_run), "--file", str(file))
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["warm", "the warm film"]
    target = tmp_path / "predictions.csv"
    status, out, _ = run("predict", str(finished_run), "--file", str(file), "--output", str(target))
    assert (status, out) == (0, f"written: {target} (2 rows)\n")
    assert target.read_text(encoding="utf-8").splitlines()[0] == "text,prediction,p(bad),p(good)"
    status, _, err = run("predict", str(finished_run), "--text", "a", "--max_new_tokens", "5")
    assert (status, "max_new_tokens is for language models; the run's task is train" in err) == (1, True)
    status, out, err = run("predict", str(finished_run))
    assert (status, out, err) == (1, "", "sparsegrad predict: expected either a file or texts, found neither\n")


def test_export_and_inspect(finished_run: Path, tiny_bert: Path, run: Run, tmp_path: Path) -> None:
    target = tmp_path / "lora"
    status, out, _ = run("export", str(finished_run), "--rank", "full", "--output", str(target))
    assert status == 0
    assert out.endswith(f"written: {target}\n")
    assert json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORA"
    status, out, _ = run("export", str(finished_run), "--rank", "1", "--output", str(tmp_path / "small"))
    assert status == 0
    assert re.search(r"4 of 4 layers lost more than a tenth of their update, at most \d+%\. Evaluate the export", out)
    status, out, _ = run("inspect", str(tiny_bert), "--c", "0.5", "--r", "0.5", "--json", "true")
    assert status == 0
    assert sum(group["layers"] for group in json.loads(out)["groups"]) == 4
    status, _, err = run("inspect", str(tiny_bert), "--c", "0.5", "--r", "0.5", "--trained_share", "0.1")
    assert (status, "--trained_share has no effect with --c and --r; leave one out" in err) == (2, True)


# Errors.


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--learn_rate", "1"), "unrecognized arguments: --learn_rate 1; did you mean --training.learning_rate?"),
        (("--training.epoch", "1"), "unrecognized arguments: --training.epoch 1; did you mean --training.epochs?"),
        (("--xyzzy", "1"), "unrecognized arguments: --xyzzy 1"),
        (("--test_file", "a.csv"), "after the run (--validation_file selects the checkpoint)?"),
        (("more",), "unrecognized arguments: more"),
        (("--rest", "thaw"), "Expected a typing.Literal['train', 'freeze']. Got value: thaw"),
        (("--training.batch_size", "many"), "Expected a <class 'int'>. Got value: many"),
        (("--training.learning_rate", "NaN"), "Given value: NaN"),
        (("--config", "nowhere.yaml"), "nowhere.yaml'"),
    ],
)  # fmt: skip
def test_invalid_options(words: tuple[str, ...], line: str, run: Run) -> None:
    status, out, err = run("train", *words)
    assert (status, out) == (2, "")
    assert err.rstrip().endswith(line)
    assert err.startswith("usage: sparsegrad train [--OPTION VALUE ...]\n")
    assert "sparsegrad train --help" in err
    assert len(err.splitlines()) < 12  # the error can be seen


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ("taks: files\n", 2, r"Option 'taks' is not accepted; did you mean --task\?"),
        ("training: {epochz: 3}\n", 2, r"'training' does not accept option 'epochz'; did you mean --training.epochs\?"),
        ("training: {learning_rate: .nan}\n", 2, r"training.learning_rate must be above 0 and finite, found nan"),
        ("task: [\n", 1, r"config.yaml: expected YAML \(.*line 2, column 1"),
        ("preset: nope\n", 1, r"no preset 'nope'; expected one of paper/bert-base/"),
        ("preset: 3\n", 2, r"Expected a <class 'str'>. Got value: 3"),
    ],
)
def test_invalid_config_files(content: str, status: int, words: str, run: Run, tmp_path: Path) -> None:
    found, _, err = run("train", "--config", file_of(tmp_path, content))
    assert found == status
    assert re.search(words, plain(err))


@pytest.fixture
def weightless(tiny_bert: Path, tmp_path: Path) -> Path:
    """A model folder without weights: an error about anything else came before the model was loaded."""
    return shutil.copytree(tiny_bert, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))


FILES = {
    "empty.csv": "",
    "header.csv": "text,other,label,score\n",
    "column.csv": "sentence,label\nwarm,good\ndull,bad\n",
    "label.csv": "text,label\nwarm,good\nodd,strange\n",
    "one.csv": "text,label\nwarm,good\nbright,good\n",
    "none.json": "{}",
    "kind.json": '{"peft_type": "NONE_SUCH"}',
    "list.json": "[]",
    "text.json": "text",
}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("task", "glue/rtee", r"unknown task 'glue/rtee'; expected one of acceptability, files, glue/cola, "),
        ("task", "glue/rte", r"data.train_file is for files, text; task glue/rte does not read it"),
        (
            "data.train_file",
            "@column.csv",
            r"data.text: expected a column 'text' in .*column.csv, found 'sentence', 'label'",
        ),
        (
            "data.validation_file",
            "@column.csv",
            r"data.text: expected a column 'text' in .*column.csv, found 'sentence'",
        ),
        ("data.train_file", "@empty.csv", r"empty.csv: expected rows, found none"),
        ("data.validation_file", "@header.csv", r"header.csv: expected rows, found none"),
        ("data.train_file", "@nowhere.csv", r"nowhere.csv: no such file"),
        (
            "data.train_file",
            "@one.csv",
            r"at least two different labels in 'label', found good; .* set data.regression",
        ),
        (
            "data.validation_file",
            "@label.csv",
            r"label.csv, line 3: expected one of 'bad', 'good' as 'label', found 'st",
        ),
        ("data.text", "[]", r"task files needs data.text"),
        ("data.metrics", '["acuracy"]', r"data.metrics: expected some of accuracy, .*; found acuracy"),
        ("training.learning_rate", ".nan", r"training.learning_rate must be above 0 and finite, found nan"),
        ("training.learning_rate", "-0.1", r"training.learning_rate must be above 0 and finite, found -0.1"),
        ("training.learning_rate", "0", r"training.learning_rate must be above 0 and finite, found 0"),
        ("training.batch_size", "0", r"training.batch_size must be at least 1, found 0"),
        ("training.schedule", "steep", r"training.schedule: expected one of linear, cosine, .*, found 'steep'"),
        ("adapter.density", "1.5", r"adapter.density must be above 0 and at most 1, found 1.5"),
        ("adapter.c", "lots", r"expected \"full\", a count .*; found 'lots'"),
        ("seeds", "[1, 1]", r"seeds: expected different numbers from 0 to 4,294,967,295, at least one; found \[1, 1\]"),
        (
            "method",
            "sparsgrad",
            r"expected one of sparsegrad, lora, meprop, full, galore, literal, or the path .*; found 'sparsgrad'",
        ),
        ("adapter.products", "sparse", r"adapter.products is for literal; found method 'sparsegrad'"),
        (
            "data.max_length",
            "33",
            r"data.max_length: expected at most 32 tokens, the number of .*; found 33",
        ),
        ("calibration.refresh", "5", r"calibration.refresh is for complete bases .*, found sizes c = "),
        ("output", "@one.csv", r"one.csv: expected a folder to write, found a file; choose another output folder"),
        ("output", "@one.csv/run", r"one.csv/run: .*one.csv is a file, not a folder; choose another output folder"),
        ("output", "@", r"is not empty and holds no run \(no config.yaml\); choose another output folder"),
        ("model", "@nowhere", r"there is no folder .*nowhere"),
        ("model", "@one.csv", r"one.csv: expected a model's folder, with config.json and weights; found a file"),
        ("model", "minlm", r"there is no model minlm; did you mean minilm\?"),
        ("model", "@", r"has no config.json; expected a model's folder"),
    ],
)
def test_refused_before_a_model_is_loaded(
    option: str, value: str, expected: str, words_of: Words, run: Run, tmp_path: Path
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    if value.startswith("@"):
        value = str(tmp_path / value[1:])
    status, out, err = run(*words_of(tmp_path / "run", f"--{option}", value))
    assert (status, out) == (1 if option == "output" else 2, "")
    assert err.startswith("sparsegrad train: ")
    assert re.search(expected, plain(err))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", r"none.json: expected an adapter_config.json .* a peft_type such as LORA, found None"),
        ("kind", r"expected a peft_type such as LORA, found 'NONE_SUCH'"),
        ("list", r"expected a peft_type such as LORA, found 'list'"),
        ("text", r"text.json: expected an adapter_config.json of PEFT \(Expecting value: line 1"),
    ],
)
def test_files_that_are_no_peft_config(name: str, expected: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.json"
    file.write_text(FILES[file.name], encoding="utf-8")
    status, out, err = run("train", "--method", str(file), "--output", str(tmp_path / "run"))
    assert (status, out) == (2, "")
    assert re.search(expected, plain(err))


@pytest.fixture
def words_of(words: Words, weightless: Path) -> Words:
    """Return the words of a run with the model that has no weights."""
    return lambda output, *more: words(output, "--model", str(weightless), *more)


def test_wrong_names_are_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    """In half a second, not in ten."""
    finished = tmp_path / "finished"
    shutil.copytree(Path(__file__).parents[2] / "samples" / "finished_run", finished)
    settings = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    settings["data"] |= {"validation_file": "nowhere.csv", "text": ["text"]}
    (finished / "config.yaml").write_text(yaml.safe_dump({**settings, "task": "files"}), encoding="utf-8")
    commands = [
        ["train", "--task", "glue/rtee"],
        ["train", "--model", "./nowhere"],
        ["train", "--task", "glue/rte", "--data.folder", "nowhere"],
        ["search", "--task", "images", "--data.folder", "nowhere"],
        ["evaluate", "nowhere"],
        ["evaluate", str(finished)],  # its data are gone
        ["bench", "--workload", "nowhere"],
        ["predict", "nowhere", "--text", "a"],
        ["merge", "nowhere"],
        ["export", "nowhere", "--output", "lora"],
        ["inspect", "./nowhere"],
        ["report", "nowhere"],
        ["reproduce", "nowhere"],
    ]
    err = refused_without_torch(commands)
    assert len(re.findall(r"nowhere|rtee", err)) >= len(commands)


def test_labels_are_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    """Those of the evaluation file too, and not only those of the first row."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "train.csv").write_text("text,label\nwarm,good\ndull,bad\n", encoding="utf-8")
    (tmp_path / "values.csv").write_text("text,label\nwarm,1.5\ndull,low\n", encoding="utf-8")
    train = ["train", "--task", "files", "--text", "text", "--train_file"]
    err = refused_without_torch(
        [
            [*train, str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "label.csv")],
            [*train, str(tmp_path / "values.csv"), "--val_size", "0.5", "--regression"],
            [*train, str(tmp_path / "one.csv"), "--val_size", "0.5"],
        ]
    )
    assert "label.csv, line 3: expected one of 'bad', 'good' as 'label', found 'strange'" in err
    assert "values.csv, line 3: expected a number as 'label', found 'low'" in err
    assert "one.csv: expected at least two different labels in 'label', found good" in err


def test_a_folder_in_use_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"):
        err = refused_without_torch([["train", "--output", str(tmp_path)]])
    assert err == f"sparsegrad train: {tmp_path}: another process trains into this folder; wait for it\n"


def refused_without_torch(commands: list[list[str]]) -> str:
    """Run commands in a new process, check that none loads torch or succeeds, and return what they print as errors."""
    code = (
        "import json, sys\nfrom sparsegrad_lab.cli.main import main\n"
        "for words in json.loads(sys.argv[1]): print(main(words), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    ends = [line.split() for line in done.stdout.splitlines()]
    assert [loaded for _, loaded in ends] == ["False"] * len(commands)
    assert all(status != "0" for status, _ in ends)
    return done.stderr


def test_errors_name_the_options_that_were_typed(words_of: Words, run: Run, tmp_path: Path) -> None:
    """Whether the parser refuses a value or the settings' check does."""
    _, _, err = run(*words_of(tmp_path / "run", "--val_size", "2", "--max_train_samples=0"))
    assert "data.val_size (--val_size) must be between 0 and 1, found 2" in err
    assert "data.train_rows (--max_train_samples) must be at least 1, found 0" in err
    _, _, err = run("train", "--lr", "fast")
    assert 'Parser key "training.learning_rate" (--lr):' in err


def test_all_problems_at_once(words_of: Words, run: Run, tmp_path: Path) -> None:
    more = ["--training.batch_size", "0", "--training.epochs", "-1", "--method", "sgd"]
    _, _, err = run(*words_of(tmp_path / "run", *more))
    assert err.startswith("sparsegrad train: this run cannot be started:\n  - ")
    assert len(err.splitlines()) == 4


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu(words_of: Words, run: Run, tmp_path: Path) -> None:
    status, _, err = run(*words_of(tmp_path / "run", "--training.precision", "fp16"))
    assert status == 2
    assert "training.precision: fp16 needs a GPU, and this machine has none; use bf16 or fp32" in err


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder in which nobody can write, not even root: Linux's")
def test_output_that_cannot_be_written(words_of: Words, run: Run) -> None:
    status, _, err = run(*words_of(Path("/proc/run")))
    assert status == 1
    assert re.match(r"sparsegrad train: /proc/run: cannot write in /proc \(.*\); choose another output", err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(words_of: Words, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    status, _, err = run(*words_of(folder / "run"))
    assert status == 1
    assert "nothing can be written in" in err


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (
            "narrow",
            r"narrow, bert.encoder.layer.0.intermediate.dense: expected .* a count from 1 to 16, .*; found 1000",
        ),
        ("wide", r"wide, bert.encoder.layer.0.intermediate.dense: expected .* a count from 1 to 32, .*; found 1000"),
        ("c", r"c, bert.encoder.layer.0.intermediate.dense: expected .* a count from 1 to 16, .*; found 1000"),
        ("r", r"r, bert.encoder.layer.0.intermediate.dense: expected .* a count from 1 to 32, .*; found 1000"),
        ("k", r"adapter.k: expected at most 128 entries, which is what bert.* trains \(16 by 8\); found 1,000"),
        ("target_modules", r"no MLP layers found .*1000"),
        ("layers", r"adapter.layers: expected numbers of blocks .*, 0, 1; found 1000"),
    ],
)
def test_sizes_and_layers_that_do_not_fit_the_model(
    option: str, expected: str, words_of: Words, run: Run, tmp_path: Path
) -> None:
    """Checked with the model's config alone."""
    more = ["--adapter.c", "null", "--adapter.r", "null"] if option in ("narrow", "wide") else []
    status, out, err = run(*words_of(tmp_path / "run", *more, f"--adapter.{option}", "1000"))
    assert (status, out) == (2, "")
    assert re.search(expected, err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--data.max_length", "4000"], r"data.max_length.*: expected at most 32 tokens"),
        (["--metrics", "pearson"], r"data.metrics \(--metrics\): expected for classes accuracy, .*; found pearson"),
        (["--data.validation_file", "null", "--val_size", ".001"], r"a share of 0.001 of the 48 rows .*leaves no rows"),
    ],
)
def test_settings_that_do_not_fit_the_rows_or_the_model(
    more: list[str], expected: str, words_of: Words, run: Run, tmp_path: Path
) -> None:
    status, out, err = run(*words_of(tmp_path / "run", *more))
    assert (status, out) == (2, "")
    assert re.search(expected, err)
    assert not (tmp_path / "run").exists()


def test_incomplete_models(words: Words, weightless: Path, run: Run, tmp_path: Path) -> None:
    """No weights, damaged weights, no tokenizer, and a model for images."""
    asked = words(tmp_path / "run", "--model", str(weightless))
    status, _, err = run(*asked)
    assert status == 1
    assert f"{weightless}: the model's weights cannot be read (" in err
    (weightless / "model.safetensors").write_bytes(b"no weights")
    status, _, err = run(*asked)
    assert status == 1
    assert f"{weightless}: the model's weights cannot be read (" in err
    for file in weightless.glob("tokenizer*"):
        file.unlink()
    status, _, err = run(*asked)
    assert status == 1
    assert f"{weightless}: expected a tokenizer (tokenizer.json, ...) in the model's folder, found none" in err
    transformers.ViTConfig().save_pretrained(weightless)
    status, _, err = run(*asked)
    assert status == 2
    assert err == "sparsegrad train: transformers has no AutoModelForSequenceClassification of type 'vit'\n"
    assert not (tmp_path / "run").exists()


def test_traceback_option(words_of: Words, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size"):
        main([*words_of(tmp_path / "run", "--training.batch_size", "0"), "--traceback"])


def test_settings_for_another_task_are_refused(words_of: Words, run: Run, tmp_path: Path) -> None:
    text = ["train", "--task", "glue/rte", "--output", str(tmp_path / "run"), "--data.text", "a", "--data.label", "b"]
    status, _, err = run(*text)
    assert status == 2
    assert "data.text is for files, text; task glue/rte does not read it" in err
    assert "data.label is for files; task glue/rte does not read it" in err


def test_a_model_that_sees_the_words_it_predicts(tiny_bert: Path, run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text\na film\na warm film\n", encoding="utf-8")
    files = ["--data.train_file", str(rows), "--data.validation_file", str(rows), "--data.text", "text"]
    status, _, err = run(
        "train", "--task", "text", "--model", str(tiny_bert), *files, "--data.max_length", "24",
        "--output", str(tmp_path / "run"),
    )  # fmt: skip
    assert status == 2
    assert "is a bert, which sees the words that it has to predict; expected a causal language model" in err
    assert not (tmp_path / "run").exists()


def test_an_edited_config_is_another_run(words: Words, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "lora.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 1, "target_modules": "mlp"}), encoding="utf-8")
    command = ["train", "--config", file_of(tmp_path, parse(words(tmp_path / "run")[1:]).as_dict())]
    command += ["--method", str(file)]
    assert run(*command)[0] == 0
    assert run(*command)[0] == 0
    file.write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": "mlp"}), encoding="utf-8")
    status, _, err = run(*command)
    assert status == 1
    assert "holds another run, which differs in method.r (1 there, 2 here)" in err


def test_several_seeds_beside_one(finished_run: Path, words: Words, run: Run) -> None:
    status, _, err = run(*words(finished_run, "--seeds", "0,1"))
    assert status == 1
    assert "holds the run of one seed; choose another output folder for several" in err
    assert not (finished_run / "seed-0").exists()


def test_a_search_wants_a_folder_of_its_own(finished_run: Path, search_words: Words, run: Run) -> None:
    before = sorted(path.name for path in finished_run.iterdir())
    status, _, err = run(*search_words(finished_run), "--search.trials", "1")
    assert status == 1
    assert "is not empty and holds no search; choose another output folder" in err
    assert sorted(path.name for path in finished_run.iterdir()) == before


def test_files_that_cannot_be_written(finished_run: Path, run: Run, tmp_path: Path) -> None:
    for words in (
        ("predict", str(finished_run), "--text", "a film", "--output", str(tmp_path)),
        ("bench", "--workload", "mlp", "--json", str(tmp_path)),
        ("report", str(finished_run), "--markdown", str(tmp_path)),
    ):
        status, _, err = run(*words)
        assert status == 1
        assert f"{tmp_path}: expected a file to write, found a folder" in plain(err)
    file = tmp_path / "file"
    file.touch()
    for words in (("report", str(finished_run)), ("export", str(finished_run))):
        status, _, err = run(*words, "--output", str(file / "x"))
        assert status == 1
        assert "is a file, not a folder; choose another output folder" in plain(err)
