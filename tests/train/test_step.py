"""One update: micro-batches add up to the batch and bound the memory; the choice between the dense and the sparse step."""

from pathlib import Path

import pytest
import ranks
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gsae.config import TrainConfig
from gsae.sae.objective import SAE_CLASS, build
from gsae.train import step
from gsae.train.bank import make_run
from gsae.train.optim import SAEOptimizer
from gsae.train.plan import RunSpec
from gsae.train.step import TrainingModule, update
from gsae.world import start

D_MODEL, FEATURES, ROWS = 8, 64, 30


@pytest.fixture(scope="module")
def group():
    with start("cpu") as world:
        yield world.group


def training_module(name, is_sparse):
    module = TrainingModule(build(name, D_MODEL, FEATURES, seed=0, dtype=torch.float64), name)
    with torch.no_grad():
        module.sae.gate_bias.sub_(0.5)
    module.is_sparse = is_sparse
    return module


def on_kernels(monkeypatch, products="float32"):
    """A module whose steps are made by kernels: on the card where there is one, otherwise in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(step, "why_not", lambda *_: None)
    return TrainingModule(build("gated", D_MODEL, 40, seed=0), "gated", products=products)


def updated(group, name, is_sparse, micro_batch_rows):
    """A step's report and the weights after it; both from the same start."""
    module = training_module(name, is_sparse)
    optimizer = SAEOptimizer(module.sae, betas=(0.0, 0.999), eps=1e-8, unit_norm=name != "gated-norm-weighted")
    x = torch.randn(ROWS, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    report = update(group.wrap(module), optimizer, x, lambda_=0.2, learning_rate=0.01, micro_batch_rows=micro_batch_rows)
    return report, module.sae.state_dict()


@pytest.mark.parametrize("name", SAE_CLASS)
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("micro_batch_rows", [1, 7, 100])
def test_micro_batches_add_up_to_the_batch(group, name, is_sparse, micro_batch_rows):
    whole, weights = updated(group, name, is_sparse, None)
    report, found = updated(group, name, is_sparse, micro_batch_rows)
    torch.testing.assert_close(report.measures, whole.measures, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.gradient.norm, whole.gradient.norm, rtol=1e-12, atol=1e-12)
    assert torch.equal(report.fired, whole.fired)
    assert torch.equal(report.opened, whole.opened)
    for parameter, value in weights.items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-9, atol=1e-9)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor with a dimension of FEATURES that was made, weights apart."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] == FEATURES and result.shape[0] != D_MODEL:
            self.rows = max(self.rows, result.shape[0])
        return result


@pytest.mark.parametrize("is_sparse", [False, True])
def test_micro_batches_bound_the_rows_that_are_in_memory_at_once(group, is_sparse):
    for micro_batch_rows, expected in ((None, ROWS), (7, 7)):
        with LargestTensor() as largest:
            updated(group, "gated", is_sparse, micro_batch_rows)
        assert largest.rows == expected


def test_the_step_is_sparse_below_the_density_and_dense_again_above_five_quarters_of_it():
    module = training_module("gated", is_sparse=False)
    taken = []
    for density in (0.5, 0.1, 0.099, 0.1, 0.124, 0.125, 0.124, 0.1, 0.09):
        module.choose(density, 0.1)
        taken.append(module.is_sparse)
    assert taken == [False, False, True, True, True, False, False, False, True]


def test_a_density_of_zero_never_takes_the_sparse_step():
    module = training_module("gated", is_sparse=False)
    module.choose(0.0, 0)
    assert not module.is_sparse


@pytest.mark.parametrize("is_sparse", [False, True])
def test_updates_on_kernels_are_those_without(group, monkeypatch, is_sparse):
    reports, weights = [], []
    for module in (on_kernels(monkeypatch), TrainingModule(build("gated", D_MODEL, 40, seed=0), "gated", kernels=False)):
        kernels = module.why_no_kernels is None
        assert kernels == (not weights)
        with torch.no_grad():
            module.sae.gate_bias.sub_(0.5)
        module.is_sparse = is_sparse
        optimizer = SAEOptimizer(module.sae, betas=(0.9, 0.999), eps=1e-8, unit_norm=True, clip_gradient_norm=1.0, on_kernels=kernels)
        for seed in range(3):
            x = torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(seed))
            report = update(group.wrap(module), optimizer, x, lambda_=0.2, learning_rate=0.01, micro_batch_rows=5)
        reports.append(report)
        weights.append(module.sae.state_dict())
    assert torch.equal(reports[0].fired, reports[1].fired)
    torch.testing.assert_close(reports[0].measures, reports[1].measures, rtol=1e-5, atol=1e-6)
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-4, atol=1e-5)


def test_on_kernels_the_step_is_sparse_below_a_lower_density(monkeypatch):
    for products, limit in (("float32", 0.04), ("tf32", 0.006), ("bfloat16", 0.006)):
        module = on_kernels(monkeypatch, products)
        taken = []
        for density, given in ((limit, 0.1), (0.9 * limit, 0.1), (1.2 * limit, 0.1), (1.3 * limit, 0.1), (0.9 * limit, 0.001)):
            module.choose(density, given)
            taken.append(module.is_sparse)
        assert taken == [False, True, True, False, False]


def test_kernels_can_be_left_alone(monkeypatch):
    monkeypatch.setattr(step, "why_not", lambda *_: None)
    module = TrainingModule(build("gated", D_MODEL, FEATURES, seed=0), "gated", kernels=False)
    assert module.why_no_kernels == "train.kernels is false"
    module.choose(0.09, 0.1)
    assert module.is_sparse


def check_agreement(folder: str) -> None:
    with start("cpu") as world:
        step.why_not = lambda *_: None if world.everyone.is_first else "no kernel image is available"
        spec = RunSpec("a", "resid.1", 1, "gated", False, 0.0, D_MODEL, 40, 0.1, 0, 1e-2)

        def why_not(**train: bool) -> str | None:
            return make_run(spec, Path(folder), TrainConfig(**train), torch.zeros(D_MODEL), world.group).training.why_no_kernels

        expected = "another rank of the group cannot run them" if world.everyone.is_first else "no kernel image is available"
        assert why_not() == expected
        assert why_not(kernels=False) == "train.kernels is false"
        step.why_not = lambda *_: None
        assert why_not() is None


def test_a_group_takes_kernels_only_if_all_its_ranks_can(tmp_path):
    pytest.importorskip("triton")
    ranks.run(2, check_agreement, str(tmp_path))
