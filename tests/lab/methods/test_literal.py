"""Runs with the published layer give the numbers of the adapter with complete bases, and leave a plain model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForSequenceClassification, TrainerCallback

from sparsegrad_lab.run.finished_run import evaluate, merge, open_run
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train
from sparsegrad_lab.tasks.library_logs import suppress_library_logs
from tiny_runs import save_tokenizer

Arguments = Callable[..., RunArguments]
WHOLE_BASES = ("--adapter.c", "full", "--adapter.r", "full", "--adapter.shared", "true", "--adapter.density", "0.05")
LITERAL = ("--method", "literal", *WHOLE_BASES)


def losses(run: Path) -> list[float]:
    log = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return [entry[name] for entry in log for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.parametrize("rest", ["freeze", "train"])
@pytest.mark.parametrize("products", ["regular", "sparse"])
def test_equal_to_the_complete_adapter(products: str, rest: str, arguments: Arguments, tmp_path: Path) -> None:
    """Equal losses at each step and equal final weights. Without clipping, which the adapter does before selection."""
    common = ("--rest", rest, "--training.max_grad_norm", "0", "--training.learning_rate", "0.003", *WHOLE_BASES)
    (adapter,) = train(arguments(tmp_path / "adapter", *common), progress=False)
    asked = arguments(tmp_path / "literal", *common, "--method", "literal", "--adapter.products", products)
    (literal,) = train(asked, progress=False)
    torch.testing.assert_close(losses(tmp_path / "literal"), losses(tmp_path / "adapter"), rtol=1e-5, atol=1e-6)
    for name in ("score", "steps", "best_step"):
        assert literal[name] == adapter[name], name
    for name in ("adapter", "all"):  # numbers that train
        assert literal["trained_entries"][name] == adapter["trained_entries"][name], name
    assert 4 * 25 < literal["trained_entries"]["touched"] < literal["trained_entries"]["adapter"]  # 25 in each step
    assert literal["calibration"]["seconds"] > 0
    merged, _ = merge(tmp_path / "adapter")
    expected = AutoModelForSequenceClassification.from_pretrained(merged).state_dict()
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "literal" / "model").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_stopped_run_resumes(arguments: Arguments, tmp_path: Path) -> None:
    """A resumed run, which starts with plain layers, equals an uninterrupted one to the bit."""
    (expected,) = train(arguments(tmp_path / "whole", *LITERAL), progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(arguments(tmp_path / "stopped", *LITERAL), progress=False, callbacks=[Interrupt(8)])
    (found,) = train(arguments(tmp_path / "stopped", *LITERAL), progress=False)
    assert found["resumed"]
    for name in ("score", "scores", "best_step", "trained_entries"):
        assert found[name] == expected[name], name
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    weights = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / run / "model") for run in ("stopped", "whole")
    ]
    for one, other in zip(*(model.state_dict().values() for model in weights), strict=True):
        assert torch.equal(one, other)


def test_gpt2(arguments: Arguments, tmp_path: Path) -> None:
    """GPT-2's Conv1D stores its weight as (in, out), and the saved model must do so as well."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "bos_token_id": 2, "eos_token_id": 3}
    model = hf.GPT2Model(hf.GPT2Config(vocab_size=save_tokenizer(tmp_path / "base"), **sizes, pad_token_id=0))
    model.save_pretrained(tmp_path / "base")
    (result,) = train(arguments(tmp_path / "run", "--model", str(tmp_path / "base"), *LITERAL), progress=False)
    assert evaluate(tmp_path / "run")["validation"]["accuracy"] == result["score"]
    layer = open_run(tmp_path / "run").model.get_submodule("transformer.h.1.mlp.c_fc")
    assert type(layer).__name__ == "Conv1D"
    assert not torch.equal(layer.weight, model.get_submodule("h.1.mlp.c_fc").weight)


class Norms(TrainerCallback):
    """Records the norm of all gradients after clipping."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        assert any(grad.is_sparse for grad in grads)
        self.found.append(float(torch.cat([grad.to_dense().reshape(-1) for grad in grads]).norm()))


@pytest.mark.parametrize("most", [0.01, 1e6])
def test_clipping(most: float, arguments: Arguments, tmp_path: Path) -> None:
    norms = Norms()
    asked = arguments(tmp_path / "run", *LITERAL, "--training.max_grad_norm", str(most), "--training.epochs", "1")
    train(asked, progress=False, callbacks=[norms])
    assert len(norms.found) == 6
    if most < 1:
        assert norms.found == pytest.approx([most] * 6, rel=1e-4)
    else:
        assert all(0.03 < norm < 100 for norm in norms.found)  # left as they are


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            ("--training.gradient_accumulation", "2"),
            r"gradient_accumulation is for .*; found method 'literal'",
        ),
        (("--adapter.c", "0.5"), r"method literal has complete bases: .* found 0.5 and full"),
        (("--calibration.refresh", "3"), r"calibration.refresh is for sparsegrad; found method 'literal', which"),
    ],
)
def test_refused(more: tuple[str, ...], problem: str, arguments: Arguments, tmp_path: Path) -> None:
    with suppress_library_logs(), pytest.raises(ValueError, match=problem):
        train(arguments(tmp_path / "run", *LITERAL, *more), progress=False)
    assert not (tmp_path / "run").exists()
