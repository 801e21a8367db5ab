"""SparseGrad as a PEFT adapter: importing this registers the method with PEFT.

    config       SparseGradConfig
    targets      which layers are the MLP's, by architecture or by structure
    layer        one adapted layer: any number of adapters, merge, unmerge, mixed batches
    model        which module is replaced by what; saving and loading of shared bases
    bases        which layers share a basis, and how they get it
    calibration  bases for an adapter, after get_peft_model
    refresh      new bases for it in mid-training
    offload      adapters of models whose weights wait on the CPU or on disk
    trainer      calibration and optimizer inside transformers.Trainer
    combine      a weighted sum of adapters
    export       an adapter as a LoRA adapter
    register     the one contact with PEFT's registry

The mathematics is in `sparsegrad_peft.method`.
"""

from .config import SparseGradConfig
from .model import SparseGradModel
from .register import register

register(SparseGradConfig, SparseGradModel)
