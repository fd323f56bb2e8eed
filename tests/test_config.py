"""The configuration tree: what it accepts, and what it says about what it refuses."""

from pathlib import Path

import pytest
import yaml

from fusellm_ray.config_file import PRESETS, load_config, parse_config, read_tree
from fusellm_ray.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


def minimal() -> dict:
    return {
        "run": {"name": "a"},
        "target": {"model": "target"},
        "teachers": [{"name": "t", "model": "teacher"}],
        "corpus": {"sources": [{"name": "x", "path": "x.jsonl"}]},
        "training": {"steps": 3},
    }


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path):
    assert load_config(path).run.name


def test_there_are_shipped_configs():
    assert {path.name for path in CONFIGS.glob("*.yaml")} >= {"quickstart.yaml", "paper.yaml", "trio.yaml"}


def test_the_paper_preset_selects_the_papers_choices_and_yields_to_the_file():
    config = parse_config(minimal() | {"preset": "paper", "objective": {"clm_weight": 0.7}})
    assert config.alignment.sequence == "dtw"
    assert config.alignment.projection == "mined"
    assert config.fusion.granularity == "row"
    assert config.fusion.unit == "nats_per_token"
    assert config.objective.tail == "renormalise"
    assert config.training.batch_rows == 128
    assert config.objective.clm_weight == 0.7
    assert [teacher.top_k for teacher in config.teachers] == [10]
    told = minimal() | {"preset": "paper"}
    told["teachers"][0]["top_k"] = 4
    assert [teacher.top_k for teacher in parse_config(told).teachers] == [4]
    alone = minimal() | {"preset": "paper", "fusion": {"rule": "none"}}
    del alone["teachers"]
    assert not parse_config(alone).teachers


def test_the_frozen_target_is_one_more_teacher_with_the_first_ones_engine():
    tree = minimal() | {"fusion": {"gate": "frozen_target"}}
    tree["teachers"][0]["add_bos"] = True
    tree["teachers"][0] |= {"engine": {"type": "vllm"}, "resources": {"num_gpus": 1}, "top_k": 4, "weight": 3}
    first, frozen = parse_config(tree).active_teachers
    assert (frozen.model, frozen.add_bos) == ("target", None)
    assert (frozen.engine, frozen.resources, frozen.top_k) == (first.engine, first.resources, first.top_k)
    tree["teachers"][0]["name"] = frozen.name
    assert f"two teachers are named '{frozen.name}'" in refused(tree)


def test_presets_are_valid():
    for name in PRESETS:
        parse_config(minimal() | {"preset": name})


@pytest.mark.parametrize("preset", ["papers", ["paper"], {"paper": 1}])
def test_a_preset_that_is_none_is_refused(preset: object):
    assert f"run.yaml: preset {preset!r} is unknown; known: paper" in refused(minimal() | {"preset": preset})


def refused(tree: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, where="run.yaml")
    return str(caught.value)


def test_gpus_that_vllm_asks_ray_for_count_as_the_teachers_and_not_twice():
    tree = minimal()
    args = {"distributed_executor_backend": "ray", "pipeline_parallel_size": 2}
    tree["teachers"][0] |= {
        "engine": {"type": "vllm", "tensor_parallel_size": 4, "args": args},
    }
    assert parse_config(tree).teachers[0].asks["GPU"] == 8
    tree["teachers"][0]["resources"] = {"num_gpus": 8}
    assert "resources.num_gpus=8 would be held and not used" in refused(tree)
    del args["distributed_executor_backend"]
    assert parse_config(tree).teachers[0].asks["GPU"] == 8


def test_what_goes_by_evaluations_during_training_needs_them():
    tree = minimal() | {"checkpoint": {"keep_best": True}}
    tree["training"] = {"steps": 3, "early_stop": {"patience": 2}}
    wanted = "training.early_stop and checkpoint.keep_best go by evaluations"
    assert wanted in refused(tree)
    evaluation = {"sources": [{"name": "x", "path": "x.jsonl"}]}
    assert wanted in refused(tree | {"evaluation": evaluation})
    parse_config(tree | {"evaluation": evaluation | {"every_steps": 1}})


