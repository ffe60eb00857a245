"""What `gsae plan` says of configs/llama2_70b_million.yaml, beside the simulation. In: the demo's assets. Out: one JSON line.

    .venv/bin/python benchmarks/plan_large.py [--assets runs/assets] [--gpus 64 256 1024]

The text is the demo's Wikipedia articles, over and over, to a billion tokens; the LLM is its config.json and the demo's tokenizer: a plan
asks for no more. Rates, links and disk are the simulation's inputs (simulate.py), groups and grids those that it found.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

from simulate import CONFIG, GIB, GPUS_PER_NODE, LLAMA_2_70B, bank_of, best_training, harvest_stage, stages, unit_seconds, value

from gsae.config import Config, CorpusConfig
from gsae.corpus.documents import read_documents
from gsae.settings import read_config

CHARACTERS = 4_700_000_000
"""At 4.4 characters a token somewhat more than harvest.max_tokens."""


def main() -> None:
    """Plan for each number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("runs/assets"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--scratch", help="a directory with room for 5 GB of text; default: the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        write_text(options.assets, Path(folder) / "text.jsonl")
        write_llm(options.assets, Path(folder) / "llm")
        found = {gpus: compared(Path(folder), gpus) for gpus in options.gpus}
    sys.stdout.write(json.dumps(found) + "\n")


def write_text(assets: Path, path: Path) -> None:
    """The demo's articles, over and over, each time under other names."""
    corpus = CorpusConfig(path=str(assets / "enwiki-shortened.xml.bz2"))
    texts = [document.text for document in read_documents(corpus, "training")]
    written = 0
    with path.open("w") as file:
        while written < CHARACTERS:
            for text in texts:
                file.write(json.dumps({"id": f"{written}", "text": text}) + "\n")
                written += len(text)


def write_llm(assets: Path, folder: Path) -> None:
    """The config of Llama-2-70B and the demo's tokenizer, without weights."""
    LLAMA_2_70B.save_pretrained(folder)
    for source in (assets / "SmolLM2-135M-Instruct").glob("*token*"):
        copyfile(source, folder / source.name)


def compared(folder: Path, gpus: int) -> dict[str, Any]:
    """The plan's figures beside the simulation's."""
    simulated = stages(gpus)
    planned = plan(folder, gpus)
    train = planned["train"]
    return {
        "store_terabytes": [planned["store"]["bytes"] / 1e12, simulated["store_terabytes"]],
        "checkpoint_terabytes": [planned["disk"]["checkpoint_bytes"] / 1e12, simulated["checkpoint_terabytes"]],
        "training_gib_per_gpu": [train["device_bytes_per_rank"] / GIB, simulated["training_gib_per_gpu"]],
        "sent_gigabytes_per_step": [train["communication"]["sent_bytes_per_step"] / 1e9, simulated["sent_gigabytes_per_step"]],
        "harvest_hours": [planned["harvest"]["hours"], simulated["harvest_hours"]["undisturbed"]],
        "training_hours": [train["hours"], simulated["training_hours"]["undisturbed"]],
        "advised_feature_ranks": train["grids"]["chosen"]["feature_ranks"],
        "advised_shared_reads": train["readers"]["chosen"]["shared_reads"],
        "warnings": planned["warnings"],
    }


def plan(folder: Path, gpus: int) -> dict[str, Any]:
    """What `gsae plan --json` says."""
    lanes = ["--corpus.num_lanes", str(max(64, gpus))]
    config = read_config("plan", [str(CONFIG), *lanes])
    disk_rate = value("disk") * gpus
    groups, grid, training = best_training(config, bank_of(config), gpus, disk_rate)
    harvest, _ = harvest_stage(config, gpus, disk_rate)
    words = [
        *("--corpus.format", "jsonl", "--corpus.path", str(folder / "text.jsonl"), "--llm.model", str(folder / "llm"), *lanes),
        *("--output", str(folder / "runs"), "--train.groups", str(groups), "--train.feature_ranks", str(grid.feature_ranks)),
    ]
    rates = {
        "tokens": tokens_of_batch(config) * gpus / unit_seconds(harvest, 1)[0],
        "rows": config.train.batch_rows / unit_seconds(replace(training, told_seconds=0.0), min(groups, training.tasks))[0],
    }
    link = value("link in a node" if grid.row_ranks * grid.feature_ranks <= GPUS_PER_NODE else "link between nodes")
    options = [
        *("--ranks", str(gpus), "--memory-gibibytes", str(value("memory") / GIB), "--link-gigabytes-per-second", str(link / 1e9)),
        *("--disk-gigabytes-per-second", str(disk_rate / 1e9)),
        *("--tokens-per-second", str(rates["tokens"]), "--rows-per-second", str(rates["rows"])),
    ]
    command = [sys.executable, "-m", "gsae", "plan", str(CONFIG), *words, *options, "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def tokens_of_batch(config: Config) -> int:
    """Of an LLM batch of the harvest."""
    return config.harvest.batch_contexts * config.harvest.context_length


if __name__ == "__main__":
    main()
