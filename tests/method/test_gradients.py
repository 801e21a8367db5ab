"""stream_gradients: gradients equal autograd's, one is held at a time, and the model is restored to the bit."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from calibration import LiveBytes
from helpers import F64, orthogonal
from sparsegrad_peft import Basis, CalibrationConfig, SparseGradLinear, Trajectory
from sparsegrad_peft.method.config import normalized_step, sign_step
from sparsegrad_peft.method.gradients import default_loss, stream_gradients

TARGETS = ["up", "down"]


class Net(nn.Module):
    """A model whose forward changes state: running statistics, a replaced buffer, three random number generators."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.drop = nn.Dropout(0.3)
        self.down = Conv1D(4, 10)  # GPT-2's: 10 in, 4 out, weight (10, 4)
        self.head = nn.Linear(4, 3)
        self.frozen = nn.Linear(6, 10)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", None)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        self.calls = self.calls + 1  # another tensor in the buffer's place
        x = self.drop(self.norm(torch.relu(self.up(x) + self.frozen(x))))
        noise = random.random() + np.random.random()  # noqa: NPY002 - the global state is what is looked at
        logits = self.head(self.down(x)) * (1 + 0.1 * noise)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels))


def a_net() -> Net:
    """Make a model that is partly frozen, partly in train mode, and has gradients already."""
    net = Net()
    net.frozen.requires_grad_(False)
    net.down.weight.requires_grad_(False)  # a target that did not train before
    net.norm.eval()
    net.head.weight.grad = torch.randn(3, 4, dtype=F64)
    net.up.weight.grad = torch.randn(10, 6, dtype=F64)
    net.down.weight.grad = torch.randn(10, 4, dtype=F64)
    net.head.weight.register_post_accumulate_grad_hook(lambda _: None)  # the user's own stays
    return net


def some_batches(n: int = 2) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(8, 6, dtype=F64), "labels": torch.randint(0, 3, (8,))} for _ in range(n)]


class Before:
    """The state of a model and of the random number generators, for comparison to the bit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.found = self._look()

    def _look(self) -> dict[str, Any]:
        def bits(tensor: Tensor | None) -> Any:
            return None if tensor is None else (id(tensor), tensor.data_ptr(), tensor.detach().numpy().tobytes())

        self.alive = [p.grad for p in self.model.parameters()] + list(self.model.buffers())  # so that no id is reused
        return {
            "parameters": {n: bits(p) for n, p in self.model.named_parameters()},
            "requires_grad": {n: p.requires_grad for n, p in self.model.named_parameters()},
            "grad": {n: bits(p.grad) for n, p in self.model.named_parameters()},
            "hooks": {n: dict(p._post_accumulate_grad_hooks or {}) for n, p in self.model.named_parameters()},
            "tensor hooks": {n: dict(p._backward_hooks or {}) for n, p in self.model.named_parameters()},
            "module hooks": {n: (dict(m._forward_hooks), dict(m._backward_hooks), dict(m._forward_pre_hooks))
                             for n, m in self.model.named_modules()},
            "buffers": {(n, b): bits(t) for n, m in self.model.named_modules() for b, t in m._buffers.items()},
            "modes": {n: m.training for n, m in self.model.named_modules()},
            "torch": torch.get_rng_state().numpy().tobytes(),
            "python": random.getstate(),
            "numpy": str(np.random.get_state()),  # noqa: NPY002
            "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        }  # fmt: skip

    def assert_unchanged(self) -> None:
        alive = self.alive
        now = self._look()
        assert len(alive) == len(self.alive)
        for what, found in self.found.items():
            assert now[what] == found, what


# The gradients themselves


@pytest.mark.parametrize("batch_shape", [(1,), (40,), (3, 5)])
def test_gradients_of_plain_layers(batch_shape: tuple[int, ...]) -> None:
    """(out, in) also for GPT-2's Conv1D, whose own gradient is (in, out)."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), Conv1D(4, 10), nn.Tanh(), nn.Linear(4, 1, bias=False)).double()
    batches = [torch.randn(*batch_shape, 6, dtype=F64) for _ in range(3)]
    collected: list[tuple[str, Tensor]] = []
    stream_gradients(
        model, ["0", "2", "4"], lambda name, G: collected.append((name, G.clone())), batches,
        loss_fn=lambda model, x: model(x).square().mean(), n_steps=3,
    )  # fmt: skip
    assert [name for name, _ in collected] == ["4", "2", "0"] * 3  # as the backward pass meets them
    for step, x in enumerate(batches):
        weights = [model[i].weight for i in (4, 2, 0)]
        expected = list(torch.autograd.grad(model(x).square().mean(), weights))
        expected[1] = expected[1].T
        for (_, G), G_expected in zip(collected[3 * step : 3 * step + 3], expected, strict=True):
            assert G.shape == G_expected.shape
            torch.testing.assert_close(G, G_expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("tokens", [2, 200])
def test_gradient_of_a_sparsegrad_layer(complete: bool, packed: bool, prefer: str, tokens: int) -> None:
    """The gradient is that of the effective weight `W + Vᵀ S U`, as a refresh during training needs it."""
    U, V = orthogonal(7), orthogonal(11)
    layer = SparseGradLinear.from_linear(
        nn.Linear(7, 11, dtype=F64), Basis(U, V) if complete else Basis(U[:3], V[:5]), prefer=prefer
    )
    if packed:
        layer.pack(torch.tensor([0, 3, 8, 11]))
    with torch.no_grad():
        layer.core.normal_()
    x, factor = torch.randn(tokens, 7, dtype=F64), torch.randn(tokens, 11, dtype=F64)
    found: list[Tensor] = []
    stream_gradients(
        nn.Sequential(nn.Tanh(), layer), ["1"], lambda _, G: found.append(G.clone()),
        step=lambda: (layer(x).sin() * factor).sum(), n_steps=1,
    )  # fmt: skip
    plain = layer.to_linear()
    assert float((plain.weight - layer.weight).detach().norm()) > 1  # S is not zero, so W alone gives another gradient
    (expected,) = torch.autograd.grad((plain(x).sin() * factor).sum(), plain.weight)
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-12)
    assert layer.core.requires_grad
    assert not layer.weight.requires_grad


