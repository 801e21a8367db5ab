"""A real pretrained BERT (6 layers, 384/1536): replaced MLP layers change nothing, and its gradients are sparse.

GLUE rows are used if `SPARSEGRAD_DATA` names a folder with them. Otherwise two tests are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import energy
from sparsegrad_peft import (
    CalibrationConfig,
    LiteralSparseGradLinear,
    ProjectedStatistics,
    SparseGradAdamW,
    SparseGradLinear,
    calibrate,
    group_linears,
    param_groups,
    replace_linears,
    restore_linears,
    weight_bases,
)
from sparsegrad_peft.method.projected import Projections, random_vectors

SENTENCES = [
    "a gorgeous , witty , seductive movie .",
    "the plot is nothing but boilerplate clichés from start to finish",
    "it 's a charming and often affecting journey .",
    "unflinchingly bleak and desperate",
] * 2


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    return energy.minilm()


def encoded(tokenizer: Any) -> dict[str, Tensor]:
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor([1, 0] * 4)
    return batch


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_replacing_the_mlp_changes_the_logits_by_less_than_1e_5(minilm: tuple[nn.Module, Any]) -> None:
    model, tokenizer = minilm
    model.eval()
    batch = encoded(tokenizer)
    groups = group_linears(model, energy.MLP)
    assert {name: len(layers) for name, layers in groups.items()} == {
        "bert.encoder.layer.*.intermediate.dense": 6,
        "bert.encoder.layer.*.output.dense": 6,
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model, batch)
    calibration = calibrate(model, [batch], groups=groups, n_steps=2, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    for make, options, size in (
        (SparseGradLinear.from_linear, {}, "full"),
        (SparseGradLinear.from_linear, {}, 0.1),
        (LiteralSparseGradLinear.from_linear, {"density": 0.01}, "full"),
        (LiteralSparseGradLinear.from_linear, {"density": 0.01, "products": "sparse"}, "full"),
    ):
        torch.manual_seed(0)
        changed, _ = energy.minilm()
        changed.load_state_dict(before)
        changed.eval()
        replace_linears(changed, groups, calibration.bases(c=size, r=size), make, **options)
        found = logits(changed, batch)
        error = float((found - expected).norm() / expected.norm())
        print(f"{make.__qualname__} {options} {size}: relative change of the logits {error:.2g}")
        assert error < 1e-5
        assert restore_linears(changed) == 12
        assert float((logits(changed, batch) - expected).norm() / expected.norm()) < 1e-5
        assert changed.state_dict().keys() == before.keys()


def test_literal_exact_and_adapter_forms_train_alike(minilm: tuple[nn.Module, Any]) -> None:
    """Five steps on the same batches with the same complete bases give the same losses in all three forms."""
    model, tokenizer = minilm
    batch = encoded(tokenizer)
    groups = group_linears(model, energy.MLP)
    calibration = calibrate(model, [batch], groups=groups, n_steps=2, training=False, progress=False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    losses: dict[str, list[float]] = {}
    for form in ("literal", "adapter", "exact"):
        changed, _ = energy.minilm()
        changed.load_state_dict(start)
        changed.eval().requires_grad_(False)  # no dropout: the forms must see the same numbers
        bases = calibration.bases()
        if form == "exact":
            weights = weight_bases(changed, groups, bases)
            for weight in weights:
                weight.requires_grad_(True)
            group = {"params": list(weights), "sparse": True, "density": 0.01}
            optimizer = SparseGradAdamW([group], lr=1e-3, bases=weights)
        else:
            make = LiteralSparseGradLinear.from_linear if form == "literal" else SparseGradLinear.from_linear
            replace_linears(changed, groups, bases, make, **({"density": 0.01} if form == "literal" else {}))
            optimizer = SparseGradAdamW(param_groups(changed, density=0.01), lr=1e-3)
        losses[form] = []
        for _ in range(5):
            loss = changed(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[form].append(loss.item())
    print(losses)
    assert losses["adapter"][-1] < losses["adapter"][0] - 0.05
    torch.testing.assert_close(losses["literal"], losses["adapter"], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(losses["exact"], losses["adapter"], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(os.environ.get("SPARSEGRAD_DATA", "")) / "glue" / "SST-2" / "train.tsv").is_file(),
    reason="SPARSEGRAD_DATA names no folder with glue/SST-2/train.tsv",
)
def test_gradient_energy_on_real_sst2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways to calibrate, at a reduced size: their order is that of the full run (benchmarks/results/energy.json)."""
    chosen = ("paper, shared", "sign walk, per layer")
    all_ways = energy.calibrations
    monkeypatch.setattr(energy, "calibrations", lambda *sizes: {way: all_ways(*sizes)[way] for way in chosen})
    found = energy.measure_all([0, 25], rows=2000, seed=0, batch=8, paper_steps=6, walk_steps=12, n_batches=3)
    for step, row in found.items():
        for way, roles in row["shares"].items():
            print(f"step {step}, {way}: up {roles['up']}, down {roles['down']}")
    start, later = found["0"]["shares"], found["25"]["shares"]
    paper, walk, none = chosen[0], chosen[1], "none (original space)"
    assert start[paper]["down"]["top"] > start[none]["down"]["top"] + 0.1
    assert start[paper]["up"]["top"] > 0.6  # the sparsity that the paper shows, at the starting point
    assert later[paper]["up"]["top"] < start[paper]["up"]["top"]  # ... and how it goes
    for role in ("up", "down"):
        assert later[walk][role]["top"] > later[paper][role]["top"]
        assert later[walk][role]["block"] > later[none][role]["block"]


