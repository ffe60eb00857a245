import hashlib
import itertools
import json
import logging
import re
import shutil
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from gsae.config import LLMConfig
from gsae.errors import ConfigError, ModelError
from gsae.llm.load import describe, load, load_tokenizer
from gsae.llm.site import capture, resolve_sites

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config_of(directory, **settings):
    return LLMConfig(model=str(directory), dtype="float32", **settings)


def num_parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensor(path, name, change):
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata={"format": "pt"})


def file_with(directory, name):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


@pytest.fixture(params=["random", "directory"])
def any_config(request, config):
    return config if request.param == "random" else config_of(request.getfixturevalue("directory"))


def test_a_truncated_llm_has_the_same_activations_and_fewer_parameters(any_config):
    whole = load(any_config, CPU)
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(2, 12)
    for last_layer in range(4):
        cut = load(any_config, CPU, last_layer)
        sites = resolve_sites(range(last_layer + 1), 4)
        expected = capture(whole.model, sites, tokens, positions)
        for name, x in capture(cut.model, sites, tokens, positions).items():
            assert torch.equal(x, expected[name])
        # The layers above and the LM head are left out (where it is tied to the embeddings it has no parameters of its own).
        layer_size, head_size = num_parameters(whole.model.model.layers[0]), whole.model.lm_head.weight.numel()
        own_head_size = 0 if whole.model.config.tie_word_embeddings else head_size
        assert num_parameters(whole.model) - num_parameters(cut.model) == (3 - last_layer) * layer_size + own_head_size
        assert not hasattr(cut.model, "lm_head")
        assert cut.info == whole.info


