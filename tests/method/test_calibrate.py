"""calibrate: Gram matrices equal the plain sums of `reference.grams`; peak memory is bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calibration import peak_bytes
from helpers import F64
from sparsegrad_peft import CalibrationConfig, Sizes, SparseGradLinear, Trajectory, calibrate, group_linears
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.calibrate import sums_device
from sparsegrad_peft.method.gradients import stream_gradients


class Blocks(nn.Module):
    """Blocks with roles of odd shapes: a Conv1D, a layer with one input, a layer with one output."""

    def __init__(self, blocks: int = 3, width: int = 5, inner: int = 7) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up": nn.Linear(width, inner),
                    "narrow": nn.Linear(inner, 1),
                    "wide": nn.Linear(1, inner, bias=False),
                    "down": Conv1D(width, inner),
                }
            )
            for _ in range(blocks)
        )
        self.drop = nn.Dropout(0.2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = torch.tanh(block["up"](x))
            y = y + block["wide"](torch.sin(3 * block["narrow"](y)))
            x = x + block["down"](self.drop(y))
        return x.square().mean()


def call(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def some_batches(n: int = 4, width: int = 5) -> list[Tensor]:
    return [torch.randn(6, width, dtype=F64) for _ in range(n)]


def collected(model: nn.Module, groups: dict[str, list[str]], batches: Any, **options: Any) -> dict[str, Tensor]:
    """Return, for each group, the stack of gradients (n, out, in) that the paper decomposes."""
    found: dict[str, list[Tensor]] = {name: [] for names in groups.values() for name in names}
    stream_gradients(
        model, list(found), lambda name, G: found[name].append(G.clone()), batches, loss_fn=call, **options
    )
    return {group: torch.stack([G for name in names for G in found[name]]) for group, names in groups.items()}


# The sums


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("gram_dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shared", [True, False])
def test_sums_of_all_groups(normalize: bool, gram_dtype: torch.dtype, tolerance: float, shared: bool) -> None:
    """Sums over layers and steps, also for sides of size 1 and for GPT-2's layout."""
    model, batches = Blocks(), some_batches()
    groups = group_linears(model, shared=shared)
    assert len(groups) == (4 if shared else 12)
    calibration = calibrate(
        model, batches, groups=groups, loss_fn=call, n_steps=4, normalize=normalize, gram_dtype=gram_dtype,
        progress=False,
    )  # fmt: skip
    stacks = collected(model, groups, batches, n_steps=4)
    assert list(calibration.groups) == list(groups)
    for name, gram in calibration.groups.items():
        expected_in, expected_out = reference.grams(stacks[name], normalize)
        assert gram.gram_in.dtype == gram.gram_out.dtype == gram_dtype
        assert gram.gram_in.shape == expected_in.shape
        assert float((gram.gram_in - expected_in).norm() / expected_in.norm()) < tolerance
        assert float((gram.gram_out - expected_out).norm() / expected_out.norm()) < tolerance
        assert gram.n_gradients == len(stacks[name]) == 4 * len(groups[name])
        assert (gram.name, gram.layers) == (name, tuple(groups[name]))
        if normalize:  # each gradient has energy 1
            assert float(gram.gram_in.trace()) == pytest.approx(gram.n_gradients, rel=tolerance)


