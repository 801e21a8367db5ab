"""Convert GGUF files to transformers folders in float32: once each, in a cache folder.

GGUF is the format of llama.cpp. Its weights are usually quantized, so they cannot be trained as they are.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .checksums import sha256_of

logger = logging.getLogger(__name__)

_ORIGIN = "gguf.json"


@dataclass(frozen=True)
class Origin:
    """Where a converted model comes from."""

    file: str
    "name of the GGUF file"
    sha256: str
    name: str | None
    "of the model, as the file states it"
    license: str | None
    "SPDX identifier, as the file states it"
    quantization: str
    "type of most of the weights in the file, such as Q4_1"

    @property
    def is_quantized(self) -> bool:
        """True if the weights were rounded, so that they differ from the published model's."""
        return self.quantization not in ("F32", "F16", "BF16")


def find_gguf(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that holds no weights of transformers; None if there is none.

    Raises:
        ValueError: there are several.
    """
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder}: expected one GGUF file, found {names}; give the path of one of them")
    return files[0] if files else None


def origin_of(folder: str | Path) -> Origin | None:
    """Return where a converted model comes from; None for any other model."""
    path = Path(folder) / _ORIGIN
    return Origin(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


@cache  # a run asks several times
def converted(file: Path) -> Path:
    """Return the transformers folder of a GGUF file, with model, tokenizer and chat template; convert it if necessary.

    The folder lies in the cache of huggingface_hub (`$HF_HOME/assets`). Its name contains the checksum of
    the file. Several processes may call this at the same time.

    Raises:
        ModuleNotFoundError: the package `gguf` is not installed.
        ValueError: the file is damaged, or transformers does not know its architecture.
    """
    from filelock import FileLock
    from huggingface_hub import cached_assets_path

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    checksum = sha256_of([file])
    cache_folder = cached_assets_path(library_name="sparsegrad", namespace="converted", subfolder="gguf")
    folder = cache_folder / f"{file.stem}-{checksum[:12]}"
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            logger.warning("Converting %s to float32, once: %s", file.name, folder)
            draft = folder.with_name(f".{folder.name}.draft")
            shutil.rmtree(draft, ignore_errors=True)
            try:
                _convert(file, checksum, draft)
                os.replace(draft, folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


def _convert(file: Path, checksum: str, folder: Path) -> None:
    """Write the transformers folder; its files are on the disk when this returns."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{file.name}: reading GGUF files needs a package: pip install gguf") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name}
    try:
        reader = gguf.GGUFReader(file)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=torch.float32, **options, **_dequantization()
        )
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{file}: transformers cannot read this GGUF file ({error})") from error
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)  # it refuses to save, although nothing is quantized any more
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    origin = Origin(file.name, checksum, _text(reader, "name"), _text(reader, "license"), _main_type(reader))
    (folder / _ORIGIN).write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _dequantization() -> dict[str, Any]:
    """Return the option of `from_pretrained` for float32 weights. Older versions know no other way and no option."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _text(reader: Any, name: str) -> str | None:
    field = reader.get_field(f"general.{name}")
    return None if field is None else str(field.contents())


def _main_type(reader: Any) -> str:
    """Return the type in which most of the weights are stored."""
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(sizes, key=sizes.__getitem__)
