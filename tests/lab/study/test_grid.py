"""A grid is run once, by one process or several; failures are named; the runs use the best of a search."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import Command
from grids import Lines, read, result_file
from groups_of_processes import free_port, launcher_environment
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.run.folder import RunFolder
from sparsegrad_lab.run.parsing import arguments_from
from sparsegrad_lab.study import cell_run
from sparsegrad_lab.study.experiment import merged
from sparsegrad_lab.study.experiment_files import load_experiment
from sparsegrad_lab.study.grid import Grid, Places, reproduce
from sparsegrad_lab.study.locks import SharedRuns
from sparsegrad_lab.study.sections import read_report
from sparsegrad_lab.study.stored_results import StoredResults


@pytest.mark.slow
def test_grid_search_best_and_again(load: Any, places: Places) -> None:
    options: dict[str, Any] = {"keep": lambda cell: cell.method != "lora" and cell.seed != 1, "threads": 1}
    experiments, reporter = [load("first"), load("second")], Lines()
    interrupted = next(cell for cell in experiments[0].cells() if options["keep"](cell))
    other = arguments_from(merged(interrupted.settings(1e-3), {"data": {"max_length": 7}}))
    RunFolder(places.runs / interrupted.name).start(other)  # before its settings changed
    results = reproduce(experiments, places, progress=reporter, **options)
    assert len(results) == 2 + 1 + 2 == len(reporter.begun)
    # The search is run before what depends on it, on its own rows and seed.
    assert [name.split("/")[1] for name in reporter.begun[:2]] == ["search"] * 2
    trials = {result["learning_rate"]: result for result in results.values() if result["trial"]}
    assert sorted(trials) == [1e-3, 1e-2]
    assert {(trial["rows"]["train"], trial["seed"]) for trial in trials.values()} == {(16, 100)}
    best = max(sorted(trials), key=lambda rate: (trials[rate]["score"], -trials[rate]["training_loss_last_sixth"]))
    runs = {result["variant"]: result for result in results.values() if not result["trial"]}
    run, same, broken = runs["sparsegrad"], runs["same"], runs["broken"]
    assert (run["learning_rate"], run["seed"], run["rows"]["train"]) == (best, 0, 48)
    # The same settings as a run of the first experiment: it is not run again, and the result says so.
    assert same["same_as"].endswith("/sparsegrad-0.json")
    assert (same["score"], same["learning_rate"]) == (run["score"], best)
    assert broken["status"] == "diverged"
    assert "the loss of step" in broken["error"]
    for name, result in results.items():
        assert read(result_file(places, name)) == result
        assert {"experiment", "scale", "config", "environment", "status", "command", "attempts"} <= result.keys()
        if result["status"] == "finished":
            assert {"training", "calibration", "evaluations", "trained_entries", "weights_bytes"} <= result.keys()
    assert not list(places.runs.rglob("*.safetensors"))

    again = Lines()
    assert reproduce(experiments, places, progress=again, **options) == results
    assert again.begun == []

    # The search would give another rate now: what ran with the old one is named, and with retry run again.
    worse = result_file(places, next(name for name in results if name.endswith(f"sparsegrad-lr{best:g}")))
    worse.write_text(json.dumps({**read(worse), "selection_score": -1.0}), encoding="utf-8")
    new = 1e-3 if best == 1e-2 else 1e-2
    words = rf"1 results.*sparsegrad-0\.json \(training\.learning_rate {best:g}, now {new:g}\).*--retry"
    with pytest.raises(ValueError, match=words):
        reproduce([load("first")], places, progress=Lines(), **options)
    redone = Lines()
    found = reproduce([load("first")], places, retry=True, progress=redone, **options)
    assert [name.rpartition("/")[2] for name in redone.begun] == ["sparsegrad-0"]
    redo = next(result for name, result in found.items() if name.endswith("sparsegrad-0"))
    assert (redo["status"], redo["learning_rate"]) == ("finished", new)


def test_what_retry_removes(load: Any, places: Places) -> None:
    """A run that diverged starts from the beginning. A killed or failed one goes on from its last checkpoint."""
    grid = Grid(list(load("first").cells())[:4], places)
    grid.open()
    for cell, status in zip(grid.cells, ("diverged", "killed", "failed", "finished"), strict=True):
        grid.results.write(cell.name, {"status": status})
        (places.runs / cell.name).mkdir(parents=True)
    with grid.locks.attempt(grid.cells[0].name):  # another process does it
        grid.forget_failures()
        assert [cell.name in grid.results for cell in grid.cells] == [True, False, False, True]
        assert (places.runs / grid.cells[0].name).is_dir()
    grid.forget_failures()
    assert [cell.name in grid.results for cell in grid.cells] == [False, False, False, True]
    assert [(places.runs / cell.name).is_dir() for cell in grid.cells] == [False, True, True, True]


def test_training_settings_are_checked_before_the_search(experiments: Path, places: Places) -> None:
    """Those of the runs too, not only those of the trials, which come first."""
    file = experiments / "first" / "experiment.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["search"] = merged(content.get("search", {}), {"settings": {"training": {"patience": 1}}})
    content["settings"] = merged(content.get("settings", {}), {"training": {"patience": 0}})
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"training\.patience must be at least 1, found 0"):
        reproduce([load_experiment("first", "cpu", experiments)], places)


def test_a_full_disk_ends_the_study(load: Any, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run would fail as well. The run keeps its checkpoints, and has no result yet."""

    def full(command: Any, stream: Any, threads: Any, attempt: Any) -> int:
        stream.write(f"sparsegrad train: checkpoint: no space left ({os.strerror(errno.ENOSPC)}). Earlier files\n")
        return 1

    monkeypatch.setattr(cell_run, "_run", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        reproduce([load("first")], places, threads=1)
    assert caught.value.errno == errno.ENOSPC
    assert not list(places.results.rglob("*.json"))


def search_one_rate(experiments: Path) -> None:
    """Cut the search of the first experiment to one run for each method, which its other runs wait for."""
    file = experiments / "first" / "experiment.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for method in content["methods"].values():
        method["learning_rates"] = [1e-2]
    file.write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)  # six processes import the training stack, which takes minutes on a busy machine
