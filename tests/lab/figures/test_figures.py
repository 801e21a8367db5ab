"""Figures: the numbers agree with counts made by hand, the SVGs are complete, and equal numbers give equal bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.figures import touched, update_norms
from sparsegrad_lab.figures.ageing import energy_shares
from sparsegrad_lab.figures.cells import log_magnitude, pool_cells, share_of_cell
from sparsegrad_lab.figures.collect import ORIGINAL, collect
from sparsegrad_lab.figures.folder import read
from sparsegrad_lab.figures.gradient_before_after import colour_range
from sparsegrad_lab.figures.settings import FiguresArguments
from sparsegrad_lab.figures.setup import AGEING_BATCHES, ZERO_ROW_BATCHES, Setup, evenly_spaced, load_setup
from sparsegrad_lab.figures.strided_structure import TokenKind, classify, kind_shares
from sparsegrad_lab.figures.training import relative_change, train_sparsegrad
from sparsegrad_lab.run.exit_codes import ExitCode
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_peft import Basis
from tiny_runs import save_tokenizer

NAMES = [
    "data_flow", "gradient_before_after", "strided_structure", "spectrum", "ageing", "touched", "update_norms",
]  # fmt: skip
SAMPLES = Path(__file__).parents[2] / "samples"
SHORT = ["--figures.steps", "4", "--figures.points", "2", "--figures.batches", "1"]
Words = Callable[..., list[str]]


@pytest.fixture(scope="session")
def figures_of(words: Words) -> Words:
    """Return arguments for `sparsegrad figures` with the tiny model."""
    return lambda output, *more: ["figures", *words(output)[1:], *SHORT, *more]


@pytest.fixture(scope="session")
def folder(figures_of: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures as the command writes them; tests must not change them."""
    output = tmp_path_factory.mktemp("figures") / "tiny"
    assert main(figures_of(output)) == 0
    return output


@pytest.fixture(scope="session")
def data(folder: Path) -> dict[str, Any]:
    return read(folder)


@pytest.fixture
def setup(arguments: Callable[..., RunArguments], tmp_path: Path) -> Setup:
    """Model and batches without dropout, so that a gradient can be taken twice."""
    loaded = load_setup(arguments(tmp_path), None)
    for module in loaded.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return loaded


