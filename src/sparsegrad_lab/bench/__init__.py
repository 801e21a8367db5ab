"""Time and memory of a training step, of SparseGrad and other methods: `sparsegrad bench`.

settings    what the user sets
workloads   models with random weights, and random batches
methods     the methods: each prepares a model and its optimizer
counts      multiply-adds of a step, from shapes
worker      one method in a process of its own
speed       runs all methods in turn and collects the result
"""

import logging

# PEFT imports bitsandbytes in every process, which then warns about missing kernels. The benchmark uses none of them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
