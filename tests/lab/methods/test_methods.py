"""The parameters that each method trains, by name, and sizes that a layer cannot have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from sparsegrad_lab.methods.lora import matching_rank
from sparsegrad_lab.methods.method import Adapted
from sparsegrad_lab.methods.registry import find_method
from sparsegrad_lab.methods.settings import AdapterArguments
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.tasks.library_logs import suppress_library_logs
from sparsegrad_peft import SparseGradConfig

HEAD = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
MLPS = [f"bert.encoder.layer.{i}.{side}.dense" for i in range(2) for side in ("intermediate", "output")]


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


def adapted(method: str, rest: str, **adapter: Any) -> Adapted:
    arguments = RunArguments(method=method, rest=rest)
    for name, value in adapter.items():
        setattr(arguments.adapter, name, value)
    with suppress_library_logs():
        return find_method(method).adapt(bert(), arguments.setup())


def trained(model: Any) -> tuple[set[str], set[str]]:
    """Names of trained parameters as in the plain model: of the adapter, and of the rest."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    plain = [name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in names]
    marks = ("sparsegrad_S", "lora_", "ia3_")
    return {n for n in plain if any(m in n for m in marks)}, {n for n in plain if not any(m in n for m in marks)}


@pytest.fixture
def ia3(tmp_path: Path) -> str:
    peft.IA3Config(
        target_modules=[name.removeprefix("bert.encoder.") for name in MLPS],
        feedforward_modules=[name.removeprefix("bert.encoder.") for name in MLPS if "output" in name],
        inference_mode=True,  # as every adapter that was saved has it
    ).save_pretrained(tmp_path)
    return str(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("rest", ["freeze", "train"])
@pytest.mark.parametrize("method", ["sparsegrad", "meprop", "lora", "ia3"])
def test_what_an_adapter_trains(method: str, rest: str, ia3: str) -> None:
    found = adapted(ia3 if method == "ia3" else method, rest)
    own, others = trained(found.model)
    mlp = {f"{name}.{kind}" for name in MLPS for kind in ("weight", "bias")}
    everything = {name for name, _ in bert().named_parameters()}
    assert others == (HEAD if rest == "freeze" else everything - mlp)
    parts = {
        "sparsegrad": [".sparsegrad_S.default"],
        "meprop": [".sparsegrad_S.default"],
        "lora": [".lora_A.default.weight", ".lora_B.default.weight"],
        "ia3": [".ia3_l.default"],
    }[method]
    assert own == {f"{name}{part}" for name in MLPS for part in parts}
    assert (found.calibration is not None) == (method == "sparsegrad")
    assert found.density == (0.01 if method == "meprop" else None)


def test_heads_are_saved_whole() -> None:
    """With `rest: train` too: "bert.pooler" and not "bert.pooler.dense", which is what PEFT would save by itself."""
    saved = adapted("lora", "train").model.peft_config["default"].modules_to_save
    assert {"bert.pooler", "classifier"} <= set(saved)
    assert "bert.embeddings.word_embeddings" in saved


@pytest.mark.parametrize("rest", ["freeze", "train"])
def test_what_full_trains(rest: str) -> None:
    model = adapted("full", rest).model
    mlp = {f"{name}.{kind}" for name in MLPS for kind in ("weight", "bias")}
    everything = {name for name, _ in model.named_parameters()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == (
        everything if rest == "train" else mlp | HEAD
    )


def test_fused_experts_are_adapted_by_both_methods_alike() -> None:
    """All experts of both blocks, or of one; none with bases that rotate both sides."""
    config = MixtralConfig(
        vocab_size=30, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    arguments = RunArguments(rest="freeze")
    for options, parameters in (({}, 2 * 2), ({"layers": [1]}, 2)):
        arguments.adapter = AdapterArguments(**options)
        for method, tensors in (("sparsegrad", 1), ("lora", 2)):
            with suppress_library_logs():
                model = find_method(method).adapt(MixtralForCausalLM(config), arguments.setup()).model
            own = [name for name, p in model.named_parameters() if p.requires_grad]
            assert len(own) == parameters * tensors
            assert all("experts" in name for name in own)
    for method in ("sparsegrad", "lora"):
        arguments.adapter = AdapterArguments(c=4, r=4)
        with pytest.raises(
            ValueError, match=r"fused experts, such as .* SparseGrad in its default form .* and by LoRA"
        ):
            find_method(method).adapt(MixtralForCausalLM(config), arguments.setup())
        with pytest.raises(ValueError, match=r"experts, which has parameters of its own .* use rest: freeze"):
            find_method(method).adapt(MixtralForCausalLM(config), RunArguments(rest="train").setup())


def test_matching_rank() -> None:
    """Cores of 16 by 8 and 8 by 16 in layers of 32 + 16: 128 entries, 48 a rank."""
    arguments = RunArguments()
    arguments.adapter.c = arguments.adapter.r = 0.5
    assert matching_rank(bert(), MLPS, arguments.adapter.sizes) == round(128 / 48)
    arguments.adapter.c = arguments.adapter.r = "full"
    assert matching_rank(bert(), MLPS, arguments.adapter.sizes) == round(512 / 48)
    arguments.adapter.c = 1
    assert matching_rank(bert(), MLPS, arguments.adapter.sizes) == 1  # 0.5 to 1
    arguments.adapter.c = "energy:0.9"
    with pytest.raises(ValueError, match=r"adapter.rank: the matching rank is not known"):
        matching_rank(bert(), MLPS, arguments.adapter.sizes)
    assert adapted("lora", "freeze", rank=5).model.peft_config["default"].r == 5


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("sparsegrad", {"k": 129, "c": 8, "r": 16}, r"at most 128 entries, .*layer.0.intermediate.dense .*16 by 8"),
        ("sparsegrad", {"k": 513, "c": "energy:0.9", "r": "full"}, r"adapter.k: expected at most 512"),
        ("meprop", {"k": 513}, r"adapter.k: expected at most 512 entries, .* trains \(32 by 16\); found 513"),
        ("sparsegrad", {"c": 17}, r"c, bert.encoder.layer.0.intermediate.dense: .* a count from 1 to 16"),
        ("sparsegrad", {"r": 17}, r"r, bert.encoder.layer.0.output.dense: .* a count from 1 to 16"),
        ("sparsegrad", {"target_modules": ["nothing"]}, r"no MLP layers found .*'nothing'.*name them"),
        ("lora", {"target_modules": "nothing"}, r"no MLP layers found .*'nothing'.*name them"),
    ],
)  # fmt: skip
def test_refused_before_any_work(method: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adapted(method, "freeze", **options)


def test_k_of_a_whole_core_is_allowed() -> None:
    assert adapted("sparsegrad", "freeze", k=128, c=8, r=16).k == 128


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"peft_type": "NONE_SUCH"}', '{"peft_type": "IA3", "r":'])
def test_a_method_file_that_is_not_a_peft_config(content: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"adapter_config.json: expected an adapter_config.json of PEFT"):
        adapted(str(path), "freeze")


def test_the_config_of_a_saved_adapter_is_calibrated_again(finished_run: Path, tiny_bert: Path) -> None:
    found = adapted(str(finished_run / "adapter" / "adapter_config.json"), "freeze")
    assert found.calibration is not None
    assert not found.model.peft_config["default"].calibrated
    assert trained(found.model)[1] == HEAD


def test_shared_weights_are_refused_if_the_rest_trains() -> None:
    model = bert()
    model.bert.embeddings.token_type_embeddings.weight = model.bert.embeddings.position_embeddings.weight
    with pytest.raises(ValueError, match=r"rest: train cannot save .*which share a weight; use rest: freeze"):
        find_method("sparsegrad").adapt(model, RunArguments(rest="train").setup())


def test_head_that_comes_with_the_model(tiny_bert: Path, tmp_path: Path) -> None:
    """It is kept if its size is right, and created anew otherwise."""
    import torch

    from sparsegrad_lab.tasks.kinds import KINDS
    from sparsegrad_lab.tasks.pretrained import load_tokenizer
    from sparsegrad_lab.tasks.task import TEXT, Task

    tokenizer, load_model = load_tokenizer(str(tiny_bert)), KINDS[TEXT].load_model
    three = load_model(str(tiny_bert), Task("x", ("text",), ("a", "b", "c"), ("accuracy",), {}), tokenizer)
    three.save_pretrained(tmp_path)  # type: ignore[operator]
    again = load_model(str(tmp_path), Task("x", ("text",), ("d", "e", "f"), ("accuracy",), {}), tokenizer)
    assert torch.equal(again.classifier.weight, three.classifier.weight)  # type: ignore[union-attr, arg-type]
    two = load_model(str(tmp_path), Task("x", ("text",), ("a", "b"), ("accuracy",), {}), tokenizer)
    assert two.classifier.weight.shape == (2, 16)  # type: ignore[union-attr]
    assert two.config.id2label == {0: "a", 1: "b"}  # type: ignore[union-attr]


def test_galore_without_its_package(arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setattr("sparsegrad_lab.methods.galore.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="method galore needs its package: pip install galore-torch"):
        arguments(tmp_path / "run", "--method", "galore").check()


def test_a_file_of_sparsegrad_is_calibrated_as_the_method(tmp_path: Path) -> None:
    """For the mean gradient, which gives the entries their scales; sizes of one's own for single gradients."""
    for number, config in enumerate([SparseGradConfig(), SparseGradConfig(c=8, r=8)]):
        config.save_pretrained(tmp_path / str(number))
        found = adapted(str(tmp_path / str(number) / "adapter_config.json"), "freeze").calibration
        assert found is not None
        assert found.mean_gradient is (number == 0)
