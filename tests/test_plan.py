"""`gsae plan` as a user sees it: what it prints, what it warns of, and that the cures it names are cures."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gsae.cli import main
from gsae.config import Config
from gsae.plan import budget as plan_budget
from gsae.plan import disk as plan_disk
from gsae.plan import rate as plan_rate
from gsae.plan.budget import Assumptions, Budget, budget
from gsae.plan.limits import warnings
from gsae.plan.machine import Machine, this_machine
from gsae.settings import read_config

ROOT = Path(__file__).parents[1]

LARGE = 2**50


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    """A host on which all fits, unless a test says otherwise."""
    set_machine(monkeypatch)
    set_disk(monkeypatch)


def set_machine(monkeypatch, host: int = LARGE, gpus: tuple[int, ...] = ()) -> None:
    monkeypatch.setattr(plan_budget, "this_machine", lambda config: Machine(host, gpus))


def set_disk(monkeypatch, free: int = LARGE) -> None:
    monkeypatch.setattr(plan_disk.shutil, "disk_usage", lambda path: plan_disk.shutil._ntuple_diskusage(free, 0, free))


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    return int(ended.value.code)


def planned(pipeline: Path, *words: str, ranks: int = 1) -> tuple[Budget, list[str]]:
    config = read_config("plan", [str(pipeline), *words])
    found = budget(config, Assumptions(ranks=ranks))
    return found, warnings(config, found)


# what it prints


def test_plan_tells_the_budget_in_four_groups(pipeline, capsys):
    assert run(str(pipeline)) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if not line.startswith(" ")] == ["harvest", "store", "LLM", "train"]
    assert "at resid.1, resid.2;" in shown
    assert "6 runs of 200 steps of 64 rows = 12,800 rows" in shown
    assert "give --tokens-per-second, or --measure" in shown
    assert "warning" not in shown
    texts = [line[21:] for line in shown.splitlines()]
    assert all(text and not text.startswith(" ") for text in texts), "the third column is aligned"


def test_json_is_one_object_with_the_same_figures(pipeline, capsys):
    assert run("--json", str(pipeline), "--ranks", "2", "--tokens-per-second", "100") == 0
    found = json.loads(capsys.readouterr().out)
    figures, _ = planned(pipeline, ranks=2)
    assert found["store"]["bytes"] == figures.store.bytes
    assert found["llm"]["bytes_per_rank_zero3"] == figures.llm.bytes_per_rank_zero3
    assert found["warnings"] == []
    assert found["harvest"]["hours"] == pytest.approx(figures.harvest.computed_tokens / 100 / 3600)
    assert found["train"]["hours"] is None


def test_hours_of_training_are_those_of_the_busiest_group(pipeline, capsys):
    """Two sites, 12,800 rows each: one group does both, two groups one each."""
    for groups, expected in ((1, 2 * 12_800 / 64 / 3600), (2, 12_800 / 64 / 3600)):
        assert run(str(pipeline), "--rows-per-second", "64", "--ranks", "2", "--train.groups", str(groups), "--json") == 0
        assert json.loads(capsys.readouterr().out)["train"]["hours"] == pytest.approx(expected)


def test_the_llm_of_evaluations_in_training_counts_in_its_memory(pipeline, capsys):
    found = []
    for words in ([], ["--train.evaluate_every_fraction", "0.1"]):
        assert run(str(pipeline), *words, "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    without, probed = (each["train"] for each in found)
    assert without["probe_bytes_per_rank"] == 0
    assert probed["device_bytes_per_rank"] - without["device_bytes_per_rank"] == probed["probe_bytes_per_rank"]
    llm = found[1]["llm"]
    assert llm["parameters"] * 4 < probed["probe_bytes_per_rank"] < llm["evaluation_bytes_per_rank"]
    assert run(str(pipeline), "--train.evaluate_every_fraction", "0.1") == 0
    assert "of the LLM for train.evaluate_every_fraction" in " ".join(capsys.readouterr().out.split())


def test_pilots_count_in_the_hours_and_the_memory(pipeline, capsys):
    sweep = {"objective": "gated", "expansions": [3], "seeds": [0, 1]}
    words = ["--train.sweeps", json.dumps([sweep]), "--train.target_l0", '{"1": [4, 8]}', "--train.sites", "[1]"]
    assert run(str(pipeline), *words, "--rows-per-second", "1000", "--json") == 0
    train = json.loads(capsys.readouterr().out)["train"]
    # Of 200 steps: 7 pilots of 10 steps, and two of 20 for each of two targets; four runs take that many from one stream of 64 rows a step.
    assert train["runs"] == 4
    assert train["pilots"] == 7 + 4
    assert train["pilot_rows"] == (7 * 10 + 4 * 20) * 64 / 4
    assert train["hours"] == pytest.approx((200 * 64 + train["pilot_rows"]) / 1000 / 3600)
    parameters = 2 * 16 * 48 + 3 * 48 + 16
    assert train["state_bytes_per_rank"] == 5 * 8 * 7 * parameters
    assert run(str(pipeline), *words) == 0
    assert "at least 11 short runs for train.target_l0: 19% of a site's time for its runs" in capsys.readouterr().out


def test_parts_are_harvested_as_often_as_they_are_visited(pipeline):
    config = read_config("plan", [str(pipeline), "--corpus.parts", "2", "--train.total_rows", "40000"])
    found = budget(config, Assumptions(tokens_per_second=1.0))
    assert found.train.visits > 2
    assert found.harvest.hours == pytest.approx(found.harvest.computed_tokens * found.train.visits / 2 / 3600)


def test_a_measured_rate_is_taken_for_every_rank(pipeline, monkeypatch, capsys):
    monkeypatch.setattr(plan_rate, "MEASURED_SECONDS", 0.0)
    assert run(str(pipeline), "--measure", "--ranks", "4", "--json") == 0
    harvest = json.loads(capsys.readouterr().out)["harvest"]
    assert harvest["is_measured"]
    monkeypatch.setattr(plan_budget, "measure_tokens_per_second", lambda config, sites: 7.0)
    assert run(str(pipeline), "--measure", "--ranks", "4") == 0
    assert "at 28 tokens/s, measured on one rank and taken for each of 4;" in capsys.readouterr().out


def test_what_is_measured_is_the_forward_up_to_the_last_site(pipeline, monkeypatch):
    """A clock that stands still but for the forwards: each takes a second, the first is not counted."""
    monkeypatch.setattr(plan_rate, "MEASURED_SECONDS", 2.5)
    seen, clock = [], [0.0]

    def capture(model, sites, tokens, positions):
        seen.append((len(model.model.layers), tokens.shape, int((positions == 0).sum())))
        clock[0] += 1.0

    monkeypatch.setattr(plan_rate, "capture", capture)
    monkeypatch.setattr(plan_rate.time, "perf_counter", lambda: clock[0])
    config = read_config("plan", [str(pipeline)])
    found = budget(config, Assumptions(measure=True))
    assert found.harvest.tokens_per_second == 4 * 32
    assert {(layers, tuple(shape)) for layers, shape, _ in seen} == {(3, (4, 32))}
    assert len(seen) == 4
    assert all(segments >= 4 for *_, segments in seen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "argument --ranks: invalid positive int value: '0'"),
        (["--tokens-per-second", "inf"], "invalid positive float value: 'inf'"),
        (["--measure", "--tokens-per-second", "3"], "not allowed with argument"),
        (["--measure", "--llm.sharding", "zero3"], "give --tokens-per-second"),
        (["--harvest.max_tokenz", "3"], "did you mean harvest.max_tokens?"),
    ],
)
def test_a_mistake_is_one_line(pipeline, words, message, capsys):
    assert run(str(pipeline), *words) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_of_several_ranks_the_first_speaks_and_they_are_counted(pipeline, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert run(str(pipeline)) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert run(str(pipeline), "--json") == 0
    assert json.loads(capsys.readouterr().out)["llm"]["ranks"] == 4


# what will not fit


def cures_of(lines: list[str]) -> list[tuple[str, str]]:
    """Settings with the values that the lines name for them."""
    return re.findall(r"(?<=set )(?:--)?([a-z_0-9]+\.[a-z_0-9]+) (\w+)", " ".join(lines))


def test_a_store_too_large_is_mended_by_each_setting_that_is_named(pipeline, monkeypatch):
    found, _ = planned(pipeline)
    set_disk(monkeypatch, found.disk.checkpoint_bytes + int(found.store.bytes * 0.6))
    _, lines = planned(pipeline)
    assert len(lines) == 1
    assert lines[0].startswith("the store will not fit: ")
    assert "name fewer harvest.sites" in lines[0]
    cures = cures_of(lines)
    assert [setting for setting, _ in cures] == ["harvest.max_tokens", "harvest.storage_dtype", "corpus.parts"]
    for setting, value in cures:
        if setting != "harvest.storage_dtype":  # rows of 16 dimensions are columns and headers mostly
            assert planned(pipeline, f"--{setting}", value)[1] == [], setting
    parts = dict(cures)["corpus.parts"]
    fewer = planned(pipeline, "--corpus.parts", str(int(parts) - 1))[1]
    assert any("the store will not fit" in line for line in fewer), "fewer parts do not fit"


def test_what_is_in_the_store_already_need_not_fit_again(pipeline, monkeypatch):
    found, _ = planned(pipeline)
    tar = Path(found.store.directory) / "resid.1" / "0000-000000.tar"
    tar.parent.mkdir(parents=True)
    tar.write_bytes(b"0" * (found.store.bytes // 2))
    set_disk(monkeypatch, found.disk.checkpoint_bytes + found.store.bytes * 6 // 10)
    assert planned(pipeline)[1] == []


def test_the_fewest_parts_that_fit_are_named(pipeline, monkeypatch):
    found, _ = planned(pipeline, "--corpus.parts", "3")
    set_disk(monkeypatch, found.disk.checkpoint_bytes + found.store.bytes_at_once)
    assert dict(cures_of(planned(pipeline)[1]))["corpus.parts"] == "3"


def test_checkpoints_count_beside_the_store(pipeline, monkeypatch):
    found, _ = planned(pipeline)
    set_disk(monkeypatch, found.disk.checkpoint_bytes + found.store.bytes)
    assert planned(pipeline)[1] == []
    set_disk(monkeypatch, found.disk.checkpoint_bytes + found.store.bytes - 1)
    assert len(planned(pipeline)[1]) == 1
    set_disk(monkeypatch, found.disk.checkpoint_bytes - 1)
    _, (store, checkpoints) = planned(pipeline)
    assert store.startswith("the store will not fit")
    assert checkpoints.startswith("the checkpoints will not fit")
    assert "train.keep_checkpoints (2)" in checkpoints


def harvest_lines(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("the LLM will not fit")]


def test_an_llm_too_large_for_a_gpu_is_mended_by_zero3(pipeline, monkeypatch):
    words = ("--llm.random.d_model", "64")
    found, _ = planned(pipeline, *words, ranks=2)
    free = (found.llm.bytes_per_rank_replicate + found.llm.bytes_per_rank_zero3) // 2 + found.llm.activation_bytes
    set_machine(monkeypatch, gpus=(free, LARGE))
    _, lines = planned(pipeline, *words, ranks=2)
    (line,) = harvest_lines(lines)
    assert ("llm.sharding", "zero3") in cures_of([line])
    assert harvest_lines(planned(pipeline, *words, "--llm.sharding", "zero3", ranks=2)[1]) == []


def test_more_ranks_or_the_host_hold_an_llm_too_large_for_two_gpus(pipeline, monkeypatch):
    words = ("--llm.random.d_model", "64", "--llm.sharding", "zero3")
    found, _ = planned(pipeline, *words, ranks=4)
    set_machine(monkeypatch, gpus=(found.llm.harvest_bytes_per_rank, LARGE))
    (line,) = harvest_lines(planned(pipeline, *words, ranks=2)[1])
    ranks = int(re.search(r"start (\d+) ranks or more", line)[1])
    assert ranks == 4
    assert harvest_lines(planned(pipeline, *words, ranks=ranks)[1]) == []
    assert ("llm.offload", "true") in cures_of([line])
    assert harvest_lines(planned(pipeline, *words, "--llm.offload", "true", ranks=2)[1]) == []


def test_a_batch_too_large_is_mended_by_fewer_contexts(pipeline, monkeypatch):
    found, _ = planned(pipeline)
    set_machine(monkeypatch, gpus=(found.llm.bytes_per_rank_replicate + found.llm.activation_bytes * 5 // 8,))
    (line,) = harvest_lines(planned(pipeline)[1])
    assert cures_of([line])[0] == ("harvest.batch_contexts", "2")  # of 4
    assert harvest_lines(planned(pipeline, "--harvest.batch_contexts", "2")[1]) == []


def test_ranks_of_a_host_without_gpus_share_its_memory(pipeline, monkeypatch):
    found, _ = planned(pipeline)
    set_machine(monkeypatch, host=found.llm.harvest_bytes_per_rank * 5 // 2)
    assert harvest_lines(planned(pipeline, ranks=2)[1]) == []
    (line,) = harvest_lines(planned(pipeline, ranks=4)[1])
    assert "start 2 ranks or fewer" in line


def test_training_too_large_names_what_takes_the_memory(pipeline, monkeypatch):
    found, _ = planned(pipeline, "--train.batch_rows", "4096")
    set_machine(monkeypatch, gpus=(found.train.state_bytes_per_rank * 2,))
    lines = [line for line in planned(pipeline, "--train.batch_rows", "4096")[1] if line.startswith("training will not fit")]
    assert len(lines) == 1
    assert "; lower train.micro_batch_rows" in lines[0]
    words = ("--train.batch_rows", "4096", "--train.micro_batch_rows", "4")
    assert not [line for line in planned(pipeline, *words)[1] if line.startswith("training")]


def test_the_evaluation_holds_the_llm_whole(pipeline, monkeypatch):
    _, lines = planned(pipeline, "--llm.sharding", "zero3", ranks=2)
    assert lines == ["the evaluation holds the LLM whole on each rank; run it with --llm.sharding replicate"]
    found, _ = planned(pipeline)
    set_machine(monkeypatch, gpus=(found.llm.evaluation_bytes_per_rank - 1,))
    assert any(line.startswith("the evaluation will not fit") for line in planned(pipeline)[1])


def test_ranks_that_the_stages_would_refuse_are_named(pipeline):
    _, lines = planned(pipeline, "--train.groups", "2", ranks=3)
    assert [line.partition(",")[0] for line in lines] == [
        "3 ranks do not divide corpus.num_lanes (4)",
        "train.groups (2) does not divide 3 ranks",
    ]


def test_lanes_without_text_are_named(pipeline):
    _, lines = planned(pipeline, "--corpus.num_lanes", "4096", "--train.batch_rows", "4096", "--train.window_rows", "4096")
    assert re.match(r"\d+ of 4096 lanes get no text; lower corpus.num_lanes", lines[0])


# this machine


def test_this_machine_has_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = this_machine(Config())
    assert 2**25 < found.host_free_bytes < 2**45
    assert found.gpu_free_bytes == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_this_machine_has_gpus(pipeline):
    assert len(this_machine(Config()).gpu_free_bytes) == torch.cuda.device_count()
    assert this_machine(replace(Config(), device="cpu")).gpu_free_bytes == ()
    config = read_config("plan", [str(pipeline), "--device", "cuda"])
    assert budget(config, Assumptions(measure=True)).harvest.tokens_per_second > 0


def test_help_names_the_options_and_the_settings(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--ranks N", "--tokens-per-second", "--measure", "--json", "--harvest.sites"))


def suggested(capsys, *words: str) -> dict[str, str]:
    """The last group, by stage."""
    assert run(*words, "--slurm") == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("slurm"))
    return {line[9:21].strip(): line[21:] for line in lines[first:]}


def test_slurm_jobs_for_gpus_fill_their_nodes(pipeline, capsys):
    words = [
        str(pipeline),
        "--device",
        "auto",
        "--ranks",
        "8",
        "--gpus-per-node",
        "4",
        "--tokens-per-second",
        "10",
        "--rows-per-second",
        "1",
    ]
    shown = suggested(capsys, *words)
    figures, _ = planned(pipeline, ranks=8)
    overrides = f"{pipeline} --device auto"
    hours = 1.5 * figures.harvest.computed_tokens / 10 / 3600
    half_hours = int(2 * hours) + 2
    time = f"{half_hours // 2:02d}:{30 * (half_hours % 2):02d}:00"
    assert (
        shown["harvest"]
        == f"sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --mem=20G --time={time} slurm/harvest.sbatch {overrides}"
    )
    assert "--time=11:30:00 slurm/train.sbatch" in shown["train"], "2 sites of 12,800 rows at one a second, half as much again, and a bit"
    assert "--time" not in shown["evaluate"]
    assert shown["all stages"].startswith("bash slurm/pipeline.sh nodes=2 gpus_per_node=4 cpus_per_rank=8 ")
    assert shown["all stages"].endswith(f"harvest.time={time} train.time=11:30:00 {overrides}")


def test_slurm_jobs_on_cpus_count_what_they_compute_with(pipeline, capsys):
    shown = suggested(capsys, str(pipeline), "--ranks", "6", "--gpus-per-node", "4", "--corpus.num_lanes", "6", "--train.batch_rows", "60")
    assert "--nodes=2 " in shown["train"], "six ranks are two nodes of three"
    assert "slurm/train.sbatch ranks_per_node=3 " in shown["train"]
    assert "gpus" not in " ".join(shown.values())


def test_an_evaluation_gets_no_more_nodes_than_batches(pipeline, capsys):
    """1,500 tokens in batches of 4 contexts of 32 are 12 batches."""
    shown = suggested(capsys, str(pipeline), "--ranks", "32", "--gpus-per-node", "8", "--corpus.num_lanes", "32")
    assert "--nodes=4 " in shown["train"]
    assert "--nodes=2 " in shown["evaluate"]
    assert "harvest.nodes=4 train.nodes=4 evaluate.nodes=2" in shown["all stages"]


def test_the_longest_job_is_a_day(pipeline, capsys):
    assert "--time=24:00:00" in suggested(capsys, str(pipeline), "--tokens-per-second", "0.1")["harvest"]


def test_the_suggested_words_are_settings(pipeline, capsys):
    found = suggested(capsys, str(pipeline), "--device", "auto", "--ranks", "16", "--tokens-per-second", "10")["all stages"]
    words = found.split()[2:]
    script = 'source slurm/env.sh; read_settings "$@"; stage=harvest; echo "$(setting nodes) $(setting gpus_per_node) ${words[*]}"'
    done = subprocess.run(["bash", "-c", script, "-", *words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == f"2 8 {pipeline} --device auto\n"


def test_slurm_jobs_are_in_the_json(pipeline, capsys):
    assert run(str(pipeline), "--json", "--slurm", "--ranks", "2") == 0
    jobs = json.loads(capsys.readouterr().out)["slurm"]
    assert [(job["stage"], job["nodes"], job["ranks_per_node"]) for job in jobs] == [("harvest", 1, 2), ("train", 1, 2), ("evaluate", 1, 2)]
