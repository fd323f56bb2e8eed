"""The objective's kernels: what they compute, and that they compile for GPUs, which needs none."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_loss import DIVERGENCES, TAILS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
)


def test_the_kernels_of_the_objective() -> None:
    """In a process of their own: Triton asks for its interpreter once, when it is imported."""
    environment = dict(os.environ) if torch.cuda.is_available() else os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("kernels.py")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize(("capability", "logits"), [(80, "fp16"), (90, "fp32"), (100, "bf16")])
def test_the_kernels_compile_for_gpus(
    capability: int, logits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes what the compiler refuses."""
    from fusellm_ray.fusion import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (kernels._row_mass, kernels._scaled_exp, kernels._scale):
        _compile(kernel, logits, capability, {"block": 4096, "slot_block": 32})
    sizes = {"least_mass": 1e-30, "least_residual": -16.1, "row_block": 8, "slot_block": 32}
    for divergence, tail in itertools.product(DIVERGENCES, TAILS):
        _compile(kernels._compare_slots, logits, capability, sizes | {"divergence": divergence, "tail": tail})
    # Without teachers gold is the only slot, and a number that is 1 becomes a constant.
    alone = {"row_block": 256, "slot_block": 1, "num_slots": 1}
    _compile(kernels._row_mass, logits, capability, {"block": 4096} | alone)
    clm = {"divergence": "forward_kl", "tail": "bucket"}
    _compile(kernels._compare_slots, logits, capability, sizes | alone | clm)


def _compile(kernel, logits: str, capability: int, constants: dict) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("logits", "slots", "gathered", "values"), f"*{logits}") | {"listened": "*i1"}
    sizes = ("num_columns", "row_stride", "num_slots", "num_rows", "vocab_size", "count")
    types |= dict.fromkeys(sizes, "i32") | {"clm_weight": "fp32"}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names
    }
    made = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", capability, 32)
    )
    assert made.asm["cubin"]
