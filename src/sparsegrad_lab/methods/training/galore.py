"""The trainer of method `galore`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from galore_torch.galore_projector import GaLoreProjector
from torch import nn

from .trainer import MethodTrainer


class GaLoreTrainer(MethodTrainer):
    """Resumes from checkpoints whose optimizer state holds GaLore's projectors."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create GaLore's AdamW. Its warning advises PyTorch's AdamW, which does not project."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This implementation of AdamW is deprecated", FutureWarning)
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state. The Trainer loads tensors only, to the CPU, and knows no projectors."""
        with torch.serialization.safe_globals([GaLoreProjector]):
            super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        for parameter, state in optimizer.state.items():
            if "projector" in state and state["projector"].ortho_matrix is not None:
                state["projector"].ortho_matrix = state["projector"].ortho_matrix.to(parameter.device)
