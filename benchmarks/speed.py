"""Measure time and memory of a training step: `sparsegrad bench`, from a checkout.

python benchmarks/speed.py --workload bert-base --tokens 2048 --json benchmarks/results/speed/bert-base.json
"""

from __future__ import annotations

import sys

from sparsegrad_lab.cli.bench import main

if __name__ == "__main__":
    main(sys.argv[1:])
