"""Exports in slices: the same files as from the whole SAE in memory, from checkpoints in any number of parts, in little memory."""

import io
import json
import multiprocessing
import os
import resource
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from exchange_commands import command, mistake
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from gsae.errors import CheckpointError, ConfigError
from gsae.exchange import source as source_
from gsae.exchange.export import run_export
from gsae.exchange.load import load_sae
from gsae.exchange.streamed import Slice, outline, read_part, stored_tensors, write_safetensors
from gsae.sae.formats import describe_parts, part_file, save_sae, write_tensors
from gsae.sae.objective import SAE_CLASS, build
from gsae.sae.part import Part

D_MODEL, NUM_FEATURES, SCALE = 8, 96, 0.37
TARGETS = ("gsae", "saelens", "jumprelu", "dictionary_learning")
FILES = dict(zip(TARGETS, ("sae.safetensors", "sae_weights.safetensors", "sae_weights.safetensors", "ae.pt"), strict=True))
UNFOLDED = {"site": "resid.1", "layer": 1, "scale": SCALE, "llm": {"name": "x/y"}}
FOLDED = UNFOLDED | {"scale": 1.0, "training_scale": SCALE, "folded": True}


def made(objective: str, dtype: torch.dtype = torch.float32):
    """Decoder rows of any norm, one of them zero."""
    sae = build(objective, D_MODEL, NUM_FEATURES, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        sae.W_dec[40] = 0
    return sae


def write_source(directory: Path, sae, objective: str, num_parts: int = 1, description: dict = UNFOLDED) -> Path:
    """What one rank leaves, or ranks that hold the features together."""
    description = {**description, "objective": objective}
    if num_parts == 1:
        save_sae(directory, sae, description)
        return directory
    directory.mkdir()
    size, hashes = sae.num_features // num_parts, []
    for number in range(num_parts):
        path, own = directory / part_file("sae.safetensors", number, num_parts), slice(number * size, (number + 1) * size)
        cuts = {name: own if axis == 0 else (slice(None), own) for name, axis in sae.FEATURE_AXIS.items()}
        write_tensors(path, {name: value[cuts.get(name, ...)] for name, value in sae.state_dict().items()})
        hashes.append(sha256(path.read_bytes()).hexdigest())
    part = build(objective, sae.d_model, size, 0)
    part.part = Part(0, sae.num_features, holders=None)
    describe_parts(directory, part, description, hashes)
    return directory


def fold(w: dict, scale: float) -> dict:
    """W_enc' = s n W_enc;  W_dec' = W_dec / (s n);  b_dec' = b_dec / s;  biases' = n biases, n = |W_dec row| / s, or 1."""
    norms = torch.linalg.vector_norm(w["W_dec"], dim=1) / scale
    norms[norms == 0] = 1
    biases = {name: w[name] * norms for name in ("b_enc", "b_gate", "b_mag") if name in w}
    encoder = {name: w[name] * (scale * norms) for name in ("W_enc", "W_gate") if name in w}
    return w | biases | encoder | {"W_dec": w["W_dec"] / (scale * norms)[:, None], "b_dec": w["b_dec"] / scale}


def whole(sae, target: str, is_folded: bool) -> dict[str, torch.Tensor]:
    """The tensors of an export, of all features at once, in the order of the format."""
    wide = {name: value.double() for name, value in sae.state_dict().items()}
    w = {name: value.contiguous() for name, value in fold(wide if is_folded else fold(wide, SCALE), 1.0).items()}
    if target == "gsae":
        return {name: value.to(sae.b_dec.dtype) for name, value in w.items()}
    w = {name: value.float() for name, value in w.items()}
    is_relu = "W_enc" in w
    encoder = w["W_enc" if is_relu else "W_gate"]
    if target == "dictionary_learning":
        matrices = {"encoder.weight": encoder.T.contiguous(), "decoder.weight": w["W_dec"].T.contiguous()}
        if is_relu:
            return {"bias": w["b_dec"], **matrices, "encoder.bias": w["b_enc"]}
        return {"decoder_bias": w["b_dec"], **matrices, "r_mag": w["r_mag"], "gate_bias": w["b_gate"], "mag_bias": w["b_mag"]}
    if target == "saelens":
        return {"W_enc" if name == "W_gate" else name: value for name, value in w.items()}
    ratio = torch.ones(NUM_FEATURES) if is_relu else w["r_mag"].exp()
    bias, gate = (w["b_enc"], w["b_enc"]) if is_relu else (w["b_mag"], w["b_gate"])
    rest = {"threshold": (bias - ratio * gate).relu(), "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    return {"W_enc": encoder * ratio, "b_enc": bias, **rest}


def slices_of(monkeypatch, num_features: int, d_model: int = D_MODEL) -> None:
    monkeypatch.setattr(source_, "SLICE_BYTES", 2 * 8 * d_model * num_features)


@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("objective", ["relu", "gated"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_files_are_those_of_the_whole_byte_for_byte(tmp_path, monkeypatch, target, objective, is_folded, num_parts):
    sae = made(objective, torch.float64 if is_folded else torch.float32)
    source = write_source(tmp_path / "source", sae, objective, num_parts, FOLDED if is_folded else UNFOLDED)
    slices_of(monkeypatch, 23)  # four times 23, then 4: over the edges of parts of 24
    run_export(str(source), target, output=tmp_path / "out")
    wanted = whole(sae, target, is_folded)
    found = (tmp_path / "out" / FILES[target]).read_bytes()
    if target == "dictionary_learning":
        buffer = io.BytesIO()
        torch.save(wanted, buffer)
        assert found == buffer.getvalue()
        assert list(torch.load(tmp_path / "out" / "ae.pt", weights_only=True)) == list(wanted)
    else:
        save_file(wanted, tmp_path / "wanted")
        assert found == (tmp_path / "wanted").read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 3
    if target == "gsae":
        described = json.loads((tmp_path / "out" / "sae.json").read_text())
        assert described["sha256"] == sha256(found).hexdigest()
        assert "parts" not in described


@pytest.mark.parametrize("num_features", [1, 50, 95, 96])
def test_any_slices_and_parts_give_the_same_export(tmp_path, monkeypatch, num_features):
    sae, found = made("gated"), []
    for num_parts in (1, 2, 12):
        source = write_source(tmp_path / f"source{num_parts}", sae, "gated", num_parts)
        slices_of(monkeypatch, num_features)
        run_export(str(source), "gsae", output=tmp_path / f"out{num_parts}")
        found.append({path.name: path.read_bytes() for path in (tmp_path / f"out{num_parts}").iterdir()})
    assert found[0] == found[1] == found[2]
    assert found[0]["sae.safetensors"] == save(whole(sae, "gsae", is_folded=False))


@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("objective", ["relu", "gated"])
def test_what_is_loaded_is_that_of_the_whole(tmp_path, monkeypatch, objective, dtype, num_parts):
    """In float64 until the last step: W_enc = exp(r_mag) W_gate, threshold = max(0, b_mag - exp(r_mag) b_gate)."""
    sae = made(objective, dtype)
    source = write_source(tmp_path / "source", sae, objective, num_parts)
    w = fold({name: value.double() for name, value in sae.state_dict().items()}, SCALE)
    if objective == "relu":
        wanted = w | {"threshold": torch.zeros(NUM_FEATURES)}
    else:
        ratio = w["r_mag"].exp()
        wanted = {"W_enc": w["W_gate"] * ratio, "b_enc": w["b_mag"], "threshold": (w["b_mag"] - ratio * w["b_gate"]).relu()}
        wanted |= {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    slices_of(monkeypatch, 23)
    for asked, kept in ((None, dtype), (torch.float16, torch.float16)):
        state = load_sae(source, dtype=asked).state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name].to(kept)) and value.dtype == kept for name, value in state.items())
        assert all(value.is_contiguous() for value in state.values())


@given(
    dtypes=st.lists(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), min_size=1, max_size=7),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=30)
def test_any_tensors_in_any_slices_are_what_safetensors_writes_and_reads(tmp_path_factory, dtypes, cuts):
    folder, total = tmp_path_factory.mktemp("streamed"), sum(cuts)
    shapes, axes = ((3,), (total,), (total, 2), (2, total), (2, total, 3)), (None, 0, 0, 1, 1)
    kinds = {f"t{number}": number % len(shapes) for number in range(len(dtypes))}
    wanted = {name: torch.randn(shapes[kind]).to(dtype) for (name, kind), dtype in zip(kinds.items(), dtypes, strict=True)}

    def cut(first: int, count: int) -> dict[str, torch.Tensor]:
        return {
            name: value if axes[kinds[name]] is None else value.narrow(axes[kinds[name]], first, count) for name, value in wanted.items()
        }

    starts = [sum(cuts[:number]) for number in range(len(cuts))]
    like = outline(lambda count: cut(0, count), total) if total > 1 else wanted
    write_safetensors(folder / "found", like, (Slice(first, cut(first, count)) for first, count in zip(starts, cuts, strict=True)))
    save_file(wanted, folder / "wanted")
    assert (folder / "found").read_bytes() == (folder / "wanted").read_bytes()
    stored = stored_tensors(folder / "wanted")
    with (folder / "wanted").open("rb") as file:
        for first, count in zip(starts, cuts, strict=True):
            for name, value in cut(first, count).items():
                part = read_part(file.fileno(), stored[name], axes[kinds[name]], range(first, first + count))
                assert part.dtype == value.dtype
                assert torch.equal(part, value)


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_part_is_refused_in_one_line(tmp_path, capsys, target):
    source = write_source(tmp_path / "source", made("gated"), "gated", 4)
    path = source / "sae-00003-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = mistake(capsys, "export", source, "--to", target, "--output", tmp_path / "out")
    assert "sae-00003-of-00004.safetensors: SHA-256 differs from sae.json" in said
    path.unlink()
    assert "sae-00003-of-00004.safetensors: No such file" in mistake(capsys, "export", source, "--to", target, "--output", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("num_parts", "change"),
    [
        (1, {"num_features": 95}),
        (1, {"num_features": 97}),
        (1, {"num_features": 2**62}),
        (1, {"d_model": 7}),
        (1, {"objective": "relu"}),
        (4, {"d_model": 9}),
        (4, {"features": [23, 25, 24, 24]}),
        (4, {"features": [23, 24, 24, 24], "num_features": 95}),
    ],
)
def test_weights_that_are_not_those_of_the_description_are_refused(tmp_path, capsys, num_parts, change):
    source = write_source(tmp_path / "source", made("gated"), "gated", num_parts)
    described = json.loads((source / "sae.json").read_text())
    for part, count in zip(described.get("parts", ()), change.get("features", ()), strict=False):
        part["features"] = count
    (source / "sae.json").write_text(json.dumps(described | {key: value for key, value in change.items() if key != "features"}))
    assert " does not fit sae.json: tensor " in mistake(capsys, "export", source, "--to", "gsae", "--output", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r" does not fit sae.json: tensor "):
        load_sae(source)


@pytest.mark.parametrize("tensors", [{}, {"W_dec": torch.ones(96, 8, dtype=torch.int64)}, b"no tensors"])
def test_weights_with_the_right_hash_that_are_none_are_refused(tmp_path, capsys, tensors):
    source = write_source(tmp_path / "source", made("gated"), "gated")
    data = tensors if isinstance(tensors, bytes) else save(tensors)
    (source / "sae.safetensors").write_bytes(data)
    described = json.loads((source / "sae.json").read_text()) | {"sha256": sha256(data).hexdigest()}
    (source / "sae.json").write_text(json.dumps(described))
    assert "sae.safetensors does not fit sae.json: " in mistake(capsys, "export", source, "--to", "gsae", "--output", tmp_path / "out")


def test_parts_of_two_types_are_refused(tmp_path, capsys):
    source = write_source(tmp_path / "source", made("relu"), "relu", 2)
    other = write_source(tmp_path / "other", made("relu", torch.float64), "relu", 2)
    name = "sae-00002-of-00002.safetensors"
    (source / name).write_bytes((other / name).read_bytes())
    described = json.loads((source / "sae.json").read_text())
    described["parts"][1]["sha256"] = sha256((source / name).read_bytes()).hexdigest()
    (source / "sae.json").write_text(json.dumps(described))
    said = mistake(capsys, "export", source, "--to", "gsae", "--output", tmp_path / "out")
    assert f"{name} does not fit sae.json: tensor W_dec is torch.float64, in sae-00001-of-00002.safetensors torch.float32" in said


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_of_the_last_slice_that_is_not_finite_leaves_no_export(tmp_path, capsys, monkeypatch, target):
    sae = made("gated")
    with torch.no_grad():
        sae.r_mag[95] = float("nan")
    source = write_source(tmp_path / "source", sae, "gated")
    slices_of(monkeypatch, 23)
    assert "source: tensor r_mag holds NaN or infinite" in mistake(capsys, "export", source, "--to", target, "--output", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("limit", [4_000, 10_000])
@pytest.mark.parametrize("target", ["gsae", "dictionary_learning"])
def test_a_disk_without_the_room_is_one_line(tmp_path, capsys, target, limit):
    """Files have a limit here: the first is below that of W_dec alone, 96 x 8 x 8 bytes, the second below that of all the weights."""
    source = write_source(tmp_path / "source", made("gated", torch.float64), "gated")
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        ended = None
        run_export(str(source), target, output=tmp_path / "out")
    except ConfigError as error:
        ended = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended == f"{tmp_path / 'out'} cannot be written (File too large); give another directory"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_of_more_than_the_memory_can_be_read(tmp_path):
    """A mapping of it that may be written, as safetensors has of it for torch, is refused by the system. The file is a hole."""
    rows = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4096
    header = json.dumps({"W_dec": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}}).encode()
    with (tmp_path / "large").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 4096)
    tensor = stored_tensors(tmp_path / "large")["W_dec"]
    with (tmp_path / "large").open("rb") as file:
        assert torch.equal(read_part(file.fileno(), tensor, 0, range(rows - 2, rows)), torch.zeros(2, 1024))


