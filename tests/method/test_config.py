"""Settings of calibration: the paper's defaults, the range of each, and the two updates of a trajectory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import F64
from sparsegrad_peft import CalibrationConfig, Trajectory
from sparsegrad_peft.method.config import normalized_step, resolve_config, sign_step
from sparsegrad_peft.method.sizes import Sizes


def test_defaults_are_those_of_the_paper() -> None:
    assert resolve_config(None, {}) == CalibrationConfig(
        n_steps=30, trajectory=None, normalize=False, mean_gradient=False, training=True, gram_device=None,
        gram_dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "mean_gradient"),
    [(None, False), (Sizes(c=4, r=4), False), (Sizes(narrow=4, wide=4), True), (Sizes(None, None), True)],
)
def test_products_of_steps_are_for_bases_of_the_default_form(sizes: Sizes | None, mean_gradient: bool) -> None:
    assert CalibrationConfig(n_steps=8).for_sizes(sizes) == CalibrationConfig(n_steps=8, mean_gradient=mean_gradient)
    assert CalibrationConfig.paper().for_sizes(sizes) == CalibrationConfig.paper()


def test_single_fields_replace_those_of_the_default() -> None:
    config = CalibrationConfig.paper(n_steps=7, normalize=True)
    assert resolve_config(None, {"n_steps": 3}, config) == CalibrationConfig.paper(n_steps=3, normalize=True)
    assert resolve_config(config, {}) is config
    with pytest.raises(ValueError, match="either config or single fields, found both: config and n_steps, normalize"):
        resolve_config(config, {"n_steps": 3, "normalize": False})
    with pytest.raises(TypeError, match=r"unknown options steps for calibration; .*; did you mean n_steps"):
        resolve_config(None, {"steps": 3})


@pytest.mark.parametrize("n_steps", [0, -1, 2.0, None, "3", True])
def test_number_of_steps(n_steps: Any) -> None:
    with pytest.raises(ValueError, match=f"n_steps must be an integer of at least 1, found {n_steps!r}"):
        CalibrationConfig.paper(n_steps=n_steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_gram_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"gram_dtype must be torch\.float32 or torch\.float64, found {dtype}"):
        CalibrationConfig.paper(gram_dtype=dtype)


@pytest.mark.parametrize("name", ["normalize", "mean_gradient", "training"])
def test_a_text_is_no_yes_or_no(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False.*found 'no'"):
        CalibrationConfig(**{name: "no"})


@pytest.mark.parametrize("lr", [0, -1e-4, float("nan"), float("inf"), "1e-4", True])
def test_trajectory_learning_rate(lr: Any) -> None:
    with pytest.raises(ValueError, match=r"Trajectory\.lr must be a number above 0 and finite, found"):
        Trajectory(lr=lr)


def test_step_lengths() -> None:
    """`normalized_step` is as long as `sign_step`, along the gradient; a zero gradient moves nothing."""
    start, gradient = torch.randn(3, 5, dtype=F64), torch.randn(3, 5, dtype=F64)
    steps = []
    for update in (sign_step, normalized_step):
        parameter = start.clone()
        update(parameter, gradient.clone(), 0.1)
        steps.append(start - parameter)
    torch.testing.assert_close(steps[0], 0.1 * gradient.sign())
    torch.testing.assert_close(steps[1], 0.1 * 15**0.5 * gradient / gradient.norm())
    torch.testing.assert_close(steps[0].norm(), steps[1].norm())
    for update in (sign_step, normalized_step):
        parameter = start.clone()
        update(parameter, torch.zeros(3, 5, dtype=F64), 0.1)
        assert torch.equal(parameter, start)


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_a_normalized_step_of_a_tiny_or_huge_gradient(scale: float) -> None:
    """In float32 the squares of these entries underflow or overflow."""
    gradient = torch.randn(3, 5)
    moved = torch.zeros(3, 5)
    normalized_step(moved, gradient * scale, 0.1)
    torch.testing.assert_close(moved, -0.1 * 15**0.5 * gradient / gradient.norm())


def test_bfloat16_weights_move_by_the_step_on_average() -> None:
    """Rounded to the nearest number, a weight of 0.05 would stay where it is. Equal weights move alike."""
    weights = torch.full((100, 200), 0.05, dtype=torch.bfloat16)
    moved = [weights.clone() for _ in range(2)]
    for weight in moved:
        for _ in range(5):
            sign_step(weight, torch.ones_like(weight), 1e-4)
    assert torch.equal(*moved)
    change = (moved[0].double() - weights.double()).mean()
    assert change == pytest.approx(-5e-4, rel=0.05)


def test_a_rate_is_no_trajectory() -> None:
    with pytest.raises(ValueError, match=r"trajectory must be None or a Trajectory, such as .*; found 0.0001"):
        CalibrationConfig(trajectory=1e-4)  # type: ignore[arg-type]
