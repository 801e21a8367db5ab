"""Packed conversations: none is lost, each is read as if it were alone, and the loss is that without packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from chat_models import save_model
from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.train import train
from sparsegrad_lab.tasks.kinds import KINDS
from sparsegrad_lab.tasks.kinds.packing import pack, prepare_model
from sparsegrad_lab.tasks.kinds.writer import IGNORED
from sparsegrad_lab.tasks.pretrained import load_tokenizer
from sparsegrad_lab.tasks.task import LANGUAGE

LENGTHS = (9, 4, 3, 7, 1, 5, 2)
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5,
    "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    ),
}


@pytest.fixture
def rows() -> Dataset:
    """Rows of several lengths, of which the second half of the tokens is learnt."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 50, (length,), generator=generator).tolist() for length in LENGTHS]
    labels = [[IGNORED] * (len(row) - len(row) // 2) + row[len(row) - len(row) // 2 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def conversations_of(packed: Dataset) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels between positions that start anew."""
    found = []
    for row in packed:
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            found.append((row["input_ids"][start:end], row["labels"][start:end]))
    return found


def test_every_row_is_packed_once(rows: Dataset) -> None:
    packed = pack(rows, 12)
    assert [len(row["input_ids"]) for row in packed] == [12, 12, 7]  # 9 + 3, 7 + 5, 4 + 2 + 1
    assert sorted(conversations_of(packed)) == sorted(zip(rows["input_ids"], rows["labels"], strict=True))
    assert len(pack(rows, 9)) == 4
    learnt = pack(Dataset.from_dict({"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], [7, 8]]}), 4)
    assert learnt["labels"][0] == [IGNORED, 6, IGNORED, 8]  # the first of a row is predicted from nothing


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_loss_are_those_without_packing(name: str, rows: Dataset, tmp_path: Path) -> None:
    """With padding, which is the second row's."""
    save_model(tmp_path)
    torch.manual_seed(0)
    model: Any = MODELS[name]().eval()
    prepare_model(model, rows["input_ids"][0])
    packed = pack(rows, 12)
    batch = KINDS[LANGUAGE].collator(load_tokenizer(tmp_path), None)(list(packed))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    with torch.no_grad():
        found = model(**batch)
        alone = [model(torch.tensor([ids])).logits[0] for ids, _ in conversations_of(packed)]
    together = [logits[: len(row["input_ids"])] for logits, row in zip(found.logits, packed, strict=True)]
    torch.testing.assert_close(torch.cat(together), torch.cat(alone), rtol=1e-4, atol=1e-4)
    unpacked = KINDS[LANGUAGE].collator(load_tokenizer(tmp_path), None)(list(rows))
    with torch.no_grad():
        torch.testing.assert_close(found.loss, model(**unpacked).loss, rtol=1e-5, atol=1e-5)


def test_a_model_that_would_mix_them_is_refused() -> None:
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5))
    with pytest.raises(ValueError, match=r"data\.packing: attention of a bloom crosses .*; leave data\.packing out"):
        prepare_model(bloom.train(), list(range(3, 19)))
    assert bloom.training


def test_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The loss of a step is that without packing; the evaluation is not packed."""
    save_model(tmp_path / "llama")
    rows = [
        [{"role": "user", "content": f"what is {thing}"}, {"role": "assistant", "content": f"{tone} film"}]
        for thing in ("warm", "one", "a film")
        for tone in ("bright", "dull")
    ]
    lines = [json.dumps({"messages": row}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = {}
    for flag in ("true", "false"):
        asked = parse([
            "--model", str(tmp_path / "llama"), "--task", "text", "--train_file", str(tmp_path / "rows.jsonl"),
            "--validation_file", str(tmp_path / "rows.jsonl"), "--text", "messages", "--n_steps", "2", "--packing",
            flag, "--max_length", "30", "--batch_size", "6", "--epochs", "1", "--lr", "1e-9",
            "--output", str(tmp_path / flag),
        ])  # fmt: skip
        [found[flag]] = train(asked, progress=False)
    packed, plain = found["true"], found["false"]
    assert packed["tokens"] == plain["tokens"]
    assert packed["tokens"]["learnt"] == 6 * 3  # two words and the end
    assert (packed["rows"], plain["rows"]) == ({"train": 2, "validation": 6}, {"train": 6, "validation": 6})
    assert "train: packed 6 rows into 2; a row has" in caplog.text
    assert packed["training_loss_last_sixth"] == pytest.approx(plain["training_loss_last_sixth"], abs=1e-4)
    assert packed["score"] == pytest.approx(plain["score"], abs=1e-5)
