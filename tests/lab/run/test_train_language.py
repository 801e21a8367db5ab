"""Runs of a tiny LLaMA: the loss equals one computed by hand, and the saved weights are the trained ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_models import STORY, data_folder
from small_models import write_llama
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.finished_run import evaluate, merge, open_run, predict
from sparsegrad_lab.run.folder import RunFolder
from sparsegrad_lab.run.search import search
from sparsegrad_lab.run.settings import RunArguments, SearchArguments
from sparsegrad_lab.run.train import train
from sparsegrad_lab.tasks.read import read_rows

Arguments = Callable[..., RunArguments]


def loss_by_hand(model: Any, folder: Path, file: Path) -> float:
    """Mean loss over the tokens of the answers and their end tokens, row by row without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in read_rows(file):
        prompt = tokenizer(row["text"], add_special_tokens=False).input_ids
        answer = [*tokenizer(row["other"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            found = model(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-found[at - 1, ids[0, at]].item() for at in range(len(prompt), len(prompt) + len(answer))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("method", ["sparsegrad", "lora", "meprop", "full"])
def test_each_method(method: str, language_arguments: Arguments, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    more = ["--training.epochs", "8", "--training.learning_rate", "0.03"]
    asked = language_arguments(tmp_path / "run", "--method", method, *more)
    (result,) = train(asked, progress=False)
    before = loss_by_hand(AutoModelForCausalLM.from_pretrained(tiny_llama), tiny_llama, rows / "dev.csv")
    assert result["score"] < before - 0.1
    assert (result["metric"], result["metrics"], result["labels"]) == ("loss", ["loss", "perplexity"], None)
    assert result["score"] == min(entry["loss"] for entry in result["evaluations"])
    assert result["scores"]["validation"]["perplexity"] == pytest.approx(math.exp(result["score"]))

    # Only the adapter is trained, or the MLP weights: 4 blocks of three matrices.
    of_mlps = 4 * 3 * 16 * 32
    assert result["trained_entries"]["all"] == result["trained_entries"]["adapter"] or method == "full"
    if method == "full":
        assert result["trained_entries"]["all"] == of_mlps
    if method == "sparsegrad":
        assert result["trained_entries"]["all"] == of_mlps / 4  # half of each side

    run = open_run(tmp_path / "run")
    assert loss_by_hand(run.model, tiny_llama, rows / "dev.csv") == pytest.approx(result["score"], abs=1e-5)
    assert evaluate(tmp_path / "run")["validation"]["loss"] == pytest.approx(result["score"], abs=1e-6)
    if method == "sparsegrad":
        folder, _ = merge(tmp_path / "run")
        merged = AutoModelForCausalLM.from_pretrained(folder)
        assert loss_by_hand(merged, tiny_llama, rows / "dev.csv") == pytest.approx(result["score"], abs=1e-4)


def test_neither_batch_nor_padding_changes_the_loss(language_arguments: Arguments, tmp_path: Path) -> None:
    """With a tiny learning rate the model stays the same. 24 rows are not a multiple of 7."""
    scores = []
    for number, (size, padding) in enumerate(
        [("8", "dynamic"), ("7", "dynamic"), ("1", "dynamic"), ("5", "max_length")]
    ):
        asked = language_arguments(
            tmp_path / str(number), "--training.batch_size", size, "--training.padding", padding,
            "--training.learning_rate", "1e-12", "--training.epochs", "1",
        )  # fmt: skip
        scores += [result["score"] for result in train(asked, progress=False)]
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-6)


def test_predict_continues_the_prompt(language_arguments: Arguments, tiny_llama: Path, tmp_path: Path) -> None:
    """Batches and single prompts give the same text as greedy decoding by hand."""
    run = tmp_path / "run"
    train(language_arguments(run, "--training.epochs", "1"), progress=False)
    prompts = ["the warm film", "a dull one in spring again", "quiet"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in prompts))
    together = predict(run, tmp_path / "rows.jsonl", max_new_tokens=6)
    assert together == [predict(run, texts=[text], max_new_tokens=6)[0] for text in prompts]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), open_run(run).model
    for row, text in zip(together, prompts, strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        made: list[int] = []
        while len(made) < 6 and tokenizer.eos_token_id not in made:
            with torch.no_grad():
                made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
        assert row == {"text": text, "prediction": tokenizer.decode(made, skip_special_tokens=True).strip()}
    assert predict(run, texts=prompts, max_new_tokens=6) == together
    with pytest.raises(ValueError, match=r"max_new_tokens must be at least 1, found 0"):
        predict(run, texts=["a"], max_new_tokens=0)


def test_early_stopping_and_the_lowest_loss(
    language_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate that ruins the model, the first evaluation stays the best, and two more follow."""
    words = ["--training.patience", "2", "--training.epochs", "9", "--training.learning_rate", "3.0"]
    assert main(language_words(tmp_path / "run", *words, "--training.schedule", "constant")) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in result["evaluations"]]
    best = losses.index(min(losses))
    assert result["score"] == pytest.approx(min(losses), abs=1e-6)
    assert (result["best_step"], result["steps"]) == (6 * (best + 1), 6 * (best + 3))
    assert capsys.readouterr().err.count("best so far") == sum(
        loss < min(losses[:number], default=math.inf) for number, loss in enumerate(losses)
    )


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_search_takes_the_lowest(language_arguments: Arguments, tmp_path: Path) -> None:
    what = SearchArguments(trials=3, lowest=1e-4, highest=1e-1, batch_sizes=[8])
    result = search(language_arguments(tmp_path / "s", "--training.epochs", "1"), what, lambda words: None)
    scores = [trial["score"] for trial in result["trials"]]
    assert len(set(scores)) == 3
    assert result["best"]["score"] == min(scores)


def test_blocks_by_their_numbers(language_arguments: Arguments, tmp_path: Path) -> None:
    """The paper's LLaMA setting: up and down projections of every third block."""
    words = ["--adapter.target_modules", '["up_proj", "down_proj"]', "--adapter.layers", "[0, 3]"]
    for method in ("sparsegrad", "lora"):
        asked = language_arguments(tmp_path / method, "--method", method, "--training.epochs", "1", *words)
        train(asked, progress=False)
        keys = load_file(tmp_path / method / "adapter" / "adapter_model.safetensors").keys()
        layers = {".".join(re.findall(r"layers\.(\d+)\.mlp\.(\w+)", key)[0]) for key in keys}
        assert layers == {"0.up_proj", "0.down_proj", "3.up_proj", "3.down_proj"}
        assert evaluate(tmp_path / method)["validation"]["loss"] > 0
    wrong = language_arguments(tmp_path / "wrong", "--adapter.layers", "[0, 7]")
    with pytest.raises(ValueError, match=r"expected numbers of blocks that hold layers to adapt, 0, 1, 2, 3; found 7"):
        train(wrong, progress=False)
    with pytest.raises(ValueError, match=r"adapter.layers: expected block numbers, counted from 0; found \[\]"):
        train(language_arguments(tmp_path / "wrong", "--adapter.layers", "[]"), progress=False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--data.metrics", '["accuracy"]'],
            r"expected for language models loss, perplexity; found accuracy",
        ),
        (["--data.max_length", "3"], r"no row has anything to learn in its first 3 tokens; raise data.max_length"),
        (
            ["--data.text", '["text", "nothing"]'],
            r"data.text: expected a column 'nothing' in .*train.csv, found 'text'",
        ),
        (["--data.text", "[]"], r"task text needs data.text"),
        (["--data.language", "en"], r"data.language is for oasst1; task text does not read it"),
        (["--rest", "train", "--adapter.target_modules", "nothing"], r"no MLP layers found in a LlamaForCausalLM"),
    ],
)
def test_refused(more: list[str], message: str, language_arguments: Arguments, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(language_arguments(tmp_path / "run", *more), progress=False)
    assert not (tmp_path / "run").exists()


def test_perplexity_may_be_what_decides(language_arguments: Arguments, tmp_path: Path) -> None:
    asked = language_arguments(tmp_path / "run", "--data.metrics", '["perplexity"]', "--training.epochs", "1")
    (result,) = train(asked, progress=False)
    assert (result["metric"], result["score"]) == ("perplexity", result["scores"]["validation"]["perplexity"])


def test_a_real_llama(stories: Path) -> None:
    """It predicts its stories better than a model of the same size with random weights."""
    tokenizer, model = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(stories)
    batch = {"input_ids": tokenizer(STORY, return_tensors="pt").input_ids}
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == STORY
    assert model(**batch, labels=batch["input_ids"]).loss < 1.0
    untrained = AutoModelForCausalLM.from_config(model.config)
    assert untrained(**batch, labels=batch["input_ids"]).loss > 5.0
    made = model.generate(tokenizer("Once upon", return_tensors="pt").input_ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(made[0], skip_special_tokens=True).startswith("Once upon a time, there was a")


def test_a_real_llama_reads_more_than_it_was_trained_on(stories: Path, tmp_path: Path) -> None:
    """With YaRN's rotary embedding: the model of the experiment `long-sequences` on a CPU."""
    write_llama(data_folder("weights/stories260K"), tmp_path, length=1024)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 1024
    weights = AutoModelForCausalLM.from_pretrained(stories).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    ids = tokenizer(" ".join([STORY] * 16), return_tensors="pt").input_ids[:, :1024]
    assert ids.shape[1] == 1024
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert losses[:511].mean() < 2  # of ln 512 = 6.2
    assert losses[511:].mean() < 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegrad", "lora"])
def test_a_real_llama_learns_conversations(method: str, stories: Path, tmp_path: Path) -> None:
    words = [
        "--model", str(stories), "--task", "oasst1", "--method", method, "--data.max_length", "128",
        "--data.train_rows", "48", "--data.validation_rows", "16", "--training.batch_size", "8", "--training.epochs",
        "2", "--calibration.n_steps", "2", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    (result,) = train(parse(words), progress=False)
    first, last = result["evaluations"]
    assert last["loss"] < first["loss"] < 5.0
    assert evaluate(tmp_path / "run")["validation"]["loss"] == pytest.approx(result["score"], abs=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(language_arguments: Arguments, tmp_path: Path) -> None:
    scores = []
    for flag in ("false", "true"):
        asked = language_arguments(tmp_path / flag, "--training.epochs", "2", "--training.gradient_checkpointing", flag)
        scores += [result["score"] for result in train(asked, progress=False)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_forgetting(language_arguments: Arguments, tiny_llama: Path, tmp_path: Path) -> None:
    """Perplexity of texts that are not trained on: before is the pretrained model's, after the saved one's."""
    texts = ["the quiet film", "a very long one and again"]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    asked = language_arguments(tmp_path / "run", "--data.unrelated", str(tmp_path / "texts.txt"))
    (result,) = train(asked, progress=False)

    def perplexity(model: Any) -> float:
        tokenizer, losses = AutoTokenizer.from_pretrained(tiny_llama), []
        for text in texts:
            ids = torch.tensor([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                found = model(input_ids=ids).logits[0].log_softmax(-1)
            losses += [-found[at - 1, ids[0, at]].item() for at in range(1, ids.shape[1])]
        return math.exp(sum(losses) / len(losses))

    found = result["unrelated_perplexity"]
    assert found["before"] == pytest.approx(perplexity(AutoModelForCausalLM.from_pretrained(tiny_llama)), rel=1e-4)
    assert found["after"] == pytest.approx(perplexity(open_run(tmp_path / "run").model), rel=1e-4)
    assert evaluate(tmp_path / "run")["unrelated"]["perplexity"] == pytest.approx(found["after"], rel=1e-4)
    assert found["after"] != pytest.approx(found["before"], rel=1e-3)
    with pytest.raises(ValueError, match=r"data.unrelated: expected a text file or cola, found no file gone.txt"):
        language_arguments(tmp_path / "other", "--data.unrelated", "gone.txt").check()


def test_evaluated_in_the_runs_precision_and_without_packing(language_arguments: Arguments, tmp_path: Path) -> None:
    """The scores are those of the run; packed training rows have the loss of separate ones."""
    (result,) = train(language_arguments(tmp_path / "run", "--training.precision", "bf16", "--packing"), progress=False)
    assert evaluate(tmp_path / "run")["validation"]["loss"] == pytest.approx(result["score"], abs=1e-7)
    packed = evaluate(tmp_path / "run", "train")["train"]["loss"]
    config = RunFolder(tmp_path / "run").read_arguments()
    config["data"]["packing"] = False
    RunFolder(tmp_path / "run").write_yaml("config.yaml", config)
    assert packed == pytest.approx(evaluate(tmp_path / "run", "train")["train"]["loss"], rel=5e-3)
