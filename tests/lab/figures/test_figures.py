"""The figures' numbers are what is counted by hand; each picture is whole, and the same numbers give the same bytes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.figures.arguments import FiguresArguments
from sparsegrad_lab.figures.collect import ORIGINAL, collect
from sparsegrad_lab.figures.image import decode, encode, log_pair, shrink
from sparsegrad_lab.figures.measure import LIVE, LIVE_PADDING, PADDING, UNREAD, kinds, look, shares_of
from sparsegrad_lab.figures.scene import Scene, evenly, prepare
from sparsegrad_lab.figures.train import published, relative_change
from sparsegrad_lab.figures.write import draw
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_peft import Basis
from tiny_runs import save_tokenizer

NAMES = [
    "data_flow", "gradient_before_after", "strided_structure", "spectrum", "ageing", "touched", "update_norms",
]  # fmt: skip
SHORT = ["--figures.steps", "4", "--figures.points", "2", "--figures.batches", "1"]
Words = Callable[..., list[str]]


@pytest.fixture(scope="session")
def figures_of(words: Words) -> Words:
    """Words for `sparsegrad figures` with the tiny model."""
    return lambda output, *more: ["figures", *words(output)[1:], *SHORT, *more]


@pytest.fixture(scope="session")
def folder(figures_of: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures as the command leaves them. Not to be changed."""
    output = tmp_path_factory.mktemp("figures") / "tiny"
    assert main(figures_of(output)) == 0
    return output


@pytest.fixture(scope="session")
def data(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def scene(arguments: Callable[..., RunArguments], tmp_path: Path) -> Scene:
    """Without dropout, so that a gradient can be taken twice."""
    found = prepare(arguments(tmp_path), None)
    for module in found.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return found


# What is drawn.


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_whole(name: str, folder: Path) -> None:
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


def test_the_same_numbers_give_the_same_bytes(data: dict[str, Any], folder: Path) -> None:
    drawings = draw(data)
    assert [drawing.name for drawing in drawings] == NAMES
    for drawing in drawings:
        assert drawing.svg() == (folder / f"{drawing.name}.svg").read_text(encoding="utf-8")


def test_texts_of_the_data_flow_do_not_overlap(data: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(data)[0].figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) > 25
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert overlapping == []
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.corners())


