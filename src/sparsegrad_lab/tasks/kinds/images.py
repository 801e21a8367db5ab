"""Image classification."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..library_logs import suppress_library_logs
from ..metrics import predictions_of, score
from ..model_folder import model_path
from ..pretrained import load_config
from ..settings import DataArguments
from ..task import Task
from .kind import Kind, Rows
from .text import with_probabilities

_FILE = "pixels.json"
_MEAN = _DEVIATION = 0.5


@dataclass(frozen=True)
class Pixels:
    """An image processor for models that have none: bilinear resizing, then values from -1 to 1."""

    height: int
    width: int
    channels: int

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pixel values: (images, channels, height, width)."""
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> Tensor:
        values = np.asarray(image.convert("L" if self.channels == 1 else "RGB"), np.float32) / 255
        pixels = torch.from_numpy(np.atleast_3d(values)).permute(2, 0, 1)
        pixels = interpolate(
            pixels[None], size=(self.height, self.width), mode="bilinear", antialias=True, align_corners=False
        )[0]
        return (pixels - _MEAN) / _DEVIATION

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings to a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


class ImagesKind(Kind):
    """Image classification."""

    auto = AutoModelForImageClassification
    task_type = None
    heads = ("classifier", "pooler", "cls_classifier", "distillation_classifier")
    processor_folder = "processor"

    def processor(self, model: str | Path) -> Any:
        """Load the image processor, or make one from image_size and num_channels of the config."""
        place = model_path(str(model))
        if (Path(place) / _FILE).is_file():
            return Pixels(**json.loads((Path(place) / _FILE).read_text(encoding="utf-8")))
        try:
            with suppress_library_logs():  # it recommends torchvision
                return AutoImageProcessor.from_pretrained(place)
        except (OSError, ValueError):  # the model has none
            config: Any = load_config(place)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
        if size is None or channels is None:
            raise ValueError(
                f"{model}: expected an image processor (preprocessor_config.json), or image_size and num_channels in "
                "config.json; found neither. Save the model's image processor in its folder"
            )
        height, width = (size, size) if isinstance(size, int) else size
        return Pixels(height, width, channels)

    def features(self, task: Task, split: str, processor: Any, data: DataArguments) -> Dataset:
        """Return the images as they are, in "pixel_values"; the collator reads them batch by batch.

        Raises:
            ValueError: a file is not an image.
        """
        for image in task.splits[split][task.text[0]]:
            if isinstance(image, str):
                _check_image(image)
        return task.splits[split].rename_columns({task.text[0]: "pixel_values", "label": "labels"})

    def collator(self, processor: Any, length: int | None) -> Callable[[Rows], dict[str, Tensor]]:
        """Return a collator that reads the images and converts them to pixel values."""

        def collate(rows: Rows) -> dict[str, Tensor]:
            pixels = _pixels(processor, [row["pixel_values"] for row in rows])
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate

    def score(self, task: Task, outputs: np.ndarray[Any, Any], labels: Any) -> dict[str, float]:
        """Return the metrics of the classes with the largest logits; outputs: (rows, classes)."""
        predictions = predictions_of(outputs, regression=False)
        return score(task.metrics, np.asarray(labels), predictions, task.positive_number)

    @torch.inference_mode()
    def predict(
        self, model: nn.Module, processor: Any, task: Task, rows: Sequence[dict[str, Any]], data: DataArguments,
        max_new_tokens: int,
    ) -> Rows:  # fmt: skip
        """Return the rows of image files with their class and probabilities."""
        (column,), labels = task.text, task.labels
        assert labels is not None
        device = next(model.parameters()).device
        logits = [model(pixel_values=_pixels(processor, [row[column]]).to(device)).logits for row in rows]
        return with_probabilities(rows, torch.cat(logits).float().cpu().numpy(), labels)


def _pixels(processor: Any, images: Sequence[Any]) -> Tensor:
    opened = [_opened(image) for image in images]
    if isinstance(processor, Pixels):
        return processor(opened)
    found: Tensor = processor(images=[image.convert("RGB") for image in opened], return_tensors="pt")["pixel_values"]
    return found


def _check_image(path: str) -> None:
    """Raise ValueError if the file does not start like an image."""
    try:
        Image.open(path).close()
    except UnidentifiedImageError:
        raise ValueError(f"{path}: expected an image, found another kind of file; remove or convert it") from None


def _opened(image: Any) -> Image.Image:
    """Open an image file, or convert rows of grey values.

    Raises:
        ValueError: the file is not an image.
    """
    if not isinstance(image, str):
        return Image.fromarray(np.asarray(image, np.uint8))
    _check_image(image)
    with Image.open(image) as file:
        file.load()
        return file.copy()
