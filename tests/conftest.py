from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.head import Head, running_head
from tests.tokenizers import KINDS, build


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small trained tokenizer of each kind in `tests.tokenizers`, by kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: build(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One private Ray for all tests that need one; its object store never overflows to disk."""
    from fusellm_ray.job import start_private_ray, stop_private_ray

    os.environ.pop("RAY_ADDRESS", None)
    for attempt in range(4):
        try:
            start_private_ray(num_cpus=8, resources={"train_slot": 1}, object_store_memory=512 << 20)
            break
        except Exception as error:  # Ray gives a node 30 s to start, which a busy machine can exceed
            if "timed out during startup" not in str(error) or attempt == 3:
                raise
            stop_private_ray()
    yield
    stop_private_ray()


@pytest.fixture(scope="session")
def ray_head() -> Iterator[Head]:
    """One Ray head in processes of its own, with token authentication, for tests of jobs and of operation."""
    with running_head() as head:
        yield head


@pytest.fixture
def arrow_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A datasets cache of the test's own."""
    import datasets

    folder = tmp_path / "arrow_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder
