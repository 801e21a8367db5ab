"""SparseGrad: fine-tune the MLP layers of transformers by sparse gradients in a learnt basis (EMNLP 2024).

`sparsegrad_peft.method` is the method in plain PyTorch, `sparsegrad_peft.tuner` the PEFT adapter. Names are loaded on
first use, so importing the package does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Basis": "method.basis",
    "Calibration": "method.calibrate",
    "CalibrationConfig": "method.config",
    "GramStatistics": "method.gram",
    "LiteralSparseGradLinear": "method.literal",
    "PairStatistics": "method.pairs",
    "ProjectedStatistics": "method.projected",
    "Sizes": "method.sizes",
    "SparseGradAdamW": "method.optim",
    "SparseGradCalibration": "tuner.trainer_callbacks",
    "SparseGradConfig": "tuner.config",
    "SparseGradLinear": "method.linear",
    "SparseGradTrainer": "tuner.trainer",
    "SparseGradTrainerMixin": "tuner.trainer",
    "Trajectory": "method.config",
    "TrainingDivergedError": "tuner.trainer_callbacks",
    "calibrate": "method.calibrate",
    "calibrate_adapter": "tuner.calibration",
    "exclude_bases_from_ddp": "method.ddp",
    "export_lora": "tuner.export",
    "group_linears": "method.groups",
    "normalized_step": "method.config",
    "param_groups": "method.surgery",
    "refresh": "method.refresh",
    "refresh_adapter": "tuner.refresh",
    "replace_linears": "method.surgery",
    "renew_positions": "method.refresh",
    "restore_linears": "method.surgery",
    "select_positions": "method.positions",
    "sign_step": "method.config",
    "sparse_dense_product": "method.selection",
    "topk_magnitude": "method.selection",
    "weight_bases": "method.surgery",
}
# The PEFT adapter's names are left out, so that `import *` works without PEFT.
__all__ = sorted(name for name, home in _HOME.items() if not home.startswith("tuner"))
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .method.basis import Basis as Basis
    from .method.calibrate import Calibration as Calibration
    from .method.calibrate import calibrate as calibrate
    from .method.config import CalibrationConfig as CalibrationConfig
    from .method.config import Trajectory as Trajectory
    from .method.config import normalized_step as normalized_step
    from .method.config import sign_step as sign_step
    from .method.ddp import exclude_bases_from_ddp as exclude_bases_from_ddp
    from .method.gram import GramStatistics as GramStatistics
    from .method.groups import group_linears as group_linears
    from .method.linear import SparseGradLinear as SparseGradLinear
    from .method.literal import LiteralSparseGradLinear as LiteralSparseGradLinear
    from .method.optim import SparseGradAdamW as SparseGradAdamW
    from .method.pairs import PairStatistics as PairStatistics
    from .method.positions import select_positions as select_positions
    from .method.projected import ProjectedStatistics as ProjectedStatistics
    from .method.refresh import refresh as refresh
    from .method.refresh import renew_positions as renew_positions
    from .method.selection import sparse_dense_product as sparse_dense_product
    from .method.selection import topk_magnitude as topk_magnitude
    from .method.sizes import Sizes as Sizes
    from .method.surgery import param_groups as param_groups
    from .method.surgery import replace_linears as replace_linears
    from .method.surgery import restore_linears as restore_linears
    from .method.surgery import weight_bases as weight_bases
    from .tuner.calibration import calibrate_adapter as calibrate_adapter
    from .tuner.config import SparseGradConfig as SparseGradConfig
    from .tuner.export import export_lora as export_lora
    from .tuner.refresh import refresh_adapter as refresh_adapter
    from .tuner.trainer import SparseGradTrainer as SparseGradTrainer
    from .tuner.trainer import SparseGradTrainerMixin as SparseGradTrainerMixin
    from .tuner.trainer_callbacks import SparseGradCalibration as SparseGradCalibration
    from .tuner.trainer_callbacks import TrainingDivergedError as TrainingDivergedError


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name == "peft":
            raise ImportError(f"{name} needs PEFT; in a checkout: pip install '.[peft]'") from error
        raise


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
