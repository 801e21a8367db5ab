"""The model card beside an adapter: the code in it loads the adapter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsegrad_lab.run.train import train


@pytest.mark.parametrize("method", ["sparsegrad", "full"])
def test_the_code_in_the_card_loads_the_model(method: str, arguments: Callable[..., Any], tmp_path: Path) -> None:
    """Run in a fresh process: PEFT knows SparseGrad only after an import, which the card names."""
    [result] = train(arguments(tmp_path / "run", "--method", method, "--training.epochs", "1"), progress=False)
    folder = tmp_path / "run" / ("model" if method == "full" else "adapter")
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == ("transformers" if method == "full" else "peft")
    assert yaml.safe_load(header)["tags"] == [method]
    assert f"| validation | accuracy | {result['score']:.4f} |" in body
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]  # type: ignore[index]
    assert ("sparsegrad_peft" in code) == (method == "sparsegrad")
    script = f"{code.replace('PATH', str(folder))}\nprint(sum(p.numel() for p in model.parameters()))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8")) == result
