"""The sharded target's gradients, norms and steps are those of the plain model, on one rank and on two."""

import gc
import math
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy, linear

from fusellm_ray.config import LoraConfig, ModelConfig, ObjectiveConfig, TargetConfig, TrainingConfig
from fusellm_ray.errors import ConfigError
from fusellm_ray.fusion.loss import objective
from fusellm_ray.models import HeadedModel, build_on_meta, hidden_states, lm_head, load_causal_lm
from fusellm_ray.target.model import (
    add_adapters,
    build_target,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    trainable_parameters,
    transformer_blocks,
)
from tests.models import tiny_model
from tests.ranks import run_ranks

NUM_TOKENS = 40
TRAINING = TrainingConfig(steps=10, lr=1e-2, schedule="constant")


def batch(seed):
    """Two rows of two documents each."""
    generator = torch.Generator().manual_seed(seed)
    ids, gold = torch.randint(97, (2, 2, 20), generator=generator)
    positions = torch.tensor([[*range(7), *range(13)], [*range(15), *range(5)]])
    return ids, positions, gold


def nats(gold):
    return lambda hidden, weight, bias: (
        cross_entropy(linear(hidden, weight, bias).flatten(0, 1).float(), gold.flatten(), reduction="sum")
        / NUM_TOKENS
    )


def objective_nats(gold):
    """The same through the chunked objective, which makes the head's gradient during forward."""
    config = ObjectiveConfig(chunk_tokens=7)
    return lambda hidden, weight, bias: (
        objective(
            hidden.flatten(0, 1), weight, bias, gold.flatten(), None, config=config, denominator=NUM_TOKENS
        ).loss
    )


def backward(model, mesh, seed=0, head=nats):
    """Backward over this rank's rows."""
    rows = range(mesh.get_rank(), 2, mesh.size())
    loss = 0.0
    for row in rows:  # with one rank: two micro-batches
        ids, positions, gold = (x[row : row + 1] for x in batch(seed))
        part = model(ids, positions, head(gold))
        part.backward()
        loss += part.item()
    return loss


def worst_gradient_error(mesh, folder, options, head=nats):
    model = build_target(TargetConfig(model=folder, **options), mesh)
    backward(model, mesh, head=head)
    reference = load_causal_lm(ModelConfig(model=folder), dtype=torch.float32)
    ids, positions, gold = batch(0)
    nats(gold)(hidden_states(reference, ids, positions), *lm_head(reference)).backward()
    pairs = zip(model.causal_lm.named_parameters(), reference.named_parameters(), strict=True)
    errors = []
    for (name, sharded), (reference_name, plain) in pairs:
        assert name == reference_name
        assert sharded.dtype == sharded.grad.dtype == torch.float32
        errors.append((sharded.grad.full_tensor() - plain.grad).abs().max().item())
    return max(errors)


def all_gradient_errors(mesh, cases):
    return [worst_gradient_error(mesh, *case) for case in cases]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_summed_gradients_of_all_ranks_are_those_of_the_plain_model(num_ranks, tmp_path):
    cases = [
        (str(tiny_model("llama", 97, tmp_path / "untied")), {}),
        (str(tiny_model("llama_tied", 97, tmp_path / "tied")), {}),
        (str(tmp_path / "untied"), {}, objective_nats),
        (str(tmp_path / "tied"), {}, objective_nats),
        (str(tiny_model("gpt2", 97, tmp_path / "gpt2")), {"activation_checkpointing": True}),
        (str(tiny_model("gemma3", 97, tmp_path / "gemma3")), {"activation_checkpointing": True}),
    ]
    for errors in run_ranks(num_ranks, all_gradient_errors, cases):
        assert max(errors) < 1e-6


def bf16_error(mesh, folder):
    return worst_gradient_error(mesh, folder, {"dtype": "bfloat16"})


def test_bf16_compute_keeps_float32_weights_and_gradients(tmp_path):
    (error,) = run_ranks(1, bf16_error, str(tiny_model("llama", 97, tmp_path)))
    assert 1e-6 < error < 0.05


def train(mesh, folder, options):
    """Five steps; norms, losses, and a digest of the final weights."""
    model = build_target(TargetConfig(model=folder, **options), mesh)
    optimizer = make_optimizer(model, TRAINING)
    history = []
    for step in range(5):
        loss = torch.tensor(backward(model, mesh, seed=step), dtype=torch.float64)
        torch.distributed.all_reduce(loss)
        norm = clip_gradients(model, TRAINING.clip_norm)
        set_learning_rate(optimizer, learning_rate(step, TRAINING))
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm))
    weights = [p.full_tensor().double().norm().item() for p in trainable_parameters(model).values()]
    return torch.tensor(history).tolist(), weights


