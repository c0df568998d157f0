"""Stable Diffusion 3 as a whole, live against diffusers: its texts, its folders, its samples."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_config
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from ml_collections import ConfigDict
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from liftplace_jax import data
from liftplace_jax.compress import depth
from liftplace_jax.conditioning import Text, check_sources
from liftplace_jax.encoders.joint_texts import NAMES, is_joint, load_joint_texts
from liftplace_jax.encoders.tokenizer import train_tokenizer
from liftplace_jax.experiment.configuration import compress_config
from liftplace_jax.experiment.context import make_context
from liftplace_jax.experiment.texts import with_captions
from liftplace_jax.families.loading import load_checkpoint
from liftplace_jax.families.pipelines import write_pipeline
from liftplace_jax.families.registry import family_named
from liftplace_jax.nn.network import from_tensors
from liftplace_jax.weights import to_torch

LENGTH, T5_TOKENS, WIDTH, POOLED = 16, 12, 32, 18
CAPTIONS = ["a photo of a cat", "", "the red house! " * 20]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """A tiny pipeline as diffusers writes it, with weights in shards."""
    folder = tmp_path_factory.mktemp("sd3")
    torch.manual_seed(0)
    parts = {}
    for end, width, act, projection in (("", 12, "quick_gelu", 10), ("_2", 14, "gelu", 8)):
        made = train_tokenizer(folder / f"made{end}", [c + end for c in CAPTIONS], 530, LENGTH)
        parts[f"tokenizer{end}"] = CLIPTokenizer.from_pretrained(folder / f"made{end}")
        config = CLIPTextConfig(
            vocab_size=made.vocab_size,
            hidden_size=width,
            intermediate_size=24,
            hidden_act=act,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            projection_dim=projection,
            eos_token_id=made.pad_id,
        )
        parts[f"text_encoder{end}"] = CLIPTextModelWithProjection(config)
    (folder / "made_3").mkdir()
    for name, content in golden("tokenizer_ids")[1]["t5"]["files"].items():
        (folder / "made_3" / name).write_text(json.dumps(content))
    parts["tokenizer_3"] = AutoTokenizer.from_pretrained(folder / "made_3")
    parts["text_encoder_3"] = T5EncoderModel(
        T5Config(
            vocab_size=len(parts["tokenizer_3"]),
            d_model=WIDTH,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    parts["transformer"] = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )
    parts["vae"] = AutoencoderKL(
        down_block_types=2 * ["DownEncoderBlock2D"],
        up_block_types=2 * ["UpDecoderBlock2D"],
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        sample_size=16,
    )
    for name in ("transformer", *NAMES):
        for parameter in parts[name].parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts
    )
    pipeline.save_pretrained(folder / "whole", max_shard_size="20KB")
    return folder / "whole"


@pytest.fixture(scope="module")
def theirs(folder):
    return StableDiffusion3Pipeline.from_pretrained(folder)


def encoded(pipeline, captions=CAPTIONS):
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            captions,
            None,
            None,
            device="cpu",
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )
    return {"context": context.numpy(), "pooled": pooled.numpy()}


def told(texts, cached=False, captions=CAPTIONS, dropout=0.0, empty=()):
    """What a network is told of captions."""
    bound = Text(WIDTH, POOLED).bound(lambda pooled: texts.encoding(pooled, cached), dropout)
    condition = bound.of(texts.values(captions, bound.columns))
    for index in empty:
        condition["empty"] = condition["empty"].at[index].set(True)
    frozen = {"text": texts.frozen("a cat", bound.columns)}
    return jax.jit(bound.embed)(frozen, condition)


def close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], atol=atol, err_msg=name)


# Texts --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(folder):
    assert is_joint(folder) and not is_joint(folder, "text_encoder_2.fp16")
    return load_joint_texts(folder, t5_tokens=T5_TOKENS)


def test_texts_are_those_of_the_pipeline(texts, theirs):
    expected = encoded(theirs)
    assert expected["context"].shape == (3, LENGTH + T5_TOKENS, WIDTH)
    assert np.abs(expected["context"]).max() > 0.5 and np.abs(expected["pooled"]).max() > 0.05
    close(told(texts), expected, 1e-4)
    # Cached in float16, a half of whose zeros is not stored.
    close(told(texts, cached=True), expected, 2e-3)
    columns = dict((name, shape) for name, shape, _ in texts.encoding(True, cached=True).columns)
    assert columns == {
        "text": (LENGTH, 12),
        "pooled": (10,),
        "text_2": (LENGTH, 14),
        "pooled_2": (8,),
        "text_3": (T5_TOKENS, WIDTH),
    }


@pytest.mark.parametrize("cached", [False, True])
def test_a_dropped_caption_is_dropped_of_all_encoders(texts, theirs, cached):
    expected = encoded(theirs, [CAPTIONS[0], "a cat", CAPTIONS[2]])
    close(told(texts, cached, empty=[1]), expected, 2e-3)


def test_a_pipeline_without_its_third_encoder(folder, theirs, tmp_path):
    shutil.copytree(folder, tmp_path / "short", ignore=shutil.ignore_patterns("*_3"))
    without = load_joint_texts(tmp_path / "short", t5_tokens=T5_TOKENS)
    parts = {**theirs.components, "text_encoder_3": None, "tokenizer_3": None}
    expected = encoded(StableDiffusion3Pipeline(**parts))
    close(told(without), expected, 1e-4)
    left_out = load_joint_texts(folder, left_out=("text_encoder_3",), t5_tokens=T5_TOKENS)
    close(told(left_out), expected, 1e-4)
    assert left_out.token_columns == ("tokens", "tokens_2")
    assert left_out.identity["text_encoder_3"] is None
    (tmp_path / "short" / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match="neither text_encoder_3/config.json nor transformer/"):
        load_joint_texts(tmp_path / "short")


@pytest.mark.parametrize("name", NAMES[:2])
def test_zeros_stand_for_a_clip_that_is_left_out(folder, theirs, name):
    texts = load_joint_texts(folder, left_out=(name,), t5_tokens=T5_TOKENS)
    expected, first = encoded(theirs), name == NAMES[0]
    expected["context"][:, :LENGTH, slice(12) if first else slice(12, None)] = 0
    expected["pooled"][:, slice(10) if first else slice(10, None)] = 0
    close(told(texts), expected, 1e-4)
    close(told(texts, cached=True), expected, 2e-3)


def pictures(captions=CAPTIONS):
    records = [{"image": np.zeros((2, 2, 3), np.uint8)} for _ in captions]
    source = data.Source("pictures", records, image_shape=(2, 2, 3))
    source.captions = captions
    return source


def test_columns_of_captions(texts):
    """As experiments and `encode` have them; those of other settings are refused."""
    bound = Text(WIDTH, POOLED).bound(lambda pooled: texts.encoding(pooled, True))
    source = with_captions(pictures(), texts, bound, tokens=True)
    assert {*source.columns} >= {
        "tokens",
        "tokens_2",
        "tokens_3",
        "text",
        "text_2",
        "text_3",
        "pooled",
        "pooled_2",
    }
    check_sources(bound, [source])
    batch = source.get([2, 0])
    values = texts.values([CAPTIONS[2], CAPTIONS[0]], source.columns.keys() - {"label"})
    for name, value in values.items():
        np.testing.assert_array_equal(batch[name], value, err_msg=name)
    names = {"tokens": "text_encoder", "tokens_3": "text_encoder_3"}
    assert len({source.column_identities[name]["tokenizer"] for name in names}) == 2


def test_what_cannot_be_joined_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="left_out must be some of"):
        load_joint_texts(folder, left_out=("tokenizer",))
    with pytest.raises(ValueError, match="left_out must be some of"):
        load_joint_texts(folder, left_out=NAMES)
    broken = shutil.copytree(folder, tmp_path / "broken")
    fields = json.loads((broken / "text_encoder_2" / "config.json").read_text())
    (broken / "text_encoder_2" / "config.json").write_text(json.dumps(fields | {"vocab_size": 9}))
    with pytest.raises(ValueError, match="text_encoder_2"):
        load_joint_texts(broken)
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(ValueError, match="text_encoder_2/config.json: no such file"):
        load_joint_texts(broken)
    texts = load_joint_texts(folder, left_out=NAMES[:2])
    with pytest.raises(ValueError, match="has several encoders.*name it by config.text.entry"):
        Text(WIDTH).bound(texts.encoding)


# Folders and samples ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    """As an experiment has it: everything from one folder."""
    config = tiny_config.get_config()
    fields = load_checkpoint(folder).config.to_dict()
    config.model = ConfigDict({k: v for k, v in fields.items() if v is not None})
    config.model.model = "mmdit"
    config.compress = compress_config(family_named("mmdit"))
    config.process.update(kind="flow", num_timesteps=1000, shift=3.0)
    config.latents.update(autoencoder=str(folder), path=str(folder / "none"))
    config.text.update(folder=str(folder), t5_tokens=T5_TOKENS)
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text(f"{CAPTIONS[0]}\n{CAPTIONS[2]}\n")
    config.evaluation.update(
        prompts=str(prompts),
        repeat_prompts=True,
        negative_prompt="a house",
        guidance=4.0,
        sample_steps=10,
        skip_type="diffusers",
        clip=None,
        features=None,
        batch_size=8,
    )
    return config


def ours(config, network, tmp_path):
    """(images of eight keys, their start)."""
    context = make_context(config, tmp_path)
    judge = context.judge
    keys = jax.vmap(jax.random.key)(np.arange(8))
    images = jax.jit(judge.sampler(network))(judge.placed_params(network), keys, judge.condition(8))
    start = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), (8, 8, 16)))(keys)
    return np.asarray(images), np.asarray(start)


def of_theirs(pipeline, start, config):
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        4 * [CAPTIONS[0], CAPTIONS[2].strip()],
        negative_prompt=8 * ["a house"],
        num_inference_steps=10,
        guidance_scale=4.0,
        height=16,
        width=16,
        output_type="latent",
        latents=torch.from_numpy(np.moveaxis(start, -1, 1).copy()),
        max_sequence_length=T5_TOKENS,
    ).images
    vae = pipeline.vae
    with torch.no_grad():
        images = vae.decode(found / vae.config.scaling_factor + vae.config.shift_factor).sample
    return np.moveaxis(images.numpy(), 1, -1)


def equal_images(found, expected):
    span = expected.max() - expected.min()
    assert expected.std() > 0.02 * span and np.abs(expected[0] - expected[1]).max() > 0.05 * span
    np.testing.assert_allclose(found, expected, atol=1e-4 * span)


def test_images_of_their_pipeline(config, folder, theirs, tmp_path):
    for part in ("transformer", *NAMES, "vae"):
        assert len(list((folder / part).glob("*.safetensors"))) > 1, part
    images, start = ours(config, load_checkpoint(folder), tmp_path)
    equal_images(images, of_theirs(theirs, start, config))


def test_images_of_our_students_pipeline(config, folder, theirs, tmp_path):
    teacher = load_checkpoint(folder)
    student = from_tensors(*depth.prune_depth(teacher.config, to_torch(teacher.params), (1, 2)))
    write_pipeline(tmp_path / "out", student.config, student.params, folder)
    images, start = ours(config, student, tmp_path / "work")
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    assert len(again.transformer.transformer_blocks) == 2
    expected = of_theirs(again, start, config)
    equal_images(images, expected)
    assert np.abs(expected - of_theirs(theirs, start, config)).max() > 1e-2
