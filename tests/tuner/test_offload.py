"""Models whose weights wait on the CPU or on disk, with accelerate's own hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel
from transformers import LlamaForCausalLM

from helpers import logits, max_difference, tiny_batch, tiny_model, trained_adapter

# PyTorch's word for it, with LoRA as well: what is away is not written to.
COPIED = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_is_the_same_model(place: str, shared: bool, tmp_path: Path) -> None:
    model, _ = trained_adapter("llama", shared=shared)
    expected = logits(model, tiny_batch("llama"))
    prompt = tiny_batch("llama")["input_ids"][:, :4]
    written = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    if place == "cpu":
        model = cpu_offload(model, execution_device="cpu")
    else:
        model = disk_offload(model, str(tmp_path), execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):
        assert (
            max_difference(logits(model, tiny_batch("llama")), expected) < 1e-6
        )  # base layer and update by themselves
        assert all(parameter.is_meta for parameter in model.parameters())  # away again
    # A token at a time is decoded by other products.
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False), written)
    model.merge_adapter()
    assert max_difference(logits(model, tiny_batch("llama")), expected) < 1e-5


@COPIED
def test_loading_onto_a_model_that_is_away_is_refused(tmp_path: Path) -> None:
    """PEFT's own loading has no place for what is not LoRA there; LoRA's numbers come out wrong without a word."""
    trained_adapter("llama")[0].save_pretrained(tmp_path / "adapter")
    base = cpu_offload(tiny_model("llama"), execution_device="cpu")
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    with pytest.raises(RuntimeError, match=r"offloaded already. Load model and adapter into CPU memory first"):
        logits(model.eval(), tiny_batch("llama"))


@COPIED
def test_loading_onto_a_model_on_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT writes below the working folder: it loses the first slash of the path
    trained_adapter("llama")[0].save_pretrained(tmp_path / "adapter")
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" for i in range(base.config.num_hidden_layers)}
    away = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "away"))
    model = PeftModel.from_pretrained(
        away, str(tmp_path / "adapter"), max_memory={"cpu": 10_000}, offload_folder=str(tmp_path / "there")
    )
    with pytest.raises(RuntimeError, match=r"sparsegrad_S.* is not among the tensors on disk.*onto an offloaded model"):
        logits(model.eval(), tiny_batch("llama"))
