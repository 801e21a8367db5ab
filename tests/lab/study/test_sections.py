"""Runs are grouped by experiment and model, and told apart by their settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import write_json
from sparsegrad_lab.study.page import render_page
from sparsegrad_lab.study.sections import Report, Section, read_report
from sparsegrad_lab.study.statistics import compare, means_of_tasks
from sparsegrad_lab.study.verdict import verdict


def test_models_are_apart(real: dict[str, Any], tmp_path: Path) -> None:
    """Ten points behind on one model, and the other has not run LoRA: no mean over the two."""
    common = {**real, "experiment": "comparison", "scale": "paper", "trial": False, "status": "finished"}
    for model, scores_of in {
        "bert-base-uncased": {"sparsegrad": 0.6, "lora": 0.7}, "roberta-large": {"sparsegrad": 0.85},
    }.items():  # fmt: skip
        for variant, score in scores_of.items():
            what = {"task": "glue/rte", "model": model, "variant": variant, "score": score}
            write_json(tmp_path / "s" / f"{model}-{variant}.json", {**common, **what})
    sections = read_report([tmp_path / "s"]).sections
    assert [section.name for section in sections] == [
        "comparison-bert-base-uncased", "comparison-roberta-base", "comparison-roberta-large",
    ]  # fmt: skip
    assert "too few runs to tell. -10.00 points over 1 pair" in verdict(sections[0])[1]
    assert verdict(sections[1])[0] == "No run has a score yet."
    assert means_of_tasks(replace(sections[2], tasks=("rte",)))["sparsegrad"] == pytest.approx(85)
    text = render_page(Report(list(sections)), "t")
    assert all(f'id="of-{section.name}"' in text for section in sections)
    assert "roberta-large</h3>" in text


def test_runs_of_one_seed_are_told_apart(folder: Path, real: dict[str, Any]) -> None:
    """By the settings in which they differ; of two with the same settings the later one counts."""
    for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
        for more, time in (("", "2026-01-02"), ("-before", "2026-01-01")):
            what = {
                "task": "glue/rte", "method": "full", "seed": 0, "score": 10 * rate + (more != "") / 2,
                "learning_rate": rate, "environment": {**real["environment"], "time": time},
            }  # fmt: skip
            write_json(folder / f"{name}{more}" / "result.json", {**real, **what})
    (folder / "glue" / "rte" / "full-0.json").unlink()
    [section] = read_report([folder]).sections
    names = {"full (learning_rate 0.0001)": 0.1, "full (learning_rate 0.01)": 10.0}
    assert {run.method_name: run.value for run in section.runs if "full" in run.method_name} == pytest.approx(names)

    [section] = read_report([folder], "full").sections
    [words] = [line for line in verdict(section) if "no comparison with full is possible" in line]
    first = min(names)
    assert words.endswith(f"it has runs with several settings. Choose one: --baseline '{first}'.")
    [section] = read_report([folder], first).sections
    assert section.baseline == first
    assert any(f"against {first}: " in line for line in verdict(section))


def test_rows_of_ones_own_are_told_apart(real: dict[str, Any], tmp_path: Path) -> None:
    """A task is named by its file, and everybody's is "train"."""
    for name, method, rows in (("a", "lora", "d"), ("b", "full", "d"), ("c", "full", "d2")):
        data = {**real["config"]["data"], "train_file": f"{rows}/train.csv"}
        config = {**real["config"], "task": "files", "data": data}
        write_json(
            tmp_path / "own" / name / "result.json", {**real, "task": "train", "method": method, "config": config}
        )
    [section] = read_report([tmp_path / "own"]).sections
    assert section.tasks == ("train (train_file d/train.csv)", "train (train_file d2/train.csv)")
    assert compare(section.runs, "full", "lora").pairs == 1


def test_a_baseline_that_has_no_runs(folder: Path) -> None:
    with pytest.raises(ValueError, match="one of full, lora, sparsegrad; found 'lore'"):
        read_report([folder], "lore")


def test_runs_of_another_experiment_are_named(study: Section, tmp_path: Path) -> None:
    [run] = [run for run in study.runs if run.variant == "sparsegrad"]
    content = {**json.loads(run.as_json()), "task": "glue/mrpc"}  # both experiments have it
    write_json(tmp_path / "study" / "a.json", content)
    write_json(tmp_path / "study" / "d.json", {**content, "experiment": "kept-entries", "variant": "keep-1"})
    sections = {section.name: section for section in read_report([tmp_path / "study"]).sections}
    assert sections["comparison"].remarks == ()
    assert sections["kept-entries"].remarks == (
        "Learning rate of keep-1: the one found for comparison/sparsegrad-paper, without a search of their own.",
        'The runs of keep-1 with seed 0 are those of sparsegrad in "The paper\'s comparison".',
    )


def test_runs_that_are_scored_otherwise_are_told_apart(real: dict[str, Any], tmp_path: Path) -> None:
    for name, method, metric in (("a", "lora", "f1"), ("b", "full", "accuracy"), ("c", "sparsegrad", "accuracy")):
        write_json(tmp_path / "own" / name / "result.json", {**real, "method": method, "metric": metric})
    [section] = read_report([tmp_path / "own"]).sections
    assert section.tasks == ("train (metric f1)", "train (metric accuracy)")
    assert compare(section.runs, "full", "lora").pairs == 0
    assert compare(section.runs, "sparsegrad", "full").pairs == 1


