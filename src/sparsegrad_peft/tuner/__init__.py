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
    peft_private everything private of PEFT that the adapter relies on
    versions     the supported versions of PEFT and transformers

The mathematics is in `sparsegrad_peft.method`.
"""

from .versions import check_versions

check_versions()  # before an unsupported PEFT is imported

from .config import SparseGradConfig  # noqa: E402
from .model import SparseGradModel  # noqa: E402
from .peft_private import register  # noqa: E402

register(SparseGradConfig, SparseGradModel)