def test_redraw(folder: Path, figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the numbers alone: the run's model is not looked at."""
    shutil.copy(folder / "figures.json", tmp_path)
    words = figures_of(tmp_path, "--figures.redraw", "true", "--model", "nowhere")
    assert main(words) == 0
    shown = capsys.readouterr().out
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert "touched.svg: Which entries a run touches. Images of where" in shown
    assert shown.endswith(f"written: {tmp_path}/index.md, figures.json and an SVG each\n")


# What is measured.


def test_record(data: dict[str, Any], tiny_bert: Path) -> None:
    assert data["command"].startswith(f"sparsegrad figures --model {tiny_bert} --task files ")
    assert data["figures"] == {"steps": 4, "points": 2, "batches": 1, "layer": None, "redraw": False}
    assert data["environment"]["seed"] == 0
    assert (data["block"], data["blocks"]) == (0, 2)


def test_gradient(data: dict[str, Any]) -> None:
    assert list(data["gradient"]) == ["up", "down"]
    for role, shape in (("up", [32, 16]), ("down", [16, 32])):
        found = data["gradient"][role]
        assert found["shape"] == shape
        assert all(image["shape"] == shape for image in found["images"])
        before, after = found["images"]
        assert (before["low"], before["high"]) == (after["low"], after["high"])
        for image, share in zip(found["images"], found["shares"], strict=True):
            # The share once more, from the drawn 8-bit logarithms: 5 of 512 entries.
            squares = torch.tensor(100 ** decode(image).filled(-99)).flatten().sort(descending=True).values
            assert float(squares[:5].sum() / squares.sum()) == pytest.approx(share, abs=0.02)


def test_zero_rows(data: dict[str, Any], arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """Padding has none, the last block has one for each row: the first token's."""
    from sparsegrad_lab.figures.collect import FRESH

    scene = prepare(arguments(tmp_path), None)
    batch = next(scene.batches(FRESH))
    mask = batch["attention_mask"]
    assert 0 < mask.sum() < mask.numel()  # some padding
    expected = [["".join("2" if real else "0" for real in row) for row in mask.tolist()]]
    expected += [["2" + "".join("1" if real else "0" for real in row[1:]) for row in mask.tolist()]]
    assert [data["rows"]["tokens"][key] for key in ("middle", "last")] == expected
    padding = 1 - float(mask.sum()) / mask.numel()
    first = data["rows"]["shares"][0]
    assert first["middle"] == pytest.approx({"padding": padding, "unread": 0, "live": 1 - padding, "live_padding": 0},
                                            abs=1e-6)  # fmt: skip
    assert first["last"]["live"] == pytest.approx(8 / mask.numel(), abs=1e-6)
    assert [look["step"] for look in data["rows"]["shares"]] == [0, 2, 4]
    assert all(look[key]["live_padding"] == 0 for look in data["rows"]["shares"] for key in ("middle", "last"))


def test_spectrum(data: dict[str, Any]) -> None:
    """Half of each side was asked for (c = r = 0.5)."""
    sides = data["spectrum"]
    assert [(side["role"], side["side"], side["size"], side["kept"]) for side in sides] == [
        ("up", "input", 16, 8), ("up", "output", 32, 16), ("down", "input", 32, 16), ("down", "output", 16, 8),
    ]  # fmt: skip
    for side in sides:
        assert side["at"] == list(range(1, side["size"] + 1))  # few enough for all
        assert side["each"] == sorted(side["each"], reverse=True)
        assert side["summed"][-1] == pytest.approx(1)
        assert sum(side["each"][: side["kept"]]) == pytest.approx(side["share_kept"], rel=1e-3)
        assert side["summed"][side["kept"] - 1] == side["share_kept"]


def test_ageing(data: dict[str, Any]) -> None:
    found = data["ageing"]
    assert (found["half"], found["measured"], len(found["ways"])) == (2, 4, 5)
    steps = {point["step"]: set(point["shares"]) for point in found["points"]}
    renewed = "along a trajectory, shared, renewed at step 2"
    assert steps[0] == set(found["ways"]) - {renewed}
    assert steps[2] == steps[4] == set(found["ways"])
    assert data["calibrated"] == "along a trajectory, per layer"  # what a run does by default


def test_original_space_by_hand(scene: Scene) -> None:
    """And the basis that puts all of a gradient of rank 1 into one entry; the model is left as it was."""
    before = {name: value.clone() for name, value in scene.model.state_dict().items()}
    name = scene.layers[0]
    scene.model.train()
    scene.model(**next(scene.batches(7))).loss.backward()
    G = scene.weight(name).grad
    assert G is not None
    squares = G.square().flatten().sort(descending=True).values
    expected = float(squares[:5].sum() / squares.sum())  # 1 % of 512
    U, _, V = torch.linalg.svd(G)
    scene.model.zero_grad()
    turned = Basis(V.contiguous(), U.T.contiguous())
    bases = {ORIGINAL: {name: Basis.identity()}, "svd": {name: turned}}
    shares, tokens = look(scene, bases, {"first": name}, 1, 7, lambda: None)
    assert shares[ORIGINAL] == {"up": pytest.approx(expected, abs=1e-5)}
    diagonal = turned.to_basis(G).diagonal().square()
    assert shares["svd"] == {"up": pytest.approx(float(diagonal[:5].sum() / squares.sum()), abs=1e-4)}
    assert tokens["first"][0].shape == next(scene.batches(7))["input_ids"].shape
    assert all(torch.equal(value, before[key]) for key, value in scene.model.state_dict().items())


def test_touched_is_what_is_counted(data: dict[str, Any]) -> None:
    found = data["touched"]
    assert found["selection"] == {"density": 0.01}
    for role in ("up", "down"):
        curve, image = found["touched"][role], decode(found["images"][role])
        assert curve[:2] == [0, pytest.approx(5 / 512)]
        assert curve == sorted(curve)
        assert len(curve) == 5
        assert curve[-1] == pytest.approx(image.count() / 512)  # few enough entries that a cell is one
        assert set(image.compressed().tolist()) == {1.0}


def test_published_run(scene: Scene, arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """In the original space an entry that was never selected has not moved, so what has moved is what was touched."""
    before = {name: value.clone() for name, value in scene.model.state_dict().items()}
    ends: dict[str, Tensor] = {}
    name = scene.pair["down"]

    def advance() -> None:
        ends[name] = scene.weight(name).detach().clone()

    run = arguments(tmp_path, "--adapter.k", "7")
    found = published(scene, run, dict.fromkeys(scene.layers, Basis.identity()), 3, advance)
    moved = ends[name] != before[f"{name}.weight"]
    assert found["touched"]["down"][-1] == pytest.approx(int(moved.sum()) / 512)
    assert found["touched"]["down"][1] == pytest.approx(7 / 512)
    assert torch.equal(torch.tensor(~decode(found["images"]["down"]).mask), moved)
    change = (ends[name] - before[f"{name}.weight"]).norm() / before[f"{name}.weight"].norm()
    assert found["norms"][next(g for g in scene.groups if name in scene.groups[g])][0] == pytest.approx(float(change))
    assert all(torch.equal(value, before[key]) for key, value in scene.model.state_dict().items())


def test_update_norms(data: dict[str, Any]) -> None:
    for run in data["runs"].values():
        assert len(run["losses"]) == 4
        assert [len(norms) for norms in run["norms"].values()] == [2, 2]
        assert all(0 < norm < 1 for norms in run["norms"].values() for norm in norms)
    assert relative_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 6.5]])) == 0.5


