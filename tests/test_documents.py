"""README, docs and guides: the tables are those of the result files, links and names lead somewhere, the demo runs."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import tables
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.study.sections import Section, read_report
from sparsegrad_lab.study.statistics import compare_all

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
SPEED = sorted((ROOT / "benchmarks" / "results" / "speed").glob("*.json"))
RUNS = sorted((ROOT / "benchmarks" / "results" / "study").rglob("*.json"))


def test_counts() -> None:
    assert len(RESULTS) == 5
    assert len(SPEED) == 13


@pytest.mark.slow
def test_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What `make demo` runs, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSEGRAD_DATA", raising=False)
    assert "$(VENV)/bin/sparsegrad demo\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert main(["demo", "--epochs", "0.03", "--output", "out"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"sparsegrad .* 69,120 .*\n.*lora .* 69,120 ", out), out
    assert "next:   sparsegrad predict out/sparsegrad" in out


@pytest.mark.slow
def test_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python benchmarks/calibration.py`, on a small model."""
    small = "--steps 1 --batch 1 --tokens 8 --hidden 64 --blocks 2 --llama-blocks 1 --llama-tokens 8 --llama-steps 1"
    options = [*small.split(), "--json", str(tmp_path / "result.json")]
    script = ROOT / "benchmarks" / "calibration.py"
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    committed = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text(encoding="utf-8"))
    assert result.keys() == committed.keys()
    assert tables.RENDER["calibration"](result)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_run_files_say_where_they_come_from(path: Path) -> None:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    environment = result["environment"]
    assert re.fullmatch(r"[0-9a-f]{40}", environment["commit"])
    assert environment["dirty"] is False
    assert environment["seed"] == result["seed"]
    run_name = f"lr{result['learning_rate']:g}" if result["trial"] else str(result["seed"])
    if result["trial"] and result["seed"] != 100:  # the first seed of a search is not in the name
        run_name += f"-{result['seed']}"
    assert path.name == f"{result['variant']}-{run_name}.json"
    assert result["task"].removeprefix("glue/") == path.parent.name
    assert path.is_relative_to(ROOT / tables.STUDY / result["experiment"])


def test_results_page_is_what_the_result_files_give() -> None:
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == tables.results_document(read_report([ROOT / tables.STUDY]), tables.RESULTS_TITLE), (
        "stale: run python benchmarks/tables.py"
    )


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_result_files_say_where_they_come_from(path: Path) -> None:
    environment: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["environment"]
    assert re.fullmatch(r"[0-9a-f]{40}", environment["commit"])
    assert environment["dirty"] is False
    assert environment.keys() >= {"command", "time", "seed", "python", "torch", "sparsegrad_peft", "machine"}


