"""Exports in slices: the same files as from the whole SAE in memory, from checkpoints in any number of parts, in little memory."""

import json
import multiprocessing
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gsae.exchange import export
from gsae.exchange.load import load_sae
from gsae.exchange.streamed import Layout, Slice, write_safetensors
from gsae.sae.folded import folded, jumprelu_weights
from gsae.sae.foreign import dictionary_tensors
from gsae.sae.formats import describe_parts, fold_scale, part_file, read_sae, save_sae, write_tensors
from gsae.sae.objective import SAE, build
from gsae.sae.part import Part

D_MODEL, NUM_FEATURES = 8, 96
DESCRIPTION = {"site": "resid.1", "layer": 1, "scale": 0.25, "llm": {"name": "x/y"}}


def made(objective: str, dtype: torch.dtype = torch.float32, d_model: int = D_MODEL, num_features: int = NUM_FEATURES) -> SAE:
    sae = build(objective, d_model, num_features, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def save_in_parts(directory: Path, sae: SAE, objective: str, count: int) -> Path:
    """What ranks leave that hold the features together."""
    if count == 1:
        save_sae(directory, sae, {**DESCRIPTION, "objective": objective})
        return directory
    from hashlib import sha256

    directory.mkdir()
    size, hashes = sae.num_features // count, []
    for number in range(count):
        path, own = directory / part_file("sae.safetensors", number, count), slice(number * size, (number + 1) * size)
        cut = {name: own if axis == 0 else (slice(None), own) for name, axis in sae.FEATURE_AXIS.items()}
        write_tensors(path, {name: value[cut.get(name, ...)] for name, value in sae.state_dict().items()})
        hashes.append(sha256(path.read_bytes()).hexdigest())
    part = build(objective, sae.d_model, size, 0)
    part.part = Part(0, sae.num_features, holders=None)  # type: ignore[arg-type]
    describe_parts(directory, part, {**DESCRIPTION, "objective": objective}, hashes)
    return directory


def whole(sae: SAE, objective: str, target: str) -> dict[str, torch.Tensor]:
    """The tensors of an export, made of all features at once."""
    wide = fold_scale(folded(sae, {**DESCRIPTION, "objective": objective}), 1.0)
    if target == "gsae":
        return wide.to(sae.b_dec.dtype).state_dict()
    wide = wide.to(torch.float32)
    if target == "dictionary_learning":
        return dictionary_tensors(wide)
    if target == "jumprelu":
        return dict(vars(jumprelu_weights(wide)))
    return {"W_enc" if name == "W_gate" else name: value for name, value in wide.state_dict().items()}


FILES = {"gsae": "sae.safetensors", "saelens": "sae_weights.safetensors", "jumprelu": "sae_weights.safetensors"}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("objective", ["gated", "relu"])
@pytest.mark.parametrize("target", ["gsae", "saelens", "jumprelu", "dictionary_learning"])
def test_the_files_are_those_of_the_whole(tmp_path, monkeypatch, target, objective, count):
    monkeypatch.setattr(export, "SLICE_BYTES", 2 * 8 * D_MODEL * 23)  # 23 features at a time, then 4
    sae = made(objective, torch.float64 if target == "gsae" else torch.float32)
    source, out = save_in_parts(tmp_path / "source", sae, objective, count), tmp_path / "out"
    export.run_export(str(source), target, output=out)
    wanted = {name: value.contiguous() for name, value in whole(sae, objective, target).items()}
    if target == "dictionary_learning":
        found = torch.load(out / "ae.pt", weights_only=True)
        assert list(found) == list(wanted)
    else:
        found = load_file(out / FILES[target])
        save_file(wanted, tmp_path / "wanted")
        assert (out / FILES[target]).read_bytes() == (tmp_path / "wanted").read_bytes()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in wanted.items())
    assert not any("partial" in path.name for path in out.rglob("*"))
    if target == "gsae":
        assert torch.equal(read_sae(out).sae.W_dec, wanted["W_dec"]), "the hash is that of the file"
        assert "parts" not in json.loads((out / "sae.json").read_text())
        torch.testing.assert_close(load_sae(source).W_dec, load_sae(out).W_dec, rtol=1e-12, atol=0)


@given(
    dtypes=st.lists(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=30)
def test_any_tensors_in_any_slices_are_what_safetensors_writes(tmp_path_factory, dtypes, cuts):
    folder, total = tmp_path_factory.mktemp("streamed"), sum(cuts)
    axes = {f"t{number}": (None, 0, 1)[number % 3] for number in range(len(dtypes))}
    shapes = {None: (3,), 0: (total, 2), 1: (2, total)}
    wanted = {name: torch.randn(shapes[axis]).to(dtype) for (name, axis), dtype in zip(axes.items(), dtypes, strict=True)}
    slices, first = [], 0
    for cut in cuts:
        places = {name: (slice(None),) * (axis or 0) + (slice(first, first + cut),) for name, axis in axes.items()}
        slices.append(Slice(first, {name: value if axes[name] is None else value[places[name]] for name, value in wanted.items()}))
        first += cut
    outline = {name: Layout(tuple(value.shape), value.dtype, axes[name]) for name, value in wanted.items()}
    write_safetensors(folder / "found", outline, slices)
    save_file(wanted, folder / "wanted")
    assert (folder / "found").read_bytes() == (folder / "wanted").read_bytes()


def test_a_damaged_part_is_refused_before_anything_is_written(tmp_path):
    source = save_in_parts(tmp_path / "source", made("gated"), "gated", 4)
    path = source / "sae-00003-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"sae-00003-of-00004.safetensors: SHA-256 differs"):
        export.run_export(str(source), "gsae", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["gsae", "dictionary_learning"])
def test_an_export_of_more_than_the_memory(tmp_path, target):
    """67 MB of weights, 134 in float64, by a process that may take 80: slices of 8 MB, and a few copies of them."""
    sae = made("relu", d_model=128, num_features=2**16)
    source = save_in_parts(tmp_path / "source", sae, "relu", 4)
    starts = multiprocessing.get_context("spawn")
    for slices, code in ((2**23, 0), (2**30, 1)):
        process = starts.Process(target=exported_in, args=(str(source), str(tmp_path / f"out{code}"), target, slices))
        process.start()
        process.join(120)
        assert process.exitcode == code, "with one slice of all it has not got the memory"
    assert not (tmp_path / "out1").exists()
    if target == "gsae":
        wanted = whole(sae, "relu", target)
        assert all(torch.equal(value, wanted[name]) for name, value in load_file(tmp_path / "out0/sae.safetensors").items())


def exported_in(source: str, out: str, target: str, slice_bytes: int) -> None:
    torch.set_num_threads(1)
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    limit = int(data.split()[1]) * 1024 + 80 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    export.SLICE_BYTES = slice_bytes
    export.run_export(source, target, output=Path(out))