def test_a_checkpoint_in_parts_on_the_hub_is_fetched_whole(tmp_path, monkeypatch):
    sae = made("gated")
    source = write_source(tmp_path / "source", sae, "gated", 4)
    (source / "state.safetensors").touch()
    wanted = []

    def download(name, revision, patterns):
        wanted.extend(path.name for path in source.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns))
        return source

    monkeypatch.setattr("gsae.exchange.hub.download", download)
    assert command("export", "owner/name", "--to", "gsae", "--output", tmp_path / "out") == 0
    assert sorted(wanted) == sorted(["sae.json", *(part_file("sae.safetensors", number, 4) for number in range(4))])
    assert (tmp_path / "out" / "sae.safetensors").read_bytes() == save(whole(sae, "gsae", is_folded=False))


# memory


def test_an_export_takes_the_memory_of_a_few_slices(tmp_path):
    """The weights are 118 MB; a process that may take 60 exports them in slices of 8 MB, and has not got the memory for one of all."""
    sae = SAE_CLASS["relu"](256, 57_344)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.uniform_(-1, 1)
    source = write_source(tmp_path / "source", sae, "relu")
    process = multiprocessing.get_context("spawn").Process(target=export_in_little_memory, args=(source, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert stored_tensors(tmp_path / "gsae" / "sae.safetensors")["W_enc"].shape == (256, 57_344)
    assert torch.load(tmp_path / "dictionary_learning" / "ae.pt", weights_only=True, mmap=True)["encoder.weight"].shape == (57_344, 256)


def export_in_little_memory(source: Path, output: Path) -> None:
    torch.set_num_threads(1)
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    limit = int(data.split()[1]) * 1024 + 60 * 10**6
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    source_.SLICE_BYTES = 10**10
    with pytest.raises((RuntimeError, MemoryError), match=r"allocate"):
        run_export(str(source), "gsae", output=output / "whole")
    source_.SLICE_BYTES = 8 * 10**6
    for target in ("gsae", "dictionary_learning"):
        run_export(str(source), target, output=output / target)