@pytest.mark.parametrize("alignment", [{"sequence": "dtw"}, {"straddle": "onehot"}])
@pytest.mark.parametrize("fusion", [{"granularity": "token"}, {"gate": "live_target"}])
def test_one_hot_positions_are_not_compared_one_by_one(alignment: dict, fusion: dict):
    tree = minimal() | {"alignment": alignment, "fusion": fusion}
    assert "some positions hold the gold token alone, at no cost" in refused(tree)
    parse_config(tree | {"fusion": {}})
    parse_config(tree | {"alignment": {"straddle": "mask"}})


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: a}\ntraining: {steps: 3}\ntraining: {lr: 1.0}\n")
    with pytest.raises(ConfigError, match=r"a key is there twice \(line 3, column 1\)"):
        load_config(path)
    merges = "a: &a {x: 1, y: 2}\nd: {b: &b {<<: *a, x: 3}}\nc: {<<: *b, y: 4}\n"
    path.write_text(merges)
    assert read_tree(path) == yaml.safe_load(merges)
    assert read_tree(path)["d"] == {"b": {"x": 3, "y": 2}}


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes("run: {name: café}".encode("latin-1"))
    with pytest.raises(ConfigError, match="byte 15 is not UTF-8"):
        load_config(path)


def test_held_out_text_has_no_weight():
    sources = [{"name": "x", "path": "x.jsonl", "weight": 2}]
    assert "weight=2 means nothing" in refused(minimal() | {"evaluation": {"sources": sources}})


def test_elastic_workers_need_a_resource_that_teachers_do_not_take():
    elastic = {"workers": {"min": 1, "max": 4}, "resources_per_worker": {"CPU": 1}}
    assert "asks for no custom resource" in refused(minimal() | {"trainer": elastic})
    elastic["resources_per_worker"] = {"train_slot": 1}
    workers = parse_config(minimal() | {"trainer": elastic}).trainer.workers
    assert (workers.min, workers.max, workers.is_elastic) == (1, 4, True)
    assert not parse_config(minimal() | {"trainer": {"workers": 2}}).trainer.workers.is_elastic
    assert "did you mean 'min'?" in refused(minimal() | {"trainer": {"workers": {"mim": 1, "max": 2}}})
    few = minimal()
    few["training"]["batch_rows"] = 3
    assert "trainer.workers=4 exceeds training.batch_rows=3" in refused(few | {"trainer": elastic})
    few["training"]["batch_rows"] = 4
    assert "min=4 exceeds max=2" in refused(minimal() | {"trainer": {"workers": {"min": 4, "max": 2}}})
    assert "trainer.workers" in refused(minimal() | {"trainer": {"workers": 0}})


def test_several_ranks_on_one_gpu_are_refused():
    trainer = {"use_gpu": True, "workers": 2, "resources_per_worker": {"GPU": 0.5}}
    assert "on one GPU, which NCCL refuses" in refused(minimal() | {"trainer": trainer})
    parse_config(minimal() | {"trainer": trainer | {"workers": 1}})
    parse_config(minimal() | {"trainer": {"use_gpu": True, "workers": 2}})


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_that_only_gpus_can_train_is_refused_elsewhere(attention: str):
    target = {"model": "target", "attention": attention, "dtype": "bfloat16"}
    assert f"target.attention={attention} has no backward pass on a CPU" in refused(
        minimal() | {"target": target}
    )
    parse_config(minimal() | {"target": target, "trainer": {"use_gpu": True}})


def test_flash_attention_in_single_precision_is_refused():
    tree = minimal() | {"trainer": {"use_gpu": True}}
    tree["target"] = {"model": "target", "attention": "flash_attention_2"}
    assert "half precision only and dtype=float32; set target.dtype to bfloat16" in refused(tree)


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"betas": [0.9, 1.0]}, "training.betas.1: Input should be less than 1 (got 1.0)"),
        ({"betas": [-0.1, 0.9]}, "training.betas.0: Input should be greater than or equal to 0 (got -0.1)"),
        ({"lr": float("inf")}, "training.lr: Input should be a finite number"),
        ({"weight_decay": float("nan")}, "training.weight_decay: Input should be a finite number"),
    ],
)
def test_numbers_no_optimiser_can_use_are_refused(training: dict, says: str):
    assert says in refused(minimal() | {"training": {"steps": 3, **training}})


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"num_cpus": -1}, "CPU: -1.0 is below 0"),
        ({"num_cpus": float("inf")}, "num_cpus: Input should be a finite number"),
        ({"num_gpus": 1.5}, "GPU: 1.5 is neither a fraction of one GPU nor a whole number of them"),
        ({"num_gpus": 0.00001}, "GPU: 1e-05 is less than Ray counts; ask for 0 or at least 0.0001"),
        ({"custom": {"slot": float("nan")}}, "custom.slot: Input should be a finite number"),
    ],
)
def test_amounts_that_ray_cannot_give_are_refused(resources: dict, says: str):
    tree = minimal()
    tree["teachers"][0]["resources"] = resources
    assert says in refused(tree)


