"""`gsae inspect` on stores of the small pipeline, against slow loops over what went into them."""

import json
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import small_settings, write_config, write_text
from ranks import run_gsae

from gsae.cli import main
from gsae.config import LLMConfig, RandomLlamaConfig
from gsae.corpus.contexts import Packer
from gsae.corpus.documents import read_pieces
from gsae.inspect import measure, show
from gsae.inspect.mixing import Batching
from gsae.llm.load import load
from gsae.settings import read_config
from gsae.store.finish import finish
from gsae.store.manifest import load as load_manifest
from gsae.store.progress import progress_path, read_records
from gsae.store.shards import read_tar, tar_path

SITE = "resid.2"


def run(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store whose bound on norms is low, so that there are outliers; made by two ranks."""
    folder = tmp_path_factory.mktemp("inspected")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"]["outlier_multiple"] = 1.3
    run_gsae(2, ["harvest", write_config(folder / "config.yaml", settings)])
    return folder


@pytest.fixture(scope="module")
def store(folder) -> Path:
    return folder / "runs/store"


def members(store):
    """Lane and rows of every context at SITE, in the order of lane and shard."""
    for lane in range(4):
        for record in read_records(store, lane):
            for member in read_tar(tar_path(store, SITE, lane, record.shard)):
                yield lane, member.rows


def test_dropped_rows_are_those_of_a_slow_loop_over_the_text(folder, store):
    """Every token of every lane through the whole LLM; those that are not in the store, by reason."""
    config = read_config("harvest", [str(folder / "config.yaml")])
    llm = load(LLMConfig(model="random", dtype="float32", random=RandomLlamaConfig(4, 16, 2)), torch.device("cpu"))
    site = load_manifest(store).sites[SITE]
    tokens, norms = {"first": Counter(), "outlier": Counter()}, {"first": [], "outlier": []}
    for lane in range(4):
        packer, contexts = Packer(llm.tokenizer, 32), []
        for piece in read_pieces(config.corpus, "training", lambda document, piece, lane=lane: (document + piece) % 4 == lane):
            contexts += packer.push(piece)
        for context in contexts + packer.finish():
            ids, positions = (torch.from_numpy(value)[None].long() for value in (context.tokens, context.positions))
            with torch.no_grad():
                hidden = llm.model(input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False).hidden_states[3]
            for row in range(32):
                norm = float(hidden[0, row].bfloat16().double().norm())
                reason = "first" if context.positions[row] == 0 else "outlier" if norm > 1.3 * site.median_norm else None
                if context.documents[row] >= 0 and reason:
                    tokens[reason][llm.tokenizer.convert_ids_to_tokens(int(context.tokens[row]))] += 1
                    norms[reason].append(norm / site.median_norm)
    found = {inspected.manifest.name: inspected for inspected in measure.inspect_store(store, Batching()).sites}[SITE].dropped
    assert len(norms["outlier"]) > 20
    for reason in ("first", "outlier"):
        assert found[reason].rows == len(norms[reason])
        assert dict(found[reason].tokens) == tokens[reason]
        assert [rows for _, rows in found[reason].tokens] == sorted(tokens[reason].values(), reverse=True)
        assert sum(found[reason].norms.values()) == len(norms[reason])
        assert measure.median_of_bins(found[reason].norms) == pytest.approx(np.median(norms[reason]), rel=0.2)
    assert found["first"].tokens == [("<s>", found["first"].rows)]


def test_norms_and_lanes_are_those_of_the_stored_rows(store):
    site = {inspected.manifest.name: inspected for inspected in measure.inspect_store(store, Batching()).sites}[SITE]
    norms = np.concatenate([rows.x.double().norm(dim=1).numpy() for _, rows in members(store)])
    lanes = Counter()
    for lane, rows in members(store):
        lanes[lane] += len(rows.x)
    assert site.lane_rows == [lanes[lane] for lane in range(4)]
    assert site.norm_rows == sum(site.norms.values()) == len(norms)
    assert [site.quantiles[share] for share in (0.1, 0.5, 1.0)] == pytest.approx(np.quantile(norms, [0.1, 0.5, 1.0]), rel=1e-6)
    for number, rows in site.norms.items():
        low, high = (measure.norm_of_bin(bound) * site.manifest.median_norm for bound in (number, number + 1))
        assert rows == pytest.approx(((norms >= low) & (norms < high)).sum(), abs=1)


def test_a_large_store_is_read_in_part_with_contexts_from_all_over_it(store):
    every = [len(rows.x) for _, rows in members(store)]
    with patch.object(measure, "MAX_NORM_ROWS", sum(every) // 3 + 1):
        (site,) = (inspected for inspected in measure.inspect_store(store, Batching()).sites if inspected.manifest.name == SITE)
    assert site.norm_rows == sum(every[::3])


def test_the_json_holds_what_the_issue_asks_for_and_the_pictures_are_written(store, tmp_path, capsys):
    assert run("inspect", store, "--json", "--output", tmp_path / "pictures") == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["sites"]) == ["resid.1", "resid.2"]
    site = shown["sites"][SITE]
    assert list(site["kept_above"]) == ["2", "3", "5", "10"]
    assert 1e-7 < site["storage_fvu"] < 1e-5  # a bfloat16 has 8 bits: its error is about 2^-9 / sqrt(3) of the value
    assert site["dropped"]["first"]["tokens"] == [["<s>", site["dropped"]["first"]["rows"]]]
    assert sum(site["lane_rows"]) == site["rows"]
    assert [Path(path).name for path in shown["pictures"]] == ["norms.png", "norms.svg"]
    assert (tmp_path / "pictures" / "norms.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "pictures" / "norms.svg").read_text()
    assert all(label in svg for label in ("norms by layer", "resid.1", "resid.2", "dropped: first of a segment", "dropped: outlier"))


def test_elsewhere_than_on_a_terminal_there_is_one_line_a_row(store, tmp_path, capsys):
    assert run("inspect", store, "--output", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("resid.2, dropped rows: reason first, rows ") and '"<s>"' in line]
    assert lines[-1] == str(tmp_path / "norms.svg")
    assert "resid.2, what storing costs: type bfloat16, share of the variance " in "\n".join(lines)
    assert (
        len(lines) == 2 * (1 + 1 + 1 + 2 + 2 + 1) + 2
    )  # each site: lanes, cost, norms, shares of two kinds, two reasons, mixing; two pictures


def test_how_well_windows_mix_is_shown_and_a_larger_one_advised_where_it_is_too_small(store, tmp_path, capsys):
    words = ["inspect", store, "--output", tmp_path, "--batch-rows", 64]
    assert run(*words, "--window-rows", 64) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith(f"{SITE}, mixing: batch rows 64, window rows 64, ")]
    assert [float(line.rpartition("ratio ")[2]) > show.POOR_RATIO for line in found] == [True]
    assert [line for line in lines if line.startswith("windows of 64 rows mix poorly: ") and line.endswith("; raise train.window_rows")]
    assert run(*words, "--window-rows", load_manifest(store).sites[SITE].rows * 3 // 4) == 0
    assert "poorly" not in capsys.readouterr().out
    assert run(*words, "--json", "--seed", 3) == 0
    shown = json.loads(capsys.readouterr().out)["sites"][SITE]["mixing"]
    assert (shown["batch_rows"], shown["window_rows"], shown["seed"]) == (64, 1_048_576, 3)
    assert shown["ratio"] == pytest.approx(shown["same_document_rows"] / shown["perfect_same_document_rows"])
    assert 0.8 < shown["ratio"] < 1.1


def test_a_batch_that_does_not_fit_the_lanes_is_one_line_and_nothing_is_written(store, tmp_path, capsys):
    assert run("inspect", store, "--output", tmp_path / "pictures", "--batch-rows", 66) == 2
    shown = capsys.readouterr()
    assert shown.err == "gsae: --batch-rows (66) is not a multiple of the store's 4 lanes; give 64 or 68\n"
    assert shown.out == ""
    assert not (tmp_path / "pictures").exists()


def test_a_token_that_looks_like_markup_is_shown_as_it_is(capsys):
    show._show_rich([show.Table("dropped rows", ["site", "commonest tokens"], [["resid.2", '"[/b]" 3 "[red]" 2']])])
    assert '"[/b]" 3 "[red]" 2' in capsys.readouterr().out


def test_a_store_of_before_dropped_rows_were_recorded_is_still_looked_at(store, tmp_path, capsys):
    old = shutil.copytree(store, tmp_path / "old")
    for lane in range(4):
        lines = [json.loads(line) for line in progress_path(old, lane).read_text().splitlines()]
        for line in lines:
            for site in line["sites"].values():
                del site["statistics"]["dropped_rows"]
        progress_path(old, lane).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert finish(old).fingerprint == load_manifest(store).fingerprint
    assert run("inspect", old) == 0
    assert "not recorded in this store" in capsys.readouterr().out
    assert (old / "inspect" / "norms.png").exists()
    assert run("verify", old) == 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda store: (store / "manifest.json").unlink(), "is not whole: manifest.json is missing"),
        (lambda store: progress_path(store, 1).write_text(progress_path(store, 1).read_text() + "\n"), "lane 1"),
        (lambda store: tar_path(store, SITE, 2, 0).write_bytes(b""), "resid.2/0002-000000.tar has 0 bytes"),
        (lambda store: (store / "identity.json").unlink() or (store / "manifest.json").unlink(), "there is no activation store"),
    ],
    ids=["unfinished", "log", "shard", "none"],
)
def test_what_cannot_be_looked_at_is_one_line_and_nothing_is_written(store, tmp_path, capsys, spoil, words):
    spoilt = shutil.copytree(store, tmp_path / "store")
    spoil(spoilt)
    assert run("inspect", spoilt) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not (spoilt / "inspect").exists()


def test_a_place_that_cannot_be_written_is_named(store, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("inspect", store, "--output", tmp_path / "file" / "x") == 2
    assert "--output is" in capsys.readouterr().err