@pytest.mark.parametrize("path", SPEED, ids=lambda path: path.stem)
def test_speed_files_say_where_they_come_from(path: Path) -> None:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"])
    assert result["environment"]["dirty"] is False
    assert str(path.relative_to(ROOT)) in result["command"]
    assert {"floor", "sparsegrad", "lora", "full"} <= result["methods"].keys()
    assert not [name for name, row in result["methods"].items() if "failed" in row]


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_tables_are_what_the_result_files_give(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert tables.MARK.search(text)
    assert tables.filled(text) == text, "stale: run python benchmarks/tables.py"


def test_links_lead_somewhere() -> None:
    checked = 0
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            assert linked.exists(), f"{path.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target
            checked += 1
    assert checked >= 80


GUIDES = ("ARCHITECTURE.md", "CONTRIBUTING.md")
PACKAGES = (ROOT / "src" / "sparsegrad_peft", ROOT / "src" / "sparsegrad_lab")


def source_file(name: str) -> Path:
    """The file that a guide calls `name`: from the root, or from one of the packages."""
    found = [folder / name for folder in (ROOT, ROOT / "src", *PACKAGES) if (folder / name).exists()]
    assert len(found) == 1, f"{name}: expected one file, found {found}"
    return found[0]


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_name_files_that_exist(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    names = {name for name in re.findall(r"`(\w+/[\w/]*(?:\.py|\.md|/)?)`", text) if "NAME" not in name}
    assert len(names) >= 5
    for name in names:
        source_file(name)


def test_the_architecture_names_functions_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    places = re.findall(r"`(\w+)`\s\((\w+/\w+\.py)\)", text)
    assert len(places) >= 20
    for name, file in places:
        tree = ast.parse(source_file(file).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert name in defined, f"{name} is not defined in {file}"


def test_method_page_names_functions_that_exist() -> None:
    """The map from equation to function is followed here, line by line."""
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \|[^|]*\| (`[^|]+`[^|]*) \| ([^|]+) \|$", text, re.MULTILINE)
    assert len(rows) == 12
    for functions, oracle in rows:
        for name in re.findall(r"`([\w.]+)`", functions):
            first, *parts = name.split(".")
            home = f"sparsegrad_peft.method.{first}" if first.islower() else "sparsegrad_peft"
            found: Any = importlib.import_module(home)
            for part in parts if first.islower() else [first, *parts]:
                found = getattr(found, part)
        for name in re.findall(r"`([\w.]+)`", oracle):
            found = importlib.import_module("sparsegrad_peft.method.reference")
            for part in name.split("."):
                found = getattr(found, part)


@pytest.mark.parametrize("document", ["README.md", "docs/study.md"])
def test_scores_in_sentences_are_those_of_the_results(document: str) -> None:
    """What the pages say in words about runs of two and of four epochs."""
    text = " ".join((tables.ROOT / document).read_text(encoding="utf-8").split())

    def score(experiment: str, task: str, method: str) -> str:
        folder = tables.ROOT / tables.STUDY / experiment / "minilm" / task
        files = sorted(folder.glob(f"{method}-[0-9].json"))
        assert len(files) == 3
        return f"{100 * sum(json.loads(file.read_text(encoding='utf-8'))['score'] for file in files) / 3:.1f}"

    if document == "README.md":
        (mrpc, qnli), (own_mrpc, own_qnli) = (
            [score("more-epochs", task, method) for task in ("mrpc", "qnli")] for method in ("lora", "sparsegrad")
        )
        assert f"it has {mrpc} on MRPC and {qnli} on QNLI, SparseGrad {own_mrpc} and {own_qnli}" in text
    else:
        (mrpc, qnli), (own_mrpc, own_qnli) = (
            [score("glue", task, method) for task in ("mrpc", "qnli")] for method in ("lora", "sparsegrad")
        )
        assert f"SparseGrad has {own_mrpc} on MRPC and {own_qnli} on QNLI, and LoRA {mrpc} and {qnli}" in text
        [glue] = read_report([tables.ROOT / tables.STUDY / "glue"]).sections
        [found] = compare_all(glue.runs, ["sparsegrad"], "lora")
        share = found.by_task["qnli"] / found.by_task.sum()
        assert f"is ahead by {found.difference:.1f} points" in text
        assert f"(p {found.p_tasks:.3f}). QNLI alone makes {share:.0%}".replace("%", " %") in text


def test_what_the_pages_say_about_long_sequences_and_glue() -> None:
    [long], [glue] = (read_report([tables.ROOT / tables.STUDY / name]).sections for name in ("long-sequences", "glue"))
    study = " ".join((tables.ROOT / "docs" / "study.md").read_text(encoding="utf-8").split())
    own, lora, full = (long.runs_of(method=method)[0] for method in ("sparsegrad", "lora", "full"))
    best = f"full fine-tuning {full.score:.3f}, LoRA {lora.score:.3f}, SparseGrad {own.score:.3f}."
    assert f"The best evaluations: {best}" in study
    curves = [[(entry["step"], entry["loss"]) for entry in run.evaluations] for run in (own, lora)]
    losses = [loss for _, loss in curves[0]]
    assert losses == sorted(losses, reverse=True)  # "falls at every evaluation"
    ahead = [step for (step, loss), (_, other) in zip(*curves, strict=True) if loss < other]
    assert f"ahead for {ahead[-1]:.0f} steps, and LoRA after them" in study
    assert ahead == [step for step, _ in curves[0] if step <= ahead[-1]]
    [found] = compare_all(glue.runs, ["sparsegrad"], "lora")
    assert f"Over the eight tasks, SparseGrad is ahead by {found.difference:.1f} points." in study


def test_what_the_pages_say_about_paraphrases() -> None:
    [section] = read_report([tables.ROOT / tables.STUDY / "paraphrases"]).sections
    names = ("sparsegrad", "few-directions", "lora", "exponent-0", "few-directions-exponent-0")
    own, few, lora, unscaled, few_unscaled = (section.runs_of(method=method) for method in names)
    assert {run.learning_rate for run in (*own, *few, *lora, *unscaled, *few_unscaled)} == {8e-3}
    assert [run.steps for run in own] == [300] * 3
    assert all(b.score < a.score for a, b in zip(own, lora, strict=True))  # "with each of three seeds"
    assert sum(b.score < a.score for a, b in zip(unscaled, lora, strict=True)) == 2
    many = section.runs_of(method="many-steps")
    assert all(a.score < b.score for a, b in zip(many, lora, strict=True))  # "with each of three seeds"
    assert all(run.learning_rate == 8e-3 for run in many)
    shares = [run.calibration.seconds / run.training.seconds for run in many if run.calibration is not None]
    assert fmean(shares) == pytest.approx(0.5, abs=0.1)  # "half as long as the training"
    means = [f"{fmean(run.score for run in runs):.3f}" for runs in (lora, own, few, unscaled, few_unscaled, many)]
    study = " ".join((tables.ROOT / "docs" / "study.md").read_text(encoding="utf-8").split())
    assert "The means: LoRA {}, SparseGrad {}.".format(*means) in study
    assert f"SparseGrad's loss is {means[5]}, below LoRA's with each of three seeds." in study
    assert f"Without scales (exponent 0) SparseGrad has {means[3]}," in study
    assert f"SparseGrad has {means[2]}, and {means[4]} without scales." in study
    assert means[1] < means[2]  # docs/method.md: "9 directions have a higher loss than 72"


def test_what_the_pages_say_about_the_rest_trained() -> None:
    [section] = read_report([tables.ROOT / tables.STUDY / "rest-trained"]).sections
    study = " ".join((tables.ROOT / "docs" / "study.md").read_text(encoding="utf-8").split())
    means = [fmean(run.value for run in section.runs_of("mrpc", method)) for method in ("full", "lora", "sparsegrad")]
    assert "full fine-tuning has {:.1f}, LoRA {:.1f} and SparseGrad {:.1f}.".format(*means) in study
    for found in compare_all(section.runs, ["sparsegrad", "full"], "lora"):
        assert found.low < 0 < found.high


def test_what_the_parts_of_the_default_are_worth() -> None:
    """What docs/study.md says beside the table in docs/method.md, which `benchmarks/tables.py` writes."""
    form, glue = (
        read_report([tables.ROOT / tables.STUDY / name]).sections[0] for name in ("default-form", "default-form-glue")
    )

    def worse(variant: str) -> list[float]:
        own, other = ({run.seed: run.score for run in form.runs_of("oasst1", name)} for name in ("sparsegrad", variant))
        return [other[seed] - own[seed] for seed in range(3)]

    study = " ".join((ROOT / "docs" / "study.md").read_text(encoding="utf-8").split())
    means = [f"{fmean(worse(variant)):.3f}" for variant in ("single-gradients", "unscaled", "rotated")]
    assert "the three are {}, {} and {} worse".format(*means) in study
    assert "On STS-B and SST-2 they make no difference." in study
    for task in ("stsb", "sst2"):
        own, without = (fmean(run.value for run in glue.runs_of(task, name)) for name in ("sparsegrad", "unscaled"))
        assert abs(own - without) < 0.5
    for variant in ("narrow-9", "narrow-18", "narrow-32"):
        assert max(worse(variant)) < 0
    few, many = compare_all(glue.runs, ["eight-steps", "many-steps"], "sparsegrad")
    assert (few.pairs, many.pairs) == (9, 9)
    assert min(few.p_tasks, many.p_tasks) > 0.05
    method, settings = (
        " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split()) for name in ("method", "settings")
    )
    assert (
        f"8 steps lose {-few.difference:.1f} points (95 % interval {-few.high:.1f} to {-few.low:.1f}), and 120 steps "
        f"gain {many.difference:.1f} ({many.low:.1f} to {many.high:.1f})." in method
    )
    assert f"120 gained {many.difference:.1f} points, and 8 lost {-few.difference:.1f}." in settings
    gained = -fmean(worse("many-steps"))
    assert min(-value for value in worse("many-steps")) > 0
    assert (
        f"On SmolLM2, 120 lowered the loss by {gained:.4f}, which is more than SparseGrad's lead over LoRA." in settings
    )
    [openassistant] = read_report([tables.ROOT / tables.STUDY / "openassistant"]).sections
    [lead] = compare_all(openassistant.runs, ["sparsegrad"], "lora")
    assert gained > -lead.difference


def test_best_rates_beside_those_of_lora() -> None:
    """What docs/settings.md says of the searches."""
    ratios = []
    for name in ("glue", "more-epochs", "openassistant", "every-third-block", "paraphrases", "digits"):
        [section] = read_report([tables.ROOT / tables.STUDY / name]).sections
        for task in section.tasks:
            own, lora = ({run.learning_rate for run in section.runs_of(task, m)} for m in ("sparsegrad", "lora"))
            ratios.append(min(own) / max(lora))
            assert len(own) == len(lora) == 1
    assert sorted(ratios) == pytest.approx([0.5] * 4 + [1.0] * 9 + [4.0])
    settings = " ".join((ROOT / "docs" / "settings.md").read_text(encoding="utf-8").split())
    assert "In 14 [searches](results.md#search) of today's default, its best rate equals LoRA's in nine" in settings
    assert "is half of it in four, and four times it in one (MRPC, two epochs)." in settings


def test_how_long_calibration_takes() -> None:
    """What README.md says is the table of docs/performance.md."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = page.partition("/glue calibration -->")[2].partition("<!-- end of table -->")[0]
    steps = [int(row) for row in re.findall(r"^\| \w+ \| (\d+) \|", table, re.MULTILINE)]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sections = [
        read_report([tables.ROOT / tables.STUDY / name]).sections[0]
        for name in ("openassistant", "conversations", "every-third-block", "paraphrases")
    ]
    own = [
        run.calibration.seconds / run.training.seconds * run.steps
        for section in sections
        for run in section.runs_of(method="sparsegrad")
        if run.calibration is not None and not run.resumed
    ]
    assert (
        f"[{min(steps)} to {max(steps)} training steps](docs/performance.md#calibration) on GLUE, "
        f"and {min(own):.0f} to {max(own):.0f} with SmolLM2." in text
    )


def test_how_much_memory_whole_runs_need() -> None:
    """What README.md says: with SmolLM2 more than LoRA's, on GLUE less."""

    def ratio(name: str) -> float:
        [section] = read_report([tables.ROOT / tables.STUDY / name]).sections
        own, lora = (max(run.megabytes for run in section.runs_of(method=method)) for method in ("sparsegrad", "lora"))
        return own / lora

    found = [
        round(100 * ratio(name)) - 100
        for name in ("openassistant", "conversations", "every-third-block", "paraphrases")
    ]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"with SmolLM2 {min(found)} to {max(found)} % more than LoRA's, on GLUE a fifth less" in text
    assert ratio("glue") == pytest.approx(0.8, abs=0.02)


def test_what_fewer_directions_are_worth() -> None:
    """The table in docs/method.md."""
    form, long, glue = (
        read_report([tables.ROOT / tables.STUDY / name]).sections[0]
        for name in ("default-form", "paraphrases", "fewer-directions")
    )

    def mean(section: Section, task: str, variant: str, digits: int) -> str:
        runs = section.runs_of(task, variant)
        return f"{fmean(run.value for run in runs):.{digits}f}" if runs else ""

    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for words, of_form, of_long, of_glue in (
        ("SmolLM2: 72, BERT: 64 (the default of both)", "sparsegrad", "sparsegrad", "sparsegrad"),
        ("32", "narrow-32", "", "narrow-32"),
        ("18", "narrow-18", "", ""),
        ("9 (BERT: 6)", "narrow-9", "few-directions", "narrow-6"),
    ):
        cells = [words, mean(form, "oasst1", of_form, 4), mean(long, "paraphrases", of_long, 4)]
        row = " | ".join([*cells, *(mean(glue, task, of_glue, 1) for task in ("mrpc", "stsb"))])
        assert f"| {row} |".replace("|  |", "| |").replace("|  |", "| |") in text


@pytest.mark.parametrize(("out", "in_", "share"), [(1536, 384, 0.5), (384, 1536, 0.25)])
def test_how_far_a_step_of_lora_moves_a_weight(out: int, in_: int, share: float) -> None:
    """docs/settings.md: half as far as SparseGrad's with the same rate and as many entries, or a quarter."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(in_, out)), LoraConfig(r=16, target_modules=["0"]))
    A = model.base_model.model[0].lora_A["default"].weight.detach()
    step = torch.randn(out, 16).sign()  # Adam's first step of B; A starts to move when B is not 0
    same_entries = (16 * (in_ + out)) ** 0.5  # the norm of a step of as many entries in orthonormal directions
    assert float((step @ A).norm()) / same_entries == pytest.approx(share, rel=0.1)
