"""Saved state comes back bit for bit on any number of ranks; what is incomplete or foreign is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusellm_ray.config import ModelConfig, TargetConfig, TrainingConfig
from fusellm_ray.errors import CheckpointError, ModelError
from fusellm_ray.models import HeadedModel, load_causal_lm
from fusellm_ray.target.checkpoint import (
    STATE_FILE,
    explain_changes,
    export_model,
    load_checkpoint,
    read_state,
    training_tensors,
    write_checkpoint,
)
from fusellm_ray.target.model import build_target, make_optimizer, trainable_parameters
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.tokenizers import build

TRAINING = TrainingConfig(steps=10, lr=1e-2)
STATE = {"step": 3, "cursors": {"0": {"document": 17}}}


def step(model, optimizer, seed):
    """One optimiser step on random ids, the same on every rank."""
    ids = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(seed))
    loss = model(
        ids, torch.arange(12)[None], lambda h, w, b: torch.nn.functional.linear(h, w, b).logsumexp(-1).sum()
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def snapshot(model, optimizer):
    """All parameters and optimiser state, whole, as nested lists."""
    parameters = trainable_parameters(model.causal_lm)
    return {n: full(p).tolist() for n, p in parameters.items()} | {
        f"{entry}.{n}": full(t).tolist()
        for n, p in parameters.items()
        for entry, t in optimizer.state[p].items()
    }


def save(mesh, folder, out, *, own_folders=False):
    """Two steps, a checkpoint, and what it should hold."""
    model = build_target(TargetConfig(model=folder), mesh)
    optimizer = make_optimizer(model, TRAINING)
    for seed in range(2):
        step(model, optimizer, seed)
    write_checkpoint(
        f"{out}/{mesh.get_rank()}" if own_folders else out, training_tensors(model, optimizer), STATE
    )
    return snapshot(model, optimizer)


def load(mesh, folder, directory):
    model = build_target(TargetConfig(model=folder), mesh)
    optimizer = make_optimizer(model, TRAINING)
    load_checkpoint(directory, model, optimizer)
    return snapshot(model, optimizer)


def save_own_folders(mesh, folder, out):
    return save(mesh, folder, out, own_folders=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("bytelevel", folder)
    return str(tiny_model("llama_tied", 1200, folder))


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory):
    """A checkpoint of two ranks, each of which wrote into a folder of its own, and its content."""
    root = tmp_path_factory.mktemp("checkpoints")
    contents = run_ranks(2, save_own_folders, model_folder, str(root))
    together = root / "together"
    together.mkdir()
    for rank in range(2):
        for path in (root / str(rank)).iterdir():
            assert not (together / path.name).exists(), "files of two ranks collide"
            shutil.copy(path, together)
    return together, contents[0]


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(saved[0], tmp_path / "copy")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_checkpoint_of_two_ranks_loads_bit_for_bit_on_any_number(num_ranks, saved, model_folder):
    directory, content = saved
    num_parameters = len(list(AutoModelForCausalLM.from_pretrained(model_folder).parameters()))
    assert len(content) == 4 * num_parameters  # each with two moments and a step count
    for loaded in run_ranks(num_ranks, load, model_folder, str(directory)):
        assert loaded == content


def continue_from(mesh, folder, directory):
    model = build_target(TargetConfig(model=folder), mesh)
    optimizer = make_optimizer(model, TRAINING)
    if directory is None:
        for seed in range(2):
            step(model, optimizer, seed)
    else:
        load_checkpoint(directory, model, optimizer)
    for seed in range(2, 4):
        step(model, optimizer, seed)
    return snapshot(model, optimizer)


def test_training_continues_exactly_as_if_never_stopped(saved, model_folder):
    assert run_ranks(2, continue_from, model_folder, str(saved[0])) == run_ranks(
        2, continue_from, model_folder, None
    )


def test_a_checkpoint_is_safetensors_and_json_and_lists_its_files(saved):
    directory, _ = saved
    state = read_state(directory)
    names = {path.name for path in directory.iterdir()}
    assert names == {STATE_FILE, *state["files"]}
    assert all(name.endswith(".safetensors") for name in state["files"])
    assert {key: state[key] for key in STATE} == STATE


def test_state_that_is_large_goes_to_several_files(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fusellm_ray.target.checkpoint.FILE_BYTES", 100_000)
    model = HeadedModel(load_causal_lm(ModelConfig(model=model_folder), dtype=torch.float32))
    optimizer = make_optimizer(model, TRAINING)
    step(model, optimizer, 0)
    before = snapshot(model, optimizer)
    write_checkpoint(tmp_path, training_tensors(model, optimizer), STATE)
    assert len(read_state(tmp_path)["files"]) > 3
    step(model, optimizer, 1)
    load_checkpoint(tmp_path, model, optimizer)
    assert snapshot(model, optimizer) == before


def test_a_checkpoint_without_its_marker_is_refused(copy):
    (copy / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        read_state(copy)


def test_a_checkpoint_that_lost_a_rank_is_refused_by_file_name(copy):
    lost = next(copy.glob("shard-00002*"))
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name} is missing"):
        read_state(copy)


def test_a_truncated_file_is_refused(copy):
    file = next(copy.glob("shard-00001*"))
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    with pytest.raises(CheckpointError, match=f"has {size - 1} bytes instead of {size}"):
        read_state(copy)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 99, "files": {}}', '{"format": 2, "files": {}}', '{"format": 3}'],
)
def test_a_damaged_state_file_is_refused(copy, text):
    (copy / STATE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=STATE_FILE):
        read_state(copy)


def test_a_state_file_that_names_files_outside_its_folder_is_refused(copy):
    outside = copy.parent / "outside.safetensors"
    outside.write_bytes(b"1234")
    state = read_state(copy)
    for name in ("../outside.safetensors", str(outside)):
        (copy / STATE_FILE).write_text(json.dumps({**state, "files": {**state["files"], name: 4}}))
        with pytest.raises(CheckpointError, match="leaves the folder"):
            read_state(copy)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_shards_of_an_earlier_attempt_at_the_step_do_no_harm(num_ranks, saved, copy, model_folder, tmp_path):
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    stale = copy / second.name.replace("shard-00002", "shard-00003")
    stale.write_bytes(second.read_bytes()[:100])
    shutil.copy(first, copy / "whole.safetensors")
    for loaded in run_ranks(num_ranks, load, model_folder, str(copy)):
        assert loaded == saved[1]
    out = export_model(copy, TargetConfig(model=model_folder), tmp_path / "out")
    for name, parameter in AutoModelForCausalLM.from_pretrained(out).named_parameters():
        assert torch.equal(parameter, torch.tensor(saved[1][name]))


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(saved, tmp_path):
    folder = tiny_model("llama", 1200, tmp_path)
    model = HeadedModel(load_causal_lm(ModelConfig(model=str(folder)), dtype=torch.float32))
    with pytest.raises(CheckpointError, match=r"model\.lm_head\.weight: was absent, is \[1200, 32\]"):
        load_checkpoint(saved[0], model, make_optimizer(model, TRAINING))


def test_a_state_that_json_cannot_hold_is_not_written(model_folder, tmp_path):
    model = HeadedModel(load_causal_lm(ModelConfig(model=model_folder), dtype=torch.float32))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_checkpoint(
            tmp_path, training_tensors(model, make_optimizer(model, TRAINING)), {"loss": float("nan")}
        )
    assert not (tmp_path / STATE_FILE).exists()


# ---------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_loads_with_transformers_and_has_the_trained_weights(dtype, saved, model_folder, tmp_path):
    directory, content = saved
    out = export_model(directory, TargetConfig(model=model_folder, dtype=dtype), tmp_path / "deep" / "out")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.tensor(content[name]).to(parameter.dtype))
    text = "def café(): return '😀'"
    tokenizer, original = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer(text).input_ids == original(text).input_ids
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_generation_config_that_cannot_be_saved_does_not_cost_the_export(saved, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9, "top_p": 0.6}')
    out = export_model(saved[0], TargetConfig(model=str(folder)), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.temperature in (None, 1.0)


def test_an_export_never_overwrites(saved, model_folder, tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_model(saved[0], TargetConfig(model=model_folder), tmp_path)


def test_an_export_that_fails_leaves_nothing(copy, model_folder, tmp_path):
    next(copy.glob("shard-00002*")).unlink()
    with pytest.raises(CheckpointError):
        export_model(copy, TargetConfig(model=model_folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_without_a_tokenizer_is_refused(saved, tmp_path):
    folder = tiny_model("llama_tied", 1200, tmp_path / "bare")
    with pytest.raises(ModelError, match="bare"):
        export_model(saved[0], TargetConfig(model=str(folder)), tmp_path / "out")


def test_an_export_of_another_architecture_is_refused(saved, tmp_path):
    build("bytelevel", tmp_path / "other")
    folder = tiny_model("gpt_neox", 1200, tmp_path / "other")
    with pytest.raises(CheckpointError, match="trained parameters are not this model's"):
        export_model(saved[0], TargetConfig(model=str(folder)), tmp_path / "out")


def save_lora(mesh, folder, out):
    model = build_target(TargetConfig(model=folder, lora={"rank": 4}), mesh)
    optimizer = make_optimizer(model, TRAINING)
    for seed in range(2):
        step(model, optimizer, seed)
    write_checkpoint(out, training_tensors(model, optimizer), STATE)
    ids = torch.arange(9)[None]
    return model(ids, ids, torch.nn.functional.linear).tolist()


def test_an_export_of_adapters_is_the_merged_model(model_folder, tmp_path):
    pytest.importorskip("peft")
    logits, *_ = run_ranks(2, save_lora, model_folder, str(tmp_path / "checkpoint"))
    saved_bytes = sum(read_state(tmp_path / "checkpoint")["files"].values())
    assert saved_bytes < 100_000, "frozen weights are not saved"
    out = export_model(
        tmp_path / "checkpoint", TargetConfig(model=model_folder, lora={"rank": 4}), tmp_path / "out"
    )
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(
        merged(torch.arange(9)[None]).logits, torch.tensor(logits), rtol=1e-4, atol=1e-4
    )
    assert not json.loads((out / "config.json").read_text()).get("peft_config")


# ---------------------------------------------------------------------------------------- identity


def test_equal_identities_have_no_changes():
    assert explain_changes({"a": {"b": 1}}, {"a": {"b": 1}}) == []


def test_changes_name_key_old_and_new_value():
    saved = {"corpus": "c0ffee", "teachers": {"math": "aa", "law": "bb"}, "seed": 1}
    now = {"corpus": "c0ffee", "teachers": {"math": "cc", "code": "dd"}, "seed": 1}
    assert explain_changes(saved, now) == [
        "teachers.math: was aa, is cc",
        "teachers.law: was bb, is absent",
        "teachers.code: was absent, is dd",
    ]
