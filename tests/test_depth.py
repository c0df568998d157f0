"""Students by depth: which blocks stay, given, by importance or learned, and what they become."""

import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config
import torch
from conftest import nhwc
from flax import nnx
from ml_collections import ConfigDict

from liftplace_jax import data, weights
from liftplace_jax.compress import (
    LAYER_IMPORTANCES,
    annealed,
    expected_gates,
    init_search,
    layer_scores,
    make_groups,
    most_important,
    most_probable,
    prune_depth,
    pruned_depth_config,
    read_layers,
    searched_apply,
    smallest_groups,
    uniform_layers,
)
from liftplace_jax.compress.learned_depth import merge_lora, sample_gates
from liftplace_jax.experiment.compressing import compress
from liftplace_jax.experiment.configuration import compress_config
from liftplace_jax.experiment.pictures import keep_probabilities
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.experiment.training import train_teacher
from liftplace_jax.families import registry
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.loading import load_network
from liftplace_jax.families.registry import family_named
from liftplace_jax.nn import building
from liftplace_jax.nn.network import from_tensors, make_apply
from liftplace_jax.training.metrics_io import read_metrics
from liftplace_jax.weights import to_torch

CONFIG = DiTConfig(
    image_size=8,
    patch_size=4,
    in_channels=1,
    hidden_size=16,
    depth=4,
    num_heads=2,
    num_classes=10,
    learn_sigma=False,
)


@pytest.fixture(scope="module")
def constructed():
    """A DiT of random weights, blocks 1 and 3 of which do nothing: their gates are zero."""
    graphdef, abstract = building.abstract(CONFIG)
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        idle = "adaLN" in name and name.startswith(("blocks.1.", "blocks.3."))
        scale = 0 if idle else 0.5 if "adaLN" in name else 0.3
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)

    return graphdef, jax.tree_util.tree_map_with_path(drawn, abstract)


def inputs(batch=16, seed=2):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (batch, 8, 8, 1))
    t = jax.random.randint(keys[1], (batch,), 0, 1000)
    return x, t, jax.random.randint(keys[2], (batch,), 0, 11)


def gated(graphdef, params, gates):
    """The model's prediction for `inputs()`."""
    return run(graphdef, params, jnp.array(gates, jnp.float32), *inputs())


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, gates, x, t, cond):
    return nnx.merge(graphdef, params)(x, t, cond, gates=gates)


# Which blocks, and the student of them ------------------------------------------------------------


def test_lists_of_blocks():
    assert read_layers("0,2,5") == read_layers("0+2+5") == (0, 2, 5)
    assert uniform_layers(14, 28) == tuple(range(1, 28, 2))
    assert uniform_layers(7, 28) == (3, 7, 11, 15, 19, 23, 27)
    assert uniform_layers(2, 3) == (0, 2)
    assert most_important(np.array([3.0, 1, 2, 5]), 2) == (0, 3)
    assert most_important(np.array([1.0, 1, 1, 1]), 2) == (2, 3)


def test_the_student_is_the_teacher_without_the_other_blocks(constructed):
    graphdef, params = constructed
    config, tensors = prune_depth(CONFIG, to_torch(params), (0, 1, 3))
    assert (config.depth, config.kept_layers) == (3, (0, 1, 3))
    assert config == registry.config_from_dict(config.described())
    student, abstract = building.abstract(config)
    found = gated(student, weights.from_torch(abstract, tensors), [1, 1, 1])
    np.testing.assert_allclose(found, gated(graphdef, params, [1, 1, 0, 1]), atol=1e-5)


