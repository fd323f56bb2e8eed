"""Loading refuses what is unsafe or absent; structure checks accept sound architectures, refuse others."""

import contextlib
import http.server
import itertools
import json
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import AttentionInterface

from fusellm_ray.config import ModelConfig, TeacherConfig
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ModelError, TokenizerError
from fusellm_ray.models import (
    HeadedModel,
    build_on_meta,
    check_head,
    check_packing,
    check_skeleton,
    check_structure,
    hidden_states,
    lm_head,
    load_causal_lm,
    load_hf_tokenizer,
    model_facts,
    weights_fingerprint,
)
from tests.models import tiny_model

SOUND = ["llama", "llama_tied", "qwen2", "mistral", "gemma3", "gpt_neox", "gpt2"]


def load(folder, attention=None):
    return load_causal_lm(ModelConfig(model=str(folder)), dtype=torch.float32, attention=attention)


@pytest.mark.parametrize("architecture", SOUND)
def test_sound_architectures_pass_the_structure_check(architecture, tmp_path):
    check_structure(load(tiny_model(architecture, 97, tmp_path)))


def test_eager_attention_keeps_documents_apart_too(tmp_path):
    check_structure(load(tiny_model("llama", 97, tmp_path), attention="eager"))


def test_an_architecture_that_caps_its_logits_is_refused_by_name(tmp_path):
    model = load(tiny_model("gemma2", 97, tmp_path))
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM.*soft-capping"):
        check_head(model)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_the_head_is_checked_whatever_the_attention_which_stays(attention, tmp_path):
    capped, plain = (load(tiny_model(name, 97, tmp_path / name)) for name in ("gemma2", "llama"))
    for model in (capped, plain):
        model.config._attn_implementation = attention
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM.*soft-capping"):
        check_head(capped)
    check_head(plain)
    assert [model.config._attn_implementation for model in (capped, plain)] == [attention] * 2


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_flash_attention_is_told_where_documents_begin(architecture, name, tmp_path, monkeypatch):
    """Its kernel is played by PyTorch's attention, document by document."""
    told = []

    def attend(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale):
        told.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q))
        parts = []
        for start, stop in itertools.pairwise(cu_seqlens_q.tolist()):
            own = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(
                *own, is_causal=True, scale=scale, enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    def arguments(*, softmax_scale, max_seqlen_q, **_):
        return {"scale": softmax_scale, "max_seqlen_q": max_seqlen_q}

    model = load(tiny_model(architecture, 97, tmp_path))
    ids = torch.arange(32).reshape(2, 16) % 31
    positions = torch.cat([torch.arange(6), torch.arange(10)]).expand(2, -1).contiguous()
    with torch.no_grad():
        expected = hidden_states(model, ids, positions)
        kernels = (None, attend, None, None, None), (arguments, None)
        monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda _: kernels)
        monkeypatch.setitem(AttentionInterface._global_mapping, name, flash_attention_forward)
        model.config._attn_implementation = name
        seen = hidden_states(model, ids, positions)
    assert told == [([0, 6, 16, 22, 32], [0, 6, 16, 22, 32], 16)] * 2
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_flex_attention_is_asked_for_the_kernel_of_any_length(tmp_path, monkeypatch):
    model = load(tiny_model("llama", 97, tmp_path))
    model.config._attn_implementation = "flex_attention"
    asked = {}

    def forward(**kwargs):
        asked.update(kwargs)
        return SimpleNamespace(last_hidden_state=torch.zeros(1, 4, 32))

    monkeypatch.setattr(model.base_model, "forward", forward)
    hidden_states(model, torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None])
    assert asked["kernel_options"] == {"BACKEND": "TRITON"}


def test_a_head_that_could_not_be_checked_under_its_attention_is_refused_before_loading(tmp_path):
    skeleton = build_on_meta(ModelConfig(model=str(tiny_model("falcon", 97, tmp_path))))
    check_skeleton(skeleton)
    with pytest.raises(
        ModelError, match=r"FalconForCausalLM.*target\.attention=flash_attention_2.*sdpa or eager"
    ):
        check_skeleton(skeleton, "flash_attention_2")


def test_an_architecture_without_positions_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"BloomForCausalLM.*position_ids"):
        check_structure(load(tiny_model("bloom", 97, tmp_path)))


