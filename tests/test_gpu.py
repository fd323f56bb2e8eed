"""What only a GPU shows of a run: batches copied beside compute, attention in kernels, state that leaves the device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fusellm_ray.config_file import parse_config
from fusellm_ray.corpus.rows import ShardReader
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.job import export_run, run_job
from fusellm_ray.observe.records import read_records
from fusellm_ray.target.batches import RankBatches, after_copy, begin_copy
from fusellm_ray.target.storage import Checkpoints
from tests.runs import build_run, losses, model_folder, named
from tests.test_statistics import batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> dict[str, Any]:
    """Heads of 16, the least that attention kernels take."""
    folder = tmp_path_factory.mktemp("run")
    tree = build_run(
        folder,
        tokenizer_folders,
        training={"schedule": "constant", "warmup_ratio": 0.0},
        trainer={"workers": 1},
    )
    wide = model_folder("llama_wide", tokenizer_folders["llama"], folder / "wide", seed=5)
    return tree | {"target": {"model": str(wide)}}


def record_losses(tree: dict[str, Any], name: str) -> list[float]:
    records = read_records(Checkpoints(tree["run"]["storage"], name).folder)
    return [loss for _, loss in sorted(losses(records).items())]


def require_equal(there: Any, here: Any) -> None:
    """Every tensor of a dataclass is on the GPU, and what it is on the CPU."""
    for field in dataclasses.fields(here):
        expected = getattr(here, field.name)
        if isinstance(expected, torch.Tensor):
            assert getattr(there, field.name).is_cuda
            assert torch.equal(getattr(there, field.name).cpu(), expected), field.name


@pytest.fixture(scope="module")
def on_cpu(tree: dict[str, Any], ray_session: None) -> list[float]:
    assert run_job(named(tree, "cpu")).is_finished
    return record_losses(tree, "cpu")


@pytest.mark.parametrize(
    ("dtype", "attention", "near"),
    [("float32", "sdpa", 1e-3), ("bfloat16", "sdpa", 3e-2), ("bfloat16", "flex_attention", 3e-2)],
)
def test_a_run_on_a_gpu_follows_the_run_on_a_cpu_and_goes_on_from_its_checkpoint(
    tree: dict[str, Any], on_cpu: list[float], dtype: str, attention: str, near: float, tmp_path: Path
):
    name = f"gpu-{dtype}-{attention}"
    teachers = [
        teacher | {"resources": {"num_cpus": 0.1, "num_gpus": share}}
        for teacher, share in zip(tree["teachers"], (0.0, 0.25), strict=True)
    ]
    sections: dict[str, Any] = {
        "trainer": {"use_gpu": True, "resources_per_worker": {"CPU": 0.2, "GPU": 0.5}},
        "target": {"dtype": dtype, "attention": attention},
    }
    begun = named(tree | {"teachers": teachers}, name, **sections | {"training": {"steps": 3}})
    assert run_job(begun).step == 3
    config = named(tree | {"teachers": teachers}, name, **sections)
    assert run_job(config).is_finished
    assert record_losses(tree, name) == pytest.approx(on_cpu, rel=near)
    assert (export_run(config, tmp_path / "export") / "model.safetensors").is_file()


def test_a_batch_with_teachers_is_the_same_after_its_copy():
    copies = torch.cuda.Stream()
    for _ in range(20):
        torch.randn(2048, 2048, device="cuda").mm(torch.randn(2048, 2048, device="cuda"))  # to copy beside
        copied = after_copy(*begin_copy(batch(), copies), copies.device)
        seen = [copied.fused, copied.teachers[0].candidates, copied.teachers[1].candidates, copied]
        wanted = [batch().fused, *(part.candidates for part in batch().teachers), batch()]
        for there, here in zip(seen, wanted, strict=True):
            require_equal(there, here)


def test_batches_read_ahead_are_the_same_on_a_gpu(tree: dict[str, Any]):
    config = parse_config(tree)
    tokenizer = ByteTokenizer.of_model(config.target)
    corpus = Corpus.open(config.corpus, config.run.seed)

    def batches(device: str) -> RankBatches:
        readers = {0: ShardReader(corpus, tokenizer, 0, 1, config.corpus.row_tokens)}
        return RankBatches(
            readers, None, config, pad_id=0, num_micro=1, device=torch.device(device), num_batches=20
        )

    there, here = batches("cuda"), batches("cpu")
    for _ in range(20):
        (copied,), (own,) = next(there).micro_batches, next(here).micro_batches
        require_equal(copied, own)
    there.close()
    here.close()
