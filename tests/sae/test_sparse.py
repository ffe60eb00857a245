"""The sparse step against the dense reference, on ordinary and extreme batches. (By hand and by differences: test_objective.py.)"""

import pytest
import torch

from gsae.sae.objective import SAE_CLASS, build, objective
from gsae.sae.sparse import sparse_objective

D_MODEL, FEATURES = 32, 96
# Batches: rows, and what is added to every gate's bias.
BATCHES = {"random": (50, -1.0), "all off": (50, -1e3), "all on": (50, 1e3), "single row": (1, -1.0), "single row, off": (1, -1e3)}
# Relative to the largest element of a tensor; float32 sums of 50 to 96 terms.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def sae_and_rows(name, batch, dtype):
    """An SAE with nothing at its initial value, and rows that bfloat16 holds exactly, as stored ones are."""
    num_rows, shift = BATCHES[batch]
    generator = torch.Generator().manual_seed(5)
    sae = build(name, D_MODEL, FEATURES, seed=6, dtype=dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
        sae.gate_bias.add_(shift)
    return sae, torch.randn(num_rows, D_MODEL, generator=generator).bfloat16().to(dtype)


def gradients(sae, step, x, lambda_=0.3):
    sae.zero_grad()
    out = step(sae, x)
    out.losses.total(lambda_).backward()
    return out, {name: parameter.grad for name, parameter in sae.named_parameters()}


def assert_near(found, wanted, dtype, name):
    bound = TOLERANCE[dtype] * float(wanted.abs().max()) * 10
    assert float((found - wanted).abs().max()) <= bound, f"{name}: {found} is not {wanted}"


@pytest.mark.parametrize("name", SAE_CLASS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_the_sparse_step_equals_the_dense_one(name, batch, dtype, in_bfloat16):
    sae, x = sae_and_rows(name, batch, dtype)
    wanted, wanted_gradients = gradients(sae, objective(name), x)
    found, found_gradients = gradients(sae, sparse_objective(name, in_bfloat16=in_bfloat16), x)
    num_open = int(wanted.opened.sum())
    assert {"all off": num_open == 0, "all on": num_open == len(x) * FEATURES}.get(batch, (num_open == 0) == ("off" in batch))
    assert torch.equal(found.opened, wanted.opened)
    assert torch.equal(found.fired, wanted.fired)
    assert_near(found.x_hat, wanted.x_hat, dtype, "x_hat")
    for term in ("reconstruction", "sparsity", "auxiliary"):
        assert_near(getattr(found.losses, term).detach(), getattr(wanted.losses, term).detach(), dtype, term)
    for parameter, gradient in wanted_gradients.items():
        if gradient is None:
            assert float(found_gradients[parameter].abs().max()) == 0, parameter
        else:
            assert_near(found_gradients[parameter], gradient, dtype, parameter)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_a_row_that_is_not_finite_is_not_hidden(value, in_bfloat16):
    sae, x = sae_and_rows("gated", "random", torch.float32)
    x[3, 2] = value
    assert not sparse_objective("gated", in_bfloat16=in_bfloat16)(sae, x).losses.reconstruction.isfinite()


@pytest.mark.parametrize("parameter", ["W_gate", "b_gate", "W_dec"])
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_a_weight_that_is_not_finite_is_not_hidden(parameter, in_bfloat16):
    sae, x = sae_and_rows("gated", "all on", torch.float32)
    with torch.no_grad():
        getattr(sae, parameter)[..., 3] = torch.nan
    assert sparse_objective("gated", in_bfloat16=in_bfloat16)(sae, x).losses.total(0.1).isnan()


def test_a_direction_of_zeros_has_a_gradient():
    sae, x = sae_and_rows("gated-norm-weighted", "all on", torch.float64)
    with torch.no_grad():
        sae.W_dec[4] = 0
    wanted = gradients(sae, objective("gated-norm-weighted"), x)[1]["W_dec"]
    assert_near(gradients(sae, sparse_objective("gated-norm-weighted"), x)[1]["W_dec"], wanted, torch.float64, "W_dec")


def test_a_result_does_not_change_from_call_to_call():
    sae, x = sae_and_rows("gated", "random", torch.float32)
    step = sparse_objective("gated", in_bfloat16=True)
    first, second = (gradients(sae, step, x)[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SAE_CLASS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_cuda_gives_what_the_cpu_gives(name, batch, dtype, in_bfloat16):
    sae, x = sae_and_rows(name, batch, dtype)
    wanted = gradients(sae, objective(name), x)[1]
    step = sparse_objective(name, in_bfloat16=in_bfloat16)
    found, again = (gradients(sae.cuda(), step, x.cuda())[1] for _ in range(2))
    assert all(torch.equal(found[parameter], again[parameter]) for parameter in found), "an exact resume needs the same bits"
    for parameter, gradient in wanted.items():
        assert_near(
            found[parameter].cpu(), torch.zeros_like(found[parameter].cpu()) if gradient is None else gradient, torch.float64, parameter
        )
