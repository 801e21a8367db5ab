"""The same with TRL's `SFTTrainer`: any trainer behind `SparseGradTrainerMixin` calibrates and trains the adapter.

accelerate launch --config_file examples/distributed/ddp.yaml examples/distributed/sft.py \
        --model HuggingFaceTB/SmolLM2-135M --texts texts.txt --output adapter
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sparsegrad_peft import SparseGradConfig, SparseGradTrainerMixin


class SparseGradSFTTrainer(SparseGradTrainerMixin, SFTTrainer):
    """`SFTTrainer` with SparseGrad's calibration and optimizer."""


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="name or folder of a causal language model")
parser.add_argument("--texts", required=True, help="text file, a training example a line")
parser.add_argument("--output", required=True, help="folder for the adapter")
parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
parser.add_argument("--cpu", action="store_true", help="train on the CPU")
options = parser.parse_args()

arguments = SFTConfig(
    f"{options.output}/checkpoints",
    max_steps=options.steps,
    per_device_train_batch_size=4,
    learning_rate=2e-3,
    max_length=256,
    bf16=not options.cpu,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
    use_cpu=options.cpu,
    seed=0,
)
texts = [line for line in Path(options.texts).read_text(encoding="utf-8").splitlines() if line]
tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), SparseGradConfig(task_type="CAUSAL_LM"))
trainer = SparseGradSFTTrainer(
    model=model, args=arguments, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
)
trainer.train()
trainer.save_model(options.output)  # called on every process; the first one writes
if trainer.is_world_process_zero():
    print(f"adapter: {options.output}")
trainer.accelerator.end_training()  # closes the process group: with it open, a process may crash as it ends