@pytest.mark.parametrize(
    "options",
    [{"training": False}, {"training": True}, {"trajectory": Trajectory(lr=0.05)}, {"n_steps": 6}],
    ids=["eval", "train", "trajectory", "batches again"],
)
def test_options_reach_the_stream(options: dict[str, Any]) -> None:
    """In train mode dropout uses the same random numbers in both runs. Six steps start the four batches again."""
    model, batches = Blocks(), some_batches()
    groups = group_linears(model, ["up", "down"])
    options = {"n_steps": 4, **options}
    plain = calibrate(model, batches, groups=groups, loss_fn=call, progress=False, gram_dtype=F64, training=None,
                      n_steps=5)  # fmt: skip
    calibration = calibrate(model, batches, groups=groups, loss_fn=call, progress=False, gram_dtype=F64, **options)
    stacks = collected(model, groups, batches, **options)
    for name, gram in calibration.groups.items():
        expected_in, expected_out = reference.grams(stacks[name])
        torch.testing.assert_close(gram.gram_in, expected_in, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(gram.gram_out, expected_out, rtol=1e-11, atol=1e-14)
        assert not torch.allclose(gram.gram_in, plain.groups[name].gram_in)


def test_without_groups_every_linear_layer_is_taken() -> None:
    model, batches = Blocks(), some_batches()
    calibration = calibrate(model, batches, loss_fn=call, n_steps=1, progress=False)
    assert {name: list(gram.layers) for name, gram in calibration.groups.items()} == group_linears(model)


def test_step_in_place_of_batches() -> None:
    model, batches = Blocks(), some_batches()
    groups = group_linears(model, ["up"])
    stream = iter(batches)
    one = calibrate(model, groups=groups, step=lambda: model(next(stream)), n_steps=4, progress=False)
    other = calibrate(model, batches, groups=groups, loss_fn=call, n_steps=4, progress=False)
    assert torch.equal(one.groups["blocks.*.up"].gram_in, other.groups["blocks.*.up"].gram_in)


def test_sparsegrad_layers_give_the_gradient_of_the_whole_weight() -> None:
    """As a refresh needs it: the sums equal those of plain layers with the trained weights."""
    model, batches = Blocks(), some_batches()
    groups = group_linears(model, ["up"])
    basis = calibrate(model, batches, groups=groups, loss_fn=call, n_steps=4, progress=False, gram_dtype=F64).bases(
        c=3, r=3, dtype=F64
    )["blocks.*.up"]
    for block in model.blocks:
        block["up"] = SparseGradLinear.from_linear(block["up"], basis)
        with torch.no_grad():
            block["up"].S.normal_()
    options: dict[str, Any] = {"groups": groups, "loss_fn": call, "n_steps": 4, "progress": False, "gram_dtype": F64}
    found = calibrate(model, batches, **options).groups["blocks.*.up"]
    for block in model.blocks:
        block["up"] = block["up"].to_linear()
    expected = calibrate(model, batches, **options).groups["blocks.*.up"]
    torch.testing.assert_close(found.gram_in, expected.gram_in, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.gram_out, expected.gram_out, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("of_weights", "given", "expected"), [
    ("cuda:1", None, "cuda:1"), ("mps", None, "cpu"), ("mps", "mps", "mps"), ("cuda", "cpu", "cpu")
])  # fmt: skip
def test_where_the_sums_live(of_weights: str, given: str | None, expected: str) -> None:
    assert sums_device(CalibrationConfig(gram_device=given), torch.device(of_weights)) == torch.device(expected)


def test_gram_device() -> None:
    """On another device than the layers'. The device is `meta`, which every machine has."""
    model, batches = Blocks(1), some_batches(1)
    options: dict[str, Any] = {"loss_fn": call, "n_steps": 1, "progress": False}
    default = calibrate(model, batches, **options)
    on_cpu = calibrate(model, batches, gram_device="cpu", **options)
    on_meta = calibrate(model, batches, gram_device=torch.device("meta"), **options)
    for name, gram in on_cpu.groups.items():
        assert gram.gram_in.device.type == gram.gram_out.device.type == "cpu"
        assert torch.equal(gram.gram_in, default.groups[name].gram_in)
        assert on_meta.groups[name].gram_in.device.type == "meta"


@pytest.mark.parametrize("training", [True, False])
def test_two_runs_agree_to_the_bit(training: bool) -> None:
    """Also with dropout: the random number generators are restored after the first run."""
    model, batches = Blocks(), some_batches()
    one, two = (calibrate(model, batches, loss_fn=call, n_steps=5, training=training, progress=False) for _ in range(2))
    torch.rand(1)
    third = calibrate(model, batches, loss_fn=call, n_steps=5, training=training, progress=False)
    for name, gram in one.groups.items():
        assert torch.equal(gram.gram_in, two.groups[name].gram_in)
        assert torch.equal(gram.gram_out, two.groups[name].gram_out)
        assert torch.equal(gram.gram_in, third.groups[name].gram_in) != training  # other random numbers, if it has any
    for name, basis in one.bases().items():
        other = two.bases()[name]
        assert torch.equal(basis.U, other.U)
        assert torch.equal(basis.V, other.V)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_called_where_gradients_are_off(mode: Callable[[], Any]) -> None:
    model, batches = Blocks(), some_batches()
    expected = calibrate(model, batches, loss_fn=call, n_steps=2, progress=False)
    with mode():
        found = calibrate(model, batches, loss_fn=call, n_steps=2, progress=False)
    for name, gram in expected.groups.items():
        assert torch.equal(found.groups[name].gram_in, gram.gram_in)
        assert torch.equal(found.groups[name].gram_out, gram.gram_out)


def test_under_autocast_the_sums_stay_accurate() -> None:
    """The model computes in bfloat16; the sums of its gradients and the bases do not."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    batches = [torch.randn(8, 6) for _ in range(3)]
    groups = {"up": ["0"]}
    stacks: list[Tensor] = []

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        y = model(batch)
        assert y.dtype == torch.bfloat16
        return y.float().square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream_gradients(model, ["0"], lambda _, G: stacks.append(G.clone()), batches, loss_fn=loss_fn, n_steps=3)
        calibration = calibrate(model, batches, groups=groups, loss_fn=loss_fn, n_steps=3, progress=False)
        calibration.bases()
    expected_in, expected_out = reference.grams(torch.stack(stacks))
    torch.testing.assert_close(calibration.groups["up"].gram_in, expected_in)
    torch.testing.assert_close(calibration.groups["up"].gram_out, expected_out)


# Memory


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
def test_extra_memory_is_the_gram_matrices_and_one_gradient(normalize: bool, gram_dtype: torch.dtype) -> None:
    """Compared with the same backward passes with every gradient dropped. It does not depend on the number of steps."""
    model = Blocks(blocks=3, width=96, inner=160).float()
    groups = group_linears(model, ["up", "down"])
    names = [name for layers in groups.values() for name in layers]
    batches = [torch.randn(8, 96) for _ in range(4)]
    config = CalibrationConfig.paper(n_steps=4, normalize=normalize, gram_dtype=gram_dtype)
    stream_gradients(model, names, lambda *_: None, batches[:1], loss_fn=call, n_steps=1)  # what is made once only

    dropped = peak_bytes(lambda: stream_gradients(model, names, lambda *_: None, batches, loss_fn=call, n_steps=4))
    kept = peak_bytes(lambda: calibrate(model, batches, groups=groups, loss_fn=call, config=config, progress=False))
    stacked = peak_bytes(lambda: collected(model, groups, batches, n_steps=4))
    size = gram_dtype.itemsize
    gram, gradient = size * len(groups) * (96**2 + 160**2), size * 96 * 160
    assert kept - dropped <= gram + gradient
    assert kept - dropped >= gram  # the count sees what there is
    assert stacked - dropped >= 4 * len(names) * 4 * 96 * 160  # and would see gradients that are kept


# Configuration and messages


def test_config_or_single_fields() -> None:
    model, batches = Blocks(), some_batches()
    config = CalibrationConfig.paper(n_steps=2, normalize=True, gram_dtype=F64)
    one = calibrate(model, batches, loss_fn=call, progress=False, config=config)
    other = calibrate(model, batches, loss_fn=call, progress=False, n_steps=2, normalize=True, gram_dtype=F64)
    assert one.config == other.config == config
    for name, gram in one.groups.items():
        assert torch.equal(gram.gram_in, other.groups[name].gram_in)
    with pytest.raises(ValueError, match="either config or single fields, found both: config and n_steps, normalize"):
        calibrate(model, batches, loss_fn=call, config=config, n_steps=2, normalize=True)
    with pytest.raises(TypeError, match=r"unknown options steps for calibration; .*; did you mean n_steps"):
        calibrate(model, batches, loss_fn=call, steps=2)


def test_layers_of_a_group_share_a_shape() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"group 'mlp': the layers of a group share a shape, .*\(4, 3\).*\(3, 4\)"):
        calibrate(model, groups={"mlp": ["0", "1"]}, step=lambda: model(torch.ones(1, 3)).sum())


def test_groups_of_layers_that_are_not_there() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with pytest.raises(ValueError, match="group 'mlp': the model has no modules named 5"):
        calibrate(model, groups={"mlp": ["0", "5"]}, step=lambda: model(torch.ones(1, 3)).sum())
    with pytest.raises(TypeError, match=r"1: expected a torch\.nn\.Linear or a Conv1D, found ReLU"):
        calibrate(model, groups={"mlp": ["0", "1"]}, step=lambda: model(torch.ones(1, 3)).sum())


@pytest.mark.parametrize("groups", [{"a": ["0"], "b": ["0"]}, {"a": ["0", "0"]}])
def test_a_layer_belongs_to_one_group(groups: dict[str, list[str]]) -> None:
    """Otherwise its gradients would be in the sums of the last group only."""
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"0 is named twice, in groups 'a' and '[ab]'"):
        calibrate(model, groups=groups, step=lambda: model(torch.ones(1, 3)).sum(), progress=False)


def test_a_group_without_gradient_is_refused_by_name() -> None:
    """A gradient that is zero everywhere has no directions. The message names the group and its layers."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    calibration = calibrate(
        model, groups={"first": ["0"], "second": ["1"]}, step=lambda: 0 * model(torch.ones(1, 3)).sum(), n_steps=2,
        progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"group 'first' \(0\), input side has energy 0: no gradient reached these"):
        calibration.bases()