def test_a_model_that_lets_documents_see_each_other_is_refused(tmp_path):
    model = load(tiny_model("llama", 97, tmp_path))
    body = model.base_model.forward

    def leaking(input_ids, position_ids, attention_mask, use_cache):
        everything = torch.ones_like(input_ids)  # a mask that is given switches the packed one off
        return body(
            input_ids=input_ids, position_ids=position_ids, attention_mask=everything, use_cache=use_cache
        )

    model.base_model.forward = leaking
    with pytest.raises(ModelError, match="packed before theirs"):
        check_packing(HeadedModel(model))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_a_packed_document_has_the_hidden_states_it_has_alone(architecture, tmp_path):
    """Documents longer than the sliding window (8), different cuts in each row of the batch."""
    model = load(tiny_model(architecture, 97, tmp_path))
    ids = torch.randint(97, (2, 30))
    cuts = [[0, 11, 12, 30], [0, 1, 19, 30]]
    positions = torch.stack(
        [torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(c)]) for c in cuts]
    )
    with torch.no_grad():
        packed = hidden_states(model, ids, positions)
        for row, cut in enumerate(cuts):
            for start, stop in itertools.pairwise(cut):
                alone = hidden_states(model, ids[row : row + 1, start:stop], torch.arange(stop - start)[None])
                torch.testing.assert_close(packed[row, start:stop], alone[0], rtol=1e-4, atol=1e-5)


def test_forward_of_a_headed_model_gives_the_function_what_makes_the_logits(tmp_path):
    model = load(tiny_model("gpt_neox", 97, tmp_path))
    ids = torch.randint(97, (2, 9))
    positions = torch.arange(9).expand(2, -1)
    logits = HeadedModel(model)(ids, positions, torch.nn.functional.linear)
    torch.testing.assert_close(logits, model(input_ids=ids).logits)
    assert lm_head(model)[0].shape == (97, 32)


def test_facts_agree_with_the_loaded_model(tmp_path):
    config = ModelConfig(model=str(tiny_model("gpt2", 101, tmp_path)))
    facts = model_facts(config)
    model = load(tmp_path)
    assert facts.architecture == type(model).__name__
    assert (facts.vocab_size, facts.max_context) == (101, 128)
    assert facts.num_parameters == model.num_parameters()


def test_a_teacher_without_a_stated_context_needs_one_in_its_config(tmp_path):
    model = str(tiny_model("bloom", 97, tmp_path))
    with pytest.raises(ModelError, match="set max_context"):
        model_facts(ModelConfig(model=model))
    assert model_facts(TeacherConfig(name="b", model=model, max_context=64)).max_context == 64


def test_a_context_beyond_what_the_config_states_is_refused(tmp_path):
    model = str(tiny_model("llama", 97, tmp_path))
    with pytest.raises(
        ModelError, match=r"teacher t: max_context=129 exceeds what the config of .* states \(128\)"
    ):
        model_facts(TeacherConfig(name="t", model=model, max_context=129))
    assert model_facts(TeacherConfig(name="t", model=model, max_context=127)).max_context == 127


def test_a_skeleton_takes_no_memory_and_has_the_same_parameters(tmp_path):
    folder = tiny_model("qwen2", 97, tmp_path)
    skeleton = build_on_meta(ModelConfig(model=str(folder)))
    assert all(p.is_meta for p in skeleton.parameters())
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in load(folder).named_parameters()
    }


@pytest.mark.parametrize("architecture", SOUND)
def test_a_skeleton_of_a_sound_architecture_passes(architecture, tmp_path):
    check_skeleton(build_on_meta(ModelConfig(model=str(tiny_model(architecture, 97, tmp_path)))))


def test_a_setting_that_the_architecture_does_not_know_is_no_ground_for_refusal(tmp_path):
    config = tiny_model("llama", 97, tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"logits_scaling": 8.0}))
    model = load(tmp_path)
    check_skeleton(model)
    check_head(model)


def test_an_attention_implementation_the_architecture_lacks_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"set target\.attention"):
        load(tiny_model("bloom", 97, tmp_path), attention="sdpa")


