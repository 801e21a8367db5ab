"""Heads that come with a model, and tokens that it has no embedding for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from sparsegrad_lab.tasks.kinds import KINDS
from sparsegrad_lab.tasks.pretrained import load_config, load_tokenizer
from sparsegrad_lab.tasks.settings import DataArguments
from sparsegrad_lab.tasks.task import IMAGES, LANGUAGE, TEXT, Task
from tiny_runs import save_tokenizer

TEXTS = ["warm", "dull", "the film", "a long one", "spring", "grim", "kind", "very quiet"]
SPLITS = {"train": Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2, 0, 1, 2, 0, 1]})}


def task_of(*labels: str) -> Task:
    return Task("x", ("text",), labels, ("accuracy",), SPLITS)


def save_model(folder: Path, vocabulary: int | None = None, **config: Any) -> Path:
    words = save_tokenizer(folder)
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary or words, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32, initializer_range=0.5, **config,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("names", [("yes", "no", "perhaps"), ("NO", "PERHAPS", "YES")])
def test_a_kept_head_keeps_its_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    """The task sorts its classes otherwise; each text must still get the class that the model has learnt."""
    folder = save_model(tmp_path, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    kind, tokenizer = KINDS[TEXT], load_tokenizer(folder)
    task = kind.in_model_order(task_of("no", "perhaps", "yes"), load_config(str(folder)))
    assert task.labels == tuple(name.lower() for name in names)
    by_number = [("no", "perhaps", "yes")[number] for number in SPLITS["train"]["label"]]
    assert [task.labels[number] for number in task.splits["train"]["label"]] == by_number
    model = kind.load_model(str(folder), task, tokenizer).eval()
    rows = kind.predict(model, tokenizer, task, [{"text": text} for text in TEXTS], DataArguments(), 1)
    plain = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        numbers = plain(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
    assert len(set(numbers)) > 1
    assert [row["prediction"] for row in rows] == [names[number].lower() for number in numbers]


@pytest.mark.parametrize("order", [("bad", "good"), ("good", "bad")])
@pytest.mark.parametrize("kind", [TEXT, IMAGES])
def test_f1_scores_the_same_class_whatever_the_order_of_the_head(kind: str, order: tuple[str, str]) -> None:
    """The last class of the task: 2 true and 1 false positive, 1 false negative."""
    rows = Dataset.from_dict({"text": TEXTS[:5], "label": [1, 1, 1, 0, 0]})
    task = Task("x", ("text",), ("bad", "good"), ("f1",), {"train": rows}).with_label_order(order)
    found = [task.labels.index(name) for name in ("good", "good", "bad", "good", "bad")]  # type: ignore[union-attr]
    scores = KINDS[kind].score(task, np.eye(2)[found], task.splits["train"]["label"][:])
    assert scores == {"f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1))}


@pytest.mark.parametrize("labels", [("a", "b", "c"), ("no", "yes"), ("no", "yes", "other")])
def test_other_classes_keep_the_order_of_the_task(labels: tuple[str, ...], tmp_path: Path) -> None:
    names = ("yes", "no", "perhaps")
    folder = save_model(tmp_path, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    task = task_of(*labels)
    assert KINDS[TEXT].in_model_order(task, load_config(str(folder))) is task


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    """As where a padding token was added and the embeddings were not resized."""
    folder = save_model(tmp_path, vocabulary=20)
    kind, tokenizer, task = KINDS[TEXT], AutoTokenizer.from_pretrained(folder), task_of("a", "b", "c")
    model = kind.load_model(str(folder), task, tokenizer)
    features = kind.features(task, "train", tokenizer, DataArguments(max_length=24))
    words = r"the tokenizer has the token '\w+' with id 2\d, the model has 20 embeddings"
    with pytest.raises(ValueError, match=words):
        kind.check_features(features, model, tokenizer)
    with pytest.raises(ValueError, match=words):
        kind.predict(model, tokenizer, task, [{"text": "spring"}], DataArguments(), 1)
    kind.check_features(features.select([0]), model, tokenizer)


def test_texts_without_tokens(tiny_llama: Path) -> None:
    kind, tokenizer = KINDS[TEXT], load_tokenizer(tiny_llama)
    tokenizer.add_special_tokens = False
    tokenizer._tokenizer.post_processor = None  # type: ignore[attr-defined]  # as GPT-2's and LLaMA's: adds no tokens
    rows = Dataset.from_dict({"text": ["warm", ""], "label": [0, 1]})
    task = Task("x", ("text",), ("a", "b"), ("accuracy",), {"train": rows})
    with pytest.raises(ValueError, match=r"row 2 has an empty text, .*remove such rows \(1 of 2\)"):
        kind.features(task, "train", tokenizer, DataArguments(max_length=24))


def test_a_language_model_stops_at_its_end_tokens(tiny_llama: Path) -> None:
    """At the tokenizer's, and at each in the generation config."""
    kind, tokenizer = KINDS[LANGUAGE], load_tokenizer(tiny_llama)
    task = Task("x", ("text",), None, ("loss",), {}, kind=LANGUAGE)
    model: Any = kind.load_model(str(tiny_llama), task, tokenizer).eval()

    def words() -> list[str]:
        (row,) = kind.predict(model, tokenizer, task, [{"text": "the film"}], DataArguments(), 8)
        found: list[str] = row["prediction"].split()
        return found

    whole = words()
    assert len(whole) > 3
    third = tokenizer.convert_tokens_to_ids(whole[2])
    assert third not in tokenizer.convert_tokens_to_ids(whole[:2])
    for ends in (third, [3, third]):
        model.generation_config.eos_token_id = ends
        assert words() == whole[:3]