def test_settings_that_are_alike_at_the_start_are_told_apart(real: dict[str, Any], tmp_path: Path) -> None:
    """A name has room for the first 100 characters."""
    for seed, end in enumerate("ab"):
        config = {**real["config"], "model": f"{'x' * 100}{end}"}
        write_json(tmp_path / end / "result.json", {**real, "method": "lora", "seed": seed, "config": config})
    [section] = read_report([tmp_path]).sections
    start = f"lora (model {'x' * 100}"
    assert [run.method_name for run in section.runs] == [f"{start})", f"{start}, number 2)"]


def test_what_an_experiment_does_not_plan_is_named(real: dict[str, Any], tmp_path: Path) -> None:
    """A run on another task is in no table and no comparison; one with another seed is in all."""
    common = {**real, "experiment": "comparison", "model": "minilm", "trial": False, "status": "finished"}
    for task, seed in (("rte", 0), ("rte", 7), ("wnli", 0)):
        for variant in ("sparsegrad", "lora"):
            what = {"task": f"glue/{task}", "seed": seed, "variant": variant}
            write_json(tmp_path / f"{variant}-{task}-{seed}.json", {**common, **what})
    [section] = read_report([tmp_path]).sections
    assert {run.task_name for run in section.runs} == {"rte"}
    assert compare(section.runs, "sparsegrad", "lora").pairs == 2
    assert section.remarks == (
        "Left out, since the experiment does not have the task: lora, sparsegrad on wnli.",
        "The experiment does not plan these seeds of lora, which the tables count too: 7.",
        "The experiment does not plan these seeds of sparsegrad, which the tables count too: 7.",
    )


def test_seeds_with_other_settings_are_told_apart(real: dict[str, Any], tmp_path: Path) -> None:
    """Their mean and deviation would be of two different things."""
    for seed, epochs in ((0, 3.0), (1, 10.0)):
        config = {**real["config"], "training": {**real["config"]["training"], "epochs": epochs}}
        write_json(tmp_path / f"{seed}" / "result.json", {**real, "method": "lora", "seed": seed, "config": config})
    [section] = read_report([tmp_path]).sections
    assert [run.method_name for run in section.runs] == ["lora (epochs 3.0)", "lora (epochs 10.0)"]


def test_scales_and_experiments_of_ones_own_have_sections_of_their_own(real: dict[str, Any], tmp_path: Path) -> None:
    """Their words and sizes are not those of the experiment of this name that ships with the package."""
    what = {"experiment": "glue", "variant": "lora", "task": "glue/rte", "model": "minilm", "trial": False}
    common = {**real, **what, "status": "finished"}
    about = {"title": "Mine", "words": "rank 9", "scored": False}
    write_json(tmp_path / "a.json", {**common, "scale": "cpu"})
    write_json(tmp_path / "b.json", {**common, "scale": "cpu", "seed": 5, "about": {**about, "own": True}})
    write_json(tmp_path / "c.json", {**common, "scale": "large", "about": about})
    sections = {section.name: section for section in read_report([tmp_path]).sections}
    assert list(sections) == ["glue-scale-cpu", "glue-scale-cpu-your-own", "glue-scale-large"]
    assert "rank 3" in sections["glue-scale-cpu"].methods["lora"]
    own = sections["glue-scale-cpu-your-own"]
    assert (own.title, own.methods, own.scored) == ("Mine, scale cpu, your own", {"lora": "rank 9"}, False)


def test_experiments_of_ones_own_have_a_plan_if_their_folder_is_given(real: dict[str, Any], tmp_path: Path) -> None:
    """Without it, a report cannot know what is missing."""
    own = tmp_path / "experiments" / "mine"
    own.mkdir(parents=True)
    methods = {name: {"settings": {"method": name}} for name in ("lora", "full")}
    plan = {"title": "Mine", "question": "?", "tasks": ["glue/rte", "glue/mrpc"], "methods": methods}
    write_json(own / "experiment.yaml", plan)
    what = {"experiment": "mine", "variant": "lora", "task": "glue/rte", "model": "minilm", "trial": False}
    write_json(tmp_path / "results" / "a.json", {**real, **what, "status": "finished", "about": {"own": True}})
    [without] = read_report([tmp_path / "results"]).sections
    [section] = read_report([tmp_path / "results"], folder=own.parent).sections
    assert (without.tasks, list(without.methods)) == (("rte",), ["lora"])
    assert (section.title, section.tasks, list(section.methods)) == ("Mine", ("rte", "mrpc"), ["lora", "full"])
    assert "Not run: full; lora on mrpc; 2 of 3 planned runs of lora on rte." in verdict(section)


def test_rows_that_select_and_rows_that_score(real: dict[str, Any], tmp_path: Path) -> None:
    """MNLI's mismatched rows are evaluated and give no score."""
    rows = {"train": 3000, "development": 980, "validation_matched": 980, "validation_mismatched": 9832}
    write_json(tmp_path / "a" / "result.json", {**real, "rows": rows})
    [section] = read_report([tmp_path]).sections
    assert "3,000 to train, 980 to select, 980 to score" in section.setting


def test_runs_on_different_rows_are_named(real: dict[str, Any], tmp_path: Path) -> None:
    for method, sha in (("lora", "a"), ("full", "b")):
        environment = {**real["environment"], "rows_sha256": {"train": "same", "validation": sha}}
        write_json(tmp_path / method / "result.json", {**real, "method": method, "environment": environment})
    [section] = read_report([tmp_path]).sections
    assert section.remarks == (
        f"The runs on {section.tasks[0]} were not evaluated on the same rows (validation): their scores cannot be "
        "compared.",
    )
    assert section.remarks[0] in verdict(section)
