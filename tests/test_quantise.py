"""A target in 4 bits trains its adapters, on one rank as on two, and says what it lacks."""

import pytest
import torch

from fusellm_ray.config import ModelConfig, TargetConfig
from fusellm_ray.errors import ConfigError
from fusellm_ray.models import HeadedModel, load_causal_lm
from fusellm_ray.target.model import build_target, trainable_parameters
from fusellm_ray.target.quantise import is_quantised, require_bitsandbytes
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.test_target_model import batch, nats, train

QLORA = {"lora": {"rank": 4, "quantise": "nf4"}}


def first_loss_and_sizes(mesh, folder):
    """Loss before any step; the same in a plain model of the dequantised weights; bytes of the 4-bit weights."""
    import bitsandbytes

    model = build_target(TargetConfig(model=folder, **QLORA), mesh)
    plain = load_causal_lm(ModelConfig(model=folder), dtype=torch.float32)
    num_bytes = num_weights = 0
    for name, module in model.causal_lm.named_modules():
        if is_quantised(module):
            whole = plain.get_submodule(name.removesuffix(".base_layer"))
            dequantised = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            assert not torch.equal(dequantised, whole.weight)
            whole.weight.data.copy_(dequantised)
            num_bytes += module.weight.numel() * module.weight.element_size()
            num_weights += whole.weight.numel()
    ids, positions, gold = batch(0)
    seen, wanted = (m(ids, positions, nats(gold)).item() for m in (model, HeadedModel(plain)))
    return seen, wanted, num_bytes / num_weights, len(trainable_parameters(model))


def test_the_frozen_layers_are_in_4_bits_and_compute_what_these_spell(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    folder = str(tiny_model("llama", 97, tmp_path))
    for seen, wanted, bytes_per_weight, num_trained in run_ranks(2, first_loss_and_sizes, folder):
        assert seen == pytest.approx(wanted, rel=1e-5)
        assert bytes_per_weight == 0.5
        assert num_trained == 2 * 7 * 2


def test_adapters_train_alike_on_one_rank_and_two(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    folder = str(tiny_model("llama", 97, tmp_path))
    ((one, weights_one),) = run_ranks(1, train, folder, QLORA | {"activation_checkpointing": True})
    (two, weights_two), _ = run_ranks(2, train, folder, QLORA)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(weights_one), torch.tensor(weights_two), rtol=1e-5, atol=1e-9)
    assert one[-1][0] != one[0][0]


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        require_bitsandbytes()
