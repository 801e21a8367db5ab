"""What the methods share at run time. Importing it loads torch.

layers           which modules a run adapts
trainer          the trainer of a run
lora_start       the trainer of EVA and LoRA-GA
galore, literal  the trainers of these methods
"""