# What is drawn.


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_complete(name: str, folder: Path) -> None:
    text = (folder / f"{name}.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    first, second = list(root)[:2]
    assert first.tag.endswith("}title")
    assert second.tag.endswith("}desc")
    assert first.text
    assert len(second.text or "") > 60
    assert len(text) < 300_000
    assert "nan" not in (second.text or "")
    page = (folder / "index.md").read_text(encoding="utf-8")
    assert f"## {first.text}\n\n![{second.text}]({name}.svg)\n\n" in page


def test_equal_numbers_give_equal_bytes(data: dict[str, Any], folder: Path) -> None:
    for figure in (touched, update_norms):
        drawing = figure.draw(data)
        assert drawing.svg == (folder / f"{drawing.name}.svg").read_text(encoding="utf-8")


def test_redraw_from_the_first_file_format(
    figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers suffice: the run's model is not read. This format has no figures.npz and images in 8-bit base64."""
    shutil.copy(SAMPLES / "figures" / "figures.json", tmp_path)
    assert main(figures_of(tmp_path, "--figures.redraw", "true", "--model", "nowhere")) == 0
    output = capsys.readouterr().out
    assert "touched.svg: Which entries a run touches. Images of" in output
    assert output.endswith(f"written: {tmp_path}/index.md, figures.json, figures.npz and an SVG for each figure\n")
    assert {path.name for path in tmp_path.glob("*.svg")} == {f"{name}.svg" for name in NAMES}
    data = read(tmp_path)
    for role, shape in (("up", (32, 16)), ("down", (16, 32))):
        images, cells = data["gradient"][role]["images"], data["touched"]["images"][role]
        assert images.shape == (2, *shape)
        squares = np.sort(100 ** images[1].astype(float).ravel())[::-1]
        assert squares[:5].sum() / squares.sum() == pytest.approx(data["gradient"][role]["shares"][1], abs=0.02)
        assert np.isfinite(cells).sum() / 512 == pytest.approx(data["touched"]["touched"][role][-1])
    assert data["rows"]["tokens"]["last"][:, 0].tolist() == [TokenKind.live] * 8  # the classifier reads the first token


# What is measured.


def test_record(data: dict[str, Any], tiny_bert: Path) -> None:
    assert data["command"].startswith(f"sparsegrad figures --model {tiny_bert} --task files ")
    assert data["figures"] == {"steps": 4, "points": 2, "batches": 1, "layer": None, "redraw": False}
    assert data["environment"]["seed"] == 0
    assert (data["block"], data["blocks"]) == (0, 2)


def test_gradient(data: dict[str, Any]) -> None:
    assert list(data["gradient"]) == ["up", "down"]
    for role, shape in (("up", (32, 16)), ("down", (16, 32))):
        layer = data["gradient"][role]
        assert layer["images"].shape == (2, *shape)
        for image, share in zip(layer["images"], layer["shares"], strict=True):
            # The share computed again from the logarithms in the image: 5 of 512 entries.
            squares = np.sort(100 ** image.astype(float).ravel())[::-1]
            assert squares[:5].sum() / squares.sum() == pytest.approx(share, abs=0.02)


def test_zero_rows(data: dict[str, Any], arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """Padding has no gradient; in the last block only the first token of each row has one."""
    batch = next(load_setup(arguments(tmp_path), None).batches(ZERO_ROW_BATCHES))
    mask = batch["attention_mask"]
    assert 0 < mask.sum() < mask.numel()  # some padding
    last = mask.clone()
    last[:, 0] = TokenKind.live
    tokens = data["rows"]["tokens"]
    assert tokens["middle"].tolist() == (TokenKind.live * mask).tolist()
    assert tokens["last"].tolist() == last.tolist()
    padding = 1 - float(mask.sum()) / mask.numel()
    first = data["rows"]["shares"][0]
    assert first["middle"] == pytest.approx({"padding": padding, "unread": 0, "live": 1 - padding, "live_padding": 0},
                                            abs=1e-6)  # fmt: skip
    assert first["last"]["live"] == pytest.approx(8 / mask.numel(), abs=1e-6)
    assert [point["step"] for point in data["rows"]["shares"]] == [0, 2, 4]
    assert all(point[key]["live_padding"] == 0 for point in data["rows"]["shares"] for key in ("middle", "last"))


def test_spectrum(data: dict[str, Any]) -> None:
    """Half of each side was asked for (c = r = 0.5)."""
    sides = data["spectrum"]
    assert [(side["role"], side["side"], side["size"], side["kept"]) for side in sides] == [
        ("up", "input", 16, 8), ("up", "output", 32, 16), ("down", "input", 32, 16), ("down", "output", 16, 8),
    ]  # fmt: skip
    for side in sides:
        assert side["at"].tolist() == list(range(1, side["size"] + 1))  # few enough for all
        assert side["each"].tolist() == sorted(side["each"], reverse=True)
        assert side["summed"][-1] == pytest.approx(1)
        assert sum(side["each"][: side["kept"]]) == pytest.approx(side["share_kept"], rel=1e-3)
        assert side["summed"][side["kept"] - 1] == pytest.approx(side["share_kept"], abs=1e-6)


def test_ageing(data: dict[str, Any]) -> None:
    found = data["ageing"]
    assert (found["half"], found["measured"], len(found["ways"])) == (2, 4, 5)
    steps = {point["step"]: set(point["shares"]) for point in found["points"]}
    renewed = "along a trajectory, shared, renewed at step 2"
    assert steps[0] == set(found["ways"]) - {renewed}
    assert steps[2] == steps[4] == set(found["ways"])
    assert data["calibrated"] == "along a trajectory, per layer"  # what a run does by default


def test_energy_shares_by_hand(setup: Setup) -> None:
    """The original space, and a basis that puts a gradient of rank 1 into one entry. The model is restored."""
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    name = setup.layers[0]
    setup.model.train()
    setup.model(**next(setup.batches(AGEING_BATCHES))).loss.backward()
    G = setup.weight(name).grad
    assert G is not None
    squares = G.square().flatten().sort(descending=True).values
    expected = float(squares[:5].sum() / squares.sum())  # 1 % of 512
    U, _, V = torch.linalg.svd(G)
    setup.model.zero_grad()
    rotated = Basis(V.contiguous(), U.T.contiguous())
    bases = {ORIGINAL: {name: Basis.identity()}, "svd": {name: rotated}}
    shares = energy_shares(setup, bases, 1, lambda *_: None)
    assert shares[ORIGINAL] == {"up": pytest.approx(expected, abs=1e-5)}
    diagonal = rotated.to_basis(G).diagonal().square()
    assert shares["svd"] == {"up": pytest.approx(float(diagonal[:5].sum() / squares.sum()), abs=1e-4)}
    assert all(torch.equal(value, before[key]) for key, value in setup.model.state_dict().items())


def test_touched_is_what_is_counted(data: dict[str, Any]) -> None:
    measured = data["touched"]
    assert measured["selection"] == {"density": 0.01}
    for role in ("up", "down"):
        curve, image = measured["touched"][role], measured["images"][role]
        assert curve[:2] == [0, pytest.approx(5 / 512)]
        assert curve == sorted(curve)
        assert len(curve) == 5
        assert curve[-1] == pytest.approx(np.isfinite(image).sum() / 512)  # few enough entries that a cell is one
        assert set(image[np.isfinite(image)].tolist()) == {1.0}


def test_sparsegrad_run(setup: Setup, arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """In the original space only selected entries move, so the moved entries are the touched ones."""
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    ends: dict[str, Tensor] = {}
    name = setup.shown_layers["down"]

    def advance() -> None:
        ends[name] = setup.weight(name).detach().clone()

    run = arguments(tmp_path, "--adapter.k", "7")
    result = train_sparsegrad(setup, run, dict.fromkeys(setup.layers, Basis.identity()), 3, advance)
    moved = ends[name] != before[f"{name}.weight"]
    assert result["selection"] == {"k": 7}
    assert result["touched"]["down"][-1] == pytest.approx(int(moved.sum()) / 512)
    assert result["touched"]["down"][1] == pytest.approx(7 / 512)
    assert np.isfinite(result["images"]["down"]).tolist() == moved.tolist()
    change = (ends[name] - before[f"{name}.weight"]).norm() / before[f"{name}.weight"].norm()
    group = next(group for group, names in setup.groups.items() if name in names)
    assert result["norms"][group][0] == pytest.approx(float(change))
    assert all(torch.equal(value, before[key]) for key, value in setup.model.state_dict().items())


def test_update_norms(data: dict[str, Any]) -> None:
    for run in data["runs"].values():
        assert len(run["losses"]) == 4
        assert [len(norms) for norms in run["norms"].values()] == [2, 2]
        assert all(0 < norm < 1 for norms in run["norms"].values() for norm in norms)
    assert relative_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 6.5]])) == 0.5


