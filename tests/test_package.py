"""The package from outside: public names, light imports, what each extra needs, versions that agree."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sparsegrad_peft
from helpers import PROJECT

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "tests" / "samples"


def run(code: str, *options: str, folder: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run code in a fresh process, where nothing is imported yet; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, env={**os.environ, **(environment or {})},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def required_packages(extra: str | None) -> set[str]:
    """Names of the distributions that `pip install .[extra]` installs, dependencies of dependencies included."""
    lines = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else [])]
    waiting = [Requirement(line) for line in lines]
    found: set[str] = set()
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found.add(canonicalize_name(requirement.name))
        for line in importlib.metadata.requires(requirement.name) or []:
            other = Requirement(line)
            extras = requirement.extras or {""}
            if other.marker is None or any(other.marker.evaluate({"extra": name}) for name in extras):
                waiting.append(other)
    return found


def run_with(extra: str | None, code: str, tmp_path: Path, folder: Path | None = None) -> str:
    """Run code where only the packages of `pip install .[extra]` are installed: links to those of this environment."""
    site = tmp_path / "site-packages"
    site.mkdir()
    for name in required_packages(extra):
        files = importlib.metadata.files(name) or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(importlib.metadata.distribution(name).locate_file(top))))
    assert not (site / "tensorly").exists()  # a package that only the tests need
    return run(code, "-S", folder=folder, environment={"PYTHONPATH": f"{site}{os.pathsep}{ROOT / 'src'}"})


@pytest.mark.parametrize("name", sparsegrad_peft._HOME)
def test_every_name_is_that_of_its_module(name: str) -> None:
    what = getattr(sparsegrad_peft, name)
    home = importlib.import_module(f"sparsegrad_peft.{sparsegrad_peft._HOME[name]}")
    assert what is getattr(home, name)
    assert what.__module__ == home.__name__  # defined there, not passed on from elsewhere
    assert what.__doc__


def test_all_names_by_star() -> None:
    names: dict[str, object] = {}
    exec("from sparsegrad_peft import *", names)
    assert set(sparsegrad_peft.__all__) <= set(names)
    assert len(sparsegrad_peft.__all__) >= 10
    assert set(sparsegrad_peft.__all__) <= set(dir(sparsegrad_peft))


def test_names_for_type_checkers_are_the_same() -> None:
    """The lazy table and the imports under TYPE_CHECKING are written twice; one must not fall behind."""
    source = Path(sparsegrad_peft.__file__).read_text()
    written = {
        name: module
        for module, name, _ in re.findall(r"^    from \.([\w.]+) import (\w+)( as \2)$", source, re.MULTILINE)
    }
    assert written == sparsegrad_peft._HOME


def test_the_public_names() -> None:
    """Additions are welcome; a name that is gone breaks its users."""
    promised = {
        "Basis", "Calibration", "CalibrationConfig", "LiteralSparseGradLinear", "SparseGradAdamW", "SparseGradLinear",
        "calibrate", "group_linears", "param_groups", "refresh", "replace_linears", "restore_linears",
        "sparse_dense_product", "topk_magnitude",
    }  # fmt: skip
    assert promised <= set(sparsegrad_peft.__all__)


def test_importing_the_package_does_not_import_torch() -> None:
    out = run(
        "import sys, sparsegrad_peft\n"
        "assert not {'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules), 'imported too early'\n"
        "assert not [name for name in sys.modules if name.startswith('sparsegrad_peft.')]\n"
        "print(sparsegrad_peft.__version__)\n"
        "sparsegrad_peft.Basis\n"
        "assert 'torch' in sys.modules\n",
        "-W", "error",
    )  # fmt: skip
    assert out == sparsegrad_peft.__version__


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'sparsegrad_peft' has no attribute 'SparseGradLayer'"):
        sparsegrad_peft.SparseGradLayer  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from sparsegrad_peft import nothing")
    assert not hasattr(sparsegrad_peft, "torch")


def test_without_peft_the_adapter_says_what_to_install() -> None:
    out = run(
        "import sys\n"
        "sys.modules['peft'] = None\n"
        "from sparsegrad_peft import *\n"
        "try:\n"
        "    from sparsegrad_peft import SparseGradConfig\n"
        "except ImportError as error:\n"
        "    print(error)\n",
        "-W", "error",
    )  # fmt: skip
    assert out == "SparseGradConfig needs PEFT; in a checkout: pip install '.[peft]'"


def test_the_method_needs_no_extra(tmp_path: Path) -> None:
    """`pip install .`: every name is there, and a step of training runs."""
    run_with(
        None,
        "import sparsegrad_peft as s\n"
        "for name in s.__all__:\n"
        "    getattr(s, name)\n"
        "import torch\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))\n"
        "loss = lambda m, b: m(b).square().mean()\n"
        "groups = s.group_linears(model, ['0', '2'])\n"
        "batches = [torch.randn(8, 6) for _ in range(30)]\n"
        "calibration = s.calibrate(model, batches, groups=groups, loss_fn=loss, progress=False)\n"
        "s.replace_linears(model, groups, calibration.bases())\n"
        "optimizer = s.SparseGradAdamW(s.param_groups(model, density=0.1), lr=1e-2)\n"
        "model(torch.randn(8, 6)).square().mean().backward()\n"
        "optimizer.step()\n"
        "assert s.restore_linears(model) == 2\n",
        tmp_path,
    )


def test_the_adapter_needs_the_extra_peft(tmp_path: Path) -> None:
    """`pip install .[peft]`: adapt, calibrate, train a step, save and load, with no package of the laboratory."""
    run_with(
        "peft",
        "import torch\n"
        "from peft import PeftModel, get_peft_model\n"
        "from transformers import BertModel\n"
        "from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups\n"
        f"load = lambda: BertModel.from_pretrained({str(SAMPLES / 'base')!r})\n"
        "ids = torch.arange(16).reshape(2, 8)\n"
        "loss = lambda m, b: m(input_ids=b).last_hidden_state.square().mean()\n"
        "model = get_peft_model(load(), SparseGradConfig(narrow=4, wide=3))\n"
        "calibrate_adapter(model, [ids], loss_fn=loss, n_steps=2, progress=False)\n"
        "optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)\n"
        "loss(model, ids).backward()\n"
        "optimizer.step()\n"
        f"model.save_pretrained({str(tmp_path / 'adapter')!r})\n"
        f"again = PeftModel.from_pretrained(load(), {str(tmp_path / 'adapter')!r}).eval()\n"
        "torch.testing.assert_close(loss(again, ids), loss(model.eval(), ids))\n",
        tmp_path,
    )


def test_the_command_needs_the_extra_lab(tmp_path: Path) -> None:
    """`pip install .[lab]`: train, evaluate and report."""
    out = run_with(
        "lab",
        "from sparsegrad_lab.cli.main import main\n"
        "words = ['--model', 'base', '--task', 'files', '--data.text', 'text', '--data.max_length', '24',\n"
        "    '--data.train_file', 'rows/train.csv', '--data.validation_file', 'rows/dev.csv',\n"
        "    '--training.epochs', '1', '--calibration.n_steps', '2']\n"
        f"assert main(['train', *words, '--output', {str(tmp_path / 'run')!r}]) == 0\n"
        f"assert main(['evaluate', {str(tmp_path / 'run')!r}]) == 0\n"
        f"assert main(['report', {str(tmp_path / 'run')!r}, '--output', {str(tmp_path / 'report')!r}]) == 0\n",
        tmp_path,
        folder=SAMPLES,
    )
    assert '"accuracy"' in out
    assert (tmp_path / "report" / "index.html").is_file()


def test_versions_for_pre_commit_are_those_of_the_checks() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    ruff = re.search(r"ruff-pre-commit\n    rev: v([\d.]+)\n", hooks)
    assert ruff is not None
    assert f"ruff=={ruff[1]}\n" in constraints
