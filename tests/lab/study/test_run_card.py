"""The details of a run: facts, settings and curves."""

from __future__ import annotations

from sparsegrad_lab.study.run_card import HEIGHT, WIDTH, run_card
from sparsegrad_lab.study.runs import Run


def test_card(runs: list[Run]) -> None:
    run = runs[0].model_copy(
        update={
            "evaluations": [{"step": 6, "accuracy": 0.5, "loss": 0.7}, {"step": 9, "accuracy": 0.8, "loss": 0.6},
                            {"step": 12, "accuracy": 0.6, "loss": None}],
            "training_loss_last_sixth": 0.43211,
        }
    )  # fmt: skip
    card = run_card(run)
    facts = dict(card.facts)
    assert (facts["accuracy"], facts["learning rate"]) == (run.format(run.value, 2), f"{run.learning_rate:g}")
    assert facts["training loss at the end"] == "0.4321, mean of the last sixth of the steps"
    assert facts["file"] == run.path.as_posix()
    settings = dict(card.settings)
    assert (settings["adapter.c"], settings["training.batch_size"], settings["data.text"]) == ("0.5", "8", "text")
    assert not {"output", "seeds", "training.learning_rate", "data.folder"} & settings.keys()
    loss, score = card.curves
    assert loss.points == f"0.0,0.0 {WIDTH}.0,{HEIGHT}.0"
    assert score.points == f"0.0,{HEIGHT}.0 {WIDTH / 2},0.0 {WIDTH}.0,{HEIGHT * 2 / 3:.1f}"
    assert score.description == "0.5 at step 6, 0.6 at step 12; lowest 0.5, highest 0.8"


def test_rows_of_a_step(runs: list[Run]) -> None:
    """Of all micro-batches and processes."""
    config = runs[0].config
    training = config.training.model_copy(update={"batch_size": 2, "gradient_accumulation": 4})
    environment = runs[0].environment.model_copy(update={"processes": 3})
    update = {"config": config.model_copy(update={"training": training}), "environment": environment}
    assert " of 24 rows, " in dict(run_card(runs[0].model_copy(update=update)).facts)["steps"]


def test_no_curve_of_one_point(runs: list[Run]) -> None:
    """Nor a training loss, in files of earlier versions."""
    update = {"evaluations": [{"step": 6, "accuracy": 0.5}], "training_loss_last_sixth": None}
    card = run_card(runs[0].model_copy(update=update))
    assert card.curves == []
    assert "training loss at the end" not in dict(card.facts)