def test_blocks_of_the_published_model_keep_their_outputs(golden):
    arrays, meta = golden("dit_d4")
    fields = dict(meta["config"])
    fields["image_size"] = fields.pop("input_size")
    fields["class_dropout"] = fields.pop("class_dropout_prob")
    teacher = DiTConfig(**fields)
    tensors = {k[6:]: v for k, v in arrays.items() if k.startswith("param/")}
    config, pruned = prune_depth(teacher, tensors, (0, 1))
    graphdef, abstract = building.abstract(config)
    params = weights.from_torch(abstract, pruned)
    x, t, labels = nhwc(arrays["in/x"]), arrays["in/t"], arrays["in/y"].astype(np.int32)
    apply = jax.jit(make_apply(graphdef), static_argnums=(3, 4))
    _, features = apply(params, x, t, True, None, labels)
    for layer in (0, 1):
        found, expected = features[f"blocks.{layer}"], arrays[f"out/block/0{layer}"]
        np.testing.assert_allclose(found, expected, atol=5e-5)
    # Influence of its blocks, in NumPy from the published outputs.
    tokens = [arrays["out/x_embed"] + tensors["pos_embed"]]
    tokens += [arrays[f"out/block/0{i}"] for i in range(4)]
    expected = [
        1 - np.mean((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
        for a, b in itertools.pairwise(tokens)
    ]
    graphdef, abstract = building.abstract(teacher)
    params = weights.from_torch(abstract, tensors)
    batches = [(x, t, labels, x)] * 2
    found = layer_scores("similarity", graphdef, params, iter(batches))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kept, message", [
    ((0, 4), r"layers must be different block numbers in 0\.\.3 in ascending order, got \[0, 4\]"),
    ((2, 0), r"ascending order, got \[2, 0\]"),
    ((1, 1), r"ascending order, got \[1, 1\]"),
    ((), r"depth must be in 1\.\.3, below the teacher's 4 blocks, got 0"),
    ((0, 1, 2, 3), r"depth must be in 1\.\.3, below the teacher's 4 blocks, got 4"),
])  # fmt: skip
def test_blocks_that_cannot_be_kept_are_named(kept, message):
    with pytest.raises(ValueError, match=message):
        pruned_depth_config(CONFIG, kept)


def test_a_dit_whose_blocks_have_embedders_cannot_lose_blocks():
    with pytest.raises(ValueError, match="final layer depends on block 0's embedder"):
        pruned_depth_config(CONFIG.replace(embedders="per_block"), (0, 1))


@pytest.mark.parametrize("name", LAYER_IMPORTANCES)
def test_importances_find_the_blocks_that_do_nothing(constructed, name):
    graphdef, params = constructed
    x, t, cond = inputs()
    target = gated(graphdef, params, [1, 1, 1, 1])
    scores = layer_scores(name, graphdef, params, iter([(x, t, cond, target)]))
    assert most_important(scores, 2) == (0, 2)
    np.testing.assert_allclose(scores[[1, 3]], 0, atol=1e-6)
    assert scores[[0, 2]].min() > 1e-3
    if name == "loss":  # with this target, the loss of the whole model is 0
        dropped = gated(graphdef, params, [1, 1, 0, 1])
        np.testing.assert_allclose(scores[2], np.mean((dropped - target) ** 2), rtol=1e-4)


def test_importances_that_are_not_finite_or_not_there(constructed):
    graphdef, params = constructed
    x, t, cond = inputs()
    with pytest.raises(ValueError, match="importance 'similarity' of the blocks is not fin"):
        layer_scores("similarity", graphdef, params, iter([(x * jnp.nan, t, cond, x)]))
    with pytest.raises(ValueError, match="at least one batch"):
        layer_scores("loss", graphdef, params, iter([]))


