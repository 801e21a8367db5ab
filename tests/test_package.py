import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparsegrad_peft


def run(code: str) -> str:
    """In a process of its own, where nothing is imported yet; warnings are errors there too."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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
        "assert 'torch' in sys.modules\n"
    )
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
        "    print(error)\n"
    )
    assert out == "SparseGradConfig needs PEFT: pip install 'sparsegrad-peft[peft]'"


def test_neither_transformers_nor_peft_is_needed() -> None:
    """With both blocked, every name is there, and a step of training runs."""
    run(
        "import sys\n"
        "for name in ('transformers', 'peft', 'tensorly', 'hypothesis', 'pytest', 'beartype'):\n"
        "    sys.modules[name] = None\n"
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
        "assert s.restore_linears(model) == 2\n"
        "try:\n"
        "    import transformers\n"
        "except ImportError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError('transformers was not blocked')\n"
    )