def test_bases_take_sizes_and_type() -> None:
    model = Blocks()
    calibration = calibrate(model, some_batches(), loss_fn=call, n_steps=4, progress=False, gram_dtype=F64)
    bases = calibration.bases(c=1, r="full", dtype=F64)
    assert list(bases) == list(calibration.groups)
    assert {name: (tuple(b.U.shape), tuple(b.V.shape)) for name, b in bases.items()} == {
        "blocks.*.up": ((1, 5), (7, 7)),
        "blocks.*.narrow": ((1, 7), (1, 1)),
        "blocks.*.wide": ((1, 1), (7, 7)),
        "blocks.*.down": ((1, 7), (5, 5)),
    }
    assert all(b.U.dtype == F64 and b.layers == calibration.groups[name].layers for name, b in bases.items())
    default = calibration.bases()
    assert all(b.U.dtype == torch.float32 and b.is_complete for b in default.values())


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The bar goes to stderr; stdout belongs to the program."""
    calibrate(Blocks(), some_batches(), loss_fn=call, n_steps=2, progress=progress).bases(c=1, r=1, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("Calibrating" in captured.err) == ("Making bases" in captured.err) == progress
    assert (captured.err != "") == progress


def test_progress_bar_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(Blocks(1), some_batches(), loss_fn=call, n_steps=2)
    assert "Calibrating" in capsys.readouterr().err


def test_scales_of_single_gradients_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Their sums do not show what the steps have in common, so an exponent changes nothing."""
    model, x = nn.Linear(6, 5), torch.randn(4, 6)
    for mean_gradient in (False, True):
        found = calibrate(
            model, [x], loss_fn=lambda net, batch: net(batch).square().sum(), n_steps=2, mean_gradient=mean_gradient
        )
        for exponent in (0.0, 1.5):
            caplog.clear()
            found.bases(c=2, r=2, exponent=exponent)
            assert ("all scales are 1" in caplog.text) is (exponent > 0 and not mean_gradient)


