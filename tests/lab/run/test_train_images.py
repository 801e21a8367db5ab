"""Whole runs of vision transformers, on digits and on images in folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import interpolate, pad
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from real_models import data_folder
from small_models import vit_of
from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.finished_run import evaluate, merge, open_run, predict
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train
from sparsegrad_lab.tasks.kinds.images import Pixels
from sparsegrad_lab.tasks.load import load_task
from sparsegrad_lab.tasks.settings import DataArguments

Arguments = Callable[..., RunArguments]


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        num_channels=1, initializer_range=0.2,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_arguments(tiny_vit: Path) -> Arguments:
    def make(output: Path, *more: str) -> RunArguments:
        return parse([
            "--model", str(tiny_vit), "--task", "digits", "--data.train_rows", "320", "--data.validation_rows", "80",
            "--calibration.n_steps", "2", "--adapter.c", "0.5", "--adapter.r", "0.5", "--training.batch_size", "16",
            "--training.epochs", "3", "--training.learning_rate", "0.01", "--output", str(output), *more,
        ])  # fmt: skip

    return make


def save_images(folder: Path, count: int = 6) -> Path:
    """Write dark and bright images of several sizes, some in colour."""
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name, low in (("bright", 150), ("dark", 0)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                shape = (10 + number, 12, 3) if number % 2 else (9, 9 + number)
                values = generator.integers(low, low + 100, shape).astype(np.uint8)
                Image.fromarray(values).save(folder / split / name / f"{number}.png")
    return folder


def test_digits_are_split_alike_each_time() -> None:
    task = load_task("digits", DataArguments())
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 1297, "validation": 500}
    counts = np.bincount(task.splits["validation"]["label"])
    assert counts.min() >= 48
    assert counts.max() <= 51
    again = load_task("digits", DataArguments())
    assert task.hashes() == again.hashes()
    assert set(task.hashes()) == {"train", "validation"}
    assert task.splits["validation"]["image"][:] == again.splits["validation"]["image"][:]
    assert np.asarray(task.splits["train"]["image"][:]).max() == 255


@pytest.mark.parametrize("method", ["sparsegrad", "lora", "full"])
def test_each_method(method: str, image_arguments: Arguments, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (result,) = train(image_arguments(run, "--method", method), progress=False)
    losses = [entry["loss"] for entry in result["evaluations"]]
    assert losses[-1] < losses[0]
    assert (result["metric"], result["labels"]) == ("accuracy", [str(digit) for digit in range(10)])
    assert json.loads((run / "processor" / "pixels.json").read_text(encoding="utf-8"))["channels"] == 1
    scores = evaluate(run)
    assert scores["validation"]["accuracy"] == result["score"]
    if method != "full":
        keys = load_file(run / "adapter" / "adapter_model.safetensors").keys()
        assert any("classifier" in key for key in keys)
        folder, _ = merge(run)
        plain: Any = ViTForImageClassification.from_pretrained(folder).eval()
        pixels = torch.randn(3, 1, 16, 16)
        with torch.no_grad():
            expected = open_run(run).model(pixel_values=pixels).logits
            torch.testing.assert_close(plain(pixels).logits, expected, rtol=1e-4, atol=1e-5)


def test_images_in_folders(image_arguments: Arguments, tmp_path: Path) -> None:
    folder = save_images(tmp_path / "images")
    words = ["--task", "images", "--data.folder", str(folder), "--training.epochs", "6", "--training.batch_size", "4"]
    (result,) = train(image_arguments(tmp_path / "run", *words), progress=False)
    assert (result["task"], result["labels"]) == ("images", ["bright", "dark"])
    assert result["score"] == 1.0
    file = str(folder / "validation" / "dark" / "0.png")
    other = str(folder / "validation" / "bright" / "1.png")
    row, bright = predict(tmp_path / "run", texts=[file, other])
    assert (bright["image"], bright["prediction"]) == (other, "bright")
    assert (row["image"], row["prediction"]) == (file, "dark")
    assert row["p(dark)"] + row["p(bright)"] == pytest.approx(1, abs=1e-5)


def test_changed_pictures_are_noticed(
    image_arguments: Arguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As other rows are; a run of an earlier version has no hashes of them, and goes on."""
    images, run = save_images(tmp_path / "images"), tmp_path / "run"
    asked = image_arguments(run, "--task", "images", "--data.folder", str(images), "--training.epochs", "1")
    train(asked, progress=False)
    before = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert set(before["rows_sha256"]) == {"train", "validation"}
    copied = shutil.copytree(images, tmp_path / "copy")
    assert load_task("images", DataArguments(folder=str(copied))).hashes() == before["rows_sha256"]

    (images / "validation" / "dark" / "0.png").write_bytes((images / "validation" / "dark" / "1.png").read_bytes())
    evaluate(run)
    assert f"{run}: the rows have changed since the run: validation" in caplog.messages
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"the run began with other rows \(validation\); put the data back"):
        train(asked, progress=False)
    (run / "environment.json").write_text(json.dumps({**before, "rows_sha256": {}}), encoding="utf-8")
    train(asked, progress=False)