# Parts.


def test_token_kinds() -> None:
    kinds = classify(torch.tensor([[True, False, False, True]]), torch.tensor([[1, 1, 0, 0]]))
    assert kinds.tolist() == [[TokenKind.live, TokenKind.unread, TokenKind.padding, TokenKind.live_padding]]
    assert kind_shares([kinds, torch.full((1, 4), TokenKind.padding)]) == {
        "padding": 0.625, "unread": 0.125, "live": 0.125, "live_padding": 0.125,
    }  # fmt: skip


def test_cells() -> None:
    matrix = torch.tensor([[100.0, -1.0], [0.0, 10.0]])
    assert np.nan_to_num(log_magnitude(matrix), nan=-9).tolist() == [[2, 0], [-9, 1]]
    assert colour_range(np.stack([log_magnitude(matrix)] * 2)) == (pytest.approx(0, abs=0.1), 2)
    zero = log_magnitude(torch.zeros(2, 2))
    assert np.isnan(zero).all()
    assert colour_range(zero) == (-1, 0)
    large = torch.zeros(8, 6)
    large[5, 1], large[0, 0] = 3.0, -7.0
    assert pool_cells(large, "max", 2).tolist() == [[0, 0], [3, 0]]
    twelfth = pytest.approx(1 / 12)
    assert pool_cells((large != 0).float(), "mean", 2).tolist() == [[twelfth, 0], [twelfth, 0]]
    assert np.nan_to_num(share_of_cell(large != 0), nan=-9).tolist()[0] == [1, -9, -9, -9, -9, -9]


def test_evenly_spaced() -> None:
    assert evenly_spaced(list("abc"), 6) == list("abc")
    assert evenly_spaced([str(n) for n in range(24)], 4) == ["0", "8", "15", "23"]


