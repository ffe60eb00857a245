"""The GPU's kernels against the dense reference: on the card where there is one, otherwise in Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from gsae.sae import dense_kernels, dense_on_kernels, entry_kernels, kernels, on_kernels, sparse_on_kernels
from gsae.sae.dense_on_kernels import dense_kernel_objective
from gsae.sae.objective import SAE_CLASS, build, objective
from gsae.sae.part import Part
from gsae.sae.products import rounded_factors
from gsae.sae.sparse import sparse_objective
from gsae.sae.sparse_on_kernels import Capacity, Factors, propose_from_products, propose_fused, sparse_kernel_objective

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Nothing is a multiple of a tile.
ROWS, D_MODEL, FEATURES = 13, 20, 41
SOME, NONE, ALL = -1.0, -1e3, 1e3
"""What is added to every gate's bias: so many are open then."""


@pytest.fixture
def small_tiles(monkeypatch):
    """Vectors and lists take several tiles."""
    monkeypatch.setattr(kernels, "_WIDTH", 16)
    for module in (entry_kernels, kernels):
        monkeypatch.setattr(module, "PRODUCT_WIDTH", 16)
        monkeypatch.setattr(module, "ENTRIES", 4)
    monkeypatch.setattr(entry_kernels, "_WORDS", 1)
    monkeypatch.setattr(dense_on_kernels, "BLOCK_ELEMENTS", 5 * FEATURES)
    monkeypatch.setattr(sparse_on_kernels, "PRODUCTS_ELEMENTS", 5 * FEATURES)


def sae_and_rows(name, shift=SOME):
    generator = torch.Generator().manual_seed(5)
    sae = build(name, D_MODEL, FEATURES, seed=6)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        sae.gate_bias.add_(shift)
    return sae.to(DEVICE), torch.randn(ROWS, D_MODEL, generator=generator).to(DEVICE)


def results(sae, step, x):
    """What a step gives, gradients by name; those of parameters that get none are 0."""
    sae.zero_grad()
    out = step(sae, x)
    out.losses.total(0.3).backward()
    found = {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in sae.named_parameters()}
    terms = {name: getattr(out.losses, name).detach() for name in ("reconstruction", "sparsity", "auxiliary")}
    return out, {**found, **terms, "x_hat": out.x_hat}