class GradientSized(LiveBytes):
    """Count the live tensors of one size in bytes, without the model's own."""

    def __init__(self, nbytes: int, model: nn.Module) -> None:
        super().__init__()
        self.nbytes = nbytes
        self.own = {p.untyped_storage()._cdata for p in model.parameters()}
        self.found: dict[int, StorageWeakRef] = {}

    @property
    def alive(self) -> int:
        return sum(not one.expired() for one in self.found.values())

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() == self.nbytes and storage._cdata not in self.own:
            found = StorageWeakRef(storage)
            self.found[found.cdata] = found
        super()._watch(storage)


@pytest.mark.parametrize(
    "trajectory", [None, Trajectory(), Trajectory(update=normalized_step)], ids=["fixed", "sign", "normalized"]
)
def test_never_more_than_one_gradient(trajectory: Trajectory | None) -> None:
    """Each gradient is freed before the next one arrives. The test would see one that is kept."""
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), Conv1D(6, 7), nn.Tanh(), nn.Linear(6, 7)).double()
    x = torch.randn(4, 6, dtype=F64)
    passed: list[StorageWeakRef] = []
    alive: list[tuple[int, int]] = []
    kept: list[Tensor] = []

    def look(_: str, G: Tensor) -> None:
        alive.append((sum(not one.expired() for one in passed), counter.alive))
        passed.append(StorageWeakRef(G.untyped_storage()))
        if len(passed) == 5:
            kept.append(G)

    counter = GradientSized(6 * 7 * 8, model)  # every weight has 42 entries, and nothing else has
    with counter:
        stream_gradients(
            model, ["0", "2", "4"], look, step=lambda: model(x).square().sum(), n_steps=3, trajectory=trajectory
        )
    before = 3 if trajectory else 0  # the trajectory's copies of the weights it started from
    assert alive == [(0, before + 1)] * 5 + [(1, before + 2)] * 4
    assert counter.alive == 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("trajectory", [None, Trajectory(lr=0.05)])