@pytest.mark.parametrize("last_layer", [-1, 4])
def test_a_layer_that_the_llm_does_not_have_is_refused(any_config, last_layer):
    with pytest.raises(ConfigError, match=f"layer {last_layer} is not in .*; its layers are 0 to 3$"):
        load(any_config, CPU, last_layer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_type_and_attention_are_as_asked_for(any_config, dtype, attention):
    llm = load(LLMConfig(model=any_config.model, dtype=dtype, attention=attention, random=any_config.random), CPU)
    assert {weight.dtype for weight in llm.model.parameters()} == {getattr(torch, dtype)}
    assert llm.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert llm.model.config._attn_implementation == attention
    assert not llm.model.training
    assert not any(weight.requires_grad for weight in llm.model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_flash_attention_that_cannot_work_is_refused_at_once(any_config, dtype):
    config = LLMConfig(model=any_config.model, dtype=dtype, attention="flash_attention_2", random=any_config.random)
    with pytest.raises(ModelError, match=r"needs a GPU \(the device is cpu\).*; or set llm.attention: sdpa$") as caught:
        load(config, CPU)
    assert ("llm.dtype bfloat16 or float16 (it is float32)" in str(caught.value)) == (dtype == "float32")


def test_flash_attention_without_its_package_is_refused_and_not_fetched(config, monkeypatch):
    monkeypatch.setattr("gsae.llm.load.is_flash_attn_2_available", lambda: False)
    flash = LLMConfig(model="random", attention="flash_attention_2", random=config.random)
    with pytest.raises(ModelError, match=r"needs the package flash-attn \(pip install flash-attn .*; or set llm.attention: sdpa$"):
        load(flash, torch.device("cuda"))


def test_layers_above_the_last_are_not_read(directory):
    whole = load(config_of(directory), CPU).model
    for path in directory.glob("model-*.safetensors"):
        kept = {name: x for name, x in load_file(path).items() if "layers.2" not in name and "layers.3" not in name}
        save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"9 weights are missing .* model\.layers\.2\.input_layernorm\.weight"):
        load(config_of(directory), CPU, last_layer=2)
    cut = dict(load(config_of(directory), CPU, last_layer=1).model.named_parameters())
    assert all(torch.equal(weight, dict(whole.named_parameters())[name]) for name, weight in cut.items())


def test_the_description_needs_no_loading_and_equals_what_is_loaded(any_config):
    llm = load(any_config, CPU)
    info = describe(any_config)
    assert info == llm.info
    assert info.num_layers == len(llm.model.model.layers) == 4
    assert info.d_model == llm.model.model.embed_tokens.weight.shape[1]
    assert info.vocab_size == llm.model.lm_head.weight.shape[0] == len(llm.tokenizer)
    assert json.loads(json.dumps(info.identity)) == info.identity


def test_the_tokenizer_alone_is_the_llms(any_config):
    text = "Hé 漢 ab"
    assert load_tokenizer(any_config)(text)["input_ids"] == load(any_config, CPU).tokenizer(text)["input_ids"] == list(text.encode())


@pytest.fixture
def library_records(monkeypatch):
    """What transformers and huggingface_hub log, at a level that no default has."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    for name in ("transformers", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
        logging.getLogger(name).addHandler(handler)
    yield records
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).removeHandler(handler)


def test_loading_is_quiet_and_leaves_the_libraries_settings_as_they_were(directory, capfd, library_records):
    load(config_of(directory), CPU, last_layer=1)
    assert library_records == []
    assert capfd.readouterr() == ("", "")
    assert [logging.getLogger(name).level for name in ("transformers", "huggingface_hub")] == [logging.INFO, logging.INFO]


def test_the_identity_names_no_place(directory, tmp_path, monkeypatch):
    here = describe(config_of(directory)).identity
    assert str(tmp_path) not in json.dumps(here)
    assert here["name"] == "little-llama"
    elsewhere = tmp_path / "elsewhere" / "little-llama"
    shutil.copytree(directory, elsewhere)
    assert describe(config_of(elsewhere)).identity == here
    monkeypatch.chdir(elsewhere)
    assert describe(config_of(".")).identity == here


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_the_identity_tells_other_weights_of_the_same_shapes(directory, name):
    before = describe(config_of(directory)).identity
    sizes = [path.stat().st_size for path in sorted(directory.glob("*.safetensors"))]
    edit_tensor(file_with(directory, name), name, lambda tensor: tensor * 1.01)
    assert [path.stat().st_size for path in sorted(directory.glob("*.safetensors"))] == sizes
    after = describe(config_of(directory)).identity
    assert {key for key in before if before[key] != after[key]} == {"weights_sha256"}


@pytest.mark.parametrize(("file", "key"), [("config.json", "config_sha256"), ("tokenizer.json", "tokenizer_sha256")])
def test_the_identity_tells_another_config_or_tokenizer(directory, file, key):
    before = describe(config_of(directory)).identity
    edit_json(directory / file, changed=True)
    after = describe(config_of(directory)).identity
    assert {key for key in before if before[key] != after[key]} == {key}


def break_nothing_there(directory):
    shutil.rmtree(directory)


def break_all_weights(directory):
    for path in directory.glob("model*"):
        path.unlink()


def break_one_weight_file(directory):
    file_with(directory, "model.norm.weight").unlink()


def break_half_a_weight_file(directory):
    path = file_with(directory, "model.norm.weight")
    path.write_bytes(path.read_bytes()[:-100])


def break_weights_by_lfs_pointer(directory):
    file_with(directory, "model.norm.weight").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n")


def break_weights_by_empty_file(directory):
    file_with(directory, "model.norm.weight").write_bytes(b"")


def break_a_header(directory):
    file_with(directory, "model.norm.weight").write_bytes(struct.pack("<Q", 3) + b"{{{")


def break_one_tensor_missing(directory):
    edit_tensor(file_with(directory, "model.norm.weight"), "model.norm.weight", lambda tensor: None)


def break_one_tensor_of_another_shape(directory):
    edit_tensor(file_with(directory, "model.norm.weight"), "model.norm.weight", lambda tensor: tensor[:16].clone())


def break_no_config(directory):
    (directory / "config.json").unlink()


def break_config_not_json(directory):
    (directory / "config.json").write_text("{ no")


def break_other_architecture(directory):
    edit_json(directory / "config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2")


def break_no_architecture(directory):
    edit_json(directory / "config.json", architectures=None)


def break_quantised(directory):
    edit_json(directory / "config.json", quantization_config={"quant_method": "gptq"})


def break_no_tokenizer(directory):
    (directory / "tokenizer.json").unlink()


def break_tokenizer_not_whole(directory):
    (directory / "tokenizer.json").write_text('{"version": "1.0"')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_there, "no such directory; check the path, or give a name on the Hugging Face hub"),
        (break_all_weights, "holds no model.safetensors; fetch or save all the weights there, as safetensors"),
        (break_one_weight_file, "holds no model-0000.-of-00002.safetensors; fetch or save all the weights there, as safetensors"),
        (break_half_a_weight_file, r"safetensors has \d+ bytes, its header announces \d+; fetch it again"),
        (break_weights_by_lfs_pointer, r"is no whole safetensors file \(a Git LFS pointer, perhaps\); fetch it again"),
        (break_weights_by_empty_file, "is no whole safetensors file"),
        (break_a_header, "is no whole safetensors file"),
        (break_one_tensor_missing, "1 weights are missing or not of the shape that config.json tells, the first is model.norm.weight"),
        (break_one_tensor_of_another_shape, "1 weights are missing or not of the shape .*, the first is model.norm.weight"),
        (break_no_config, "holds no config.json; point llm.model to a directory made by save_pretrained"),
        (break_config_not_json, r"config.json is not JSON \(.*\); fetch it again"),
        (break_other_architecture, "architecture GPT2LMHeadModel is not supported; llm.model must be a LlamaForCausalLM"),
        (break_no_architecture, "architecture not named is not supported; llm.model must be a LlamaForCausalLM"),
        (break_quantised, "the weights are quantised; give the model in bfloat16, float16 or float32"),
        (break_no_tokenizer, "holds no tokenizer.json or tokenizer.model; save the model's tokenizer there"),
        (break_tokenizer_not_whole, r"the tokenizer in .* cannot be read \(.*\); fetch or save it again"),
    ],
    ids=lambda value: getattr(value, "__name__", "").removeprefix("break_"),
)
def test_a_directory_that_will_not_do_is_an_error_of_one_line(directory, damage, message):
    damage(directory)
    with pytest.raises(ModelError, match=message) as caught:
        load(config_of(directory), CPU)
    assert "\n" not in str(caught.value)
    assert "little-llama" in str(caught.value)


def test_a_file_and_an_empty_name_are_refused(directory):
    with pytest.raises(ModelError, match="is a file; give the directory"):
        describe(config_of(directory / "config.json"))
    with pytest.raises(
        ConfigError, match=r"llm\.model is empty; give a name on the Hugging Face hub, a directory that holds a Llama, or 'random'"
    ):
        describe(LLMConfig())


class Hub(ThreadingHTTPServer):
    """A hub on this host with two repositories of the same files: `some/llama`, and `some/gated` whose files it does not give."""

    def __init__(self, directory):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.files |= {"original/params.json": b"{}", "original/model.safetensors": b"another format of the weights"}
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.newest_commit = itertools.repeat(COMMIT)


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        path = self.path.partition("?")[0]
        _, _, file = path.partition("/resolve/")
        if path.startswith("/some/llama/resolve/"):
            commit, _, name = file.partition("/")
            self.answer(self.server.files[name], ETag=f'"{hashlib.sha256(name.encode()).hexdigest()}"', **{"X-Repo-Commit": commit})
        elif path.startswith("/some/gated/resolve/"):
            self.answer(b"", 403, **{"X-Error-Code": "GatedRepo"})
        elif not path.startswith(("/api/models/some/llama", "/api/models/some/gated")):
            self.answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            files = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in self.server.files.items()]
            self.answer(json.dumps(files).encode())
        elif path.endswith(("/some/llama", "/some/gated", "/revision/main")):
            self.answer(json.dumps({"id": "some/llama", "sha": next(self.server.newest_commit)}).encode())
        elif re.search("/revision/[0-9a-f]{40}$", path):
            self.answer(json.dumps({"id": "some/llama", "sha": path[-40:]}).encode())
        else:
            self.answer(b"", 404, **{"X-Error-Code": "RevisionNotFound"})

    do_HEAD = do_GET

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(directory, tmp_path, monkeypatch):
    """A running `Hub` that huggingface_hub takes for the real one, with an empty cache."""
    server = Hub(directory)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def stop(hub):
    hub.shutdown()
    hub.server_close()


def test_a_model_of_the_hub_is_known_by_its_commit_and_read_from_the_cache_afterwards(hub, directory, tmp_path, capfd, library_records):
    config = config_of("some/llama")
    info = describe(config)
    assert info.identity == {"name": "some/llama", "revision": COMMIT}
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []
    fetched = load(config, CPU)
    assert {path.parent.name for path in (tmp_path / "cache").rglob("*.safetensors")} == {COMMIT}
    stop(hub)
    again = load(config, CPU)
    assert fetched.info == again.info == info
    for weight, other, third in zip(*(llm.model.parameters() for llm in (fetched, again, load(config_of(directory), CPU))), strict=True):
        assert torch.equal(weight, other)
        assert torch.equal(weight, third)
    assert load(config_of("some/llama", revision=COMMIT), CPU, last_layer=0).info == info
    assert library_records == []
    assert capfd.readouterr() == ("", "")


def test_the_weights_are_of_the_commit_that_the_identity_names_when_the_branch_moves_on(hub, tmp_path):
    hub.newest_commit = (f"{number:040x}" for number in itertools.count())
    info = load(config_of("some/llama"), CPU).info
    assert {path.parent.name for path in (tmp_path / "cache").rglob("*.safetensors")} == {info.identity["revision"]}


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        (
            "some/gated",
            None,
            "is gated: accept its licence at .*, log in with `hf auth login` or set HF_TOKEN, or set llm.model to a local directory",
        ),
        ("some/unknown", None, "is no directory here and no public repository on the hub: check the spelling, log in .*, or set llm.model"),
        ("some/llama", "v9", "llm.revision 'v9' is not a branch, tag or commit of https://huggingface.co/some/llama"),
        ("./some/where/else", None, "no such directory; check the path"),
    ],
)
def test_what_the_hub_refuses_is_an_error_of_one_line(hub, model, revision, message):
    with pytest.raises(ModelError, match=message) as caught:
        describe(config_of(model, revision=revision))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_without_a_network_the_error_comes_at_once_and_tells_what_to_do(hub, revision, capfd, library_records):
    stop(hub)
    start = time.monotonic()
    with pytest.raises(
        ModelError, match=r"could not be fetched \(ConnectError: .*\): run it once on a machine that reaches https://"
    ) as caught:
        load(config_of("some/llama", revision=revision), CPU)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    assert library_records == []
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_not_in_the_cache_are_missed_when_there_is_no_network(hub):
    describe(config_of("some/llama"))
    stop(hub)
    assert describe(config_of("some/llama")).identity["revision"] == COMMIT
    with pytest.raises(ModelError, match="is not whole in the hub's cache, and could not be fetched"):
        load(config_of("some/llama"), CPU)