def assert_near(found, wanted, tolerance=5e-6):
    assert found.keys() == wanted.keys()
    far = {name: float((found[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-6)) for name in wanted}
    assert {name: distance for name, distance in far.items() if not distance <= tolerance} == {}


CASES = [*((name, shift) for name in SAE_CLASS for shift in (SOME, ALL)), ("gated", NONE)]


@pytest.mark.parametrize(("name", "shift"), CASES)
def test_the_sparse_step_equals_the_dense_reference(name, shift):
    sae, x = sae_and_rows(name, shift)
    expected, wanted = results(sae, objective(name), x)
    out, found = results(sae, sparse_kernel_objective(name), x)
    assert {SOME: 0 < int(expected.opened.sum()) < ROWS * FEATURES / 2, NONE: int(expected.opened.sum()) == 0}.get(shift, True)
    assert torch.equal(out.opened, expected.opened)
    assert torch.equal(out.fired, expected.fired)
    assert_near(found, wanted)


class OtherHalf(Part):
    """A part whose sums get what another part's ranks would add: the same each time."""

    def reduce(self, value):
        generator = torch.Generator().manual_seed(7)
        return value + torch.randn(value.shape, generator=generator).to(value)


@pytest.mark.parametrize("first", [0, FEATURES])
@pytest.mark.parametrize("name", SAE_CLASS)
def test_steps_on_a_part_of_a_dictionary_equal_the_reference_s(name, first):
    sae, x = sae_and_rows(name)
    sae.part = OtherHalf(first, 2 * FEATURES, SimpleNamespace(rank=first // FEATURES, size=2))
    _, wanted = results(sae, sparse_objective(name, in_bfloat16=False), x)
    assert float(wanted["b_dec"].norm()) > 0
    for step in (sparse_kernel_objective(name), dense_kernel_objective(name)):
        assert_near(results(sae, step, x)[1], wanted)


@pytest.mark.parametrize("name", ["gated", "gated-norm-weighted"])
def test_vectors_and_lists_of_several_tiles(name, small_tiles):
    sae, x = sae_and_rows(name)
    wanted = results(sae, objective(name), x)[1]
    for step in (
        sparse_kernel_objective(name),
        sparse_kernel_objective(name, proposer=propose_from_products),
        dense_kernel_objective(name),
    ):
        assert_near(results(sae, step, x)[1], wanted)


@pytest.mark.parametrize(("name", "shift"), CASES)
@pytest.mark.parametrize("factors", ["float32", "tf32", "bfloat16"])
def test_the_dense_step_equals_the_dense_reference(name, shift, factors):
    sae, x = sae_and_rows(name, shift)
    with rounded_factors(factors):
        expected, wanted = results(sae, objective(name), x)
    out, found = results(sae, dense_kernel_objective(name, factors), x)
    assert torch.equal(out.opened, expected.opened)
    assert torch.equal(out.fired, expected.fired)
    # The interpreter cuts numbers off where it makes them bfloat16; a GPU rounds them.
    assert_near(found, wanted, {"float32": 5e-6, "tf32": 2e-3, "bfloat16": 0.02}[factors])


class LargestFloat32(TorchDispatchMode):
    """The most elements of a float32 tensor that a block makes with one column a feature, weights apart."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.shape[1:] == (FEATURES,):
            self.elements = max(self.elements, result.numel() * (result.shape[0] != D_MODEL))
        return result


@pytest.mark.parametrize(("name", "products"), [("relu", 5), ("gated", 7), ("gated-no-aux", 5), ("gated-norm-weighted", 8)])
def test_the_dense_step_makes_no_product_more_and_keeps_nothing_of_rows_times_features_in_float32(name, products, small_tiles):
    sae, x = sae_and_rows(name)
    with FlopCounterMode(display=False) as operations, LargestFloat32() as largest:
        results(sae, dense_kernel_objective(name, "bfloat16"), x)
    assert operations.get_total_flops() == products * 2 * ROWS * D_MODEL * FEATURES
    assert largest.elements == 5 * FEATURES, "a block of rows"


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_with_bfloat16_factors_the_sparse_step_is_near_the_reference(name):
    sae, x = sae_and_rows(name)
    with torch.no_grad():
        for matrix in (sae.encoder, sae.W_dec, sae.b_dec, x):  # so that rounding opens and closes no gate
            matrix.copy_(matrix.bfloat16())
        x.copy_((x - sae.b_dec).bfloat16() + sae.b_dec)
    wanted = results(sae, objective(name), x)[1]
    found = results(sae, sparse_kernel_objective(name, in_bfloat16=True), x)[1]
    assert_near(found, wanted, 0.02)
    with pytest.raises(AssertionError):
        assert_near(found, wanted, 1e-5)


def test_neither_the_proposer_nor_the_room_in_the_list_changes_a_bit():
    sae, x = sae_and_rows("gated")
    first = results(sae, sparse_kernel_objective("gated", proposer=propose_fused), x)[1]
    for step in (
        sparse_kernel_objective("gated", proposer=propose_fused),
        sparse_kernel_objective("gated", proposer=propose_from_products),
        sparse_kernel_objective("gated", proposer=propose_everything, capacity=Capacity(1 << 11)),
    ):
        again = results(sae, step, x)[1]
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


def propose_everything(factors: Factors) -> torch.Tensor:
    return torch.full_like(propose_fused(factors), -1) & torch.tensor([-1, (1 << FEATURES - 32) - 1], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("capacity", [1, 64, 100])
def test_a_list_that_is_too_short_grows_and_loses_no_entry(monkeypatch, capacity):
    monkeypatch.setattr(sparse_on_kernels, "SMALLEST_CAPACITY", 1)
    sae, x = sae_and_rows("gated")
    expected, wanted = results(sae, objective("gated"), x)
    room, lists, whole = Capacity(capacity), [], entry_kernels.list_entries
    monkeypatch.setattr(entry_kernels, "list_entries", lambda *arguments: lists.append(arguments[-1]) or whole(*arguments))
    out, found = results(sae, sparse_kernel_objective("gated", capacity=room), x)
    assert lists == [capacity, room.entries]
    assert room.entries >= int(expected.opened.sum()) > capacity
    assert torch.equal(out.opened, expected.opened)
    assert_near(found, wanted)
    results(sae, sparse_kernel_objective("gated", capacity=room), x)
    assert len(lists) == 3, "the room is kept"


def test_the_room_follows_the_number_of_entries():
    room = Capacity(1 << 14)
    assert room.holds(1 << 14)
    assert not room.holds((1 << 14) + 1)
    assert room.entries == 1 << 15
    assert not room.holds(10**7)
    assert room.entries >= 10**7
    assert room.holds(3 * 10**6)
    assert room.entries >= 10**7, "no new room for every batch"
    assert room.holds(100)
    assert room.entries == sparse_on_kernels.SMALLEST_CAPACITY


@pytest.mark.parametrize("proposer", [propose_fused, propose_from_products])
def test_what_is_proposed_over_several_tiles_holds_every_open_gate_and_few_others(proposer):
    generator = torch.Generator().manual_seed(0)
    x, directions = torch.randn(150, 70, generator=generator).to(DEVICE), torch.randn(300, 70, generator=generator).to(DEVICE)
    bias = torch.randn(300, generator=generator).to(DEVICE) - 12
    words = proposer(Factors(x.bfloat16(), directions.bfloat16(), bias, is_exact=True))
    assert words.shape == (150, 10)
    bits = ((words[:, :, None] >> torch.arange(32, device=DEVICE)) & 1).bool().flatten(1)
    assert not bits[:, 300:].any()
    pi_gate = x.double() @ directions.double().T + bias
    assert bool(bits[:, :300][pi_gate > 0].all())
    bound = 0.02 * x.norm(dim=1)[:, None] * directions.norm(dim=1)
    assert not bits[:, :300][pi_gate < -bound].any()
    assert 0.01 < float((pi_gate > 0).double().mean()) < 0.2


@pytest.mark.parametrize("proposer", [propose_fused, propose_from_products])
def test_an_entry_is_proposed_though_all_of_it_is_rounded_against_it(proposer):
    """As in test_active.py."""
    x = torch.full((1, 1021), 1 + 2.0**-8 - 2.0**-16, device=DEVICE)
    for share, is_proposed in ((1 - 1e-6, True), (1.03, False)):
        bias = -(x.double() @ x.double().T)[0].float() * share
        assert bool(proposer(Factors(x.bfloat16(), x.bfloat16(), bias, is_exact=True)).any()) == is_proposed


@pytest.mark.parametrize("step", [sparse_kernel_objective, dense_kernel_objective])
@pytest.mark.parametrize("where", ["x", "W_gate", "b_gate", "W_dec"])
def test_what_is_not_finite_is_not_hidden(step, where):
    sae, x = sae_and_rows("gated", ALL)
    with torch.no_grad():
        (x if where == "x" else getattr(sae, where))[..., 3] = torch.nan
    assert step("gated")(sae, x).losses.total(0.1).isnan()


def test_a_direction_of_zeros_has_a_gradient():
    sae, x = sae_and_rows("gated-norm-weighted", ALL)
    with torch.no_grad():
        sae.W_dec[4] = 0
    wanted = results(sae, objective("gated-norm-weighted"), x)[1]
    for step in (sparse_kernel_objective("gated-norm-weighted"), dense_kernel_objective("gated-norm-weighted")):
        assert_near(results(sae, step, x)[1], wanted)


def test_kernels_are_for_float32_on_gpus():
    assert on_kernels.why_not("gated", torch.device("cpu"), torch.float32, 16, "float32") == "they are for NVIDIA's GPUs"
    assert on_kernels.why_not("gated", torch.device("cuda", 9), torch.float64, 16, "float32") == "they are for float32 weights"


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_kernels_are_tried_before_they_are_trusted(products, monkeypatch):
    assert on_kernels.why_wrong("gated", DEVICE, D_MODEL, products) is None
    right = kernels.gradients

    def wrong(*arguments, **settings):
        found = right(*arguments, **settings)
        found.W_dec[::2] *= 1.1
        return found

    monkeypatch.setattr(kernels, "gradients", wrong)
    assert on_kernels.why_wrong("gated", DEVICE, D_MODEL, products) == "their gradient of W_dec is wrong on this device"


def test_kernels_that_do_not_compile_are_done_without(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a long story\nno kernel image is available")

    monkeypatch.setattr(dense_kernels, "open_gates", fail)
    found = on_kernels.why_wrong("gated", DEVICE, D_MODEL, "float32")
    assert found == "they fail on this device (RuntimeError: no kernel image is available)"


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu_without_one(capability, tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script, str(capability), "gated"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 15, done.stdout
    assert [line for line in lines if int(line.split()[-3]) > 64] == [], "registers do not suffice"
    assert any("_propose" in line and ("wgmma" if capability == 90 else "mma") in line for line in lines), "tensor cores multiply"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("name", SAE_CLASS)
def test_on_a_gpu_the_step_does_not_wait(name, in_bfloat16):
    sae, x = sae_and_rows(name)
    step = sparse_kernel_objective(name, in_bfloat16=in_bfloat16)
    results(sae, step, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = (results(sae, step, x)[1] for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("products", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", SAE_CLASS)
@pytest.mark.parametrize("d_model", [576, 4096])
def test_on_a_gpu_kernels_are_right_at_the_widths_of_llamas(name, d_model, products):
    assert on_kernels.why_wrong(name, DEVICE, d_model, products) is None