def test_gradient_checkpointing(reentrant: bool, trajectory: Trajectory | None) -> None:
    """Both kinds run parts of forward again during backward; the reentrant kind in a backward pass of its own."""
    layers = [nn.Linear(5, 5, dtype=F64) for _ in range(3)]
    model = nn.ModuleList(layers)
    x = torch.randn(4, 5, dtype=F64)

    def loss(checkpointed: bool) -> Tensor:
        y = x.clone().requires_grad_()  # what model.enable_input_require_grads() does
        for layer in layers:
            y = checkpoint(_block, layer, y, use_reentrant=reentrant) if checkpointed else _block(layer, y)
        return y.square().sum()

    def collected(checkpointed: bool) -> list[Tensor]:
        found: list[Tensor] = []
        stream_gradients(
            model, ["0", "1", "2"], lambda _, G: found.append(G.clone()),
            step=lambda: loss(checkpointed), n_steps=2, trajectory=trajectory,
        )  # fmt: skip
        return found

    before = Before(model)
    found, expected = collected(True), collected(False)
    assert len(found) == len(expected) == 6
    for G, G_expected in zip(found, expected, strict=True):
        torch.testing.assert_close(G, G_expected, rtol=1e-12, atol=1e-15)
    before.assert_unchanged()


def _block(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(layer(x))


def test_reentrant_checkpointing_without_gradient_at_its_input() -> None:
    """Everything before the first target is frozen, so reentrant checkpointing passes no gradient."""
    model = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 2)])

    def loss() -> Tensor:
        return model[1](checkpoint(_block, model[0], torch.randn(4, 5), use_reentrant=True)).sum()

    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(ValueError, match=r"no gradient reached 0, up to step 1: .*use use_reentrant=False"),
    ):
        stream_gradients(model, ["0", "1"], lambda *_: None, step=loss, n_steps=1)


# Modes, batches, trajectory


@pytest.mark.parametrize("training", [True, False, None])
def test_train_or_eval_mode(training: bool | None) -> None:
    net = a_net()
    modes = {name: module.training for name, module in net.named_modules()}
    assert len(set(modes.values())) == 2
    seen = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append({name: module.training for name, module in model.named_modules()})
        return default_loss(model, batch)

    stream_gradients(net, TARGETS, lambda *_: None, some_batches(), n_steps=2, training=training, loss_fn=loss_fn)
    expected = modes if training is None else dict.fromkeys(modes, training)
    assert seen == [expected, expected]