# Parts.


def test_kinds() -> None:
    live = torch.tensor([[True, False, False, True]])
    mask = torch.tensor([[1, 1, 0, 0]])
    found = kinds(live, mask)
    assert found.tolist() == [[LIVE, UNREAD, PADDING, LIVE_PADDING]]
    assert shares_of([found, torch.full((1, 4), PADDING)]) == {
        "padding": 0.625, "unread": 0.125, "live": 0.125, "live_padding": 0.125,
    }  # fmt: skip


def test_images() -> None:
    matrix = torch.tensor([[100.0, -1.0], [0.0, 10.0]])
    before, after = log_pair(matrix, matrix.T)
    assert (before["low"], before["high"]) == (pytest.approx(0, abs=0.1), 2)
    values = decode(before)
    assert values.mask.tolist() == [[False, False], [True, False]]
    assert values.filled(9).tolist() == [[2, pytest.approx(0, abs=0.1)], [9, pytest.approx(1, abs=0.01)]]
    assert decode(after).mask.tolist() == [[False, True], [False, False]]
    zero = torch.zeros(2, 2)
    assert decode(log_pair(zero, zero)[0]).count() == 0
    large = torch.zeros(8, 6)
    large[5, 1], large[0, 0] = 3.0, -7.0
    assert shrink(large, "max", 2).tolist() == [[0, 0], [3, 0]]
    assert shrink((large != 0).float(), "mean", 2).tolist() == [[pytest.approx(1 / 12), 0], [pytest.approx(1 / 12), 0]]
    assert decode(encode(torch.tensor([[5.0, -5.0, math.nan]]), 0, 1)).filled(7).tolist() == [[1, 0, 7]]


