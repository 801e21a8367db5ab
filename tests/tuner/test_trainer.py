"""SparseGrad in a real `transformers.Trainer`: calibration that leaves no trace, the optimizer's groups, refusals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from trainers import CALIBRATION, arguments, losses, rows, saved
from transformers import Trainer

from helpers import check_equal, tiny_batch, tiny_model, train_adapter, uncalibrated_adapter
from sparsegrad_peft import SparseGradAdamW, calibrate_adapter, param_groups
from sparsegrad_peft.tuner.trainer import SparseGradTrainer, TrainingDivergedError


def first_logit(model: nn.Module, batch: Any) -> Tensor:
    """A loss of another kind than the model's."""
    logits: Tensor = model(input_ids=batch["input_ids"]).logits
    return logits[:, 0].square().mean()


class CustomLoss(SparseGradTrainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return first_logit(model, inputs)


def test_trains_the_adapter_alone(tmp_path: Path) -> None:
    model = uncalibrated_adapter()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    head = {name: p.detach().clone() for name, p in model.named_parameters() if "modules_to_save" in name}
    trainer = SparseGradTrainer(model=model, args=arguments(tmp_path), train_dataset=rows(), density=0.2)
    assert not model.peft_config["default"].calibrated
    trainer.train()
    assert model.peft_config["default"].calibrated
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if not p.requires_grad} == set(frozen)
    for name, value in frozen.items():
        assert torch.equal(parameters[name], value), name
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    cores = {name: p for name, p in trained.items() if "sparsegrad_S" in name}
    assert len(cores) == 6
    assert set(trained) == set(cores) | set(head)
    for name, core in cores.items():
        assert core.shape in ((8, 8), (4, 16)), name  # r a quarter of the output, c half of the input
        assert 0 < core.count_nonzero() <= 4 * round(0.2 * 64), name  # in each of four steps a fifth
    assert all(not torch.equal(trained[name], value) for name, value in head.items())


@pytest.mark.parametrize("custom", [False, True])
def test_as_if_calibrated_by_hand_beforehand(custom: bool, tmp_path: Path) -> None:
    """Same statistics, so same data and loss; and the same weights, so order of data and dropout as without it."""
    kind, loss_fn = (CustomLoss, first_logit) if custom else (SparseGradTrainer, lambda m, batch: m(**batch).loss)
    options = {"args": arguments(tmp_path), "train_dataset": rows()}
    automatic = kind(model=uncalibrated_adapter(), calibration=CALIBRATION, **options)
    automatic.train()

    model = uncalibrated_adapter()
    loader = Trainer(model=model, **options).get_train_dataloader()  # seeds, too
    calibrate_adapter(model, loader, config=CALIBRATION, loss_fn=loss_fn, progress=False)
    by_hand = kind(model=model, **options)
    at_start = saved(model)
    by_hand.train()
    check_equal(saved(automatic.model), saved(model))
    assert losses(automatic) == losses(by_hand)
    assert any("sparsegrad_S" in n and not torch.equal(v, at_start[n]) for n, v in saved(model).items())