def test_small_gradients_of_float16_weights() -> None:
    """Without a scaled loss, those below 6e-8 would be zero, and those somewhat above it would be rounded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)).half()
    exact = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)).to(F64)
    exact.load_state_dict(model.state_dict())
    x = torch.randn(8, 6).half()

    def found(net: nn.Module, factor: float) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        weight = next(net.parameters())
        step = lambda: net(x.to(weight.dtype)).to(F64).square().mean().mul(factor).to(weight.dtype)  # noqa: E731
        stream_gradients(net, ["0", "1"], lambda name, G: gradients.update({name: G.clone()}), step=step, n_steps=1)
        return gradients

    for factor in (1.0, 1e-7):
        gradients, expected = found(model, factor), found(exact, factor)
        for name, G in gradients.items():
            assert G.dtype == torch.float32
            assert ((G - expected[name]).norm() / expected[name].norm()) < 2e-2, (factor, name)


def test_train_mode_is_the_default() -> None:
    net = nn.Sequential(nn.Linear(2, 2)).eval()
    seen = []

    def step() -> Tensor:
        seen.append(net[0].training)
        return net(torch.ones(1, 2)).sum()

    stream_gradients(net, ["0"], lambda *_: None, step=step, n_steps=1)
    assert seen == [True]


def test_everything_but_the_targets_is_frozen_unless_on_a_trajectory() -> None:
    net = a_net()
    trained_before = {n for n, p in net.named_parameters() if p.requires_grad}
    seen: list[set[str]] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append({n for n, p in model.named_parameters() if p.requires_grad})
        return default_loss(model, batch)

    for trajectory in (None, Trajectory()):
        stream_gradients(
            net, TARGETS, lambda *_: None, some_batches(1), n_steps=1, loss_fn=loss_fn, trajectory=trajectory
        )
    assert seen[0] == {"up.weight", "down.weight"}
    assert seen[1] == trained_before | {"down.weight"} != seen[0]


def test_batches_start_again_when_they_run_out() -> None:
    model, seen = nn.Linear(2, 1), []

    def loss_fn(model: nn.Module, batch: int) -> Tensor:
        seen.append(batch)
        return model(torch.ones(1, 2)).sum()

    stream_gradients(model, [""], lambda *_: None, [0, 1, 2], n_steps=7, loss_fn=loss_fn)
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    del seen[:]
    stream_gradients(model, [""], lambda *_: None, range(100), n_steps=2, loss_fn=loss_fn)
    assert seen == [0, 1]  # no batch is taken that no step uses


@pytest.mark.parametrize(
    "update", [sign_step, normalized_step, lambda p, g, lr: p.sub_(lr * g)], ids=["sign", "normalized", "sgd"]
)
def test_trajectory_walks_as_the_update_says(update: Callable[[Tensor, Tensor, float], None]) -> None:
    """Equal to the same steps made by hand: trained parameters and targets move, the rest does not."""
    lr = 0.05
    net = a_net()
    net.drop.p = 0.0
    batches = some_batches(3)
    found: list[tuple[str, Tensor]] = []
    seen: list[Tensor] = []

    def on_gradient(name: str, G: Tensor) -> None:
        found.append((name, G.clone()))
        seen.append(net.head.bias.detach().clone())

    def plain_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        hidden = model.norm(torch.relu(model.up(batch["x"]) + model.frozen(batch["x"])))
        return nn.functional.cross_entropy(model.head(model.down(hidden)), batch["labels"])

    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    walking = [n for n, p in net.named_parameters() if p.requires_grad or n == "down.weight"]
    stream_gradients(
        net, TARGETS, on_gradient, batches, n_steps=3, loss_fn=plain_loss, trajectory=Trajectory(lr=lr, update=update)
    )
    assert len({tuple(bias.tolist()) for bias in seen}) == 3  # really elsewhere in each step

    twin = Net()
    twin.load_state_dict(net.state_dict())
    parameters = dict(twin.named_parameters())
    for step, batch in enumerate(batches):
        loss = plain_loss(twin, batch)
        gradients = dict(zip(walking, torch.autograd.grad(loss, [parameters[n] for n in walking]), strict=True))
        torch.testing.assert_close(found[2 * step][1], gradients["down.weight"].T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[2 * step + 1][1], gradients["up.weight"], rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for name in walking:
                update(parameters[name], gradients[name].clone(), lr)
    assert all(torch.equal(p, start[n]) for n, p in net.named_parameters())


# The model is afterwards what it was


def interrupted(batches: list[Any], after: int) -> Iterator[Any]:
    yield from batches[:after]
    raise KeyboardInterrupt("from the batches")


@pytest.mark.parametrize("trajectory", [None, Trajectory(lr=0.1)], ids=["fixed", "trajectory"])
@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("how", ["to the end", "batches", "on_gradient", "loss_fn", "NaN loss"])
def test_all_is_put_back(trajectory: Trajectory | None, training: bool | None, how: str) -> None:
    """After the last step, and after an exception in the second; meanwhile the state did change."""
    net = a_net()
    batches = some_batches(3)
    start = {n: t.detach().clone() for n, t in (*net.named_parameters(), *net.named_buffers())}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    seen: list[str] = []

    def on_gradient(name: str, G: Tensor) -> None:
        seen.append(name)
        if how == "on_gradient" and len(seen) == 3:  # between the two targets of step 2
            changed()
            raise KeyboardInterrupt("from on_gradient")
        if len(seen) == 4:
            changed()

    def changed() -> None:
        assert net.calls is not start["calls"]
        assert int(net.calls) == 2
        assert not net.head.weight.grad_fn
        assert net.head.weight.grad is None
        if training:
            assert not torch.equal(net.norm.running_mean, start["norm.running_mean"])
            assert not torch.equal(torch.get_rng_state(), generators[0])
        assert random.getstate() != generators[1]
        assert np.random.get_state()[2] != generators[2]  # noqa: NPY002
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, start[n])}
        walking = {n for n in start if n.startswith(("up", "down", "head", "norm.weight", "norm.bias"))}
        assert moved == (walking if trajectory else set())

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        loss = default_loss(model, batch)
        if len(seen) == 2 and how == "loss_fn":
            raise KeyboardInterrupt("from loss_fn")
        return loss * float("nan") if len(seen) == 2 and how == "NaN loss" else loss

    def run() -> None:
        source = interrupted(batches, 1) if how == "batches" else batches
        stream_gradients(
            net, TARGETS, on_gradient, source, n_steps=3, trajectory=trajectory, training=training, loss_fn=loss_fn
        )

    before = Before(net)
    if how == "to the end":
        run()
        assert seen == ["down", "up"] * 3
    elif how == "NaN loss":
        with pytest.raises(ValueError, match="the loss of step 2 is nan"):
            run()
    else:
        with pytest.raises(KeyboardInterrupt, match=f"from {how}" if how != "batches" else "from the batches"):
            run()
        assert seen == (["down", "up", "down"] if how == "on_gradient" else ["down", "up"])
    before.assert_unchanged()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trajectory", [None, Trajectory()])
def test_called_where_gradients_are_off(mode: Callable[[], Any], trajectory: Trajectory | None) -> None:
    net, batches = a_net(), some_batches()
    expected: list[Tensor] = []
    found: list[Tensor] = []
    stream_gradients(net, TARGETS, lambda _, G: expected.append(G.clone()), batches, n_steps=3, trajectory=trajectory)
    with mode():
        before = Before(net)
        stream_gradients(net, TARGETS, lambda _, G: found.append(G.clone()), batches, n_steps=3, trajectory=trajectory)
        before.assert_unchanged()
    assert len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_interrupted_progress_bar_is_taken_down() -> None:
    """Its thread must not go on drawing while a notebook keeps the traceback of the interrupt."""
    model = nn.Linear(2, 2)
    started: list[threading.Thread] = []

    def interrupt(name: str, G: Tensor) -> None:
        started.extend(set(threading.enumerate()) - before)
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as kept:
        stream_gradients(model, [""], interrupt, step=lambda: model(torch.ones(1, 2)).sum(), n_steps=2, progress="bar")
    assert kept.tb is not None
    assert started
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


# What is refused, and in which words


def run(model: nn.Module, targets: list[str], batches: Any = None, **options: Any) -> None:
    """Call stream_gradients with defaults, and check that the model is restored after every error."""
    options.setdefault("n_steps", 2)
    before = Before(model)
    try:
        stream_gradients(model, targets, options.pop("on_gradient", lambda *_: None), batches, **options)
    finally:
        before.assert_unchanged()


def test_hooks_on_accumulated_gradients_do_not_run() -> None:
    """Such as an optimizer that steps in a hook, which would also take the gradients away."""
    net = a_net()
    calls: list[Tensor] = []
    trained = [p for p in net.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(calls.append)
    run(net, TARGETS, some_batches())
    assert not calls
    net(**some_batches()[0]).loss.backward()
    assert {id(p) for p in calls} == {id(p) for p in trained}  # they are there again


def test_exactly_one_source_of_losses() -> None:
    net = a_net()
    with pytest.raises(ValueError, match="either batches or step"):
        run(net, TARGETS)
    with pytest.raises(ValueError, match="either batches or step"):
        run(net, TARGETS, some_batches(), step=lambda: torch.zeros(()))


def test_targets_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"no modules named upp, down\.weight; it has, for instance: up, head, frozen"):
        run(a_net(), ["upp", "up", "down.weight"], some_batches())
    with pytest.raises(ValueError, match="expected at least one target layer"):
        run(a_net(), [], some_batches())


def test_targets_that_are_not_linear() -> None:
    with pytest.raises(TypeError, match=r"norm: expected a torch\.nn\.Linear or a Conv1D, found BatchNorm1d"):
        run(a_net(), ["up", "norm"], some_batches())


def test_quantized_or_sharded_targets() -> None:
    net = a_net()
    net.up.weight = nn.Parameter(torch.zeros(10, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"up: expected a floating point weight of shape \(10, 6\).*int8.*quantizing"):
        run(net, ["up"], some_batches())
    net.up.weight = nn.Parameter(torch.zeros(60))  # FSDP's flat parameter looks so
    with pytest.raises(
        TypeError, match=r"up: .* with shape \(60,\); calibrate before quantizing the model or wrapping"
    ):
        run(net, ["up"], some_batches())


def test_two_targets_with_one_weight() -> None:
    """Autograd has one gradient for both, the sum over their uses, so neither name would be right."""
    net = a_net()
    net.frozen.weight = net.up.weight
    with pytest.raises(ValueError, match="up and frozen share one weight tensor"):
        run(net, ["down", "up", "frozen"], some_batches())
    found: list[str] = []
    run(net, ["up"], some_batches(), on_gradient=lambda name, G: found.append(name))  # one of them is a gradient
    assert found == ["up", "up"]


@pytest.mark.parametrize(("empty", "words"), [([], "none"), (iter([]), "none")])
def test_no_batches(empty: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"expected batches for 2 steps, found {words}"):
        run(a_net(), TARGETS, empty)


def test_too_few_batches() -> None:
    batches = some_batches(2)
    with pytest.raises(ValueError, match="expected batches for 3 steps, found 2, from an iterator that cannot be"):
        run(a_net(), TARGETS, iter(batches), n_steps=3)
    run(a_net(), TARGETS, iter(batches), n_steps=2)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (1.0, "found float"),
        (None, "found NoneType"),
        (torch.zeros(2), r"found Tensor of shape \(2,\)"),
        (torch.zeros(0), r"found Tensor of shape \(0,\)"),
    ],
)
def test_loss_that_is_no_scalar(loss: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"the loss as a tensor with one element, {words}"):
        run(a_net(), TARGETS, step=lambda: loss)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_loss_that_is_not_finite(value: str) -> None:
    net = a_net()
    batch = some_batches(1)[0]
    steps: list[float] = [1.0, 1.0, float(value)]
    with pytest.raises(ValueError, match=f"the loss of step 3 is {value}; no gradient"):
        run(net, TARGETS, step=lambda: default_loss(net, batch) + steps.pop(0), n_steps=4)


def test_loss_without_gradient() -> None:
    net = a_net()
    for step in (
        lambda: net(**some_batches(1)[0]).loss.detach(),
        lambda: net.head(torch.ones(1, 4, dtype=F64)).sum(),  # of a layer that is frozen meanwhile
    ):
        with pytest.raises(ValueError, match="the loss of step 1 does not depend on any target weight"):
            run(net, TARGETS, step=step)


def test_gradient_that_is_not_finite() -> None:
    """The loss is finite, and √0 has an infinite slope. The message names the layer and the step."""
    net = a_net()
    batch = some_batches(1)[0]
    slopes = iter([False, True])

    def loss() -> Tensor:
        y = net.up(batch["x"]).sum()
        return (y - y.detach()).abs().sqrt() if next(slopes) else y

    with pytest.raises(ValueError, match=r"up: the gradient of step 2 is not finite; .*labels"):
        run(net, ["up"], step=loss)


def test_layer_that_no_gradient_reaches() -> None:
    net = a_net()

    def loss() -> Tensor:
        hidden = net.up(torch.ones(2, 6, dtype=F64)).detach()
        return net.down(hidden).sum()

    with pytest.raises(ValueError, match="no gradient reached up, frozen, up to step 2: they do not take"):
        run(net, ["up", "down", "frozen"], step=loss)


def test_batches_that_are_not_mappings() -> None:
    with pytest.raises(TypeError, match=r"expected batches that are mappings, .*found tuple; pass loss_fn="):
        run(a_net(), TARGETS, [(torch.ones(2, 6), torch.zeros(2))])


@pytest.mark.parametrize(
    ("row", "found"),
    [({"input_ids": [1, 2], "labels": 1}, "list"), ({"input_ids": torch.tensor([1, 2]), "x": torch.ones(2, 2)}, "2,")],
)
def test_rows_in_place_of_batches(row: dict[str, Any], found: str) -> None:
    with pytest.raises(TypeError, match=rf"a row of data .*'input_ids': '.*{found}.*; pass a DataLoader"):
        run(a_net(), TARGETS, [row])


@pytest.mark.parametrize(("n_batches", "warned"), [(2, True), (3, False)])
@pytest.mark.parametrize("mean_gradient", [True, False])
def test_batches_that_are_read_again_are_named(
    n_batches: int, warned: bool, mean_gradient: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The noise of a batch that comes twice is in two steps."""
    model, config = nn.Linear(2, 1), CalibrationConfig(n_steps=3, mean_gradient=mean_gradient)
    batches = list(torch.randn(n_batches, 5, 2))
    stream_gradients(model, [""], lambda *_: None, batches, loss_fn=lambda m, x: m(x).sum(), config=config)
    found = "calibration has 2 batches for 3 steps and reads them again" in caplog.text
    assert found is (warned and mean_gradient)
    caplog.clear()
    loader = torch.utils.data.DataLoader(torch.randn(n_batches, 2))  # all of the data
    stream_gradients(model, [""], lambda *_: None, loader, loss_fn=lambda m, x: m(x).sum(), config=config)
    assert not caplog.text


