import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset
from made_up_shards import write_tar

from gsae.errors import StoreError
from gsae.store.encoding import STORAGE_TYPES, encode
from gsae.store.shards import ContextRows, TarRecord, map_tar, open_tar, read_documents, read_tar, tar_path

NAMES = ("x", "token", "position", "document")


def random_context(num_rows, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    integers = [torch.randint(0, 1000, (num_rows,), generator=generator) for _ in range(3)]
    stored = encode(torch.randn(num_rows, 6, generator=generator), dtype)
    return ContextRows(stored.x, *integers, stored.row_scale)


def names_of(context):
    return NAMES if context.row_scale is None else (*NAMES, "row_scale")


@pytest.fixture(params=list(STORAGE_TYPES))
def written(request, tmp_path):
    contexts = [random_context(num_rows, request.param, seed) for seed, num_rows in enumerate((5, 0, 1, 200))]
    path = tar_path(tmp_path, "resid.15", 3, 12)
    return path, contexts, write_tar(path, 3, 12, contexts), request.param


def test_a_plain_webdataset_client_reads_a_shard(written):
    path, contexts, _, dtype = written
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"0003-000012-0000{context}" for context in range(4)]
    for index, (sample, context) in enumerate(zip(samples, contexts, strict=True)):
        tensors = safetensors.torch.load(sample["rows.safetensors"])
        assert sorted(tensors) == sorted(names_of(context))
        assert all(torch.equal(tensors[name], getattr(context, name)) for name in names_of(context))
        assert tensors["x"].dtype == STORAGE_TYPES[dtype]
        assert json.loads(sample["json"]) == {"context": index, "lane": 3, "rows": len(context.x), "shard": 12}


def test_the_offsets_of_the_record_point_at_the_rows(written):
    path, contexts, record, dtype = written
    content = path.read_bytes()
    for context, offset in zip(contexts, record.offsets, strict=True):
        assert content[offset : offset + context.x.nbytes] == context.x.view(torch.uint8).numpy().tobytes()
    for context, offset in zip(contexts, record.scale_offsets, strict=dtype == "int8"):
        assert content[offset : offset + context.row_scale.nbytes] == context.row_scale.numpy().tobytes()
    views = map_tar(path, record, dtype, 6, verify=True)
    assert all(view.has_same_bytes(context.encoded) for view, context in zip(views, contexts, strict=True))


def test_the_record_describes_the_file(written):
    path, _, record, _ = written
    assert path.name == "0003-000012.tar"
    assert (record.bytes, record.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert (record.context_rows, record.rows) == ((5, 0, 1, 200), 206)


def test_a_shard_is_unpacked_as_it_was_written(written):
    path, contexts, _, _ = written
    members = list(read_tar(path))
    assert [member.key for member in members] == [f"0003-000012-0000{context}" for context in range(4)]
    for member, context in zip(members, contexts, strict=True):
        assert all(torch.equal(getattr(member.rows, name), getattr(context, name)) for name in names_of(context))
        assert member.rows.encoded.has_same_bytes(context.encoded)


def test_equal_rows_make_equal_bytes(written, tmp_path):
    path, contexts, record, _ = written
    other = tmp_path / "elsewhere" / "other.tar"
    copies = [ContextRows(*(getattr(context, name).clone() for name in names_of(context))) for context in contexts]
    assert write_tar(other, 3, 12, copies) == record
    assert other.read_bytes() == path.read_bytes()


def test_a_flipped_byte_anywhere_is_found(written):
    path, _, record, dtype = written
    content = path.read_bytes()
    for position in (0, record.offsets[0], record.offsets[3] + 7, len(content) - 1):
        spoiled = bytearray(content)
        spoiled[position] ^= 16
        path.write_bytes(spoiled)
        with pytest.raises(StoreError, match=r"resid\.15/0003-000012\.tar: its SHA-256 differs"):
            map_tar(path, record, dtype, 6, verify=True)


def test_a_missing_or_short_shard_is_named(written):
    path, _, record, dtype = written
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        StoreError, match=rf"resid\.15/0003-000012\.tar has {record.bytes - 1} bytes, .* {record.bytes}; run gsae harvest again"
    ):
        map_tar(path, record, dtype, 6)
    path.unlink()
    with pytest.raises(StoreError, match=r"resid\.15/0003-000012\.tar is missing in .*; run gsae harvest again"):
        map_tar(path, record, dtype, 6)


