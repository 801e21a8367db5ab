"""Other names of settings: those of transformers and PEFT, and short ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.aliases import ALIASES, INSTEAD, aliases_of, with_options
from sparsegrad_lab.run.settings import RunArguments, flat

SETTINGS = list(flat(RunArguments().as_dict()))


def in_file(folder: Path, settings: Any) -> list[str]:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", str(path)]


def test_the_table_names_settings_that_exist() -> None:
    assert set(ALIASES.values()) <= set(SETTINGS)
    assert not (ALIASES.keys() | INSTEAD.keys()) & set(SETTINGS)
    assert not INSTEAD.keys() & aliases_of(SETTINGS).keys()


def test_a_command_as_for_the_scripts_of_transformers() -> None:
    line = (
        "--model_name_or_path m --output_dir o --learning_rate 0.1 --num_train_epochs 2 --warmup_ratio=0.5 "
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 3 --lr_scheduler_type cosine --seed 7 "
        "--max_seq_length 9 --text_column_name sentence --method lora --lora_r 5 --report_to none"
    )
    found = parse(line.split())
    training = found.training
    assert (found.model, found.output, found.seeds, found.adapter.rank) == ("m", "o", [7], 5)
    assert (training.learning_rate, training.epochs, training.warmup, training.batch_size) == (0.1, 2, 0.5, 4)
    assert (training.gradient_accumulation, training.schedule) == (3, "cosine")
    assert (found.data.max_length, found.data.text) == (9, ["sentence"])


def test_a_group_may_be_left_out() -> None:
    """Where the last part of the name is clear. `--r` is not: LoRA's rank has that name elsewhere."""
    found = parse(["--epochs", "2", "--n_steps", "5", "--train_file", "a.csv", "--wide", "0.5"])
    assert (found.training.epochs, found.calibration.n_steps, found.data.train_file) == (2, 5, "a.csv")
    assert found.adapter.wide == 0.5
    short = aliases_of(["a", "x.a", "x.b", "y.b", "x.c", "x.long"])
    assert short == {"long": "x.long"}


def test_flags_without_a_value() -> None:
    assert parse(["--regression", "--epochs", "2", "--adapter.shared"]).data.regression is True
    found = parse(["--shared", "--regression", "false"])
    assert (found.adapter.shared, found.data.regression) == (True, False)
    assert parse(["--neurons"]).adapter.neurons is True


def test_in_a_file_too(tmp_path: Path) -> None:
    found = parse(
        [
            *in_file(tmp_path, {"num_train_epochs": 2, "data": {"train_rows": 5}, "method": "lora", "lora_r": 3}),
            "--lora_r",
            "4",
        ]
    )
    assert (found.training.epochs, found.data.train_rows, found.adapter.rank) == (2, 5, 4)


@pytest.mark.parametrize(
    ("words", "settings", "error"),
    [
        (["--lr", "1", "--learning_rate", "2"], None, "lr and learning_rate are two names of one setting; give one"),
        (["--lr", "1", "--training.learning_rate=2"], None, "lr and training.learning_rate are two names of one"),
        ([], {"epochs": 2, "training": {"epochs": 3}}, "epochs and training.epochs are two names of one setting"),
        (["--num_train_epoch", "1"], None, "--num_train_epoch 1; did you mean --training.epochs?"),
        (["--bf16"], None, "unrecognized arguments: --bf16; did you mean --training.precision bf16?"),
        (["--r", "8"], None, "did you mean --adapter.r (directions) or --adapter.rank (LoRA)?"),
        ([], {"bf16": True}, "Option 'bf16' is not accepted; did you mean --training.precision bf16?"),
    ],
)  # fmt: skip
def test_refused(words: list[str], settings: Any, error: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse([*words, *([] if settings is None else in_file(tmp_path, settings))])
    assert end.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message", "expected"),
    [
        ("--text a", "data.text: expected a column", "data.text (--text): expected a column"),
        ("--data.text a", "data.text: expected a column", None),
        ("--config a.yaml", "data.text: expected a column", None),
        (
            "--text=a --lr 0",
            "  - data.text is for files\n  - training.learning_rate must be above 0",
            "  - data.text (--text) is for files\n  - training.learning_rate (--lr) must be above 0",
        ),
        ("--batch_size x", 'Parser key "training.batch_size":', 'Parser key "training.batch_size" (--batch_size):'),
        ("--batch_size 4", "differs in training.batch_size (8 there, 4 here)", None),
        (
            "--seed 1,1",
            "seeds: expected different numbers; found seeds",
            "seeds (--seed): expected different numbers; found seeds",
        ),
        ("--model_name_or_path a", "the model has no weights", None),
        ("--lr 0", "did you mean --training.learning_rate?", None),
    ],
)
def test_messages_name_the_options_that_were_typed(words: str, message: str, expected: str | None) -> None:
    assert with_options(message, words.split()) == (message if expected is None else expected)
