"""The trainer of LoRA adapters that start from data: EVA (Paischer et al., 2024) and LoRA-GA (Wang et al., 2024).

EVA starts `A` at the leading directions of a layer's inputs. LoRA-GA starts `A` and `B` at leading singular vectors of
the gradient, and subtracts their product from the frozen weight. PEFT has both; this trainer gives them the training
batches. A finished LoRA-GA run is saved as a plain LoRA of twice the rank, since its weights fit a changed base model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sparsegrad_peft.method.config import CalibrationConfig
from sparsegrad_peft.method.gradients import stream_gradients

from .trainer import MethodTrainer

ADAPTER = "default"


class LoraStartTrainer(MethodTrainer):
    """Initializes the adapter before the first step. A resumed run repeats this, and keeps its checkpoint's weights."""

    def __init__(self, *args: Any, calibration: CalibrationConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, calibration=calibration, **kwargs)
        self.first_updates: dict[str, tuple[Tensor, Tensor]] = {}
        "LoRA-GA: name of a layer -> its first `A` (r, in) and `B` (out, r)"

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Initialize the adapter, then create the optimizer."""
        layers = lora_layers(self.model)
        loaded = {name: weights_of(layer) for name, layer in layers.items()}
        resumed = any(bool(B.any()) for _, B in loaded.values())
        with torch.random.fork_rng():  # the order of the training rows does not depend on the start
            self._on_training_batches(
                _start_eva if config_of(self.model).init_lora_weights == "eva" else _start_lora_ga
            )
        if config_of(self.model).init_lora_weights == "lora_ga":
            self.first_updates = {name: weights_of(layer) for name, layer in layers.items()}
        for name, layer in layers.items() if resumed else ():
            set_weights(layer, *loaded[name])
        return super().create_optimizer(model)

    def make_plain(self) -> None:
        """Move LoRA-GA's change of the base model into the adapter: `W' + s B A = W + s (B A - B0 A0)`."""
        if not self.first_updates:
            return
        for name, layer in lora_layers(self.model).items():
            A0, B0 = self.first_updates[name]
            A, B = weights_of(layer)
            layer.get_base_layer().weight.data.addmm_(B0, A0, alpha=layer.scaling[ADAPTER])
            layer.r[ADAPTER] = 2 * len(A)
            layer.lora_A[ADAPTER].out_features = layer.lora_B[ADAPTER].in_features = 2 * len(A)
            set_weights(layer, torch.cat([A, A0]), torch.cat([B, -B0], dim=1))
        config = config_of(self.model)
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha  # the same scaling
        config.init_lora_weights, config.lora_ga_config = True, None


def config_of(model: Any) -> LoraConfig:
    """Return the adapter's config."""
    config: LoraConfig = model.peft_config[ADAPTER]
    return config


def lora_layers(model: Any) -> dict[str, Any]:
    """Return the adapted layers by their names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def weights_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Return copies of `A` (r, in) and `B` (out, r)."""
    return layer.lora_A[ADAPTER].weight.detach().clone(), layer.lora_B[ADAPTER].weight.detach().clone()


def set_weights(layer: Any, A: Tensor, B: Tensor) -> None:
    """Give a layer other values of `A` and `B`."""
    layer.lora_A[ADAPTER].weight.data = A
    layer.lora_B[ADAPTER].weight.data = B


def _start_eva(
    model: Any, batches: Iterable[Any], loss_fn: Callable[..., Tensor], config: CalibrationConfig | None
) -> None:
    """Let PEFT compute EVA's `A`."""
    some = [dict(batch) for batch in itertools.islice(batches, _steps(config))]  # PEFT refuses a BatchEncoding
    tokens, eva = some[0].get("input_ids"), config_of(model).eva_config
    if eva is not None and tokens is not None and some[0]["labels"].shape != tokens.shape:
        eva.use_label_mask = False  # they are labels of rows, not of tokens
    # By default PEFT leaves out padded tokens. Images have none.
    all_inputs: dict[str, Any] = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    initialize_lora_eva_weights(
        model,
        some,
        forward_fn=loss_fn,
        adapter_name=ADAPTER,
        show_progress_bar=False,
        **(all_inputs if tokens is None else {}),
    )


def _start_lora_ga(
    model: Any, batches: Iterable[Any], loss_fn: Callable[..., Tensor], config: CalibrationConfig | None
) -> None:
    """Sum the gradients at the pretrained weights. PEFT computes LoRA-GA's `A` and `B`, and changes the weights."""
    base = {f"{name}.base_layer": layer for name, layer in lora_layers(model).items()}
    sums: dict[str, Tensor] = {}

    def add(name: str, G: Tensor) -> None:
        sums[name] = sums[name] + G if name in sums else G.clone()

    steps = _steps(config)
    with model.disable_adapter():
        stream_gradients(model, base, add, batches, loss_fn=loss_fn, n_steps=steps, trajectory=None)
    for name, layer in base.items():
        layer.get_base_layer()._peft_loraga_grad = sums.pop(name) / steps
        layer.lora_ga_init(ADAPTER, config_of(model).lora_ga_config)


def _steps(config: CalibrationConfig | None) -> int:
    return (config or CalibrationConfig()).n_steps
