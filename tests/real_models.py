"""Real pretrained models that are only a few hundred kilobytes, as `transformers` folders; from the data folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from small_models import write_llama, write_vit

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    'big, red ball. She wanted to play with it. Her mom said, "Let\'s go to the park and play!"'
)


def data_folder(name: str) -> Path:
    """A folder below SPARSEGRAD_DATA; skips the test where it is not there."""
    root = os.environ.get("SPARSEGRAD_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"SPARSEGRAD_DATA names no folder with {name}")
    return Path(root) / name


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 260,032 parameters that tells children's stories (llama2.c's stories260K)."""
    folder = tmp_path_factory.mktemp("stories")
    write_llama(data_folder("weights/stories260K"), folder)
    return folder


@pytest.fixture(scope="session")
def mnist_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 28 by 28 that was trained on MNIST, for a new head."""
    folder = tmp_path_factory.mktemp("mnist-vit")
    write_vit(data_folder("weights/vit_mnist_gaurav"), folder)
    return folder
