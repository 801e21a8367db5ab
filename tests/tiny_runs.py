"""Fixtures for the laboratory's tests: tiny models with a tokenizer, rows to train on, and one finished run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD, BAD = ("warm", "bright", "kind", "fine"), ("dull", "cold", "grim", "flat")
OTHER = ("the", "film", "was", "a", "very", "long", "and", "quiet", "one", "in", "spring", "again")
COLUMNS = ["text", "other", "label", "score"]
N_TRAIN, N_DEV = 48, 24


def save_tokenizer(folder: Path, pad: bool = True) -> int:
    """Save a word-level tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: number for number, word in enumerate([*special, *GOOD, *BAD, *OTHER])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    if pad:
        tokens["pad_token"] = "[PAD]"
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if pad else [])]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=32, model_input_names=names, **tokens
    )
    tokenizer.save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv and dev.csv. A text's label is good if it contains words of `GOOD`."""
    folder = tmp_path_factory.mktemp("rows")
    generator = random.Random(0)
    for name, count in (("train", N_TRAIN), ("dev", N_DEV)):
        lines = [",".join(COLUMNS)]
        for number in range(count):
            tone = GOOD if number % 2 else BAD
            words = [*generator.choices(OTHER, k=generator.randint(3, 8)), *generator.choices(tone, k=3)]
            generator.shuffle(words)
            other = " ".join(generator.choices(OTHER, k=4))
            lines.append(f"{' '.join(words)},{other},{'good' if number % 2 else 'bad'},{number % 2 + number / 100}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def words(tiny_bert: Path, rows: Path) -> Callable[..., list[str]]:
    """Builds a command line for `sparsegrad train`: a run of twelve steps, then the options that are passed."""

    def make(output: Path, *more: str) -> list[str]:
        return [
            "train", "--model", str(tiny_bert), "--task", "files", "--data.train_file", str(rows / "train.csv"),
            "--data.validation_file", str(rows / "dev.csv"), "--data.text", '["text"]', "--data.max_length", "24",
            "--calibration.n_steps", "2", "--adapter.c", "0.5", "--adapter.r", "0.5", "--training.batch_size", "8",
            "--training.epochs", "2", "--training.learning_rate", "0.01", "--output", str(output), *more,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    words = save_tokenizer(folder, pad=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=40, bos_token_id=None, eos_token_id=3, pad_token_id=None,
        initializer_range=0.5,  # with less, no change of the MLPs would move the frozen head's outputs
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def search_words(words: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Builds a command line for `sparsegrad search`: as `words`, without the settings that a search draws."""

    def make(output: Path, *more: str) -> list[str]:
        given = words(output, *more)[1:]
        drawn = {"--training.learning_rate", "--training.batch_size"}
        return ["search", *(word for i, word in enumerate(given) if not drawn & {word, given[i - 1]})]

    return make


@pytest.fixture(scope="session")
def language_words(words: Callable[..., list[str]], tiny_llama: Path) -> Callable[..., list[str]]:
    """As `words`, for the tiny LLaMA: the first text is a prompt, the second its answer."""
    more = ["--model", str(tiny_llama), "--task", "text", "--data.text", '["text", "other"]']
    return lambda output, *others: words(output, *more, *others)


@pytest.fixture(scope="session")
def language_arguments(language_words: Callable[..., list[str]]) -> Callable[..., Any]:
    """As `language_words`, parsed to `RunArguments`."""
    from sparsegrad_lab.cli.train import parse

    return lambda output, *more: parse(language_words(output, *more)[1:])


@pytest.fixture(scope="session")
def arguments(words: Callable[..., list[str]]) -> Callable[..., Any]:
    """As `words`, parsed to `RunArguments`."""
    from sparsegrad_lab.cli.train import parse

    return lambda output, *more: parse(words(output, *more)[1:])


@pytest.fixture(scope="session")
def finished_run(arguments: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished SparseGrad run. Tests must not change it; copy it first."""
    from sparsegrad_lab.run.train import train

    folder = tmp_path_factory.mktemp("finished") / "run"
    train(arguments(folder), progress=False)
    return folder
