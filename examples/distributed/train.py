"""Fine-tune a causal language model with `SparseGradTrainer` on one or several processes.

    accelerate launch --config_file examples/distributed/ddp.yaml examples/distributed/train.py \
        --model HuggingFaceTB/SmolLM2-135M --texts texts.txt --output adapter

The same script runs with `fsdp2.yaml` and `zero2.yaml`. ZeRO-3 shards the weights while they are loaded, so calibrate
before: run this with `ddp.yaml` or `fsdp2.yaml` and `--steps 0`, then with `zero3.yaml` and `--adapter` that folder.
"""

import argparse
from pathlib import Path

from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from sparsegrad_peft import SparseGradConfig, SparseGradTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="name or folder of a causal language model")
parser.add_argument("--texts", required=True, help="text file, a training example a line")
parser.add_argument("--output", required=True, help="folder for the adapter")
parser.add_argument("--adapter", help="folder of a calibrated adapter to go on with")
parser.add_argument("--steps", type=int, default=100, help="optimizer steps; 0 only calibrates")
parser.add_argument("--cpu", action="store_true", help="train on the CPU")
options = parser.parse_args()

# Before the model, so that ZeRO-3 can load it in parts.
arguments = TrainingArguments(
    f"{options.output}/checkpoints",
    max_steps=max(1, options.steps),
    per_device_train_batch_size=4,
    learning_rate=2e-3,
    save_strategy="no",
    report_to="none",
    use_cpu=options.cpu,
    seed=0,
)
tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model)
if options.adapter is None:
    model = get_peft_model(model, SparseGradConfig(task_type="CAUSAL_LM"))
else:
    model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
texts = [line for line in Path(options.texts).read_text(encoding="utf-8").splitlines() if line]
trainer = SparseGradTrainer(
    model=model,
    args=arguments,
    train_dataset=[dict(tokenizer(text, truncation=True, max_length=256)) for text in texts],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
if options.steps > 0:
    trainer.train()
else:
    trainer.create_optimizer()  # calibrates
trainer.save_model(options.output)  # called on every process; the first one writes
if trainer.is_world_process_zero():
    print(f"adapter: {options.output}")
trainer.accelerator.end_training()  # closes the process group: with it open, a process may crash as it ends