@pytest.mark.skipif("SPARSEGRAD_DATA" not in os.environ, reason="SPARSEGRAD_DATA names no folder with GLUE")
def test_projections_find_most_of_what_the_halves_have_in_common(minilm: tuple[nn.Module, Any]) -> None:
    """Real gradients of each layer, at the sizes of the default, from 8 steps along a trajectory."""
    model, tokenizer = minilm
    groups = group_linears(model, energy.MLP, shared=False)
    config = CalibrationConfig(n_steps=4, mean_gradient=True)
    batches = energy.batches(energy.sst2(400), tokenizer, 16, 0)
    halves = [calibrate(model, batches, groups=groups, config=config, progress=False) for _ in range(2)]
    shares: dict[str, list[float]] = {"directions": [], "neurons": []}
    for name in groups:
        M = torch.stack([half.groups[name].M[name] for half in halves])
        M = M if M.shape[1] > M.shape[2] else M.mT  # (2, 1536, 384)
        sums = Projections(torch.zeros(2, 136, 384), torch.zeros(2, 1536, 32))
        vectors = random_vectors(1536, 2 * 64 + 8, M), random_vectors(384, 32, M)
        projected = ProjectedStatistics(name, ("layer",), *vectors, {"layer": sums})
        for half in M:
            projected.add(half)
        found, energies = projected.basis(c=64, r=90, selected=(True, False)), (M[0] * M[1]).sum(1)
        assert found.U is not None
        assert found.V is not None
        best = torch.linalg.eigvalsh((M[0].T @ M[1] + M[1].T @ M[0]) / 2)[-64:].sum()
        shares["directions"].append(float(((M[0] @ found.U.T) * (M[1] @ found.U.T)).sum() / best))
        shares["neurons"].append(float(energies[found.V.long()].sum() / energies.topk(90).values.sum()))
    for what, of_layers in shares.items():
        print(f"{what}: share of the best ones' energy: mean {sum(of_layers) / 12:.4f}, least {min(of_layers):.4f}")
        assert sum(of_layers) / 12 > 0.8
        assert 0.6 < min(of_layers) <= max(of_layers) < 1.0001