def test_evenly() -> None:
    assert evenly(list("abc"), 6) == list("abc")
    assert evenly([str(n) for n in range(24)], 4) == ["0", "8", "15", "23"]


@pytest.mark.parametrize(
    ("steps", "points", "looks"), [(60, 4, [0, 20, 30, 40, 60]), (4, 3, [0, 2, 4]), (2, 2, [0, 1, 2])]
)
def test_looks(steps: int, points: int, looks: list[int]) -> None:
    assert FiguresArguments(steps=steps, points=points).looks() == looks


def test_a_decoder_with_transposed_weights(arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """GPT-2's Conv1D keeps its weight as (in, out); its head reads the last token that is no padding."""
    from transformers import GPT2Config, GPT2Model

    words = save_tokenizer(tmp_path)
    config = GPT2Config(
        vocab_size=words, n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=2, eos_token_id=3
    )
    GPT2Model(config).save_pretrained(tmp_path)
    run = arguments(tmp_path / "out", "--model", str(tmp_path), "--adapter.shared", "false", "--calibration.normalize",
                    "false")  # fmt: skip
    data = collect(run, FiguresArguments(steps=2, points=2, batches=1, layer=2), progress=False)
    assert [data["gradient"][role]["shape"] for role in ("up", "down")] == [[64, 16], [16, 64]]
    assert data["touched"]["images"]["up"]["shape"] == [64, 16]
    assert data["calibrated"] == "as the run is set"
    assert len(data["ageing"]["ways"]) == 6
    for tokens in data["rows"]["tokens"]["last"]:
        assert tokens.rstrip("0").rstrip("2") == "1" * (len(tokens.rstrip("0")) - 1)
    assert {side["group"] for side in data["spectrum"]} == {"transformer.h.2.mlp.c_fc", "transformer.h.2.mlp.c_proj"}
    assert [drawing.name for drawing in draw(data)] == NAMES


# What cannot be done.


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--figures.steps", "1"), "figures.steps must be at least 2, found 1"),
        (("--figures.points", "1"), "figures.points must be at least 2, found 1"),
        (("--figures.points", "9"), "figures.points: expected at most 5 looks at 4 steps, found 9; take fewer"),
        (("--figures.batches", "0"), "figures.batches must be at least 1, found 0"),
        (("--figures.layer", "-1"), "figures.layer must be at least 0, found -1"),
        (("--figures.layer", "2"), "figures.layer: expected a block from 0 to 1, found 2"),
        (("--method", "lora"), "method: the figures are SparseGrad's, found 'lora'; leave it out"),
        (("--seeds", "[1, 2]"), "seeds: the figures show one run, found [1, 2]; give one seed"),
        (("--training.precision", "bf16"), "training.precision: gradients are looked at in fp32, found 'bf16'"),
        (("--training.batch_size", "0"), "training.batch_size must be at least 1, found 0"),
        (("--adapter.c", "99"), "found 99"),
        (("--figures.redraw", "true"), "figures.json: there are no figures to draw again; leave out figures.redraw"),
    ],
)
def test_refused(
    more: tuple[str, ...], expected: str, figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(figures_of(tmp_path / "out", *more)) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_that_diverges(figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(figures_of(tmp_path / "out", "--training.learning_rate", "1e30")) == 1
    assert "; lower the learning rate, found 1e+30 (training.learning_rate)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(
    figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    assert main(figures_of(tmp_path)) == 1
    assert (
        "is not empty and holds no figures (no figures.json); choose another output folder" in capsys.readouterr().err
    )
    assert main(figures_of(tmp_path / "note.txt")) == 1
    assert "expected a folder to write, found a file" in capsys.readouterr().err
    (tmp_path / "figures.json").write_text('{"task": 1}', encoding="utf-8")
    assert main(figures_of(tmp_path, "--figures.redraw", "true")) == 1
    assert "figures.json: expected the numbers of figures" in capsys.readouterr().err
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "mine"
