"""SAEs of other libraries on the rows of a store, to evaluate beside ours. In: a store. Out: a directory a library, as it saves itself.

    bash launch/demo.sh && bash launch/test_interop.sh
    .venv-interop/bin/python benchmarks/others.py runs/demo/store resid.15 runs/others
    .venv/bin/gsae evaluate configs/demo.yaml --sae runs/others/saelens --sae runs/others/dictionary_learning

Each is trained by its library's own loss and saved by its own code, on raw rows in the stream's order, with Adam. They show that such
SAEs are evaluated as ours are, not how good a library's recipe is: nothing was tuned.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from dictionary_learning.trainers.standard import StandardTrainer
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput

from gsae.store.manifest import load
from gsae.store.stream import Stream

LEARNING_RATE = 1e-3


def batches(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Raw rows in float32."""
    num_lanes = load(options.store).num_lanes
    with Stream(options.store, options.site, range(num_lanes), options.batch_rows, 65_536, 0, False) as stream:
        for _ in range(options.rows // options.batch_rows):
            batch = stream.next_batch()
            yield batch.decode(torch.device("cpu"), torch.float32)


def train_saelens(options: argparse.Namespace, num_features: int, d_model: int, lambda_: float) -> None:
    """Standard architecture."""
    layer = options.site.removeprefix("resid.")
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post", model_name="SmolLM2-135M-Instruct")
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=d_model, d_sae=num_features, l1_coefficient=lambda_, metadata=metadata))
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    for number, x in enumerate(batches(options)):
        step = TrainStepInput(x, {"l1": lambda_ * min(1.0, number / 50)}, None, number, False)
        loss = sae.training_forward_pass(step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sae.save_inference_model(str(options.output / "saelens"))


def train_dictionary_learning(options: argparse.Namespace, num_features: int, d_model: int, lambda_: float) -> None:
    """Its StandardTrainer, saved as its train_sae does."""
    layer = int(options.site.removeprefix("resid."))
    steps = options.rows // options.batch_rows
    settings = {"layer": layer, "submodule_name": f"resid_post_layer_{layer}", "lm_name": "SmolLM2-135M-Instruct", "device": "cpu"}
    trainer = StandardTrainer(
        steps=steps,
        activation_dim=d_model,
        dict_size=num_features,
        lr=LEARNING_RATE,
        l1_penalty=lambda_,
        warmup_steps=50,
        sparsity_warmup_steps=50,
        decay_start=int(0.8 * steps),
        **settings,
    )
    for number, x in enumerate(batches(options)):
        trainer.update(number, x)
    directory = options.output / "dictionary_learning"
    directory.mkdir(parents=True)
    torch.save({name: value.cpu() for name, value in trainer.ae.state_dict().items()}, directory / "ae.pt")
    (directory / "config.json").write_text(json.dumps({"trainer": trainer.config}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("site")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=150_016)
    parser.add_argument("--batch-rows", type=int, default=512)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.14, help="on rows of unit variance in all, as gsae's")
    options = parser.parse_args()
    manifest = load(options.store)
    lambda_, d_model = options.lambda_ / manifest.sites[options.site].scale, manifest.d_model
    torch.manual_seed(0)
    for work in (train_saelens, train_dictionary_learning):
        began = time.perf_counter()
        work(options, 4 * d_model, d_model, lambda_)
        print(
            json.dumps(
                {"benchmark": "others", "what": work.__name__, "rows": options.rows, "seconds": round(time.perf_counter() - began, 1)}
            )
        )


if __name__ == "__main__":
    main()