class Noisy(torch.utils.data.Dataset):
    """Rows that draw from all generators there are."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return rows()[i]


@pytest.mark.parametrize("n_steps", [2, 6, 8], ids=["within", "whole", "beyond an epoch"])
def test_calibration_leaves_no_trace(n_steps: int, tmp_path: Path) -> None:
    trainer = SparseGradTrainer(
        model=uncalibrated_adapter(), args=arguments(tmp_path), train_dataset=Noisy(),
        calibration=type(CALIBRATION)(n_steps=n_steps),
    )  # fmt: skip
    trainer.get_train_dataloader()  # the Trainer makes its own first
    accelerator = trainer.accelerator

    def traces() -> Any:
        generators = [torch.get_rng_state(), list(random.getstate()), list(np.random.get_state()[1])]  # noqa: NPY002
        announced = [loader for loader in accelerator.gradient_state.dataloader_references if loader is not None]
        return [generators, announced, trainer.model.training]

    before = traces()
    trainer.create_optimizer()
    assert trainer.model.peft_config["default"].calibrated
    check_equal(traces(), before)


def test_no_batches(tmp_path: Path) -> None:
    """Said, where there is nothing to calibrate on: fewer rows than a batch, and the last batch is dropped."""
    args = arguments(tmp_path, dataloader_drop_last=True)
    trainer = SparseGradTrainer(model=uncalibrated_adapter(), args=args, train_dataset=rows()[:3])
    with pytest.raises(ValueError, match="expected batches for 30 steps, found none"):
        trainer.create_optimizer()


def groups_of(model: nn.Module, folder: Path, **options: Any) -> list[dict[str, Any]]:
    args = arguments(folder, weight_decay=0.1)
    trainer = SparseGradTrainer(
        model=model,
        args=args,
        train_dataset=rows(),
        **{"calibration": CALIBRATION, "rest_learning_rate": 1e-3, **options},
    )
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in model.named_parameters()}  # the cores are new ones
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return [
        {name: group[name] for name in ("lr", "weight_decay", "sparse", "density", "k")}
        | {"names": {names[id(p)].removeprefix("base_model.model.") for p in group["params"]}}
        for group in groups
    ]


HEAD = "classifier.modules_to_save.default"
PLAIN = {"sparse": False, "density": None, "k": None}


@pytest.mark.parametrize("selection", [{}, {"density": 0.2}, {"k": 5}])
def test_groups_of_an_adapter(selection: dict[str, Any], tmp_path: Path) -> None:
    cores, decayed, not_decayed = groups_of(uncalibrated_adapter(), tmp_path, **selection)
    assert len(cores.pop("names")) == 6
    decay = 0.0 if selection else 0.1  # selected entries have none
    assert cores == {"lr": 1e-2, "weight_decay": decay, **PLAIN, "sparse": bool(selection), **selection}
    assert decayed == {"lr": 1e-3, "weight_decay": 0.1, **PLAIN, "names": {f"{HEAD}.weight"}}
    assert not_decayed == {"lr": 1e-3, "weight_decay": 0.0, **PLAIN, "names": {f"{HEAD}.bias"}}
    assert {group["lr"] for group in groups_of(uncalibrated_adapter(), tmp_path, rest_learning_rate=None)} == {1e-2}


def lora() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "intermediate.dense"], lora_bias=True)
    return get_peft_model(tiny_model("bert"), config)


def test_groups_of_another_adapter_and_of_a_plain_model(tmp_path: Path) -> None:
    own, own_biases, decayed, not_decayed = groups_of(lora(), tmp_path)
    assert all("lora_" in name and "bias" not in name for name in own["names"])
    assert all("lora_B.default.bias" in name for name in own_biases["names"])
    assert [group["weight_decay"] for group in (own, own_biases)] == [0.1, 0.0]
    assert [group["lr"] for group in (own, own_biases)] == [1e-2, 1e-2]
    assert decayed == {"lr": 1e-3, "weight_decay": 0.1, **PLAIN, "names": {f"{HEAD}.weight"}}
    assert not_decayed == {"lr": 1e-3, "weight_decay": 0.0, **PLAIN, "names": {f"{HEAD}.bias"}}

    decayed, not_decayed = groups_of(tiny_model("bert"), tmp_path, rest_learning_rate=None)
    assert [decayed["weight_decay"], not_decayed["weight_decay"]] == [0.1, 0.0]
    assert all("LayerNorm" in name or "bias" in name for name in not_decayed["names"])
    with pytest.raises(ValueError, match="rest_learning_rate is for what trains beside an adapter, found a model w"):
        groups_of(tiny_model("bert"), tmp_path)
    for model in (lora(), tiny_model("bert")):
        with pytest.raises(ValueError, match="density and k select from the cores of SparseGrad layers"):
            groups_of(model, tmp_path, density=0.1, rest_learning_rate=None)


def test_a_model_without_an_adapter_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for model in (lora(), uncalibrated_adapter()):
        SparseGradTrainer(model=model, args=arguments(tmp_path), train_dataset=rows()).create_optimizer()
    assert "without an adapter" not in caplog.text
    model = tiny_model("bert")
    SparseGradTrainer(model=model, args=arguments(tmp_path), train_dataset=rows()).create_optimizer()
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert f"SparseGradTrainer: found a model without an adapter, and trains its {trained:,} parameters" in caplog.text


@pytest.mark.parametrize("make_model", [lora, lambda: tiny_model("bert")], ids=["lora", "plain"])
def test_without_cores_it_is_the_trainer_with_adamw(make_model: Any, tmp_path: Path) -> None:
    options = {"args": arguments(tmp_path, optim="adamw_torch", weight_decay=0.1), "train_dataset": rows()}
    trainers = [kind(model=make_model(), **options) for kind in (SparseGradTrainer, Trainer)]
    for trainer in trainers:
        trainer.train()
    assert isinstance(trainers[0].optimizer.optimizer, SparseGradAdamW)
    check_equal(saved(trainers[0].model), saved(trainers[1].model))
    assert losses(trainers[0]) == losses(trainers[1])


def test_one_schedule_scales_all_groups(tmp_path: Path) -> None:
    args = arguments(tmp_path, warmup_steps=2, max_steps=4, weight_decay=0.1)
    trainer = SparseGradTrainer(
        model=uncalibrated_adapter(), args=args, train_dataset=rows(), calibration=CALIBRATION, rest_learning_rate=1e-3
    )
    rates = []
    trainer.log = lambda logs, *a, **k: rates.append([g["lr"] for g in trainer.optimizer.param_groups])
    trainer.train()
    shares = torch.tensor([0.5, 1.0, 0.5, 0.0])[:, None]  # after each step, that of the next
    torch.testing.assert_close(torch.tensor(rates[:4]), shares * torch.tensor([1e-2, 1e-3, 1e-3]))


def test_an_optimizer_that_was_passed_in(tmp_path: Path) -> None:
    model = uncalibrated_adapter()
    options: dict[str, Any] = {"args": arguments(tmp_path), "train_dataset": rows()}
    mine = SparseGradAdamW(param_groups(model), lr=1e-2)
    trainer = SparseGradTrainer(model=model, optimizers=(mine, None), **options)
    trainer.train()
    assert trainer.optimizer.optimizer is mine
    assert model.peft_config["default"].calibrated
    assert all(bool(p.any()) for name, p in model.named_parameters() if "sparsegrad_S" in name)
    again = SparseGradTrainer(model=uncalibrated_adapter(), optimizers=(mine, None), **options)
    with pytest.raises(ValueError, match="'default' is not calibrated, and the optimizer has already trained"):
        again.train()
    for lost in ({"density": 0.1}, {"k": 3}, {"rest_learning_rate": 1e-3}):
        with pytest.raises(ValueError, match=f"passed in, which ignores {next(iter(lost))}="):
            SparseGradTrainer(model=model, optimizers=(mine, None), **lost, **options)


@pytest.mark.parametrize(
    ("options", "rate", "words"),
    [
        ({"density": 5}, 1e-3, "density must be"),
        ({"k": 0}, 1e-3, "k must be between 1 and"),
        ({"k": 3, "density": 0.1}, 1e-3, "expected exactly one of k"),
        ({"rest_learning_rate": "1e-3"}, 1e-3, "rest_learning_rate must be a number .* found '1e-3'"),
        ({}, float("nan"), "learning_rate must be a number of at least 0 and finite, found nan"),
    ],
)
def test_settings_of_the_optimizer_are_refused_before_calibration(
    options: dict[str, Any], rate: float, words: str, tmp_path: Path
) -> None:
    args = arguments(tmp_path)
    args.learning_rate = rate
    with pytest.raises(ValueError, match=words):
        SparseGradTrainer(model=uncalibrated_adapter(), args=args, train_dataset=rows(), **options)


def test_another_kind_of_optimizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found optimizer adafactor, and this trainer uses SparseGradAdamW"):
        SparseGradTrainer(
            model=uncalibrated_adapter(), args=arguments(tmp_path, optim="adafactor"), train_dataset=rows()
        )
    with pytest.raises(ValueError, match="found optimizer SGD, and this trainer uses"):
        SparseGradTrainer(
            model=uncalibrated_adapter(), args=arguments(tmp_path), train_dataset=rows(),
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
        )  # fmt: skip


def test_weights_that_zero3_has_partitioned(tmp_path: Path) -> None:
    trainer = SparseGradTrainer(model=uncalibrated_adapter(), args=arguments(tmp_path), train_dataset=rows())
    next(trainer.model.parameters()).ds_id = 0  # DeepSpeed's mark
    with pytest.raises(ValueError, match="'default' is not calibrated, and DeepSpeed ZeRO-3 has already sharded"):
        trainer.create_optimizer()


class NotFinite(SparseGradTrainer):
    """From step 3 on."""

    value = float("nan")

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.value if self.state.global_step >= 2 else loss


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


class GradientNotFinite(SparseGradTrainer):
    """From step 3 on, behind a loss that is finite."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return _BadGradient.apply(loss) if self.state.global_step >= 2 else loss