def test_output_without_loss() -> None:
    class Outputs(nn.Module):
        def __init__(self, output: Any) -> None:
            super().__init__()
            self.layer, self.output = nn.Linear(2, 2), output

        def forward(self, x: Tensor) -> Any:
            return self.output

    batches = [{"x": torch.ones(1, 2)}]
    words = r"the model's output \({}\) has no loss; put labels into the batches \(found the keys \['x'\]\)"
    with pytest.raises(TypeError, match=words.format("Tensor")):
        run(Outputs(torch.ones(2)), ["layer"], batches)
    with pytest.raises(TypeError, match=words.format("SimpleNamespace")):
        run(Outputs(SimpleNamespace(loss=None)), ["layer"], batches)
    with pytest.raises(TypeError, match=r"output is a tuple, .* set model.config.return_dict = True"):
        run(Outputs((torch.ones(()), torch.ones(2))), ["layer"], batches)


def test_reentrant_checkpointing_of_a_layer_that_is_used_twice() -> None:
    """Its gradient arrives in parts, each of which would count as a gradient."""
    model, x = nn.ModuleList([nn.Linear(5, 5)]), torch.randn(4, 5)

    def loss() -> Tensor:
        y = x.clone().requires_grad_()
        for _ in range(2):
            y = checkpoint(_block, model[0], y, use_reentrant=True)
        return y.square().sum()

    with pytest.raises(ValueError, match=r"arrived in 2 parts in 1 steps: .*; use use_reentrant=False"):
        stream_gradients(model, ["0"], lambda *_: None, step=loss, n_steps=2)