def test_the_models_own_image_processor(image_arguments: Arguments, tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path / "base")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(tmp_path / "base")
    more = ["--model", str(tmp_path / "base"), "--training.epochs", "1"]
    (result,) = train(image_arguments(tmp_path / "run", *more), progress=False)
    saved = json.loads((tmp_path / "run" / "processor" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved["image_mean"] == [0.1] * 3
    assert evaluate(tmp_path / "run")["validation"]["accuracy"] == result["score"]


def test_pixels_by_hand() -> None:
    """Bilinear interpolation to twice the size: corners stay, and the pixel beside one lies a quarter of the way."""
    image = Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8))
    found = Pixels(4, 4, 1)([image])
    assert found.shape == (1, 1, 4, 4)
    torch.testing.assert_close(found[0, 0, 1], torch.tensor([-1.0, -0.5, 0.5, 1.0]))
    assert torch.equal(Pixels(4, 4, 3)([image])[0, 2], found[0, 0])


def test_refused(image_arguments: Arguments, tiny_bert: Path, tmp_path: Path) -> None:
    def refused(message: str, *more: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            train(image_arguments(tmp_path / "run", *more), progress=False)

    refused(r"task images needs data.folder", "--task", "images")
    refused(r"transformers has no AutoModelForImageClassification of type 'bert'", "--model", str(tiny_bert))
    images = ["--task", "images", "--data.folder", str(tmp_path / "images")]
    refused(r"data.folder: there is no folder .*images", *images)
    (tmp_path / "images").mkdir()
    refused(r"expected images in .*train/CLASS/ .* found none", *images, kind=FileNotFoundError)
    (tmp_path / "images").rmdir()
    folder = save_images(tmp_path / "images")
    (folder / "validation" / "grey").mkdir()
    (folder / "validation" / "dark" / "0.png").rename(folder / "validation" / "grey" / "0.png")
    refused(r"validation: expected the classes of train, bright, dark; found grey", *images)
    (folder / "validation" / "grey" / "0.png").unlink()
    (folder / "train" / "dark" / "0.png").write_bytes(b"no image")
    refused(r"train/dark/0.png: expected an image, found another kind of file; remove or convert it", *images)


def test_a_real_vit() -> None:
    """A ViT trained on MNIST recognizes 80 % of scikit-learn's digits, if they are padded like MNIST's."""
    from sklearn.datasets import load_digits

    model = vit_of(data_folder("weights/vit_mnist_gaurav") / "vit_mnist.pth", own_head=True).eval()
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    images = pad(interpolate(images, size=(20, 20), mode="bilinear", align_corners=False), (4, 4, 4, 4))
    with torch.no_grad():
        found = model((images - 0.1307) / 0.3081).logits.argmax(-1)
    assert (found == torch.tensor(digits.target)).float().mean().item() == pytest.approx(0.806, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegrad", "lora"])
def test_a_real_vit_learns_digits(method: str, mnist_vit: Path, tmp_path: Path) -> None:
    words = ["--model", str(mnist_vit), "--task", "digits", "--method", method, "--calibration.n_steps", "4"]
    (result,) = train(parse([*words, "--training.epochs", "3", "--output", str(tmp_path / "run")]), progress=False)
    assert result["score"] > 0.75