def test_amounts_that_ray_can_give_are_taken():
    tree = minimal() | {"trainer": {"use_gpu": True, "resources_per_worker": {"GPU": 0.5, "CPU": 1.5}}}
    tree["teachers"][0]["resources"] = {"num_cpus": 2.5, "num_gpus": 2, "custom": {"slot": 0.5}}
    parse_config(tree)


@pytest.mark.parametrize(
    ("told", "says"),
    [({"CPU": -1}, "CPU: -1.0 is below 0"), ({"GPU": 2.5}, "GPU: 2.5 is neither a fraction")],
)
def test_amounts_for_ranks_that_ray_cannot_give_are_refused(told: dict, says: str):
    assert says in refused(minimal() | {"trainer": {"use_gpu": True, "resources_per_worker": told}})


def vllm_teacher(num_gpus: float, max_context: int | None = None, **engine: object) -> dict:
    tree = minimal()
    tree["teachers"][0] |= {
        "engine": {"type": "vllm", **engine},
        "resources": {"num_gpus": num_gpus},
        "max_context": max_context,
    }
    return tree


@pytest.mark.parametrize(
    ("num_gpus", "engine", "wanted"),
    [
        (1, {"tensor_parallel_size": 2}, 2),
        (2, {"tensor_parallel_size": 2, "args": {"pipeline_parallel_size": 2}}, 4),
        (2, {}, 1),
        (0.5, {"tensor_parallel_size": 2}, 2),
    ],
)
def test_vllm_gets_as_many_gpus_as_it_spreads_a_model_over(num_gpus: float, engine: dict, wanted: int):
    says = f"= {wanted} GPUs in one replica, and resources.num_gpus={num_gpus:g}; set num_gpus to {wanted}"
    assert says in refused(vllm_teacher(num_gpus, **engine))
    parse_config(vllm_teacher(wanted, **engine))
    parse_config(vllm_teacher(0, **engine))  # its build for CPUs


def test_vllm_may_ask_ray_for_its_gpus_itself():
    args = {"distributed_executor_backend": "ray", "pipeline_parallel_size": 2, "seed": 1}
    tree = vllm_teacher(0, tensor_parallel_size=8, args=args) | {"fusion": {"gate": "frozen_target"}}
    _, frozen = parse_config(tree).active_teachers
    assert frozen.engine.args == {"distributed_executor_backend": "ray", "pipeline_parallel_size": 2}


@pytest.mark.parametrize("stages", [0, "2", 1.5])
def test_a_number_of_stages_that_is_none_is_refused(stages: object):
    assert f"pipeline_parallel_size={stages!r}: expected a number" in refused(
        vllm_teacher(1, args={"pipeline_parallel_size": stages})
    )


def test_vllm_replicas_that_share_a_gpu_share_its_memory():
    for taken in (0.8, 0.5):
        says = (
            f"num_gpus=0.5 gives a replica 0.5 of a GPU's memory, and engine.gpu_memory_utilization={taken} leaves "
            "nothing of it for logits; lower that to about 0.4"
        )
        assert says in refused(vllm_teacher(0.5, gpu_memory_utilization=taken))
    assert "engine.gpu_memory_utilization=0.8" in refused(vllm_teacher(0.5))  # the default
    parse_config(vllm_teacher(0.5, gpu_memory_utilization=0.45))


def test_a_vllm_replica_leaves_some_of_its_gpu_for_logits():
    says = (
        "num_gpus=1 gives a replica 1 of a GPU's memory, and engine.gpu_memory_utilization=1 leaves nothing"
    )
    assert says in refused(vllm_teacher(1, gpu_memory_utilization=1.0))


def test_a_context_that_leaves_vllm_prompts_of_one_token_is_refused():
    assert "max_context=2: vLLM generates one token after each prompt" in refused(vllm_teacher(1, 2))
    parse_config(vllm_teacher(1, 3))


def test_a_misspelt_key_names_the_one_that_was_meant():
    message = refused(minimal() | {"fuson": {}})
    assert "run.yaml" in message
    assert "fuson: unknown key; did you mean 'fusion'?" in message