def test_writing_to_a_view_does_not_change_the_shard(written):
    path, contexts, record, dtype = written
    map_tar(path, record, dtype, 6)[0].x.zero_()
    assert torch.equal(map_tar(path, record, dtype, 6, verify=True)[0].x, contexts[0].x)


def test_a_shard_without_contexts_is_a_tar(tmp_path):
    path = tmp_path / "resid.2" / "0000-000000.tar"
    record = write_tar(path, 0, 0, [])
    assert (record.rows, list(read_tar(path)), map_tar(path, record, "bfloat16", 6, verify=True)) == (0, [], [])


def test_a_context_with_a_token_too_few_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 1, 2, 2\] rows"):
        ContextRows(torch.zeros(2, 3), torch.zeros(1), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.int8, None), (torch.int8, torch.ones(1)), (torch.float32, torch.ones(2))])
def test_int8_rows_and_no_others_have_a_scale_each(dtype, scale):
    with pytest.raises(ValueError, match="row_scale is for int8 rows, one number a row"):
        ContextRows(torch.zeros(2, 3, dtype=dtype), torch.zeros(2), torch.zeros(2), torch.zeros(2), scale)


def test_a_record_survives_json_and_one_of_before_int8_is_read(written):
    _, _, record, dtype = written
    content = json.loads(json.dumps(record.to_json()))
    assert TarRecord.from_json(content) == record
    assert ("scale_offsets" in content) == (dtype == "int8")
    assert len(record.scale_offsets) == (4 if dtype == "int8" else 0)


def test_a_tar_is_written_context_by_context_to_the_same_bytes(written, tmp_path):
    path, contexts, record, _ = written
    other = tmp_path / "elsewhere" / "other.tar"
    with open_tar(other, 3, 12) as tar:
        for context in contexts:
            tar.add(context)
            assert not other.exists()
        with pytest.raises(ValueError, match="not whole before the end"):
            _ = tar.record
    assert tar.record == record
    assert other.read_bytes() == path.read_bytes()


def test_a_tar_whose_block_raises_is_not_there(tmp_path):
    path = tmp_path / "resid.2" / "0000-000000.tar"
    with suppress(KeyError), open_tar(path, 0, 0) as tar:
        tar.add(random_context(3, "bfloat16", 0))
        raise KeyError
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(("first", "count"), [(0, 206), (0, 5), (3, 4), (5, 1), (6, 200), (100, 50), (205, 1), (206, 0), (0, 0)])
def test_documents_are_read_of_any_part_of_a_shard(written, first, count):
    path, contexts, record, _ = written
    documents = torch.cat([context.document for context in contexts])
    assert read_documents(path, record, first, count).tolist() == documents[first : first + count].tolist()


def test_where_documents_are_read_activations_are_not(tmp_path):
    path, num_rows = tar_path(tmp_path, "resid.2", 0, 0), 2000
    integers = torch.zeros(num_rows, dtype=torch.int32)
    record = write_tar(path, 0, 0, [ContextRows(torch.zeros(num_rows, 500), integers, integers, integers) for _ in range(3)])

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    assert len(read_documents(path, record, 0, 3 * num_rows)) == 3 * num_rows
    assert bytes_read() - before < record.bytes / 50


@pytest.mark.parametrize("words", [b"ustar", b"0003-000012-00002.json", b'{"', b"document"], ids=["tar", "member", "tensors", "document"])
def test_documents_of_a_damaged_shard_are_refused_in_one_line(written, words):
    path, _, record, _ = written
    content = bytearray(path.read_bytes())
    content[content.rindex(words) if words == b'{"' else content.index(words)] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=rf"^shard resid\.15/0003-000012\.tar is damaged; run gsae verify {path.parents[1]} --repair$"):
        read_documents(path, record, 0, 206)
    path.unlink()
    with pytest.raises(StoreError, match=r"resid\.15/0003-000012\.tar is missing in .*; run gsae harvest again"):
        read_documents(path, record, 0, 206)