@pytest.mark.parametrize(
    ("steps", "points", "measured"), [(60, 4, [0, 20, 30, 40, 60]), (4, 3, [0, 2, 4]), (2, 2, [0, 1, 2])]
)
def test_measured_steps(steps: int, points: int, measured: list[int]) -> None:
    assert FiguresArguments(steps=steps, points=points).measured_steps == measured


def test_a_decoder_with_transposed_weights(arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """GPT-2's Conv1D stores its weight as (in, out). Its head reads the last token that is no padding."""
    from transformers import GPT2Config, GPT2Model

    words = save_tokenizer(tmp_path)
    config = GPT2Config(
        vocab_size=words, n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=2, eos_token_id=3
    )
    GPT2Model(config).save_pretrained(tmp_path)
    run = arguments(tmp_path / "out", "--model", str(tmp_path), "--adapter.shared", "false", "--calibration.normalize",
                    "false")  # fmt: skip
    data = collect(run, FiguresArguments(steps=2, points=2, batches=1, layer=2), progress=False)
    assert [data["gradient"][role]["images"].shape for role in ("up", "down")] == [(2, 64, 16), (2, 16, 64)]
    assert data["touched"]["images"]["up"].shape == (64, 16)
    assert data["calibrated"] == "this run's settings"
    assert len(data["ageing"]["ways"]) == 6
    for row in data["rows"]["tokens"]["last"]:
        real = row[row != TokenKind.padding].tolist()
        assert real == [TokenKind.unread] * (len(real) - 1) + [TokenKind.live]
    assert {side["group"] for side in data["spectrum"]} == {"transformer.h.2.mlp.c_fc", "transformer.h.2.mlp.c_proj"}
    assert touched.draw(data).svg.startswith("<svg")


# What cannot be done.


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--figures.steps", "1"), "figures.steps must be at least 2, found 1"),
        (("--figures.points", "1"), "figures.points must be at least 2, found 1"),
        (("--figures.points", "9"), "figures.points must be at most 5 with 4 training steps, found 9; lower"),
        (("--figures.batches", "0"), "figures.batches must be at least 1, found 0"),
        (("--figures.layer", "-1"), "figures.layer must be at least 0, found -1"),
        (("--figures.layer", "2"), "figures.layer must be from 0 to 1, found 2"),
        (("--method", "lora"), "method: figures show SparseGrad only, found 'lora'"),
        (("--seeds", "[1, 2]"), "seeds: figures show one run, found [1, 2]; give one seed"),
        (("--training.precision", "bf16"), "training.precision: figures measure gradients in fp32, found 'bf16'"),
        (("--training.batch_size", "0"), "training.batch_size must be at least 1, found 0"),
    ],
)
def test_refused(
    more: tuple[str, ...], expected: str, figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(figures_of(tmp_path / "out", *more)) == ExitCode.REFUSED
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--adapter.c", "99"), "found 99"),
        (("--figures.redraw", "true"), "figures.json: no such file, so there is nothing to redraw"),
    ],
)
def test_refused_after_a_look_at_the_files(
    more: tuple[str, ...], expected: str, figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(figures_of(tmp_path / "out", *more)) == ExitCode.FAILED
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_that_diverges(figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(figures_of(tmp_path / "out", "--training.learning_rate", "1e30")) == ExitCode.DIVERGED
    assert "; lower training.learning_rate, found 1e+30" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(
    figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    assert main(figures_of(tmp_path)) == 1
    assert "not empty and has no figures.json; choose another output folder" in capsys.readouterr().err
    assert main(figures_of(tmp_path / "note.txt")) == 1
    assert "expected a folder, found a file" in capsys.readouterr().err
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "mine"


def test_damaged_numbers(folder: Path, tmp_path: Path) -> None:
    """A record of something else; no arrays, cut-off ones, and an array that is missing."""
    record, arrays = tmp_path / "figures.json", tmp_path / "figures.npz"

    def refused() -> None:
        with pytest.raises(ValueError, match=r"figures\.json: expected the numbers of figures"):
            read(tmp_path)

    for text in ('{"task": 1}', "[]", "{"):
        record.write_text(text, encoding="utf-8")
        refused()
    record.write_bytes((folder / "figures.json").read_bytes())
    refused()
    arrays.write_bytes((folder / "figures.npz").read_bytes()[:-100])
    refused()
    arrays.write_bytes((folder / "figures.npz").read_bytes())
    record.write_text(record.read_text(encoding="utf-8").replace("rows/tokens/last", "rows/tokens/none"), "utf-8")
    refused()
