"""Weight merging: the baseline where all models share one architecture and one tokenizer.

mergekit does the arithmetic (optional extra `merge`); this module says which of its methods a name stands for,
and refuses models whose weights do not correspond.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fusellm_ray.config import ModelConfig
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ConfigError, ModelError
from fusellm_ray.folders import written_whole
from fusellm_ray.models import build_on_meta

MergeMethod = Literal["linear", "slerp", "ties", "dare", "sce"]


def merge_models(
    method: MergeMethod,
    models: Sequence[ModelConfig],
    out: Path,
    *,
    base: ModelConfig,
    parameters: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Path:
    """Merge models and write the result as a Hugging Face folder, with the base's tokenizer.

    linear   the mean of the weights
    slerp    along the sphere: two models by SLERP, more by its barycentric form (multislerp)
    ties     trim, elect signs, mean of what agrees, added to the base (arXiv 2306.01708)
    dare     drop at random and rescale, then elect signs as TIES does (arXiv 2311.03099)
    sce      select by variance, weigh by energy, erase the minority sign (FuseChat, arXiv 2408.07990)

    Args:
        models: two or more.
        out: is replaced if it is there; appears complete or not at all.
        base: where the models came from; only its tokenizer counts under linear and slerp.
        parameters: mergekit's own names; over the defaults weight 1 (dare: 1/n), density 0.5, t 0.5.
        seed: of dare's draws.

    Raises:
        ConfigError: mergekit is not installed, fewer than two models, or models that do not correspond or are not
            all trusted alike.
        ModelError: a model cannot be loaded, or mergekit failed.
    """
    if len(models) < 2:
        raise ConfigError(f"merge {method}: {len(models)} model(s) given; name two or more")
    try:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions
    except ImportError as error:
        raise ConfigError(
            f"weight merging needs mergekit, which cannot be imported ({error}): "
            "pip install 'fusellm-ray[merge]'"
        ) from error
    trusted = {model.trust_remote_code for model in (base, *models)}
    if len(trusted) > 1:
        some = next(model.model for model in (base, *models) if not model.trust_remote_code)
        raise ConfigError(
            f"merge {method}: trust_remote_code is set for some models and not for {some}; mergekit knows one setting "
            "for all: trust each of them, or none"
        )
    _check_correspondence([base, *models])
    recipe = MergeConfiguration.model_validate(_recipe(method, models, base, dict(parameters or {})))
    options = MergeOptions(
        quiet=True,
        write_model_card=False,
        random_seed=seed,
        trust_remote_code=base.trust_remote_code,
    )
    try:
        with written_whole(out) as partial:
            run_merge(recipe, str(partial), options)
            shutil.rmtree(out, ignore_errors=True)
    except Exception as error:  # mergekit raises whatever it met
        names = ", ".join(model.model for model in models)
        raise ModelError(f"merge {method} of {names}: mergekit failed: {error}") from error
    return out


def _recipe(
    method: MergeMethod, models: Sequence[ModelConfig], base: ModelConfig, parameters: dict[str, float]
) -> dict[str, Any]:
    """mergekit's configuration, as a tree."""
    entries: list[dict[str, Any]] = [{"model": _reference(model)} for model in models]
    if method == "slerp" and len(models) == 2:
        shared = {"t": parameters.pop("t", 0.5)}
        return {
            "merge_method": "slerp",
            "base_model": _reference(models[0]),
            "models": entries,
            "parameters": shared | parameters,
        }
    weight = parameters.pop("weight", 1 / len(models) if method == "dare" else 1.0)
    own: dict[str, float] = {} if method == "sce" else {"weight": weight}
    if method in ("ties", "dare"):
        own["density"] = parameters.pop("density", 0.5)
    recipe: dict[str, Any] = {
        "merge_method": {"slerp": "multislerp", "dare": "dare_ties"}.get(method, method),
        "models": [entry | {"parameters": own} if own else entry for entry in entries],
        "parameters": parameters,
    }
    if method in ("ties", "dare", "sce"):
        recipe["base_model"] = _reference(base)
    return recipe


def _reference(model: ModelConfig) -> dict[str, Any]:
    """A model as mergekit names it."""
    return {"model": {"path": model.model, "revision": model.revision}}


def _check_correspondence(models: Sequence[ModelConfig]) -> None:
    """Every weight must have its like in every model, and every row of an embedding mean the same token."""
    first, *others = (
        {name: tuple(t.shape) for name, t in build_on_meta(model).state_dict().items()} for model in models
    )
    tokens = [ByteTokenizer.of_model(model).fingerprint for model in models]
    names = [model.model for model in models]
    for model, shapes, fingerprint in zip(names[1:], others, tokens[1:], strict=True):
        differing = sorted(set(first.items()) ^ set(shapes.items()))
        if differing:
            name, shape = differing[0]
            raise ConfigError(
                f"merge: {model} and {names[0]} differ in architecture ({name} {list(shape)} is in one only); "
                "weights can be merged where all models continue one base"
            )
        if fingerprint != tokens[0]:
            raise ConfigError(
                f"merge: {model} and {names[0]} have different tokenizers, so the rows of their embeddings do "
                "not correspond; weights can be merged where all models continue one base"
            )
