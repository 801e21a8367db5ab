"""Fixtures: real pretrained models of a few hundred kilobytes, from the folder that SPARSEGRAD_DATA names."""

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
    """A folder below SPARSEGRAD_DATA. Skips the test if it does not exist."""
    root = os.environ.get("SPARSEGRAD_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"SPARSEGRAD_DATA names no folder with {name}")
    return Path(root) / name


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 260,032 parameters, trained on children's stories (stories260K of llama2.c)."""
    folder = tmp_path_factory.mktemp("stories")
    write_llama(data_folder("weights/stories260K"), folder)
    return folder


@pytest.fixture(scope="session")
def mnist_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT for images of 28 x 28, trained on MNIST."""
    folder = tmp_path_factory.mktemp("mnist-vit")
    write_vit(data_folder("weights/vit_mnist_gaurav"), folder)
    return folder