# Learned ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep, size, depth", [(1, 2, 4), (2, 3, 7), (1, 4, 8), (3, 5, 5)])
def test_masks_are_all_choices_of_a_group(keep, size, depth):
    groups = make_groups(keep, size, depth)
    kept = [tuple(np.flatnonzero(mask)) for mask in groups.masks]
    assert kept == list(itertools.combinations(range(size), keep))
    gates = np.zeros((groups.count, len(kept)))
    gates[:, -1] = 1
    chosen = most_probable(gates, groups)
    assert len(chosen) == groups.kept == depth // size * keep + depth % size
    last = [g * size + i for g in range(depth // size) for i in kept[-1]]
    assert chosen == (*last, *range(depth - depth % size, depth))


@pytest.mark.parametrize("kept, depth, ratio", [
    (14, 28, (1, 2)), (7, 28, (1, 4)), (4, 28, (1, 7)), (19, 28, (2, 3)), (2, 8, (1, 4)),
    (3, 4, (2, 3)), (1, 5, (1, 5)),
])  # fmt: skip
def test_the_smallest_groups_that_leave_a_depth(kept, depth, ratio):
    groups = smallest_groups(kept, depth)
    assert groups[:2] == ratio and groups.kept == kept
    for size in range(2, groups.size):
        assert all(make_groups(k, size, depth).kept != kept for k in range(1, size))


def test_groups_with_too_many_choices_are_refused():
    with pytest.raises(ValueError, match="there are 184756 ways to keep 10 of 20 blocks, too many"):
        make_groups(10, 20, 28)


@pytest.mark.parametrize("keep, size", [(0, 2), (2, 2), (1, 5)])
def test_groups_that_do_not_fit_are_named(keep, size):
    with pytest.raises(ValueError, match=f"keep {keep} and group {size} must have 1 <= keep"):
        make_groups(keep, size, 4)


def test_draws_are_choices_and_their_gradient_is_the_soft_ones():
    groups = make_groups(2, 3, 7)
    logits = jax.random.normal(jax.random.key(0), (2, 3))
    draw = jax.jit(jax.vmap(lambda key: sample_gates(key, logits, groups, 0.7)))
    draws = np.asarray(draw(jax.random.split(jax.random.key(1), 5_000)))
    assert set(np.unique(draws)) == {0.0, 1.0}
    assert (draws[:, :3].sum(1) == 2).all() and (draws[:, 3:6].sum(1) == 2).all()
    assert (draws[:, 6] == 1).all()
    probabilities = jax.nn.softmax(logits)
    expected = expected_gates(probabilities, groups)
    np.testing.assert_allclose(expected[:3], probabilities[0] @ groups.masks, rtol=1e-6)
    np.testing.assert_allclose(draws.mean(0), expected, atol=0.025)  # 3.5 standard errors
    # PyTorch's gradient through the softmax of the same noise.
    key, slopes = jax.random.key(5), np.linspace(-1, 1, 7).astype(np.float32)
    found = jax.grad(lambda z: jnp.dot(sample_gates(key, z, groups, 0.7), slopes))(logits)
    z = torch.tensor(np.asarray(logits), requires_grad=True)
    noise = torch.tensor(np.asarray(jax.random.gumbel(key, logits.shape)))
    soft = torch.softmax((z + noise) / 0.7, dim=1) @ torch.tensor(groups.masks)
    (soft.reshape(-1) * torch.tensor(slopes[:6])).sum().backward()
    np.testing.assert_allclose(found, z.grad, atol=1e-6)


def test_the_temperature_falls_linearly():
    values = [annealed(4.0, 0.1, step, 5) for step in range(5)]
    np.testing.assert_allclose(values, np.linspace(4.0, 0.1, 5))
    assert annealed(4.0, 0.1, 0, 1) == 4.0


@pytest.fixture(scope="module")
def start(constructed):
    return init_search(jax.random.key(3), constructed[1], make_groups(1, 2, 4), 2)


def test_updates_are_of_the_blocks_linear_layers_and_start_at_zero(constructed, start):
    _, params = constructed
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert set(start["lora"]) == {f"blocks.{i}.{name}" for i in range(4) for name in layers}
    base, merged = to_torch(params), to_torch(merge_lora(params, start["lora"], 2.0))
    for name in base:
        np.testing.assert_array_equal(base[name], merged[name])
    lora = jax.tree.map(lambda x: x + 0.1, start["lora"])
    merged = to_torch(merge_lora(params, lora, 2.0))
    for name in base:
        expected, layer = base[name], name.removesuffix(".weight")
        if layer in lora:
            expected = expected + 2.0 * (np.asarray(lora[layer]["a"]) @ lora[layer]["b"]).T
        np.testing.assert_allclose(merged[name], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.15)])
