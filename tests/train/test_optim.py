"""The optimizer against torch's own Adam, unit norms, non-finite gradients, resuming, and fresh slices."""

import copy

import pytest
import torch

from gsae.sae.objective import build, objective
from gsae.train import optim
from gsae.train.optim import SAEOptimizer

UNIT_NORM = ["relu", "gated", "gated-no-aux"]


def make(name="gated", dtype=torch.float64, device="cpu", **settings):
    sae = build(name, 6, 10, seed=0, dtype=dtype).to(device)
    settings = {"betas": (0.0, 0.999), "eps": 1e-8, "unit_norm": name in UNIT_NORM, **settings}
    return sae, SAEOptimizer(sae, **settings)


def rows(seed, dtype=torch.float64, num_rows=16):
    return torch.randn(num_rows, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def backward(sae, name="gated", seed=0):
    sae.zero_grad()
    objective(name)(sae, rows(seed, sae.b_dec.dtype)).losses.total(0.05).backward()


def snapshot(sae, optimizer):
    return {**{k: v.clone() for k, v in sae.state_dict().items()}, **{k: v.clone() for k, v in optimizer.state_tensors().items()}}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_unit_norm_it_is_adam(dtype):
    sae, optimizer = make("gated-norm-weighted", dtype, betas=(0.9, 0.99))
    reference = copy.deepcopy(sae)
    adam = torch.optim.Adam(reference.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, foreach=False)
    for seed in range(5):
        for each in (sae, reference):
            backward(each, "gated-norm-weighted", seed)
        optimizer.step(1e-2)
        adam.step()
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name])


@pytest.mark.parametrize("name", UNIT_NORM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder_rows_keep_norm_one_and_gradients_are_orthogonal_to_them(name, dtype):
    sae, optimizer = make(name, dtype)
    for seed in range(20):
        before = sae.W_dec.detach().clone()
        backward(sae, name, seed)
        assert (sae.W_dec.grad * before).sum(dim=1).abs().max() > 1e-3
        optimizer.step(3e-2)
        assert (sae.W_dec.grad * before).sum(dim=1).abs().max() < 1e-6
        assert (sae.W_dec.detach().double().norm(dim=1) - 1).abs().max() < 1e-6
    assert not torch.equal(before, sae.W_dec)


def test_the_projection_comes_before_adam():
    sae, optimizer = make()
    backward(sae)
    gradient, directions = sae.W_dec.grad.clone(), sae.W_dec.detach().clone()
    optimizer.step(1e-2)
    projected = gradient - (gradient * directions).sum(dim=1, keepdim=True) * directions
    # The first update of Adam with beta1 0 is -lr g / (|g| + eps).
    moved = directions - 1e-2 * projected / (projected.abs() + 1e-8)
    torch.testing.assert_close(sae.W_dec.detach(), moved / moved.norm(dim=1, keepdim=True))


def test_the_norm_is_that_of_the_whole_projected_gradient():
    sae, optimizer = make()
    backward(sae)
    report = optimizer.step(1e-2)
    wanted = torch.cat([parameter.grad.flatten() for parameter in sae.parameters()]).norm()
    torch.testing.assert_close(report.norm, wanted)
    assert report.norm.dtype == torch.float64
    assert bool(report.is_finite)


def test_clipping_bounds_the_gradient():
    sae, optimizer = make(clip_gradient_norm=0.01)
    backward(sae)
    report = optimizer.step(1e-2)
    assert report.norm > 0.01
    assert torch.cat([parameter.grad.flatten() for parameter in sae.parameters()]).norm().item() == pytest.approx(0.01)
    sae, optimizer = make(clip_gradient_norm=1e6)
    backward(sae)
    gradient = sae.W_gate.grad.clone()
    optimizer.step(1e-2)
    assert torch.equal(sae.W_gate.grad, gradient)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_non_finite_gradient_changes_nothing_and_the_run_can_go_on(value, dtype, clip):
    sae, optimizer = make(dtype=dtype, clip_gradient_norm=clip)
    backward(sae)
    optimizer.step(1e-2)
    before = snapshot(sae, optimizer)
    backward(sae, seed=1)
    sae.W_gate.grad[2, 3] = value
    report = optimizer.step(1e-2)
    assert not bool(report.is_finite)
    assert_equal(snapshot(sae, optimizer), before)
    backward(sae, seed=1)
    assert bool(optimizer.step(1e-2).is_finite)
    assert optimizer.state_tensors()["W_gate.step"].item() == 2
    assert not torch.equal(sae.W_gate, before["W_gate"])


@pytest.mark.parametrize("name", ["gated", "gated-norm-weighted"])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.99)])
def test_kernels_make_the_same_update(name, clip, betas):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (sae, optimizer), (reference, plain) = (
        make(name, torch.float32, betas=betas, clip_gradient_norm=clip, device=device, on_kernels=each) for each in (True, False)
    )
    for seed in range(4):
        for each in (sae, reference):
            each.zero_grad()
            objective(name)(each, rows(seed, torch.float32).to(device)).losses.total(0.05).backward()
            if seed == 2:
                each.W_dec.grad[1, 1] = torch.inf
        found, wanted = optimizer.step(1e-2), plain.step(1e-2)
        torch.testing.assert_close(found.norm, wanted.norm, rtol=1e-6, atol=0, equal_nan=True)
        assert bool(found.is_finite) == bool(wanted.is_finite) == (seed != 2)
        for key, value in snapshot(sae, optimizer).items():
            torch.testing.assert_close(value, snapshot(reference, plain)[key], rtol=1e-5, atol=1e-6)
    assert optimizer.state_tensors().keys() == plain.state_tensors().keys()


