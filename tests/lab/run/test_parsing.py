"""Lists on the command line, as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsegrad_lab.cli import search
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.exit_codes import ExitCode
from sparsegrad_lab.run.folder import output_folder
from sparsegrad_lab.run.parsing import make_parser, run_arguments, run_parser


@pytest.mark.parametrize("form", [("--seeds", "3,4"), ("--seeds=3,4",), ("--seeds", "[3,4]")])
def test_numbers(form: tuple[str, ...]) -> None:
    assert parse(list(form)).seeds == [3, 4]
    assert parse(["--adapter.layers", "1", *form]).adapter.layers == [1]


@pytest.mark.parametrize("config", [["--config", "{file}"], ["--config={file}"]])
def test_the_command_line_overrides_the_file_in_any_order(config: list[str], tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("training: {epochs: 2}\noutput: ~/there\n", encoding="utf-8")
    named = [word.format(file=file) for word in config]
    for words in ([*named, "--epochs", "1"], ["--epochs", "1", *named]):
        found = parse(words)
        assert found.training.epochs == 1
        assert output_folder(found) == Path.home() / "there"


def test_files_that_would_be_read_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("training: 3\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(["--config", str(file)])
    assert "training: expected settings, found 3" in capsys.readouterr().err
    file.write_text("training:\n  epochs: 1\nseeds: [1]\ntraining:\n  batch_size: 4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own.yaml: .*found the key 'training' twice, again in line 4"):
        parse(["--config", str(file)])


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell leaves the tilde to us after `--config=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("preset: paper/bert-base/rte\n", encoding="utf-8")
    assert parse(["--config=~/own.yaml"]).task == "glue/rte"


def test_lists_and_flags_of_other_types() -> None:
    """`str | list[str]`, as `inspect` writes it; and a flag before a word that is no value."""
    parser = make_parser("inspect", "", "")
    parser.add_argument("model", type=str)
    parser.add_argument("--target_modules", type=str | list[str] | None)
    parser.add_argument("--json", type=bool, default=False)
    for word, target in (("up,down", ["up", "down"]), (".*up", ".*up"), ("all-linear", "all-linear")):
        found = parser.parse_args(["--json", "bert", "--target_modules", word])
        assert (found.json, found.model, found.target_modules) == (True, "bert", target)


def test_words() -> None:
    found = parse(["--data.text", "sentence", "--data.labels", "0,1", "--data.metrics=accuracy", "--seeds", "7"])
    assert (found.data.text, found.data.labels, found.data.metrics) == (["sentence"], ["0", "1"], ["accuracy"])
    assert parse(["--data.text+", "a", "--data.text+", "b"]).data.text == ["a", "b"]
    assert parse(["--data.labels", "null"]).data.labels is None


@pytest.mark.parametrize(
    ("word", "targets"),
    [
        ("query", ["query"]),
        ("mlp.fc1,mlp.fc2", ["mlp.fc1", "mlp.fc2"]),
        (".*attention.*", ".*attention.*"),
        ("(fc1|fc2)", "(fc1|fc2)"),
        ("all-linear", "all-linear"),
    ],
)
def test_names_of_layers_or_a_regular_expression(word: str, targets: object) -> None:
    assert parse(["--adapter.target_modules", word]).adapter.target_modules == targets


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--lora_r 16",
            "adapter.rank (--lora_r) is for lora, galore; found method 'sparsegrad', which does not read it",
        ),
        ("--method full --adapter.rank=16", "adapter.rank is for lora, galore; found method 'full'"),
        (
            "--method full --trained_share 0.05",
            "adapter.trained_share (--trained_share) is for sparsegrad, lora; found",
        ),
        ("--method meprop --trained_share 0.01", "is for sparsegrad, lora; found method 'meprop'"),
        ("--method lora --exponent 0.5", "adapter.exponent (--exponent) is for sparsegrad; found method 'lora'"),
        ("--method lora --n_steps 8", "calibration.n_steps (--n_steps) is for sparsegrad, literal; found"),
        ("--method lora --shared", "adapter.shared (--shared) is for sparsegrad, literal; found method 'lora'"),
        ("--method lora --prefer speed", "adapter.prefer (--prefer) is for sparsegrad, meprop; found method 'lora'"),
        ("--method lora --rank 2 --wide 9", "adapter.wide (--wide) has no effect with adapter.rank (--rank); leave"),
        ("--method {sparsegrad} --narrow 16", "which does not read it; leave it out; the file has the settings of its"),
        ("--method {lora} --n_steps 8", "calibration.n_steps (--n_steps) is for sparsegrad, literal; found"),
        ("--method {lora} --rest train", "rest has no effect with modules_to_save in the file; leave one of the two"),
        ("--method {tokens} --rest train", "rest has no effect with peft_type TRAINABLE_TOKENS; leave one of the two"),
        ("--wide 30 --trained_share 0.1", "adapter.trained_share (--trained_share) has no effect with adapter.wide"),
        ("--adapter.c 4 --adapter.r 4 --wide 30", "adapter.wide (--wide) has no effect with adapter.c and r; leave"),
        ("--schedule constant --warmup 0.2", "has no effect with training.schedule (--schedule) constant (constant_"),
        ("--task digits --max_length 7", "text; task digits does not read it; leave it out"),
        ("--task digits --padding dynamic", "training.padding (--padding) is for texts, found task 'digits'; leave it"),
        (
            "--task files --train_file a.json --quoting none",
            "data.quoting (--quoting) is for CSV and TSV files, found",
        ),
        ("--task text --text story --template plain", "prompts and answers; found one column of texts, 'story'; leave"),
        ("--text a,a", "expected columns that differ from each other"),
        ("--task files --text label", "and from the label column 'label'"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "search"])
def test_settings_that_have_no_effect(
    verb: str, words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"sparsegrad": '{"peft_type": "SPARSEGRAD"}', "lora": '{"peft_type": "LORA", "modules_to_save": ["head"]}'}
    files["tokens"] = '{"peft_type": "TRAINABLE_TOKENS", "token_indices": [5]}'
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
    paths = {name: str(tmp_path / f"{name}.json") for name in files}
    status = main([verb, *words.format(**paths).split(), "--output", str(tmp_path / "run")])
    assert status == ExitCode.REFUSED
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--config {file}",
        "--config {file} --method meprop",
        "--config {file} --task digits",
        "--config {file} --adapter.c null --adapter.r null --wide null --trained_share 0.1",
        "--method lora --rank null --wide 9",
        "--preset paper/bert-base/rte --method lora --adapter.density null",
        "--schedule constant --warmup 0",
        "--method {start} --n_steps 8 --rest train",
    ],
)
def test_a_file_may_hold_settings_of_others_and_the_command_line_takes_them_back(words: str, tmp_path: Path) -> None:
    shared = "{adapter: {rank: 16, wide: 9, shared: true}, calibration: {n_steps: 3}, data: {max_length: 7}}"
    (tmp_path / "all.yaml").write_text(shared, encoding="utf-8")
    start = '{"peft_type": "LORA", "init_lora_weights": "eva", "eva_config": {}}'
    (tmp_path / "start.json").write_text(start, encoding="utf-8")
    argv = words.format(file=tmp_path / "all.yaml", start=tmp_path / "start.json").split()
    parser = run_parser("train", "", "", argv)
    arguments = run_arguments(vars(parser.instantiate(parser.parse_args(argv))))
    assert arguments.problems(parser.given) == []


@pytest.mark.parametrize("words", [["--learning_rate", "1e-3"], ["--batch_size", "8"]])
def test_a_search_draws_what_it_searches(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        search.main(words)
    assert "a search draws it; set --search." in capsys.readouterr().err


def test_two_names_of_one_setting_in_any_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a file read last overrides one read first."""
    first, last = tmp_path / "first.yaml", tmp_path / "last.yaml"
    first.write_text("{preset: paper/bert-base/rte, epochs: 2}\n", encoding="utf-8")
    last.write_text("training: {epochs: 3}\n", encoding="utf-8")
    words = ["--config", str(first), "--config", str(last)]
    found = parse(words)
    assert (found.task, found.training.epochs) == ("glue/rte", 3)
    first.write_text("{lr: 1, training: {learning_rate: 1}}\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(words)
    assert "lr and training.learning_rate are two names of one setting" in capsys.readouterr().err