def test_a_step_of_the_search_sees_the_drawn_blocks_alone(constructed, start, dtype, tolerance):
    graphdef, params = constructed
    searched = searched_apply(
        building.abstract(CONFIG, jnp.dtype(dtype))[0],
        params,
        make_groups(1, 2, 4),
        lora_scale=2.0,
        gate_scale=1000.0,
        temperature=0.1,
    )
    x, t, cond = inputs()
    found = jax.jit(lambda key: searched(start, x, t, False, key, cond)[0])
    seen = set()
    for seed in range(6):
        prediction = found(jax.random.key(seed))
        gaps = {
            (a, b): np.abs(prediction - gated(graphdef, params, [a, 1 - a, b, 1 - b])).max()
            for a in (0, 1)
            for b in (0, 1)
        }
        seen.add(min(gaps, key=gaps.get))
        scale = np.abs(gated(graphdef, params, [1, 1, 1, 1])).max()
        assert min(gaps.values()) < tolerance * scale
    assert len(seen) > 1


def test_the_search_drops_the_blocks_that_do_nothing(constructed, start):
    """Also: gradients reach gates and updates only."""
    graphdef, params = constructed
    x, t, cond = inputs()
    target = gated(graphdef, params, [1, 1, 1, 1])
    groups = make_groups(1, 2, 4)

    def loss(searched, base, key):
        apply = searched_apply(
            graphdef, base, groups, lora_scale=2.0, gate_scale=1000.0, temperature=1.0
        )
        prediction, features = apply(searched, x, t, False, key, cond)
        assert features == {}
        return jnp.mean(jnp.square(prediction - target))

    optimizer = optax.adam(1e-3)

    @jax.jit
    def train(searched):
        def step(carry, key):
            searched, state = carry
            gradient, to_base = jax.grad(loss, argnums=(0, 1))(searched, params, key)
            updates, state = optimizer.update(gradient, state)
            largest = jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(to_base)]).max()
            return (optax.apply_updates(searched, updates), state), largest

        keys = jax.random.split(jax.random.key(4), 60)
        carry, to_base = jax.lax.scan(step, (searched, optimizer.init(searched)), keys)
        return carry[0], to_base

    searched, to_base = train(start)
    assert (to_base == 0).all()
    assert most_probable(searched["gates"], groups) == (0, 2)
    assert jax.nn.softmax(1000 * searched["gates"]).max(1).min() > 0.8
    for layer in start["lora"]:
        if layer.startswith(("blocks.0.", "blocks.2.")):
            assert np.abs(searched["lora"][layer]["b"]).max() > 1e-4, layer


# The stage ----------------------------------------------------------------------------------------


def tiny(**changes):
    config = tiny_config.get_config()
    config.model = ConfigDict(dict(CONFIG.described()) | {"kept_layers": None})
    config.evaluation.features = None
    config.compress = compress_config(family_named("dit"))
    config.compress.depth = 2
    config.compress.update(score_batches=2, score_batch_size=16)
    config.compress.learned.update(steps=4, batch_size=16, log_every=1, checkpoint_every=2)
    config.compress.learned.optimizer.learning_rate = 1e-2
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