def test_a_folder_may_be_given_relative_to_home(tmp_path, monkeypatch):
    tiny_model("gpt2", 97, tmp_path / "models" / "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        load("~/models/tiny").num_parameters()
        == model_facts(ModelConfig(model="~/models/tiny")).num_parameters
    )


OWN_CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(PretrainedConfig):
    model_type = "own"
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.mark.parametrize("model_type", ["own", "llama"])
@pytest.mark.parametrize("read", [model_facts, build_on_meta, load_hf_tokenizer, ByteTokenizer.of_model])
def test_code_that_ships_with_a_model_does_not_run_unless_it_is_trusted(tmp_path, read, model_type):
    folder, marker = tmp_path / "model", tmp_path / "it-ran"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": OWN}))
    own_tokenizer = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own_tokenizer))
    with contextlib.suppress(ModelError, TokenizerError):  # of a known type, it is loaded without that code
        read(ModelConfig(model=str(folder)))
    assert not marker.exists()
    with contextlib.suppress(ModelError, TokenizerError):  # there is no more to it
        read(ModelConfig(model=str(folder), trust_remote_code=True))
    assert marker.exists()


def test_a_model_that_needs_its_own_code_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": OWN}))
    with pytest.raises(
        ModelError, match="ships its own code: read that code, then set trust_remote_code: true"
    ):
        model_facts(ModelConfig(model=str(tmp_path)))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load(tmp_path / "absent")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    tiny_model("llama", 97, tmp_path)
    torch.save(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"\.bin.*never loaded.*save_pretrained"):
        load(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """A hub that lists files of any model, and has none of them."""
    files = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):  # http.server's names
            self.send_error(404)

        def do_GET(self):
            if not self.path.startswith("/api/models/"):
                return self.send_error(404)
            self.send_response(200)
            self.end_headers()
            listed = [{"rfilename": name} for name in files]
            self.wfile.write(json.dumps({"id": "some/model", "siblings": listed}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield files
        server.shutdown()


def test_a_hub_id_with_pickled_weights_alone_is_refused_before_anything_is_loaded(hub):
    hub += ["config.json", "pytorch_model.bin"]
    with pytest.raises(
        ModelError, match=r"some/model@v1: has no \*\.safetensors file on the hub; pickled.*convert"
    ):
        model_facts(ModelConfig(model="some/model", revision="v1"))
    with pytest.raises(ModelError, match="cannot be loaded"):  # a tokenizer needs no weights
        load_hf_tokenizer(ModelConfig(model="some/model"))
    hub += ["model-00001-of-00002.safetensors"]
    with pytest.raises(ModelError, match="cannot be loaded"):
        model_facts(ModelConfig(model="some/model"))


def test_the_fingerprint_of_weights_sees_any_changed_tensor_and_no_copy(tmp_path):
    def fingerprint(folder):
        return weights_fingerprint(ModelConfig(model=str(folder)))

    tiny_model("llama", 97, tmp_path / "first")
    first = fingerprint(tmp_path / "first")
    assert fingerprint(shutil.copytree(tmp_path / "first", tmp_path / "copy")) == first
    assert fingerprint(tiny_model("llama", 97, tmp_path / "other", seed=1)) != first
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    for name, tensor in tensors.items():
        save_file(tensors | {name: tensor + 1}, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
        assert fingerprint(tmp_path / "copy") != first, name


def test_a_config_that_changed_beside_its_weights_changes_their_fingerprint(tmp_path):
    model = ModelConfig(model=str(tiny_model("llama", 97, tmp_path)))
    first = weights_fingerprint(model)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert weights_fingerprint(model) != first


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]"])
def test_a_file_that_is_no_safetensors_is_named(content, tmp_path):
    tiny_model("llama", 97, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: is no safetensors file"):
        weights_fingerprint(ModelConfig(model=str(tmp_path)))


def test_a_config_that_is_no_language_model_is_refused(tmp_path):
    tiny_model("llama", 97, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(ModelError, match="unheard_of"):
        load(tmp_path)


def test_a_hub_id_without_network_fails_within_seconds(monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ModelError, match="nobody/no-such-model"):
        load_causal_lm(ModelConfig(model="nobody/no-such-model"), dtype=torch.float32)
    assert time.monotonic() - start < 10