def test_one_batch_in_place_of_several() -> None:
    with pytest.raises(TypeError, match=r"expected several batches, found one with x, labels; pass \[batch\]"):
        run(a_net(), TARGETS, some_batches()[0])


def test_a_named_tuple_with_a_loss() -> None:
    class Output(NamedTuple):
        loss: Tensor

    layer = nn.Linear(2, 1)
    assert default_loss(_Returns(Output(layer(torch.ones(1, 2)).sum())), {"x": torch.ones(1, 2)}).requires_grad


class _Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output, self.parameter = output, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.output


def test_a_walk_moves_embeddings_with_sparse_gradients() -> None:
    embedding, layer = nn.Embedding(7, 3, sparse=True), nn.Linear(3, 1)
    model, seen = nn.Sequential(embedding, layer), []
    stream_gradients(
        model, ["1"], lambda *_: seen.append(embedding.weight.detach().clone()),
        step=lambda: model(torch.tensor([1, 1, 4])).square().sum(), n_steps=2, trajectory=Trajectory(lr=0.1),
    )  # fmt: skip
    assert (seen[1] - embedding.weight).abs().sum(1).gt(0).tolist() == [False, True, False, False, True, False, False]


def test_a_layer_that_the_first_step_does_not_reach_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model, calls = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)]), []

    def loss() -> Tensor:
        calls.append(1)
        return sum(layer(torch.ones(1, 2)).sum() for layer in list(model)[: len(calls)])

    stream_gradients(model, ["0", "1"], lambda *_: None, step=loss, n_steps=2)
    assert "no gradient reached 1 in the first step of calibration" in caplog.text
