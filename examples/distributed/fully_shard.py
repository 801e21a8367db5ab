"""FSDP2 in a training loop of your own: `fully_shard`, calibration of the sharded model, and selection across shards.

    torchrun --nproc-per-node=2 examples/distributed/fully_shard.py

It runs on GPUs, and without them on CPUs. The model is small and has random weights: put your own in its place.
"""

import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, processes = distributed.get_rank(), distributed.get_world_size()
if device.type == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())

torch.manual_seed(0)  # the same weights on every process
sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100)), SparseGradConfig(task_type="CAUSAL_LM"))
model.to(device)
for block in model.base_model.model.model.layers:
    fully_shard(block)
fully_shard(model)

ids = torch.randint(100, (32, 16), device=device)[rank::processes]  # a share of the rows
batch = {"input_ids": ids, "labels": ids}
calibrate_adapter(model, [batch], n_steps=4)  # every process calls it
optimizer = SparseGradAdamW(param_groups(model, density=0.2), lr=1e-2)  # the largest 20 % of all rows of each core
for _ in range(20):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
distributed.all_reduce(loss := loss.detach(), distributed.ReduceOp.SUM)

weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    model.save_pretrained("adapter", state_dict=weights)
    print(f"loss {loss.item() / processes:.3f}")
distributed.destroy_process_group()
