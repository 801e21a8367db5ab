"""Any method of PEFT, from its own `adapter_config.json`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks.parse_files import read_json
from .method import CALIBRATION, LOOP, Adapted, Method, Setup
from .ranges import pattern_problems
from .settings import AdapterArguments, CalibrationArguments
from .sparsegrad import calibration_config

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

STARTS = ("eva", "lora_ga")
"Values of PEFT's `init_lora_weights` that need training batches."


class PeftFile(Method):
    """The method that a file names with `peft_type`.

    The file's `modules_to_save` overrides `rest`. The word "mlp" in its `target_modules` or `feedforward_modules` means
    the model's MLP layers.

    Args:
        path: the file.
    """

    summary = "any other method of PEFT"
    learning_rate = 2e-3
    reads = LOOP | CALIBRATION

    def __init__(self, path: str) -> None:
        self.path, self.name = path, Path(path).stem

    @cached_property
    def _content(self) -> dict[str, Any]:
        """The file's settings; none if it is malformed, which `problems` reports."""
        try:
            content = read_json(Path(self.path))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def ignores(self, setting: str) -> bool:
        """Also the settings of the calibration, but for SparseGrad; a start of LoRA reads its number of steps."""
        needed = CALIBRATION if self._content.get("peft_type") == "SPARSEGRAD" else frozenset[str]()
        if self._content.get("init_lora_weights") in STARTS:
            needed = frozenset({"calibration.n_steps"})
        return super().ignores(setting) or setting in CALIBRATION - needed

    def without_effect(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Which of the other layers train, if the file says so or its method trains none."""
        if self._content.get("modules_to_save") is not None:
            return {"rest": "modules_to_save in the file"}
        try:
            config = read_config(self.path)
        except ValueError:  # `problems` reports it
            return {}
        return {} if hasattr(config, "modules_to_save") else {"rest": f"peft_type {self._content['peft_type']}"}

    def problems(self, adapter: AdapterArguments, calibration: CalibrationArguments) -> list[str]:
        """The file is not a PEFT config, or the settings repeat what it says."""
        problems = (
            ["adapter.rank is for lora and galore; a PEFT config has its own"] if adapter.rank is not None else []
        )
        try:
            read_config(self.path)
        except ValueError as error:
            problems.append(str(error))
        return problems

    def why_not_four_bits(self, adapter: AdapterArguments) -> str | None:
        """A start that reads or changes the weights; SparseGrad's complete cores."""
        try:
            config = read_config(self.path)
        except ValueError:  # `problems` reports it
            return None
        if getattr(config, "original_space", False) or (hasattr(config, "sizes") and config.sizes.complete):
            return "with complete cores trains as many float32 entries as the weights have"
        start = getattr(config, "init_lora_weights", True)
        if start not in (True, False, "gaussian"):
            return f"with init_lora_weights {start!r} needs the unquantized weights"
        return None

    def target_layers(self, model: nn.Module, adapter: AdapterArguments) -> list[str]:
        """None that are known before PEFT reads the config."""
        return []

    def adapt(self, model: nn.Module, setup: Setup) -> Adapted:
        """Add the adapter. What the config says about a saved adapter (its base model, its shapes) is ignored."""
        from peft import get_peft_model

        from sparsegrad_peft.tuner.config import SparseGradConfig
        from sparsegrad_peft.tuner.targets import mlp_linears

        from .training.layers import modules_to_save
        from .training.lora_start import LoraStartTrainer

        config = read_config(self.path)
        for name in ("target_modules", "feedforward_modules"):
            if getattr(config, name, None) == "mlp":
                setattr(config, name, set(mlp_linears(model)))
        config.inference_mode, config.task_type, config.base_model_name_or_path = False, setup.task_type, None
        if getattr(config, "modules_to_save", None) is None and hasattr(config, "modules_to_save"):
            targets = mlp_linears(model, getattr(config, "target_modules", None)) if setup.train_rest else []
            config.modules_to_save = modules_to_save(model, targets, setup.heads, train_rest=setup.train_rest)
        calibration = trainer = None
        if isinstance(config, SparseGradConfig):
            config.forget_bases()  # they belong to the saved adapter
            calibration = calibration_config(setup.calibration.resolved(config.sizes))
        elif getattr(config, "init_lora_weights", None) in STARTS:
            calibration, trainer = calibration_config(setup.calibration), LoraStartTrainer
        with warnings.catch_warnings():
            # PEFT advises to keep EVA's adapter on the meta device until it starts, which saves little memory.
            warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False")
            return Adapted(get_peft_model(model, config), calibration, trainer=trainer)


def read_config(path: str) -> PeftConfig:
    """Read an `adapter_config.json` of PEFT.

    Raises:
        ValueError: the file is not one.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

    import sparsegrad_peft.tuner  # noqa: F401  # registers SparseGrad with PEFT

    try:
        settings = PeftConfig.from_json_file(path)
        peft_type = settings.pop("peft_type", None) if isinstance(settings, dict) else type(settings).__name__
        if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise ValueError(f"expected a peft_type such as LORA, found {peft_type!r}")
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if problems := pattern_problems(name, settings.get(name)):
                raise ValueError(problems[0])
        return PeftConfig.from_peft_type(peft_type=peft_type, **settings)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected an adapter_config.json of PEFT ({error})") from error
