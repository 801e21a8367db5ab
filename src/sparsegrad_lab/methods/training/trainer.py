"""The trainer of a run, which methods specialise.

The trainers here override private methods of `transformers.Trainer` (5.5 to 5.23), for which it has no hook:

_get_train_sampler              an order of the rows that a resumed run repeats
_save_checkpoint                errors of a full disk that name the checkpoint
_clip_grad_norm                 method literal: COO gradients
_get_grad_norm                  the same, where gradients are not clipped
_load_from_checkpoint           method literal: layers that the checkpoint holds and a new model does not
_load_optimizer_and_scheduler   method galore: objects in the optimizer's state
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback

from sparsegrad_peft.method.calibrate import Calibration
from sparsegrad_peft.tuner.adapters import adapter_parameters
from sparsegrad_peft.tuner.calibration import adapter_statistics
from sparsegrad_peft.tuner.trainer import SparseGradTrainer

Context = Callable[[], AbstractContextManager[Any]]


class _BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint in a run folder that was moved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the folder of today; the Trainer forgets a path that is gone."""
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")


class MethodTrainer(SparseGradTrainer):
    """`transformers.Trainer` with SparseGrad's calibration and optimizer.

    Args:
        measuring: is entered around calibration.
        saving: is entered around the writing of a checkpoint.
        sampler: creates the order of the training rows from the data set; None: the Trainer's.
    """

    expects_adapter = False  # method full trains the weights themselves

    def __init__(
        self,
        *args: Any,
        measuring: Context,
        saving: Context,
        sampler: Callable[[Any], Sampler[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.measuring, self.saving, self.sampler = measuring, saving, sampler
        super().__init__(*args, **kwargs)
        self.add_callback(_BestCheckpoint())

    def _on_training_batches(self, calibrate: Callable[..., Any], **options: Any) -> Any:
        refreshes = self.optimizer is not None  # there are bases already
        with nullcontext() if refreshes else self.measuring():
            return super()._on_training_batches(calibrate, **options)

    def calibration_statistics(self) -> Calibration:
        """Collect the statistics to calibrate the adapter, and leave it as it is."""
        statistics: Calibration = self._on_training_batches(adapter_statistics, progress=not self.args.disable_tqdm)
        return statistics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.sampler is None:
            return super()._get_train_sampler(train_dataset)
        return self.sampler(self.train_dataset if train_dataset is None else train_dataset)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.saving():
            super()._save_checkpoint(*args, **kwargs)

    def parameter_counts(self, targets: Sequence[str]) -> dict[str, Any]:
        """Number of trained parameters, see `parameter_counts`. To be called before `make_plain`."""
        return parameter_counts(self.model, targets)

    def make_plain(self) -> None:
        """Give the model the form in which it is saved."""


def parameter_counts(model: nn.Module, targets: Sequence[str]) -> dict[str, int]:
    """Number of trained parameters.

    Args:
        model: the model, with or without an adapter.
        targets: names of the layers whose own weights are trained, for a model without an adapter.

    Returns:
        "adapter": trained entries of the adapter, or of the target layers. "touched": those of them that are not zero;
        SparseGrad's cores start at zero, so these are the entries that were ever selected. "all": all trained entries.
        "model": all entries.
    """
    own, has_cores = adapter_parameters(model)
    if not has_cores and not hasattr(model, "peft_config"):
        own = {id(p) for name in targets for p in model.get_submodule(name).parameters()}
    entries = (
        model.get_nb_trainable_parameters()[1]  # counts the entries of packed weights
        if isinstance(model, PeftModel)
        else sum(p.numel() for p in model.parameters())
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "adapter": sum(p.numel() for p in trainable if id(p) in own),
        "touched": sum(int(p.count_nonzero()) for p in trainable if id(p) in own),
        "all": sum(p.numel() for p in trainable),
        "model": entries,
    }
