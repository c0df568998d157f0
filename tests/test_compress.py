"""Pruning against the published code's widths, counts and kept channels."""

import json

import jax
import numpy as np
import pytest
from conftest import GOLDEN, nhwc
from flax import nnx

from liftplace_jax.compress import taylor_gradients
from liftplace_jax.families.registry import count_macs
from liftplace_jax.families.unet.channels import prune_unet, pruned_config
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.coupling import channel_groups
from liftplace_jax.families.unet.importance import IMPORTANCES
from liftplace_jax.nn import building
from liftplace_jax.weights import from_torch, to_torch


def unet_config(published, **changes):
    model = published["model"]
    return UNetConfig(
        image_size=published["data"]["image_size"],
        in_channels=model["in_channels"],
        out_channels=model["out_ch"],
        ch=model["ch"],
        ch_mult=tuple(model["ch_mult"]),
        num_res_blocks=model["num_res_blocks"],
        attn_resolutions=tuple(model["attn_resolutions"]),
        dropout=model["dropout"],
        resamp_with_conv=model["resamp_with_conv"],
        **changes,
    )


def tiny(**changes):
    options = dict(
        image_size=8,
        in_channels=1,
        out_channels=1,
        ch=16,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(4,),
        num_groups=4,
    )
    return UNetConfig(**options | changes)


@pytest.mark.parametrize("name", ["cifar10", "celeba", "bedroom"])
def test_published_sizes(name):
    """Parameters, MACs and every tensor's shape of teachers and students, to the unit."""
    facts = json.loads((GOLDEN / "ddpm_facts.json").read_text())["models"][name]
    config = unet_config(facts["config"])
    assert building.count_parameters(building.abstract(config)[1]) == facts["total_params"]
    assert count_macs(config) == facts["macs"]
    for ratio, expected in facts["pruned"].items():
        assert count_macs(pruned_config(config, float(ratio))) == expected["macs"]
        student = building.abstract(pruned_config(config, float(ratio)))[1]
        assert building.count_parameters(student) == expected["total_params"]
        shapes = {k: list(v.shape) for k, v in to_torch_shapes(student).items()}
        assert shapes == expected["shapes"]


def to_torch_shapes(params):
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params)
    return to_torch(zeros)


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_kept_channels_match_published(golden, importance):
    arrays, meta = golden("ddpm_pruning")
    config = unet_config(meta["config"])
    tensors = {k[6:]: v for k, v in arrays.items() if k.startswith("param/")}
    gradients = {k[5:]: v for k, v in arrays.items() if k.startswith("grad/")}
    pruned = prune_unet(
        config, tensors, meta["ch_sparsity"], IMPORTANCES[importance](0), gradients=gradients
    )
    expected = meta["results"][importance]
    assert list(pruned.kept) == [group["root"] for group in expected["groups"]]
    for group in expected["groups"]:
        np.testing.assert_array_equal(pruned.kept[group["root"]], sorted(group["kept"]))
    for name, tensor in tensors.items():
        keep = [
            arrays.get(f"out/{importance}/keep_{side}/{name}", np.arange(size))
            for side, size in zip(("out", "in"), tensor.shape, strict=False)
        ]
        np.testing.assert_array_equal(pruned.tensors[name], tensor[np.ix_(*keep)])
    graphdef, abstract = building.abstract(pruned.config)
    params = from_torch(abstract, pruned.tensors)
    assert building.count_parameters(params) == expected["num_params"]
    model = nnx.merge(graphdef, params)
    y = model(nhwc(arrays["in/x"]), arrays["in/t"])
    np.testing.assert_allclose(y, nhwc(arrays[f"out/{importance}/y"]), atol=5e-5)


@pytest.mark.parametrize("resamp_with_conv", [True, False])
def test_any_architecture_prunes_to_a_working_student(resamp_with_conv):
    config = tiny(ch_mult=(1, 2, 2), num_res_blocks=2, resamp_with_conv=resamp_with_conv)
    graphdef, params = building.create(config)
    pruned = prune_unet(config, to_torch(params), 0.5, IMPORTANCES["random"](1))
    graphdef, abstract = building.abstract(pruned.config)
    model = nnx.merge(graphdef, from_torch(abstract, pruned.tensors))
    assert model(np.ones((2, 8, 8, 1), np.float32), np.array([3, 5])).shape == (2, 8, 8, 1)
    covered = {name for group in channel_groups(config) for name in group.outputs}
    assert covered >= set(dict(config.widths)), "every free width belongs to a group"


def test_no_pruning_changes_nothing():
    config = tiny()
    _, params = building.create(config)
    tensors = to_torch(params)
    pruned = prune_unet(config, tensors, 0.0, IMPORTANCES["magnitude"](0))
    assert pruned.config == config
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(pruned.tensors[name], tensor)


def test_normalisation_regimes():
    """At 90 % the published rule leaves one channel a group; the option leaves at least two."""
    published = pruned_config(tiny(), 0.9)
    assert dict(published.widths)["conv_in"] == 4 == published.num_groups
    adapted = pruned_config(tiny(), 0.9, min_channels_per_group=2)
    assert adapted.widths == published.widths
    assert adapted.norm_groups(4, "conv_in") == 2


def test_random_importance_follows_the_seed():
    config = tiny()
    tensors = to_torch(building.create(config)[1])
    one, same, other = (
        prune_unet(config, tensors, 0.5, IMPORTANCES["random"](seed)).kept for seed in (1, 1, 2)
    )
    assert all(np.array_equal(one[k], same[k]) for k in one)
    assert any(not np.array_equal(one[k], other[k]) for k in one)


def test_taylor_gradients_stop_at_the_threshold():
    losses = {0: 1.0, 1: 2.0, 2: 0.5, 3: 0.05, 4: 9.0}

    def loss_and_gradient(t):
        return losses[t], {"w": np.float32(t)}

    total, used = taylor_gradients(loss_and_gradient, range(5), 0.1)
    assert used == 3 and total["w"] == 3.0
    assert taylor_gradients(loss_and_gradient, range(5), 0.0)[1] == 5
    with pytest.raises(ValueError, match="threshold"):
        taylor_gradients(loss_and_gradient, range(5), 1.0)
    with pytest.raises(ValueError, match="timestep 0 is nan"):
        taylor_gradients(lambda t: (np.nan, {}), range(5), 0.1)


def test_bad_pruning_is_named():
    config = tiny()
    tensors = to_torch(building.create(config)[1])
    for ratio in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match="ratio must be in"):
            pruned_config(config, ratio)
    with pytest.raises(ValueError, match="leaves none of the 16 channels of up.0.*choose a smal"):
        pruned_config(tiny(attn_resolutions=(8, 4)), 0.99)
    with pytest.raises(ValueError, match="'taylor' needs gradients"):
        prune_unet(config, tensors, 0.5, IMPORTANCES["taylor"](0))
    with pytest.raises(ValueError, match="lack 'mid.attn_1.q.weight'"):
        lacking = {k: v for k, v in tensors.items() if k != "mid.attn_1.q.weight"}
        prune_unet(config, lacking, 0.5, IMPORTANCES["magnitude"](0))