def test_kernels_of_the_update_are_tried_before_they_are_trusted(monkeypatch):
    of_update = pytest.importorskip("gsae.train.kernels")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why_not = optim.why_not_on_kernels.__wrapped__
    assert why_not(device, 20) is None
    right = of_update.move
    monkeypatch.setattr(of_update, "move", lambda *arguments: right(*arguments) or arguments[0].mul_(1.001))
    assert why_not(device, 20) == "their update is wrong on this device"
    monkeypatch.setattr(of_update, "measure", lambda *_: 1 / 0)
    assert why_not(device, 20) == "those of the update fail on this device (ZeroDivisionError: division by zero)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("on_kernels", [False, True])
def test_a_step_does_not_wait_for_the_gpu(clip, on_kernels):
    sae = build("gated", 6, 10, seed=0).cuda()
    optimizer = SAEOptimizer(sae, betas=(0.0, 0.999), eps=1e-8, unit_norm=True, clip_gradient_norm=clip, on_kernels=on_kernels)
    objective("gated")(sae, rows(0, torch.float32).cuda()).losses.total(0.05).backward()
    optimizer.step(1e-2)
    before = snapshot(sae, optimizer)
    sae.W_gate.grad[2, 3] = torch.nan
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = optimizer.step(1e-2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not bool(report.is_finite)
    assert_equal(snapshot(sae, optimizer), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_run_goes_on_bit_for_bit(dtype):
    sae, optimizer = make(dtype=dtype, betas=(0.9, 0.999))
    for seed in range(3):
        backward(sae, seed=seed)
        optimizer.step(1e-2)
    resumed_sae, resumed = make(dtype=dtype, betas=(0.9, 0.999))
    resumed_sae.load_state_dict(sae.state_dict())
    resumed.load_state_tensors(snapshot(sae, optimizer))
    for seed in range(3, 6):
        for each, its in ((sae, optimizer), (resumed_sae, resumed)):
            backward(each, seed=seed)
            its.step(1e-2)
    assert_equal(snapshot(sae, optimizer), snapshot(resumed_sae, resumed))


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_resampled_slices_are_fresh_and_others_stay(name):
    sae, optimizer = make(name, betas=(0.9, 0.999))
    for seed in range(3):
        backward(sae, name, seed)
        optimizer.step(1e-2)
    before = snapshot(sae, optimizer)
    alive = torch.ones(10, dtype=torch.bool)
    alive[[2, 5, 7]] = False
    optimizer.reset_slices(torch.tensor([2, 7]), alive)
    after = optimizer.state_tensors()
    others = torch.tensor([0, 1, 3, 4, 5, 6, 8, 9])
    for parameter, axis in sae.FEATURE_AXIS.items():
        average, square = after[f"{parameter}.exp_avg"], after[f"{parameter}.exp_avg_sq"]
        assert average.select(axis, 2).abs().max() == average.select(axis, 7).abs().max() == 0
        wanted = before[f"{parameter}.exp_avg_sq"].index_select(axis, alive.nonzero().flatten()).mean(dim=axis)
        torch.testing.assert_close(square.select(axis, 2), wanted)
        torch.testing.assert_close(square.select(axis, 7), wanted)
        for key in (f"{parameter}.exp_avg", f"{parameter}.exp_avg_sq"):
            assert torch.equal(after[key].index_select(axis, others), before[key].index_select(axis, others))
    assert torch.equal(after["b_dec.exp_avg_sq"], before["b_dec.exp_avg_sq"])
    assert after["W_dec.step"].item() == 3


def test_slices_are_the_mean_over_all_features_when_none_is_alive():
    sae, optimizer = make()
    backward(sae)
    optimizer.step(1e-2)
    mean = optimizer.state_tensors()["b_gate.exp_avg_sq"].mean()
    optimizer.reset_slices(torch.arange(10), torch.zeros(10, dtype=torch.bool))
    torch.testing.assert_close(optimizer.state_tensors()["b_gate.exp_avg_sq"], mean.expand(10))
    assert mean > 0