def test_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    """The step would make the weights NaN, and the next checkpoint would hold them."""
    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    trainer = GradientNotFinite(model=uncalibrated_adapter(), args=args, train_dataset=rows(), calibration=CALIBRATION)
    with pytest.raises(TrainingDivergedError, match=r"the gradient of step 3 is not finite\. The step was not taken"):
        trainer.train()
    assert all(bool(value.isfinite().all()) for value in saved(trainer.model).values())
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value: float, tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    trainer = NotFinite(model=uncalibrated_adapter(), args=args, train_dataset=rows(), calibration=CALIBRATION)
    trainer.value = value
    with pytest.raises(
        TrainingDivergedError, match=f"the loss of step 3 is {value}. .*any checkpoints in {tmp_path} are good"
    ):
        trainer.train()
    assert all(bool(value.isfinite().all()) for value in saved(trainer.model).values())
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "checkpoint-2")
    check_equal(saved(loaded), saved(trainer.model))
    # Not asked to stop, it does not.
    trainer = NotFinite(model=uncalibrated_adapter(), args=args, train_dataset=rows(), stop_if_not_finite=False)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 6


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.3, 0.2])
    args = arguments(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer = SparseGradTrainer(
        model=uncalibrated_adapter(), args=args, train_dataset=rows(), eval_dataset=rows(), calibration=CALIBRATION,
        compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2
    at = [saved(PeftModel.from_pretrained(tiny_model("bert"), tmp_path / f"checkpoint-{step}")) for step in (2, 4)]
    check_equal(saved(trainer.model), at[0])
    moved = {name.split(".")[-2] for name in at[0] if not torch.equal(at[0][name], at[1][name])}
    assert moved == {"sparsegrad_S", "default"}  # cores and head; one basis for all steps


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradient_checkpointing(kind: str, tmp_path: Path) -> None:
    found = []
    for on in (True, False):
        trainer = SparseGradTrainer(
            model=uncalibrated_adapter(kind), args=arguments(tmp_path, gradient_checkpointing=on),
            train_dataset=rows(kind), calibration=CALIBRATION,
        )  # fmt: skip
        trainer.train()
        assert trainer.model.is_gradient_checkpointing is on
        found.append(saved(trainer.model))
    check_equal(*found)


class Precisions(SparseGradTrainer):
    """What a linear layer gives while the loss is computed, and whether that is in calibration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[tuple[bool, torch.dtype]] = []
        super().__init__(*args, **kwargs)
        for name, module in self.model.named_modules():
            if name.endswith("layers.0.self_attn.q_proj"):
                module.register_forward_hook(lambda m, x, y: self.seen.append((self.optimizer is None, y.dtype)))


def test_bfloat16_on_the_cpu(tmp_path: Path) -> None:
    trainers = []
    for bf16 in (True, False):
        args = arguments(tmp_path, bf16=bf16)
        trainer = Precisions(
            model=uncalibrated_adapter("llama"), args=args, train_dataset=rows("llama"), calibration=CALIBRATION
        )
        trainer.train()
        kind = torch.bfloat16 if bf16 else torch.float32
        assert trainer.seen == [(True, kind)] * 8 + [(False, kind)] * 4
        types = {value.dtype for name, value in trainer.model.state_dict().items() if "sparsegrad_basis" not in name}
        assert types == {torch.float32}
        assert all(p.any() for name, p in trainer.model.named_parameters() if "sparsegrad_S" in name)
        trainers.append(trainer)
    short, full = (torch.tensor(losses(trainer)) for trainer in trainers)
    torch.testing.assert_close(short, full, rtol=0.02, atol=0)


class Stream(torch.utils.data.IterableDataset):
    """Rows one after the other: from the start each time, or going on where it was left."""

    def __init__(self, *, once: bool) -> None:
        self.iterator = iter(rows(n=40)) if once else None

    def __iter__(self) -> Any:
        return self.iterator or iter(rows(n=40))


def test_data_that_can_be_read_only_once_are_not_eaten(tmp_path: Path) -> None:
    trainer = SparseGradTrainer(
        model=uncalibrated_adapter(), args=arguments(tmp_path), train_dataset=Stream(once=True), calibration=CALIBRATION
    )
    with pytest.raises(ValueError, match="can be read only once, and calibration would take its first batches"):
        trainer.train()
    model = uncalibrated_adapter()
    calibrate_adapter(model, [trainer.data_collator(rows())], n_steps=2, progress=False)
    again = SparseGradTrainer(model=model, args=arguments(tmp_path), train_dataset=trainer.train_dataset)
    again.train()  # all 40 rows are still there
    assert again.state.global_step == 4
    stream = SparseGradTrainer(
        model=uncalibrated_adapter(), args=arguments(tmp_path, max_steps=10), train_dataset=Stream(once=False),
        calibration=CALIBRATION,
    )  # fmt: skip
    stream.train()
    assert stream.state.global_step == 10


def test_an_adapter_that_has_learnt_without_calibration_is_refused(tmp_path: Path) -> None:
    """New bases would change what it has learnt. The message names the ways on."""
    model = uncalibrated_adapter()
    with pytest.warns(UserWarning, match="was not calibrated"):
        train_adapter(model.train(), tiny_batch("bert"), 1)
    before = saved(model)
    trainer = SparseGradTrainer(model=model, args=arguments(tmp_path), train_dataset=rows())
    with pytest.raises(ValueError, match=r"'default' has already learnt something .* with transformers\.Trainer; or"):
        trainer.train()
    check_equal(saved(model), before)


def test_calibration_of_another_type_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="calibration must be a CalibrationConfig or None, found"):
        SparseGradTrainer(
            model=uncalibrated_adapter(), args=arguments(tmp_path), train_dataset=rows(), calibration={"n_steps": 4}
        )
