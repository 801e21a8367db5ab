"""Every code block of README.md and docs/ runs, as a reader would run it, with small models in place of the hub's.

The pages of a chain share a folder, because a page uses what those before it have made.
"""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks import FILES, PAGES, RUN, SHOWN, Block, blocks_of, fences_of, titled_files

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.study.experiment_files import SHIPPED

CHAINS = [
    ["README.md", "docs/get-started.md", "docs/how-to/csv.md", "docs/how-to/share.md"],
    ["docs/settings.md"],
    ["docs/how-to/compare.md"],
    ["docs/how-to/conversations.md", "docs/how-to/trl.md", "docs/how-to/quantized.md"],
    ["docs/how-to/images.md", "docs/how-to/sentence-transformers.md"],
    ["docs/how-to/own-loop.md", "docs/peft.md", "docs/pytorch.md"],
]
TESTED_ELSEWHERE = {
    "make demo",  # test_documents.py::test_demo_runs
}


def is_run(block: Block) -> bool:
    return block.language in RUN and not block.not_run and set(block.commands) != TESTED_ELSEWHERE


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    blocks = blocks_of(page)
    assert fences_of(page) == 2 * len(blocks), "a fence that blocks.py does not read"
    for block in blocks:
        assert block.language in RUN | FILES | SHOWN, block
        if block.language == "yaml":
            assert yaml.safe_load(block.code)
    if any(map(is_run, blocks)):
        assert sum(page in chain for chain in CHAINS) == 1


# A verb's options that make its example short enough for a test.
CUT_SHORT = {
    "search": ["--search.trials", "2", "--epochs", "1"],
    "reproduce": ["--folder", "experiments", "--methods", "lora"],
    "bench": ["--tokens", "16", "--layers", "1", "--methods", "sparsegrad", "--repeats", "1"],
}
# What the output of a verb's example has in it.
SHOWN_BY = {
    "train": r"next: +sparsegrad",
    "evaluate": r'"accuracy"',
    "predict": r'"prediction": "|predictions.csv',
    "merge": r"merged: runs/reviews/merged",
    "search": r"next: +sparsegrad train --config runs/search-\w+/best.yaml",
    "report": r"sparsegrad against lora",
    "bench": r"sparsegrad .* 47,104 ",  # two layers of 368 x 64
}


def run_command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)
    assert words[0] == "sparsegrad", f"unknown command: {line}"
    more = list(CUT_SHORT.get(words[1], []))
    if words[1] in ("train", "search") and "lora" not in line:  # a method or a task refuses what it does not read
        more += ["--n_steps", "3"]
    if words[1] == "train" and "images" not in words:
        more += ["--max_length", "24"]
    if any(word.startswith("glue/") for word in words) and words[1] in ("train", "search"):
        more += ["--folder", "rte"]
    if "acceptability" in words:
        more += ["--train_rows", "16", "--validation_rows", "16", "--seeds", "0"]
    status = main([*words[1:], *more])
    out, err = capsys.readouterr()
    assert status == 0, f"{line}\n{err}"
    assert re.search(SHOWN_BY.get(words[1], ""), out), f"{line}\n{out}"


def run_python(block: Block, code: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run a script with the names that the page's blocks before it have defined."""
    script = Path(f"{Path(block.page).stem}.py")
    script.write_text(code, encoding="utf-8")
    found = runpy.run_path(str(script), init_globals=names, run_name="__main__")
    loss = re.search(r"loss ([0-9.]+)$", capsys.readouterr().out, re.MULTILINE)
    if 'print(f"loss' in code:
        assert loss is not None
        assert float(loss[1]) < 0.6  # it learns: the losses start at 0.7 and above
    return {name: value for name, value in found.items() if not name.startswith("__")}


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: Path(chain[0]).stem)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_blocks_run(
    chain: list[str], reader: Path, hub_models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in titled_files().items():
        Path(name).write_text(content, encoding="utf-8")
    for page in chain:
        names: dict[str, Any] = {}
        for block in filter(is_run, blocks_of(page)):
            code = block.code
            for name, folder in hub_models.items():
                code = code.replace(name, folder)
            block = Block(page, block.language, code, block.title, "")
            if block.language == "bash":
                for line in block.commands:
                    run_command(line, capsys)
            elif block.language == "diff":
                for sign in "-+":
                    run_python(block, block.side(sign), {}, capsys)
            else:
                names = run_python(block, code, names, capsys)


# The reader's folder and models.


def cut_down_experiments(folder: Path, rows: Path) -> None:
    """The shipped experiment on GLUE without its search, with one seed, on the rows of this test."""
    (folder / "glue").mkdir(parents=True)
    default, glue = (
        yaml.safe_load((SHIPPED / name).read_text(encoding="utf-8"))
        for name in ("default.yaml", "glue/experiment.yaml")
    )
    glue["seeds"] = [0]
    default["scales"]["cpu"]["settings"]["training"]["precision"] = "fp32"  # bf16 takes minutes on some processors
    default["scales"]["cpu"]["task_settings"] = {"glue/rte": {"data": {"folder": str(rows)}, "training": {"epochs": 1}}}
    for method in glue["methods"].values():
        del method["learning_rates"]
    for name, content in (("default.yaml", default), ("glue/experiment.yaml", glue)):
        (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a reader: a few rows of RTE, labelled texts, and images of two classes."""
    from PIL import Image

    (tmp_path / "rte").mkdir()
    for name in ("train", "dev"):
        rows = [f"{i}\tA man reads book {i}.\tHe reads.\t{('not_' if i % 2 else '') + 'entailment'}" for i in range(16)]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n"
        (tmp_path / "rte" / f"{name}.tsv").write_text(text, encoding="utf-8")
    cut_down_experiments(tmp_path / "experiments", tmp_path / "rte")
    (tmp_path / "train.csv").write_text("text,label\na fine film,1\na dull film,0\n", encoding="utf-8")
    for split in ("train", "validation"):
        for animal, color in {"cat": (200, 40, 40), "dog": (40, 40, 200)}.items():
            folder = tmp_path / "photos" / split / animal
            folder.mkdir(parents=True)
            for copy in range(2):
                Image.new("RGB", (32, 32), tuple(part + 9 * copy for part in color)).save(folder / f"{copy}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSEGRAD_DATA", raising=False)
    return tmp_path
