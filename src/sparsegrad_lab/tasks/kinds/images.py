"""Images with a class."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ...run.settings import RunArguments
from ..library_logs import suppress_library_logs
from ..metrics import predictions_of, score
from ..pretrained import load_config, model_path
from ..task import Task
from .kind import Kind, Rows
from .text import class_options, with_probabilities

if TYPE_CHECKING:
    from ...run.finished_run import Finished

_FILE = "pixels.json"
_MEAN = _DEVIATION = 0.5


@dataclass(frozen=True)
class Pixels:
    """Makes pixels of images for a model that says its size only: scaled bilinearly, 0 to 255 -> -1 to 1."""

    height: int
    width: int
    channels: int

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """(images, channels, height, width)."""
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> Tensor:
        values = np.asarray(image.convert("L" if self.channels == 1 else "RGB"), np.float32) / 255
        pixels = torch.from_numpy(np.atleast_3d(values)).permute(2, 0, 1)
        pixels = interpolate(
            pixels[None], size=(self.height, self.width), mode="bilinear", antialias=True, align_corners=False
        )[0]
        return (pixels - _MEAN) / _DEVIATION

    def save_pretrained(self, folder: str | Path) -> None:
        """As a file."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


class ImagesKind(Kind):
    """Image classification."""

    auto = AutoModelForImageClassification
    task_type = None
    does = "sorts images into classes"
    heads = ("classifier", "pooler", "cls_classifier", "distillation_classifier")
    processor_folder = "processor"

    def processor(self, model: str | Path) -> Any:
        """The model's image processor, or one made of its config's image_size and num_channels."""
        place = model_path(str(model))
        if (Path(place) / _FILE).is_file():
            return Pixels(**json.loads((Path(place) / _FILE).read_text(encoding="utf-8")))
        try:
            with suppress_library_logs():  # it says that there is a faster one, with torchvision
                return AutoImageProcessor.from_pretrained(place)
        except (OSError, ValueError):  # it has none
            config: Any = load_config(place)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
        if size is None or channels is None:
            raise ValueError(
                f"{model}: expected a model with an image processor (preprocessor_config.json) or with image_size and "
                "num_channels in its config, found neither; save its image processor beside the weights"
            )
        height, width = (size, size) if isinstance(size, int) else size
        return Pixels(height, width, channels)

    def options(self, task: Task) -> dict[str, Any]:
        """The classes."""
        return class_options(task)

    def features(self, task: Task, split: str, processor: Any, arguments: RunArguments) -> Dataset:
        """The images as they are, under the name of what is made of them batch by batch.

        Raises:
            ValueError: a file is no image; looked at before any training.
        """
        for image in task.splits[split][task.text[0]]:
            if isinstance(image, str):
                _check_image(image)
        return task.splits[split].rename_columns({task.text[0]: "pixel_values", "label": "labels"})

    def collator(self, processor: Any, arguments: RunArguments) -> Callable[[Rows], dict[str, Tensor]]:
        """Reads the images and makes pixels of them."""

        def collate(rows: Rows) -> dict[str, Tensor]:
            pixels = _pixels(processor, [row["pixel_values"] for row in rows])
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate

    def score(self, task: Task, outputs: np.ndarray[Any, Any], labels: Any) -> dict[str, float]:
        """Of the classes with the largest output; outputs: (rows, classes)."""
        return score(task.metrics, np.asarray(labels), predictions_of(outputs, regression=False))

    @torch.inference_mode()
    def predict(self, run: Finished, rows: Sequence[dict[str, Any]], max_new_tokens: int) -> Rows:
        """Class and probabilities of image files."""
        (column,), labels = run.task.text, run.task.labels
        assert labels is not None
        device = next(run.model.parameters()).device
        logits = [run.model(pixel_values=_pixels(run.tokenizer, [row[column]]).to(device)).logits for row in rows]
        return with_probabilities(rows, torch.cat(logits).float().cpu().numpy(), labels)


def _pixels(processor: Any, images: Sequence[Any]) -> Tensor:
    opened = [_opened(image) for image in images]
    if isinstance(processor, Pixels):
        return processor(opened)
    found: Tensor = processor(images=[image.convert("RGB") for image in opened], return_tensors="pt")["pixel_values"]
    return found


def _check_image(path: str) -> None:
    """Raise ValueError for a file that does not begin like an image."""
    try:
        Image.open(path).close()
    except UnidentifiedImageError:
        raise ValueError(f"{path}: expected an image, found something else; remove or convert it") from None


def _opened(image: Any) -> Image.Image:
    """Of rows of grey values, or of a file.

    Raises:
        ValueError: the file is no image.
    """
    if not isinstance(image, str):
        return Image.fromarray(np.asarray(image, np.uint8))
    _check_image(image)
    with Image.open(image) as file:
        file.load()
        return file.copy()
