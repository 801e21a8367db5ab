"""Time and memory of a training step, SparseGrad's forms beside their peers: what `sparsegrad bench` runs."""

import logging

# PEFT imports it in every process; its kernels are of no use here, and it says so each time.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
