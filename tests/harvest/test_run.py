"""The harvest as a whole: real ranks, real kills."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started
from trees import tree

from gsae.config import LLMConfig, RandomLlamaConfig
from gsae.corpus.contexts import Packer
from gsae.corpus.documents import read_pieces
from gsae.llm.load import load
from gsae.sae.products import SLOW_BFLOAT16, is_quick_at_bfloat16
from gsae.settings import read_config
from gsae.store import manifest
from gsae.store.progress import read_records
from gsae.store.shards import read_tar, tar_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with text, a config, and the store that one rank harvested from it."""
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder / "text", num_documents=60)
    run_gsae(1, ["harvest", write_config(folder / "config.yaml", small_settings(folder))])
    return folder


def again(whole: Path, folder: Path, **harvest) -> Path:
    """A config that harvests the same text into another folder."""
    settings = yaml.safe_load((whole / "config.yaml").read_text())
    settings["output"] = str(folder / "runs")
    settings["harvest"] |= harvest
    return write_config(folder / "config.yaml", settings)


@pytest.mark.parametrize("size", [2, 4])
def test_the_store_does_not_depend_on_the_number_of_ranks(whole, tmp_path, size):
    run_gsae(size, ["harvest", again(whole, tmp_path)])
    assert tree(tmp_path / "runs/store") == tree(whole / "runs/store")


def test_a_whole_store_keeps_no_bookmarks(whole, tmp_path):
    """Nor the half-written ones of a rank that was killed; how many there are depends on time."""
    store = tmp_path / "runs/store"
    shutil.copytree(whole / "runs/store", store)
    (store / "manifest.json").unlink()
    for name in ("bookmarks.json", "bookmarks.json.0123.partial"):
        (store / name).write_text("{}")
    run_gsae(2, ["harvest", again(whole, tmp_path)])
    assert tree(store) == tree(whole / "runs/store")


def test_a_killed_harvest_ends_as_an_uninterrupted_one(whole, tmp_path):
    config, store = again(whole, tmp_path), tmp_path / "runs/store"
    killed = 0
    for size in (2, 1, 2):
        with started(size, gsae, "harvest", str(config)) as ranks:
            before = len(list(store.glob("resid.*/*.tar")))
            until = time.monotonic() + 60
            while len(list(store.glob("resid.*/*.tar"))) < before + 3 and time.monotonic() < until:
                time.sleep(0.002)
            ranks.kill()
        killed += not (store / "manifest.json").exists()
    assert killed >= 2, "the harvest was over before it could be killed"
    run_gsae(2, ["harvest", config])
    assert tree(store) == tree(whole / "runs/store")


def test_a_second_call_touches_nothing(whole):
    before = {path: path.stat().st_mtime_ns for path in (whole / "runs/store").rglob("*")}
    assert "nothing to do" in run_gsae(1, ["harvest", whole / "config.yaml"])
    assert {path: path.stat().st_mtime_ns for path in (whole / "runs/store").rglob("*")} == before


def test_stored_rows_are_those_of_a_slow_loop_over_contexts(whole):
    """One context at a time through the whole LLM, one row at a time through the mask."""
    config = read_config("harvest", [str(whole / "config.yaml")])
    described = manifest.load(whole / "runs/store")
    llm = load(LLMConfig(model="random", dtype="float32", random=RandomLlamaConfig(4, 16, 2)), torch.device("cpu"))
    lane, site = 2, described.sites["resid.2"]
    packer, contexts = Packer(llm.tokenizer, 32), []
    for piece in read_pieces(config.corpus, "training"):
        if (piece.document + piece.piece) % 4 == lane:
            contexts += packer.push(piece)
    contexts += packer.finish()
    expected = []
    special = {llm.tokenizer.bos_token_id, llm.tokenizer.eos_token_id, llm.tokenizer.pad_token_id}
    for context in contexts:
        with torch.no_grad():
            tokens, positions = (torch.from_numpy(value)[None].long() for value in (context.tokens, context.positions))
            hidden = llm.model(input_ids=tokens, position_ids=positions, output_hidden_states=True, use_cache=False).hidden_states[3]
        for row in range(32):
            x = hidden[0, row].bfloat16()
            is_text = context.documents[row] >= 0 and context.positions[row] > 0 and int(context.tokens[row]) not in special
            if is_text and float(x.double().norm()) <= 3 * site.median_norm:
                expected.append((int(context.tokens[row]), int(context.positions[row]), int(context.documents[row]), x))
    stored = []
    for record in read_records(whole / "runs/store", lane):
        for member in read_tar(tar_path(whole / "runs/store", "resid.2", lane, record.shard)):
            rows = member.rows
            stored += zip(rows.token.tolist(), rows.position.tolist(), rows.document.tolist(), rows.x, strict=True)
    assert [row[:3] for row in stored] == [row[:3] for row in expected]
    torch.testing.assert_close(
        torch.stack([row[3] for row in stored]).float(), torch.stack([row[3] for row in expected]).float(), rtol=0.01, atol=1e-3
    )


