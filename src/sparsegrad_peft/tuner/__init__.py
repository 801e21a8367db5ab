"""SparseGrad as a PEFT adapter. Importing this package registers the method with PEFT.

    config             SparseGradConfig
    targets            which layers are the MLP's, by family or by structure
    layer              the state of one adapted weight: any number of adapters, merge, unmerge
    linear, experts    forward pass of an adapted linear layer, and of adapted fused experts
    decoding           updates prepared for one call of generate
    mixed_batch        an adapter of its own for each example of a batch
    model              which module is replaced by what; saving and loading
    adapters           find an adapter in a model, and the names of its layers
    bases, loading     how bases come into an adapter: from calibration, or from a file
    weights, fit       an adapter's file by layer; whether it belongs to an adapter
    checks             damaged numbers and impossible names are refused
    calibration        calibrate_adapter: bases for a new adapter
    refresh            refresh_adapter: new bases during training
    trainer            calibration and optimizer inside transformers.Trainer (trainer_batches, trainer_callbacks,
                       trainer_loss)
    combine            a weighted sum of adapters
    export, low_rank   an adapter as a LoRA adapter
    quantized, offload base layers that are quantized, or wait on the CPU or on disk
    peft_private       everything private of PEFT that the adapter relies on
    versions           the supported versions of PEFT and transformers

The mathematics is in `sparsegrad_peft.method`.
"""

from .versions import check_versions

check_versions()  # before an unsupported PEFT is imported

from .config import SparseGradConfig  # noqa: E402
from .model import SparseGradModel  # noqa: E402
from .peft_private import register  # noqa: E402

register(SparseGradConfig, SparseGradModel)