def test_scales_of_one_step_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """One step has nothing in common with others."""
    model, x = nn.Linear(6, 5), torch.randn(4, 6)
    found = calibrate(model, [x], loss_fn=lambda net, batch: net(batch).square().sum(), n_steps=1, mean_gradient=True)
    found.bases(c=2, r=2)
    assert "scales" not in caplog.text
    found.bases(c=2, r=2, exponent=1.5)
    assert "in 1 of 1 groups" in caplog.text
    assert "all scales are 1" in caplog.text


def test_a_weight_of_two_modules_is_not_calibrated() -> None:
    """As the output layer of a language model, which is tied to the embeddings."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    batches = [torch.arange(7)]
    assert list(calibrate(model, batches, loss_fn=lambda m, x: m(x).square().mean(), n_steps=1).groups) == ["1"]
    with pytest.raises(ValueError, match=r"0 and 2 share one weight tensor.* leave 2 out"):
        calibrate(model, batches, groups={"out": ["2"]}, loss_fn=lambda m, x: m(x).square().mean(), n_steps=1)


@pytest.mark.parametrize("neurons", [True, False])
@pytest.mark.parametrize("energy", [0.5, 0.999])
def test_the_trained_share_holds_for_a_share_of_energy(neurons: bool, energy: float) -> None:
    """`wide` is as many as make the share, whatever the number of directions turns out to be."""
    model = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 24))
    sizes = Sizes(narrow=f"energy:{energy}", wide=None, share=0.05, neurons=neurons)
    options = {"config": CalibrationConfig(n_steps=6), "progress": False}
    batches = [torch.randn(8, 24) for _ in range(6)]
    bases = calibrate(model, batches, sizes=sizes, loss_fn=lambda net, x: net(x).square().mean(), **options).bases()
    directions = {len(basis.U if basis.in_features == 24 else basis.V) for basis in bases.values()}
    assert (min(directions) < 8) is (energy == 0.5)
    for basis in bases.values():
        r, c = basis.core_shape(basis.out_features, basis.in_features)
        assert r * c / (24 * 96) == pytest.approx(0.05, rel=0.3)


def test_sizes_and_rows_of_a_side_together() -> None:
    model, batches = Blocks(), some_batches()
    found = calibrate(model, batches, loss_fn=call, n_steps=1, progress=False)
    with pytest.raises(ValueError, match=r"pass either sizes or c and r, found both: c = 1, r = 1, and c=2, r=None"):
        found.bases(sizes=Sizes(c=1, r=1), c=2)
    with pytest.raises(ValueError, match="exponent must be at least 0, found -1"):
        found.bases(exponent=-1)


def test_bases_have_the_sizes_of_the_calibration_by_default() -> None:
    model, batches = Blocks(), some_batches()
    found = calibrate(model, batches, loss_fn=call, n_steps=1, sizes=Sizes(c=1, r=1), progress=False)
    rows = {(len(basis.V), len(basis.U)) for basis in found.bases().values()}
    assert rows == {(1, 1)}
    complete = found.bases(c="full")
    assert all((len(basis.V), len(basis.U)) == found.groups[name].shape for name, basis in complete.items())