def train_plainly(folder):
    """The same with nothing of the package but the loader."""
    model = load_causal_lm(ModelConfig(model=folder), dtype=torch.float32)
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2]}]
    groups += [{"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    history = []
    for step in range(5):
        ids, positions, gold = batch(step)
        loss = nats(gold)(hidden_states(model, ids, positions), *lm_head(model))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append([loss.item(), norm.item()])
    return history, [p.double().norm().item() for p in model.parameters()]


@pytest.mark.parametrize(
    ("num_ranks", "architecture", "options"),
    [
        (1, "llama", {}),
        (1, "llama_tied", {}),
        (2, "llama", {}),
        (2, "llama_tied", {}),
        (2, "llama_tied", {"reshard_after_forward": False}),
    ],
)
def test_five_steps_are_those_of_a_plain_training_loop(num_ranks, architecture, options, tmp_path):
    folder = str(tiny_model(architecture, 97, tmp_path))
    wanted, wanted_weights = train_plainly(folder)
    for seen, weights in run_ranks(num_ranks, train, folder, options):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(wanted), rtol=2e-6, atol=0)
        torch.testing.assert_close(torch.tensor(weights), torch.tensor(wanted_weights), rtol=2e-6, atol=0)


def parameter_types(mesh, folder, options):
    model = build_target(TargetConfig(model=folder, **options), mesh)
    kinds = [{type(p) for p in model.parameters()}]
    with torch.no_grad():
        model(*batch(0)[:2], linear)
    kinds.append({type(p) for p in model.parameters()})
    return kinds


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_parameters_are_sharded_after_a_build_and_after_inference(reshard_after_forward, tmp_path):
    folder = str(tiny_model("llama", 97, tmp_path))
    for kinds in run_ranks(2, parameter_types, folder, {"reshard_after_forward": reshard_after_forward}):
        assert kinds == [{DTensor}, {DTensor}]


def whole_parameters_during_build(mesh, folder, options):
    """At each fully_shard, and at the end: how many parameters seen whole are alive, and whose they are."""
    seen, history = [], []

    def record(module, **kwargs):
        own = [p for p in module.parameters() if not isinstance(p, DTensor)]
        seen.extend(StorageWeakRef(p.untyped_storage()) for p in own)
        history.append((sum(not storage.expired() for storage in seen), len(own)))
        del own
        return fully_shard(module, **kwargs)

    gc.disable()  # reference counts alone must do
    with patch("fusellm_ray.target.model.fully_shard", record):
        model = build_target(TargetConfig(model=folder, **options), mesh)
    gc.enable()
    history.append((sum(not storage.expired() for storage in seen), 0))
    causal_lm = model.causal_lm
    is_tied = causal_lm.get_input_embeddings().weight is causal_lm.get_output_embeddings().weight
    return history, is_tied


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"activation_checkpointing": True}),
        ("llama_tied", {}),
        ("gemma3", {}),
        ("llama", {"lora": {"rank": 4}}),
    ],
)
def test_a_build_holds_one_block_whole_at_a_time_and_keeps_ties(num_ranks, architecture, options, tmp_path):
    if "lora" in options:
        pytest.importorskip("peft")
    folder = str(tiny_model(architecture, 97, tmp_path))
    for history, is_tied in run_ranks(num_ranks, whole_parameters_during_build, folder, options):
        assert len(history) == 2 + 1 + 1  # blocks, the rest, after the build
        assert [alive for alive, _ in history] == [own for _, own in history]
        assert all(own for _, own in history[:-1])
        assert is_tied == (architecture != "llama")


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path):
    folder = str(tiny_model("llama", 97, tmp_path))
    ((plain, _),) = run_ranks(1, train, folder, {})
    ((compiled, _),) = run_ranks(1, train, folder, {"compile": True, "activation_checkpointing": True})
    torch.testing.assert_close(torch.tensor(plain), torch.tensor(compiled), rtol=1e-4, atol=0)


def test_lora_trains_adapters_alike_on_one_rank_and_two(tmp_path):
    pytest.importorskip("peft")
    folder = str(tiny_model("llama", 97, tmp_path))
    options = {"lora": {"rank": 4}}
    ((one, weights_one),) = run_ranks(1, train, folder, options)
    (two, weights_two), _ = run_ranks(2, train, folder, options)
    assert len(weights_one) == 2 * 7 * 2  # A and B of seven linear layers in each of two blocks
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(weights_one), torch.tensor(weights_two), rtol=1e-5, atol=1e-9)
    assert one[-1][0] != one[0][0]