def test_max_tokens_ends_every_lane_at_the_same_shard(whole, tmp_path):
    run_gsae(1, ["harvest", again(whole, tmp_path, max_tokens=1500)])  # 4 lanes x 8 contexts x 32 tokens = 1024 a round: 2 rounds
    for lane in range(4):
        records = read_records(tmp_path / "runs/store", lane)
        assert [(record.contexts, record.last) for record in records] == [(8, False), (8, True)]
        assert [record.end for record in records] == [record.end for record in read_records(whole / "runs/store", lane)[:2]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_device_that_is_slow_at_bfloat16_is_told_of(whole, tmp_path, dtype):
    is_slow = dtype == "bfloat16" and not is_quick_at_bfloat16(torch.device("cpu"))
    shown = run_gsae(1, ["harvest", again(whole, tmp_path, max_tokens=512), "--llm.dtype", dtype])
    assert shown.count(f"warning: {SLOW_BFLOAT16}") == is_slow


def test_a_setting_that_cannot_be_does_not_claim_the_directory(whole, tmp_path):
    config = again(whole, tmp_path)
    with started(1, gsae, "harvest", str(config), "--llm.attention", "flash_attention_2") as ranks:
        assert ranks.wait() == [2]
        assert "llm.attention: sdpa" in ranks.output()
    run_gsae(1, ["harvest", config])


def test_a_failure_does_not_wait_until_the_reader_has_found_the_next_shard(whole, tmp_path):
    """The reader skips a long corpus; the writer fails at once."""
    config = again(whole, tmp_path, max_tokens=1_000_000)
    with started(1, slow_to_skip, str(config)) as ranks:
        assert ranks.wait(60) == [2]
        assert "cannot be written" in ranks.output()


def slow_to_skip(config: str) -> None:
    import gsae.corpus.documents as documents
    import gsae.harvest.writing as writing

    read = documents.read_entries

    def skip_for_long(corpus, start=None):
        yield from read(corpus, start)
        for entry in read(corpus, start):
            for _ in range(6000):  # ten minutes, if nobody ended it
                time.sleep(0.1)
                yield replace(entry, id="held out or not, nobody asks for it")

    def refuse(path, lane, shard):
        raise OSError(28, "No space left on device")

    documents.read_entries, writing.open_tar = skip_for_long, refuse
    gsae("harvest", config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"harvest": {"sites": [1]}}, "was harvested with"),
        ({"harvest": {"sites": [9]}}, "site 9 is not in this LLM of 4 layers"),
        ({"llm": {"model": "no/such-directory/"}}, "no/such-directory"),
        ({"corpus": {"path": "/nowhere/*.txt"}}, "/nowhere"),
        ({"corpus": {"num_lanes": 64, "piece_characters": 100_000}, "train": {"batch_rows": 64}, "output": "OTHER"}, "lane"),
        ({"output": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(whole, tmp_path, change, words):
    settings = yaml.safe_load((whole / "config.yaml").read_text())
    for section, value in change.items():
        settings[section] = settings[section] | value if isinstance(value, dict) else value.replace("OTHER", str(tmp_path / "other"))
    before = tree(whole / "runs/store")
    with started(1, gsae, "harvest", str(write_config(tmp_path / "config.yaml", settings))) as ranks:
        assert ranks.wait() == [2]
        (line,) = [line for line in ranks.output().splitlines() if line.startswith("gsae: ")]
        assert "Traceback" not in ranks.output()
    assert words in line
    assert tree(whole / "runs/store") == before