def test_a_misspelt_key_inside_a_tagged_union_is_explained_by_that_unions_keys():
    tree = minimal()
    tree["teachers"][0]["engine"] = {"type": "vllm", "max_num_seq": 3}
    assert "did you mean 'max_num_seqs'?" in refused(tree)


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"typ": "vllm"}, "required, and 'typ' was probably meant for it"),
        ({"typ": "vllm", "dtype": "float32"}, "required, and 'typ' was probably meant for it"),
        ({"dtype": "float32"}, "required, and not given"),
        ({}, "required, and not given"),
        ({"type": "vlm"}, "'vlm' is unknown"),
    ],
)
def test_a_tagged_union_without_a_known_tag_names_the_known_ones(engine: dict, says: str):
    tree = minimal()
    tree["teachers"][0]["engine"] = engine
    known = "known types: transformers, vllm, simulated"
    assert f"teachers.0.engine.type: {says}; {known}" in refused(tree)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"engine": "vllm"}, "teachers.0.engine: expected a section; write {type: vllm} (got 'vllm')"),
        ({"resources": 2}, "teachers.0.resources: expected a section, resources: {key: value} (got 2)"),
        ({"resources": [2]}, "teachers.0.resources: expected a section, resources: {key: value}"),
    ],
)
def test_a_value_in_place_of_a_section_is_told_apart(section: dict, says: str):
    tree = minimal()
    tree["teachers"][0] |= section
    assert says in refused(tree)


def test_a_misspelt_preset_is_known_at_the_top_alone():
    assert "presett: unknown key; did you mean 'preset'?" in refused(minimal() | {"presett": "paper"})
    assert "did you mean" not in refused(minimal() | {"fusion": {"presett": "paper"}})


def test_all_problems_are_named_at_once():
    tree = minimal() | {"trainer": {"workers": 0}, "stream": {"deadline_s": -1}}
    message = refused(tree)
    assert "trainer.workers" in message
    assert "stream.deadline_s" in message
    assert "(got -1)" in message


def test_two_teachers_of_one_name_are_refused():
    tree = minimal()
    tree["teachers"] *= 2
    assert "two teachers are named 't'" in refused(tree)


def test_two_sources_of_one_name_are_refused():
    tree = minimal()
    tree["corpus"]["sources"] *= 2
    assert "two sources are named 'x'" in refused(tree)


def test_a_source_has_exactly_one_origin():
    tree = minimal()
    tree["corpus"]["sources"] = [{"name": "x", "path": "a", "dataset": "b"}]
    assert "exactly one of path and dataset" in refused(tree)


def test_what_a_source_would_ignore_is_refused():
    tree = minimal()
    tree["corpus"]["sources"] = [{"name": "x", "path": "a", "subset": "b"}]
    assert "subset mean nothing for a path" in refused(tree)


def test_a_configuration_survives_its_own_dump():
    config = parse_config(minimal())
    assert parse_config(config.model_dump(mode="json")) == config


def test_fusion_without_teachers_is_refused_and_the_baseline_is_not():
    tree = minimal() | {"teachers": []}
    assert "needs teachers" in refused(tree)
    assert parse_config(tree | {"fusion": {"rule": "none"}}).active_teachers == []


def test_a_rank_without_rows_is_refused():
    tree = minimal() | {"trainer": {"workers": 9}}
    assert "trainer.workers=9 exceeds training.batch_rows=8" in refused(tree)


def test_overrides_reach_into_sections_and_lists(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(minimal()))
    config = load_config(
        path, ["training.steps=7", "teachers.0.top_k=4", "fusion.rule=mean", "target.lora.rank=8"]
    )
    assert config.training.steps == 7
    assert config.teachers[0].top_k == 4
    assert config.fusion.rule == "mean"
    assert config.target.lora is not None
    assert config.target.lora.rank == 8


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.steps", "expected key.path=value"),
        ("teachers.3.top_k=1", "no index of a list of 1"),
        ("run.name.x=1", "is a value, not a section"),
        ("training.steps=[", "not valid YAML"),
    ],
)
def test_a_bad_override_is_refused_with_its_own_text(tmp_path: Path, override: str, says: str):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(minimal()))
    with pytest.raises(ConfigError, match=r"override") as caught:
        load_config(path, [override])
    assert says in str(caught.value)
    assert override.split("=")[0] in str(caught.value)


def test_an_absent_or_malformed_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(tmp_path / "list.yaml")
