"""The LLM split over real ranks, against the LLM that each rank holds whole."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from llm.conftest import save_llama
from safetensors.torch import load_file, save_file

from gsae import world
from gsae.config import LLMConfig, RandomLlamaConfig
from gsae.errors import ConfigError, GsaeError, ModelError
from gsae.llm import load as load_module
from gsae.llm import sharded
from gsae.llm.load import load
from gsae.llm.sharded import held_parameter_bytes
from gsae.llm.site import capture, resolve_sites

NUM_LAYERS = 12
REAL = Path(__file__).parents[2] / "runs" / "assets" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved Llama of twelve layers, with an LM head of its own, which nobody may change."""
    return save_llama(tmp_path_factory.mktemp("saved") / "llama", NUM_LAYERS, tied=False)


def config_of(model, sharding="zero3", **settings):
    shape = RandomLlamaConfig(num_layers=NUM_LAYERS, d_model=32)
    return LLMConfig(**{"model": str(model), "dtype": "float32", "sharding": sharding, "random": shape} | settings)


def load_both(here, model, last_layer, **settings):
    """The LLM whole, and split."""
    whole = load(config_of(model, "replicate", **settings), here.device, last_layer)
    return whole, load(config_of(model, **settings), here.device, last_layer, here.everyone)


def batch(number, contexts=2, length=24, vocab_size=256):
    """Tokens and positions of contexts of two segments each."""
    tokens = torch.randint(vocab_size, (contexts, length), generator=torch.Generator().manual_seed(number))
    positions = torch.cat([torch.arange(length // 3), torch.arange(length - length // 3)]).expand(contexts, length)
    return tokens, positions


def check_activations(model, dtype, last_layer):
    with world.start("cpu") as here:
        whole, split = load_both(here, model, last_layer, dtype=dtype)
        for number, (contexts, length, num_sites) in enumerate([(2, 24, 9), (2, 24, 9), (3, 40, 9), (1, 7, 9), (2, 24, 3), (2, 24, 9)]):
            sites = resolve_sites(range(last_layer + 1), whole.info.num_layers)[:num_sites]
            # Every rank runs a batch of its own.
            arguments = (sites, *batch(number + 100 * here.everyone.rank, contexts, length))
            expected = capture(whole.model, *arguments)
            for name, x in capture(split.model, *arguments).items():
                assert x.dtype == getattr(torch, dtype)
                assert torch.equal(x, expected[name]), (number, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("model", ["random", "saved"])
def test_activations_are_those_of_the_whole_llm_bit_for_bit(saved, model, dtype):
    ranks.run(2, check_activations, saved if model == "saved" else model, dtype, 8)


@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_ranks_gives_the_same_activations(saved, size):
    ranks.run(size, check_activations, saved, "float32", 4)


def check_without_a_launcher(model):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    check_activations(model, "float32", 2)


def test_one_process_needs_no_launcher(saved):
    ranks.run(1, check_without_a_launcher, saved)


def check_loads_in_turn(model):
    with world.start("cpu") as here:
        values = []
        for sharding in ("zero3", "replicate", "zero3", "replicate"):
            llm = load(config_of(model, sharding), here.device, 2, here.everyone)
            values.append(capture(llm.model, resolve_sites([2], NUM_LAYERS), *batch(0))["resid.2"])
        assert all(torch.equal(value, values[0]) for value in values)


def test_a_split_llm_leaves_nothing_that_the_next_one_meets(saved):
    ranks.run(2, check_loads_in_turn, saved)


def check_tensors(model, last_layer):
    with world.start("cpu") as here:
        whole, split = load_both(here, model, last_layer, dtype="bfloat16")
        (whole_buffers, buffers) = (dict(llm.model.named_buffers()) for llm in (whole, split))
        assert whole_buffers.keys() == buffers.keys() != set()
        for name, buffer in whole_buffers.items():
            assert buffers[name].dtype == buffer.dtype
            assert torch.equal(buffers[name], buffer)
        shapes = [{name: getattr(w, "ds_shape", w.shape) for name, w in llm.model.named_parameters()} for llm in (whole, split)]
        assert shapes[0] == shapes[1]
        assert split.info == whole.info
        assert split.model.device == whole.model.device
        assert split.model.dtype == torch.bfloat16
        assert not any(module.training for module in split.model.modules())
        assert not any(weight.requires_grad for weight in split.model.parameters())


@pytest.mark.parametrize("model", ["random", "saved"])
def test_buffers_and_parameters_are_named_and_typed_as_in_the_whole_llm(saved, model):
    ranks.run(2, check_tensors, saved if model == "saved" else model, 5)


def check_held_bytes(model):
    with world.start("cpu") as here:
        whole, split = load_both(here, model, 8)
        all_bytes, layer_bytes = (held_parameter_bytes(part) for part in (whole.model, whole.model.model.layers[0]))
        assert all_bytes == sum(weight.numel() * 4 for weight in whole.model.parameters())
        sites, inside = resolve_sites(range(9), NUM_LAYERS), []
        for layer in split.model.model.layers:
            layer.mlp.down_proj.register_forward_hook(lambda *_: inside.append(held_parameter_bytes(split.model)))
        for number in range(5):  # DeepSpeed watches the first forwards and gathers ahead in the others
            assert held_parameter_bytes(split.model) < 0.52 * all_bytes
            capture(split.model, sites, *batch(number))
        assert held_parameter_bytes(split.model) < 0.52 * all_bytes
        assert 0.5 * all_bytes + layer_bytes < max(inside) < 0.52 * all_bytes + 2 * layer_bytes


def test_a_rank_of_two_holds_half_and_gathers_two_layers_ahead_while_it_computes(saved):
    ranks.run(2, check_held_bytes, saved)


def live_tensor_bytes():
    """Bytes of all tensors that Python can reach and has made since `gc.freeze`, a storage once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.device.type == "cpu"]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def check_loading(model):
    with world.start("cpu") as here:
        peak, split = 0, world.Zero3.split
        gc.freeze()

        def watched_split(self, module):
            nonlocal peak
            peak = max(peak, live_tensor_bytes())
            split(self, module)

        world.Zero3.split = watched_split
        llm = load(config_of(model), here.device, NUM_LAYERS - 1, here.everyone)
        all_bytes = sum(weight.ds_numel * 4 for weight in llm.model.parameters())
        assert 0.5 * all_bytes < peak < 0.65 * all_bytes  # its share, and at the end one layer of twelve besides


def test_no_rank_holds_more_than_its_share_and_a_layer_while_loading(saved):
    ranks.run(2, check_loading, saved)


def check_fifty_forwards(model):
    with world.start("cpu") as here:
        llm = load(config_of(model), here.device, 8, here.everyone)
        sites, sizes = resolve_sites([3, 8], NUM_LAYERS), []
        gc.freeze()
        for number in range(60):
            used = sites if number % 7 else sites[:1]
            capture(llm.model, used, *batch(number, contexts=1 + number % 3, length=8 + number % 5))
            if number in (9, 59):
                gc.collect()
                sizes.append((live_tensor_bytes(), len(gc.get_objects())))
        assert sizes[1][0] <= sizes[0][0]
        assert sizes[1][1] - sizes[0][1] < 50  # a leak of one object a forward would be 50


def test_fifty_forwards_leave_nothing_behind(saved):
    ranks.run(2, check_fifty_forwards, saved)


def test_a_normal_run_says_nothing(saved):
    with ranks.started(2, check_activations, saved, "float32", 2) as started:
        assert started.wait() == [0, 0]
        assert [started.output(rank) for rank in range(2)] == ["", ""]


def edit_tensors(directory, change):
    """Replace tensors in the files of a saved Llama; `change` gives the new one, or None to take it out."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        tensors = {name: change(name, tensor) for name, tensor in load_file(directory / file).items()}
        save_file({name: x for name, x in tensors.items() if x is not None}, directory / file, metadata={"format": "pt"})


def test_layers_above_the_last_and_the_lm_head_are_not_read(tmp_path):
    directory = save_llama(tmp_path / "llama", tied=False)
    edit_tensors(directory, lambda name, x: None if "layers.2" in name or "layers.3" in name or "lm_head" in name else x)
    with pytest.raises(AssertionError, match=r"model\.layers\.2\.input_layernorm\.weight"):
        ranks.run(2, check_load, directory, 2)
    ranks.run(2, check_load, directory, 1)


def check_load(model, last_layer):
    with world.start("cpu") as here:
        load(config_of(model), here.device, last_layer, here.everyone)


def check_refused(model, kind, message, settings):
    with world.start("cpu") as here:
        with pytest.raises(kind, match=message) as caught:
            load(config_of(model, **settings), here.device, 1, here.everyone)
        assert "\n" not in str(caught.value)
        assert caught.value.spoken_by == 0
        here.everyone.barrier()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, x: None if name == "model.norm.weight" else x, "1 weights are missing or not of the shape .* is model.norm.weight;"),
        (lambda name, x: x[:16].clone() if "layers.1.mlp.up" in name else x, "1 weights .* is model.layers.1.mlp.up_proj.weight;"),
    ],
    ids=["missing", "of-another-shape"],
)
def test_weights_that_will_not_do_are_the_same_error_as_in_the_whole_llm(directory, change, message):
    edit_tensors(directory, change)
    with pytest.raises(ModelError, match=message):
        load(config_of(directory, "replicate"), torch.device("cpu"), 1)
    ranks.run(2, check_refused, directory, ModelError, message, {})


def check_refused_on_one(model):
    with world.start("cpu") as here:
        place = model if here.everyone.rank == 0 else f"{model}/no-such"
        kind, words = (GsaeError, "no such directory.* .on rank 1.$") if here.everyone.rank == 0 else (ModelError, "no such directory")
        with pytest.raises(kind, match=words):
            load(config_of(place), here.device, 1, here.everyone)
        here.everyone.barrier()


def test_what_one_rank_lacks_fails_all_of_them(saved):
    ranks.run(2, check_refused_on_one, saved)


def check_reading_fails(model):
    with world.start("cpu") as here:
        weights_in = sharded.weights_in

        def broken_weights_in(*arguments):
            weights = weights_in(*arguments)

            def read(name):
                if "layers.1" in name:
                    raise OSError("the disk is gone")
                return weights.read(name)

            return replace(weights, read=read)

        load_module.weights_in = broken_weights_in
        kind, words = (OSError, "gone$") if here.is_first else (GsaeError, "OSError the disk is gone .on rank 0.$")
        with pytest.raises(kind, match=words):
            load(config_of(model), here.device, 1, here.everyone)
        here.everyone.barrier()


def test_what_the_reading_rank_cannot_read_fails_all_of_them(saved):
    ranks.run(2, check_reading_fails, saved, timeout_seconds=60)


def test_offload_is_refused_on_cpu_ranks(saved):
    ranks.run(2, check_refused, saved, ConfigError, "llm.offload is for GPUs: .*; set llm.offload: false", {"offload": True})


def check_without_deepspeed(model):
    sys.modules["deepspeed"] = None  # importing it raises
    check_refused(model, ModelError, r"needs DeepSpeed, .*ModuleNotFoundError.*pip install 'deepspeed>=", {})


def test_without_deepspeed_the_error_tells_what_to_install(saved):
    ranks.run(2, check_without_deepspeed, saved)


@pytest.mark.demo
@pytest.mark.skipif(not REAL.exists(), reason="the demo's LLM is not prepared: python launch/prepare_demo.py runs/assets")
def test_a_real_llama_gives_the_same_activations_split():
    ranks.run(2, check_activations, REAL, "bfloat16", 15, timeout_seconds=600)


def check_on_gpu(model, offload):
    with world.start("cuda") as here:
        whole = load(config_of(model, "replicate", dtype="bfloat16"), here.device, 8)
        split = load(config_of(model, dtype="bfloat16", offload=offload), here.device, 8, here.everyone)
        sites = resolve_sites(range(9), NUM_LAYERS)
        for number in range(4):
            tokens, positions = (value.to(here.device) for value in batch(number))
            expected = capture(whole.model, sites, tokens, positions)
            for name, x in capture(split.model, sites, tokens, positions).items():
                assert torch.equal(x, expected[name])
        assert {weight.ds_tensor.device.type for weight in split.model.parameters()} >= ({"cpu"} if offload else {"cuda"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_on_a_gpu_activations_are_those_of_the_whole_llm(saved, offload):
    code = f"from llm.test_sharded import check_on_gpu; check_on_gpu({str(saved)!r}, {offload})"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