@pytest.fixture(scope="module")
def teacher(constructed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    weights.save_model(folder, CONFIG.described(), constructed[1])
    return folder


def experiment(folder, teacher, **changes):
    """An experiment on eight images that has its teacher."""
    rng = np.random.default_rng(0)
    records = [
        {"image": rng.integers(0, 256, (8, 8, 1), np.uint8), "label": i % 10} for i in range(32)
    ]
    source = data.Source("noise", records, image_shape=(8, 8, 1), num_classes=10)
    made = open_experiment(tiny(teacher__checkpoint=str(teacher), **changes), folder)
    made.__dict__["sources"] = {"train": source, "test": source}
    train_teacher(made)
    return made


@pytest.mark.parametrize("layers, kept", [
    ("uniform", [1, 3]), ("0,3", [0, 3]), ("similarity", [0, 2]), ("loss", None),
])  # fmt: skip
def test_students_of_the_stage(tmp_path, teacher, layers, kept, monkeypatch):
    found = []
    for name, score in LAYER_IMPORTANCES.items():

        def spied(*args, score=score):
            found.append(jax.config.jax_default_matmul_precision)
            return score(*args)

        monkeypatch.setitem(LAYER_IMPORTANCES, name, spied)
    made = experiment(tmp_path / "run", teacher, compress__layers=layers, teacher__precision="high")
    compress(made)
    record = json.loads((tmp_path / "run" / "pruned" / "layers.json").read_text())
    student, whole = load_network(tmp_path / "run" / "pruned"), load_network(teacher)
    assert list(student.config.kept_layers) == record["kept"]
    assert kept is None or record["kept"] == kept
    assert ("scores" in record) == ("importances" in record) == (layers in LAYER_IMPORTANCES)
    if "scores" in record:
        assert record["kept"] == list(most_important(np.array(record["scores"]), 2))
        assert record["importances"] == {"dtype": "float32", "precision": "high"}
        assert set(found) == {"high"}
    theirs = to_torch(whole.params)
    for name, tensor in to_torch(student.params).items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            name = f"blocks.{record['kept'][int(number)]}.{rest}"
        np.testing.assert_array_equal(tensor, theirs[name])


def test_a_search_that_was_cut_ends_as_one_that_was_not(tmp_path, constructed):
    student, tensors = prune_depth(CONFIG, to_torch(constructed[1]), (0, 1))
    small = from_tensors(student.replace(kept_layers=None), tensors)
    weights.save_model(tmp_path / "teacher", small.config.described(), small.params)
    teacher = tmp_path / "teacher"
    changes = dict(compress__layers="learned", compress__depth=1, model__depth=2)
    whole = experiment(tmp_path / "whole", teacher, **changes)
    compress(whole)
    # As if it had been killed after step 3: the checkpoint of step 2 is the newest.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    pruned = tmp_path / "cut" / "pruned"
    for file in ("model.safetensors", "config.json", "layers.json", "search/search.png"):
        (pruned / file).unlink()
    shutil.rmtree(pruned / "search" / "checkpoints" / "4")
    cut = experiment(tmp_path / "cut", teacher, **changes)
    compress(cut)
    folders = [tmp_path / name / "pruned" for name in ("whole", "cut")]
    for file in ("layers.json", "model.safetensors", "config.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    rows = [read_metrics(folder / "search") for folder in folders]
    for ours, theirs in zip(*rows, strict=True):
        for name in set(ours) - {"seconds", "steps_per_second"}:
            assert ours[name] == theirs[name]
    record = json.loads((folders[0] / "layers.json").read_text())
    assert record["layers"] == "learned" and record["masks"] == [[1, 0], [0, 1]]
    np.testing.assert_allclose(np.sum(record["probabilities"], 1), 1, rtol=1e-6)
    assert record["kept"] == [np.argmax(record["probabilities"])]
    np.testing.assert_allclose(
        [row["temperature"] for row in rows[0]], [4.0, 2.7, 1.4, 0.1], rtol=1e-5
    )
    last = rows[0][-1]
    np.testing.assert_allclose(last["keep.0"] + last["keep.1"], 1, rtol=1e-5)
    assert len({row["keep.1"] for row in rows[0]}) > 1
    assert (folders[0] / "search" / "search.png").stat().st_size > 1000
    # The update of the search is thrown away.
    theirs = to_torch(load_network(teacher).params)
    student = to_torch(load_network(folders[0]).params)
    name = "attn.qkv.weight"
    np.testing.assert_array_equal(
        student[f"blocks.0.{name}"], theirs[f"blocks.{record['kept'][0]}.{name}"]
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(compress__depth=None),
            "config.compress.depth must be set: how many of 4 blocks stay",
        ),
        (
            dict(compress__depth=4),
            r"config.compress.depth must be in 1\.\.3, below the teacher's 4",
        ),
        (
            dict(compress__layers="best"),
            "config.compress.layers must be .*got 'best'; .*'similarity'",
        ),
        (
            dict(compress__layers="0,1,2"),
            "config.compress.layers names 3 blocks, compress.depth is 2",
        ),
        (
            dict(compress__layers="3,1"),
            r"config.compress.layers must be .*ascending order, got \[3, 1",
        ),
        (
            dict(
                compress__layers="learned",
                compress__depth=3,
                compress__learned__keep=1,
                compress__learned__group=2,
            ),
            "config.compress.learned: to keep 1 of 2 leaves 2 of .* 4 blocks, compress.depth is 3",
        ),
        (
            dict(compress__layers="learned", compress__learned__keep=1, compress__learned__group=5),
            "config.compress.learned: keep 1 and group 5 must have",
        ),
        (
            dict(compress__layers="learned", compress__learned__keep=1),
            "config.compress.learned: set keep and group both or neither, got 1 and None",
        ),
        (
            dict(compress__layers="learned", compress__learned__batch_size=12),
            "config.compress.learned.batch_size 12 is not a multiple of the 8 devices",
        ),
        (
            dict(compress__learned__rank=0),
            r"config.compress.learned.rank must be a whole number in",
        ),
        (
            dict(compress__learned__temperature_end=0.0),
            r"config.compress.learned.temperature_end must be a number in \(0, ",
        ),
        (
            dict(compress__learned__optimizer__name="sgd"),
            "config.compress.learned.optimizer.name must be one of",
        ),
        (
            dict(compress__score_batches=0),
            r"config.compress.score_batches must be a whole number in",
        ),
        (
            dict(model__embedders="per_block"),
            "config.compress.a DiT with embedders='per_block' cannot",
        ),
    ],
)
def test_bad_fields_are_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_experiment(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_fields_of_depth_are_refused_for_a_unet(tmp_path):
    config = tiny_config.get_config()
    config.compress.depth = 2
    with pytest.raises(
        ValueError,
        match="config.compress.depth is no field of a config: pruner 'channels' does not know it",
    ):
        open_experiment(config, tmp_path / "run")


def test_published_weights_of_a_pruned_start(tmp_path, teacher, constructed):
    tensors = prune_depth(CONFIG, to_torch(constructed[1]), (0, 2))[1]
    published = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    torch.save(published, tmp_path / "d2.pt")
    torch.save({"model": published, "ema": published}, tmp_path / "both.pt")
    path = str(tmp_path / "d2.pt")
    for changes, recorded in (
        (dict(compress__checkpoint=path), None),
        (dict(compress__checkpoint=path, compress__layers="0,2"), (0, 2)),
        (dict(compress__checkpoint=str(tmp_path / "both.pt"), compress__entry="ema"), None),
    ):
        made = experiment(tmp_path / f"run{len(changes)}{recorded}", teacher, **changes)
        compress(made)
        student = load_network(made.workdir / "pruned")
        assert (student.config.depth, student.config.kept_layers) == (2, recorded)
        for name, tensor in to_torch(student.params).items():
            np.testing.assert_array_equal(tensor, tensors[name])
    with pytest.raises(ValueError, match=r"d2.pt is not what config.compress (.|\n)*depth: 2 -> 3"):
        open_experiment(tiny(compress__checkpoint=path, compress__depth=3), tmp_path / "bad")
    with pytest.raises(ValueError, match=r"both.pt: .*\(config.compress.entry\)"):
        open_experiment(tiny(compress__checkpoint=str(tmp_path / "both.pt")), tmp_path / "bad")
    with pytest.raises(ValueError, match="has null_label 10, config.model.null_label is None"):
        open_experiment(
            tiny(compress__checkpoint=str(teacher), model__class_dropout=0.0), tmp_path / "bad"
        )


def test_the_picture_of_a_search_has_its_blocks_in_order():
    rows = [dict(sorted((f"keep.{i}", i / 12 + step) for i in range(12))) for step in (0, 1)]
    expected = np.stack([np.arange(12) / 12, np.arange(12) / 12 + 1], axis=1)
    np.testing.assert_allclose(keep_probabilities(rows), expected)