def test_lora_without_peft_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    model = load_causal_lm(ModelConfig(model=str(tiny_model("llama", 97, tmp_path))), dtype=torch.float32)
    with pytest.raises(ConfigError, match="pip install peft"):
        add_adapters(model, LoraConfig())


@pytest.mark.parametrize(
    ("architecture", "wanted", "says"),
    [
        ("llama", ["q_proj", "v_pro"], "'v_pro' is no module of LlamaForCausalLM; did you mean 'v_proj'?"),
        ("gpt2", ["key"], "'key' is no module of GPT2LMHeadModel; it has c_attn, c_fc, c_proj"),
        ("llama", ["q_proj", "lm_head"], "'lm_head' is the LM head of LlamaForCausalLM or shares its weight"),
        ("llama_tied", ["embed_tokens"], "'embed_tokens' is the LM head of LlamaForCausalLM or shares its"),
        ("llama", ["self_attn"], "PEFT refuses it: Target module LlamaAttention"),
        ("llama", [], "PEFT refuses it: No `target_modules` passed"),
    ],
)
def test_modules_that_no_adapter_would_train_are_refused(tmp_path, architecture, wanted, says):
    pytest.importorskip("peft")
    model = build_on_meta(TargetConfig(model=str(tiny_model(architecture, 97, tmp_path))))
    with pytest.raises(ConfigError) as refused:
        add_adapters(model, LoraConfig(target_modules=wanted))
    assert says in str(refused.value)


@pytest.fixture
def plain_model(tmp_path):
    folder = str(tiny_model("gpt_neox", 97, tmp_path))
    model = HeadedModel(load_causal_lm(ModelConfig(model=folder), dtype=torch.float32))
    ids, positions, gold = batch(0)
    model(ids, positions, nats(gold)).backward()
    return model


def test_clipping_returns_the_norm_before_and_leaves_the_limit_after(plain_model):
    gradients = [p.grad for p in plain_model.parameters()]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    assert clip_gradients(plain_model, norm / 2) == pytest.approx(norm, rel=1e-6)
    assert clip_gradients(plain_model, norm) == pytest.approx(norm / 2, rel=1e-6)
    assert clip_gradients(plain_model, norm) == pytest.approx(norm / 2, rel=1e-6)


def test_a_gradient_that_is_not_finite_is_returned_and_spreads_nowhere(plain_model):
    first, *others = [p.grad for p in plain_model.parameters()]
    first[0, 0] = math.inf
    before = [g.clone() for g in others]
    assert not math.isfinite(clip_gradients(plain_model, 1e-3))
    assert all(torch.equal(a, b) for a, b in zip(before, others, strict=True))


def test_weight_decay_holds_for_matrices_only(plain_model):
    decay = {
        p: g["weight_decay"] for g in make_optimizer(plain_model, TRAINING).param_groups for p in g["params"]
    }
    assert len(decay) == len(list(plain_model.parameters()))
    for name, parameter in plain_model.named_parameters():
        is_matrix = not (name.endswith("bias") or "norm" in name)
        assert decay[parameter] == (TRAINING.weight_decay if is_matrix else 0.0)


def test_blocks_are_the_layers_in_order(plain_model):
    assert transformer_blocks(plain_model.causal_lm) == list(plain_model.causal_lm.gpt_neox.layers)


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_learning_rate_warms_up_to_its_peak_then_follows_the_schedule(schedule, middle, end):
    config = TrainingConfig(steps=110, lr=2.0, schedule=schedule, warmup_ratio=1 / 11, min_lr_ratio=0.1)
    assert [learning_rate(step, config) for step in range(10)] == pytest.approx(
        [0.2 * i for i in range(1, 11)]
    )
    assert learning_rate(10, config) == pytest.approx(2.0)
    assert learning_rate(60, config) == pytest.approx(2.0 * middle)
    assert learning_rate(110, config) == learning_rate(500, config) == pytest.approx(2.0 * end)


def test_learning_rate_never_is_zero_at_a_step_taken():
    for warmup_ratio in (0.0, 0.3, 1.0):
        config = TrainingConfig(steps=3, schedule="linear", warmup_ratio=warmup_ratio)
        assert min(learning_rate(step, config) for step in range(3)) > 0