def test_two_processes_share_the_runs_and_a_killed_one_is_taken_up(
    experiments: Path, places: Places, load: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    """One process is killed. Then two are started as by `torchrun`, each of which does runs of its own."""
    search_one_rate(experiments)
    words = ["-m", "sparsegrad_lab.cli.main", "reproduce", "first", "--folder", str(experiments)]
    words += ["--results", str(places.results), "--runs", str(places.runs)]
    words += ["--threads", "1", "--methods", "lora", "--seeds", "0"]
    killed = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(places.runs.rglob("*.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list(places.runs.rglob("*.log"))
    assert not list(places.results.rglob("*.json"))  # it was in the first run

    port = free_port()
    both = [Command(words[2:], tmp_path / f"printed-{rank}", launcher_environment(rank, 2, port)) for rank in range(2)]
    ended = [command.wait() for command in both]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "".join(out for _, out, _ in ended).count("2 runs, 0 failed") == 1  # the first one prints
    attempts = [read(path)["attempts"] for path in places.results.rglob("*.json")]
    assert sorted(attempts) == [1, 2]


@pytest.mark.slow
def test_two_machines_share_a_study(experiments: Path, tmp_path: Path, empty_database: str, load: Any) -> None:
    """Nothing in common but a database: each run is made by one of them, and both have all results."""
    search_one_rate(experiments)
    words = ["reproduce", "first", "--folder", str(experiments), "--storage", empty_database, "--threads", "1"]
    words += ["--methods", "lora", "--seeds", "0"]
    machines = [tmp_path / "one", tmp_path / "other"]
    both = [
        Command([*words, "--results", str(machine / "results"), "--runs", str(machine / "runs")], machine / "printed")
        for machine in machines
    ]
    ended = [command.wait() for command in both]
    assert [code for code, _, _ in ended] == [0, 0], ended
    said = [out for _, out, _ in ended]
    lines = [line for words in said for line in words.splitlines() if line.startswith("first/")]
    assert len(lines) == len({line.split(":")[0] for line in lines}) == 2
    found = [
        {path.relative_to(machine / "results"): read(path) for path in (machine / "results").rglob("*.json")}
        for machine in machines
    ]
    assert found[0] == found[1]
    assert sorted(str(path) for path in found[0]) == sorted(
        f"{cell.name}.json" for cell in load("first").cells() if cell.method == "lora" and cell.seed != 1
    )
    assert all(result["status"] == "finished" for result in found[0].values())
    runs = [{path.parent for path in (machine / "runs").rglob("config.yaml")} for machine in machines]
    assert len(runs[0]) + len(runs[1]) == 2


def test_an_experiment_needs_no_more_than_its_own_lines(experiments: Path, places: Places, capsys: Any) -> None:
    """No default.yaml; what a report says of it comes with the results.

    The run was killed in the first write to its folder, so --retry does it again in a folder that holds only a draft.
    Its method has a seed that the experiment does not have.
    """
    settings = yaml.safe_load((experiments / "default.yaml").read_text(encoding="utf-8"))
    own = {
        "title": "Mine", "question": "Which?", "seeds": [0], "tasks": ["files"], "baseline": "one",
        "models": settings["scales"]["cpu"]["models"], "settings": settings["settings"],
        "methods": {"one": {"words": "the first", "seeds": [1], "settings": {"method": "lora", "adapter": {"rnk": 1}}}},
    }  # fmt: skip
    where = experiments.parent / "own"
    (where / "mine").mkdir(parents=True)
    file = where / "mine" / "experiment.yaml"
    file.write_text(yaml.safe_dump(own), encoding="utf-8")
    words = ["reproduce", "mine", "--folder", str(where), "--results", str(places.results), "--runs", str(places.runs)]
    assert main(words) == 1
    assert "experiment mine, method one: " in capsys.readouterr().err
    own["methods"]["one"]["settings"]["adapter"] = {"rank": 1}
    (where / "other").mkdir()
    file = where / "other" / "experiment.yaml"
    file.write_text(yaml.safe_dump(own), encoding="utf-8")
    [cell] = load_experiment("other", folder=where).cells()
    StoredResults(places.results).write(cell.name, {"status": "killed"})
    draft = places.runs / cell.name / ".config.yaml.0123456789ab.draft"
    draft.parent.mkdir(parents=True)
    draft.write_text("model: min", encoding="utf-8")
    words[1] = "other"
    assert main([*words, "--retry"]) == 0
    assert read(result_file(places, cell.name))["status"] == "finished"
    assert not draft.exists()
    [section] = read_report([places.results]).sections
    assert (section.title, section.question, section.baseline) == ("Mine", "Which?", "one")
    assert section.methods == {"one": "the first"}
    capsys.readouterr()
    assert main(["reproduce", "--folder", str(where)]) == 0
    assert f"sparsegrad reproduce mine --scale cpu --folder {where}" in capsys.readouterr().out


def test_a_search_that_is_half_done_gives_no_rate(load: Any, places: Places) -> None:
    trials = [cell for cell in load("first").cells() if cell.trial is not None and cell.method == "sparsegrad"]
    file = result_file(places, trials[0].name)
    file.parent.mkdir(parents=True)
    finished = {"status": "finished", "metric": "accuracy", "score": 0.5, "training_loss_last_sixth": 0.6}
    file.write_text(json.dumps(finished), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no result for .*sparsegrad-lr0\.001 in .*run it first: .* reproduce first"):
        reproduce([load("second")], places, threads=1)


def test_results_that_nobody_was_told_of_are_told(load: Any, tmp_path: Path, finished_run: Path) -> None:
    """A process is killed between its file and the database; another machine has to get the result all the same."""
    here, elsewhere = (
        Places(tmp_path / name / "results", tmp_path / name / "runs", f"sqlite:///{tmp_path}/shared.db")
        for name in ("here", "elsewhere")
    )
    real = read(finished_run / "result.json")
    cells = list(load("first").cells())
    for cell in cells:
        rate = cell.trial or 1e-2
        config = arguments_from(cell.settings(1e-3 if cell.trial is None else rate)).as_dict()
        result = {**real, "status": "finished", "score": 1e-3 / rate, "config": config, "experiment": "first"}
        StoredResults(here.results).write(cell.name, {**result, "name": cell.name})
    begun = Lines()
    reproduce([load("first")], here, progress=begun)
    there = reproduce([load("first")], elsewhere, progress=begun)
    assert [result["name"] for result in there.values()] == [cell.name for cell in cells]
    assert begun.begun == []


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped-from-a-study", "first/other"])
def test_a_shared_storage_writes_only_results_of_these_runs(name: str, load: Any, tmp_path: Path) -> None:
    """What another machine has put there under another name stays there."""
    places = Places(tmp_path / "results", tmp_path / "runs", f"sqlite:///{tmp_path}/shared.db")
    shared = SharedRuns(str(places.storage))
    with shared.attempt(name) as trial:
        assert trial is not None
        shared.finish(trial, {"status": "finished"})
    grid = Grid(list(load("first").cells()), places)
    grid.open()
    grid.fetch_results()
    assert not places.results.exists()
    assert not (tmp_path.parent / "escaped.json").exists()
    assert not Path("/tmp/escaped-from-a-study.json").exists()
    [cell, *_] = load("first").cells()
    with shared.attempt(cell.name) as trial:
        assert trial is not None
        shared.finish(trial, {"task": "a", "method": "b", "seed": "../c", "score": 1})
    with pytest.raises(ValueError, match=f"shared.db, result of {cell.name}: seed: Input should be a valid integer"):
        grid.fetch_results()
    grid.close()
    shared.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("first", "methods", {"lora": {"learning_rates": [1e-3]}, "full": {}}), "the same number of learning rates"),
        (("first", "metods", {}), "unknown key metods; expected one of answers, baseline, methods"),
        (("first", "methods", {"lora": {"rates": []}}), "unknown key methods.lora.rates"),
        (("first", "name", "second"), "experiment first: name is set by the library; remove it from the file"),
        (("first", "scale", "paper"), "experiment first: scale is set by the library"),
        (("first", "own", True), "experiment first: own is set by the library"),
        (("first", "search", {"seeds": [100, 1]}), "than for the runs that are scored, found 1 in both"),
        (("first", "methods", {"lora": {"searched_rates": [1.0]}}), "lora.searched_rates is set by the library"),
        (("first", "methods", {"lora": {"settings": {"method": "lore"}}}), "found 'lore'"),
        (("first", "methods", {"lora": {"settings": {"adaptor": {"c": 8}}}}), "adaptor"),
        (("first", "methods", {"lora": {"rates_of": "second/lora"}}), "learning_rates at scale cpu; found second/lora"),
        (("first", "scales", {"cpu": {"models": ["./no"]}}), "no folder ./no; before experiment first: make it"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_first(
    change: tuple[str, str, Any], words: str, experiments: Path, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    name, key, value = change
    file = experiments / name / "experiment.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    command = ["reproduce", name, "--folder", str(experiments), "--results", str(places.results), "--runs"]
    assert main([*command, str(places.runs)]) == 1
    assert words in capsys.readouterr().err
    assert not places.runs.exists()
    assert not places.results.exists()


def test_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "nothing"]) == 1
    assert "no experiment 'nothing'; expected one of glue" in capsys.readouterr().err
    assert main(["reproduce", "comparison", "--scale", "huge"]) == 1
    assert "no scale 'huge'; expected one of cpu, paper" in capsys.readouterr().err
    assert main(["reproduce", "comparison", "--methods", "lora,lore"]) == 1
    assert "--methods: expected some of full, lora" in capsys.readouterr().err
    assert main(["reproduce", "peers", "comparison", "--methods", "dora", "--tasks", "glue/rte"]) == 1
    assert "select no run: no experiment has them together" in capsys.readouterr().err


def test_a_printed_command_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shell sees one folder, and nothing in its name is taken for a colour or an emoji."""
    folder = tmp_path / "bob's [bold]experiments[/bold] :bug: $HOME"
    (folder / "own").mkdir(parents=True)
    experiment = {"title": "Own", "question": "Which?", "tasks": ["files"], "methods": {"lora": None}}
    (folder / "own" / "experiment.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    assert main(["reproduce", "--folder", str(folder)]) == 0
    [command] = re.findall("next:   (.*)", capsys.readouterr().out)
    assert shlex.split(command) == ["sparsegrad", "reproduce", "own", "--scale", "cpu", "--folder", str(folder)]