def test_nothing_to_learn(tiny_llama: Path) -> None:
    kind, tokenizer = KINDS[LANGUAGE], load_tokenizer(tiny_llama)
    rows = Dataset.from_dict({"prompt": ["the film was warm again"], "answer": ["one"]})
    task = Task("x", ("prompt", "answer"), None, ("loss",), {"train": rows}, kind=LANGUAGE)
    with pytest.raises(ValueError, match=r"no row has anything to learn in its first 3 tokens; raise data.max_length"):
        kind.features(task, "train", tokenizer, DataArguments(max_length=3))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"other": "x"}, r"line 2: expected a column 'messages', found 'other'"),
        ({"messages": [{"role": "user"}]}, r"line 2, messages, message 1: expected a text as content"),
        ({"messages": {"role": "user"}}, r"line 2: expected a text as 'messages', found an object"),
    ],
)
def test_rows_without_a_prompt(row: dict[str, Any], words: str) -> None:
    from sparsegrad_lab.tasks.read import Row

    task = Task("x", ("messages",), None, ("loss",), {}, kind=LANGUAGE)
    found = Row(row)
    found.line = 2
    with pytest.raises(ValueError, match=rf"rows.jsonl, {words}"):
        KINDS[LANGUAGE].check_rows(task, [found], "rows.jsonl")


def test_rows_that_are_cut_off_are_counted(tiny_bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    processor, kind = load_tokenizer(str(tiny_bert)), KINDS[TEXT]
    kind.features(task_of("a", "b", "c"), "train", processor, DataArguments(max_length=8))
    assert not caplog.messages
    kind.features(task_of("a", "b", "c"), "train", processor, DataArguments(max_length=4))
    assert caplog.messages.pop() == "x, train: 3 of 8 rows fill data.max_length, 4 tokens; longer rows were cut off"
    task = Task("x", ("text",), None, ("loss",), SPLITS, kind=LANGUAGE)
    KINDS[LANGUAGE].features(task, "train", processor, DataArguments(max_length=2))
    assert "x, train: 8 of 8 rows fill data.max_length, 2 tokens" in caplog.messages.pop()
