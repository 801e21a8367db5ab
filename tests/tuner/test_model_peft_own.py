"""What PEFT's own parametrized tests (peft 0.21.2, `tests/` of its sdist) showed when they were run on this tuner."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from helpers import logits, tiny_batch, tiny_model
from sparsegrad_peft import SparseGradConfig
from sparsegrad_peft.tuner.layer import SparseGradLayer


def adapted_layers(model: nn.Module) -> dict[str, SparseGradLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseGradLayer)}


def two_adapters(kind: str, **options: object) -> PeftModel:
    model = get_peft_model(tiny_model(kind), SparseGradConfig(init_weights=False, **options), adapter_name="one")
    model.add_adapter("two", SparseGradConfig(init_weights=False, **options))
    return model.eval()


def test_deleting_an_adapter_leaves_nothing_behind() -> None:
    model = two_adapters("bert")
    model.set_adapter("two")
    model.delete_adapter("one")
    layers = adapted_layers(model)
    assert len(layers) == 6
    for layer in layers.values():
        containers = [value for value in (*vars(layer).values(), *layer.children()) if hasattr(value, "keys")]
        assert not [container for container in containers if "one" in container]
        assert [*layer.sparsegrad_status] == [*layer.sparsegrad_checked] == ["two"]


def test_one_name_in_place_of_a_name_for_each_row() -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig()).eval()
    with pytest.raises(TypeError, match=r"adapter_names must be a list with a name for each row.*found 'default'"):
        model(**tiny_batch("bert"), adapter_names="default")


@pytest.mark.parametrize("names", [["one"], ["one"] * 5])
def test_adapter_names_must_be_one_for_each_example(names: list[str]) -> None:
    model = two_adapters("bert")
    with pytest.raises(ValueError, match=f"the number of inputs, but got {len(names)} and 4 respectively"):
        logits(model, tiny_batch("bert"), adapter_names=names)


def test_adapter_names_are_refused_where_the_model_folds_the_batch() -> None:
    """OPT hands (batch * positions, d) to its MLP: row i is not example i."""
    config = OPTConfig(vocab_size=60, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=16, word_embed_proj_dim=16)  # fmt: skip
    model = get_peft_model(OPTForCausalLM(config), SparseGradConfig(init_weights=False), adapter_name="one").eval()
    with pytest.raises(ValueError, match="but got 4 and 40 respectively"):
        logits(model, tiny_batch("llama"), adapter_names=["one", "__base__", "one", "one"])


def test_mixed_batch_uses_each_adapters_saved_modules() -> None:
    model = two_adapters("bert", modules_to_save=["classifier"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    data = tiny_batch("bert")
    expected = []
    for name in ("one", "two"):
        model.set_adapter(name)
        expected.append(logits(model, data))
    with model.disable_adapter():
        expected.append(logits(model, data))
    mixed = logits(model, data, adapter_names=["one", "two", "__base__", "one"])
    wanted = torch.stack([expected[0][0], expected[1][1], expected[2][2], expected[0][3]])
    torch.testing.assert_close(mixed, wanted)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_mixed_batch_with_beam_search(kind: str) -> None:
    """Each name stands for all beams of its example; the encoder sees each example once."""
    model = two_adapters(kind)
    names = ["one", "two", "__base__"]
    ids = tiny_batch(kind, 3)["input_ids"]
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        alone = model.generate(input_ids=ids[i : i + 1], adapter_names=[name], **options)
        assert torch.equal(mixed[i], alone[0])
    model.set_adapter("two")
    assert torch.equal(mixed[1], model.generate(input_ids=ids[1:2], **options)[0])


@pytest.mark.parametrize("targets", [None, "all-linear", r".*mlp\.down_proj", ["down_proj"]])
@pytest.mark.parametrize("blocks", [0, [0, 2]])
def test_layers_to_transform_holds_for_all_targets(targets: str | list[str] | None, blocks: int | list[int]) -> None:
    """The default targets are a regular expression, for which PEFT itself does not look at `layers_to_transform`."""
    model = get_peft_model(tiny_model("llama"), SparseGradConfig(target_modules=targets, layers_to_transform=blocks))
    found = {int(name.partition(".layers.")[2].partition(".")[0]) for name in adapted_layers(model)}
    assert found == set([blocks] if isinstance(blocks, int) else blocks)


def test_layers_to_transform_holds_for_targets_found_by_structure() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(8, 24), nn.Linear(24, 8)

    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(3))
    adapted = get_peft_model(model, SparseGradConfig(layers_to_transform=1, layers_pattern="blocks"))
    assert [name.removeprefix("base_model.model.") for name in adapted_layers(adapted)] == [
        "blocks.1.wide",
        "blocks.1.narrow",
    ]
