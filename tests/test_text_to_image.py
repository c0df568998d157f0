"""Stable Diffusion from a folder of diffusers to one: both sample alike, live."""

import functools
import json
import os
import re
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import config_module as module
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from ml_collections import ConfigDict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from liftplace_jax import weights
from liftplace_jax.conditioning import Text
from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule, make_process
from liftplace_jax.encoders.autoencoder_folder import (
    load_autoencoder,
    save_as_diffusers,
    write_random_autoencoder,
)
from liftplace_jax.encoders.clip import (
    load_text_encoder,
    save_text_encoder,
    write_random_text_encoder,
)
from liftplace_jax.encoders.texts import load_texts
from liftplace_jax.encoders.tokenizer import copy_tokenizer, train_tokenizer
from liftplace_jax.evaluation.sampling import make_sampler
from liftplace_jax.experiment.checks import check_config
from liftplace_jax.experiment.context import make_context
from liftplace_jax.experiment.pipelines import check_pipelines, write_student
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.loading import load_checkpoint
from liftplace_jax.families.pipelines import join_pipeline, write_pipeline
from liftplace_jax.families.registry import config_from_dict, config_parameters, count_macs
from liftplace_jax.families.sd_unet.published import PUBLISHED_SD_UNETS
from liftplace_jax.host.buckets import as_path
from liftplace_jax.nn.network import make_apply
from liftplace_jax.weights.diffusers import DiffusersError

PROMPTS, NEGATIVE = ["a photo of a cat", "one two three! four"], "a blurred dog"
STABLE = dict(
    sample_steps=10,
    skip_type="leading",
    steps_offset=1,
    set_alpha_to_one=False,
    eta=0.0,
    guidance=7.5,
    guidance_channels=None,
    precision="highest",
)
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
TOKENS = 8
KEYS = jax.random.split(jax.random.key(3), len(PROMPTS))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """prediction -> a pipeline's folder, of random weights, that diffusers wrote."""

    @functools.cache
    def write(prediction):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(prediction)
        train_tokenizer(folder / "words", [*PROMPTS, NEGATIVE], 530, TOKENS)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            projection_dim=12,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            down_block_types=2 * ("DownEncoderBlock2D",),
            up_block_types=2 * ("UpDecoderBlock2D",),
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            cross_attention_dim=12,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
        )
        for parameter in unet.parameters():  # so that the text matters
            with torch.no_grad():
                parameter += 0.1 * torch.randn_like(parameter)
        scheduler = PNDMScheduler(
            **BETAS,
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type=prediction,
            set_alpha_to_one=False,
        )
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder / "pipeline")
        return folder / "pipeline"

    return write


def process_of(prediction):
    betas = beta_schedule("scaled_linear", 1000, 0.00085, 0.012)
    return GaussianDiffusion(betas, {"v_prediction": "v"}.get(prediction, prediction))


def sampled_here(folder, sampler, prediction, negative=""):
    """Images in [0, 1] of a pipeline's folder by this library, and the noise they began with."""
    network, texts = load_checkpoint(folder), load_texts(folder)
    decoder = load_autoencoder(folder).decoder()
    conditioning = Text(network.config.context_dim).bound(texts.encoding)
    sample = make_sampler(
        ConfigDict(STABLE | {"sampler": sampler}),
        process_of(prediction),
        network.config,
        make_apply(network.graphdef),
        decode=decoder.decode,
        texts=conditioning,
    )
    frozen = {"text": texts.frozen(negative, ("tokens",))}
    images = jax.jit(sample)(
        (network.params, decoder.params, frozen),
        KEYS,
        conditioning.of({"tokens": texts.tokenizer.encode(PROMPTS)}),
    )
    noise = [jax.random.normal(jax.random.fold_in(k, 0), network.config.shape) for k in KEYS]
    return np.clip(images / 2 + 0.5, 0, 1), np.stack(noise)


def sampled_there(folder, sampler, noise, negative=None):
    """Images in [0, 1] of a pipeline's folder by diffusers."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if sampler == "ddim":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    assert type(pipeline.scheduler).__name__ == f"{sampler.upper()}Scheduler"
    return pipeline(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=7.5,
        output_type="np",
        negative_prompt=negative and len(PROMPTS) * [negative],
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
    ).images


@pytest.mark.parametrize("sampler, prediction, negative", [
    ("pndm", "epsilon", ""), ("ddim", "epsilon", NEGATIVE), ("pndm", "v_prediction", NEGATIVE),
])  # fmt: skip
def test_their_pipeline_is_sampled_here_as_there(theirs, sampler, prediction, negative):
    images, noise = sampled_here(theirs(prediction), sampler, prediction, negative)
    expected = sampled_there(theirs(prediction), sampler, noise, negative or None)
    assert images.shape == (2, 16, 16, 3) and 0.02 < images.std()
    assert np.mean((images > 0) & (images < 1)) > 0.3  # they are not mere black and white
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["pndm", "ddim"])
def test_our_pipelines_are_sampled_there_as_here(theirs, sampler, tmp_path):
    source = theirs("epsilon")
    network, texts = load_checkpoint(source), load_texts(source)
    params = jax.tree.map(lambda leaf: 0.9 * leaf, network.params)  # not those of the folder
    autoencoder = load_autoencoder(source)
    write_pipeline(tmp_path / "copied", network.config, params, source)
    parts = {
        "vae": lambda folder: save_as_diffusers(folder, autoencoder),
        "text_encoder": lambda folder: save_text_encoder(folder, texts.encoder),
        "tokenizer": lambda folder: copy_tokenizer(source, folder),
    }
    scheduler = process_of("epsilon").scheduler(ConfigDict(STABLE | {"sampler": sampler}))
    join_pipeline(tmp_path / "joined", network.config, params, parts, scheduler)
    images, noise = sampled_here(tmp_path / "joined", sampler, "epsilon")
    for folder in ("joined", "copied") if sampler == "pndm" else ("joined",):
        expected = sampled_there(tmp_path / folder, sampler, noise)
        np.testing.assert_allclose(images, expected, rtol=0, atol=1e-4)


def test_a_text_encoder_with_a_projection_becomes_one_without(tmp_path):
    write_random_text_encoder(tmp_path / "source", vocab_size=20, projection_dim=6)
    texts, encoder = [7, 3, 19] + 13 * [19], load_text_encoder(tmp_path / "source")
    save_text_encoder(tmp_path / "out", encoder)
    model, info = CLIPTextModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = model(torch.tensor([texts])).last_hidden_state.detach().numpy()
    expected = encoder.encode(encoder.params, jnp.asarray([texts])).last
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pipelines_that_cannot_be_put_together(theirs, tmp_path):
    network = load_checkpoint(theirs("epsilon"))
    with pytest.raises(KeyError, match="vae"):
        join_pipeline(tmp_path / "out", network.config, network.params, {}, {"_class_name": "X"})
    config = DiTConfig(image_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    with pytest.raises(DiffusersError, match="pipelines of a 'dit' are not put together here"):
        join_pipeline(tmp_path / "out", config, {}, {}, {})
    assert not list(tmp_path.iterdir())


def test_parts_that_are_not_the_pipelines_are_those_that_were_used(theirs, tmp_path, monkeypatch):
    """With the teacher's autoencoder, latents of another one would be decoded to nothing."""
    monkeypatch.chdir(tmp_path)
    source = theirs("epsilon")
    network = load_checkpoint(source)
    weights.save_model("student", network.config.described(), network.params)
    write_random_autoencoder("vae", levels=2, seed=7)
    tokenizer = train_tokenizer("words/tokenizer", ["other words"], 520, TOKENS)
    write_random_text_encoder(
        "words/text_encoder",
        vocab_size=tokenizer.vocab_size,
        width=12,
        length=TOKENS,
        projection_dim=4,
    )
    files = {
        "vae": "vae/diffusion_pytorch_model.safetensors",
        "text": "text_encoder/model.safetensors",
        "words": "tokenizer/tokenizer_config.json",
        "scheduler": "scheduler/scheduler_config.json",
    }

    def written(**fields):
        context = make_context(sd_config(source, **fields), tmp_path / "run")
        check_pipelines(context, trains=True)
        folder = as_path(tempfile.mkdtemp(dir=tmp_path))
        shutil.copytree("student", folder, dirs_exist_ok=True)
        write_student(context, folder)
        return folder / "pipeline"

    def same(folder):
        found = {
            name
            for name, file in files.items()
            if (folder / file).read_bytes() == (source / file).read_bytes()
        }
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        assert pipeline.vae.config.scaling_factor == 0.18215
        return found

    assert same(written()) == {"vae", "text", "words", "scheduler"}
    assert same(written(latents__autoencoder=str(source / "vae"))) == set(files)
    other = written(latents__autoencoder="vae")
    assert same(other) == {"text", "words", "scheduler"}
    found, wanted = load_autoencoder(other).params, load_autoencoder("vae").params
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert same(written(text__folder="words")) == {"vae", "scheduler"}


# The configs --------------------------------------------------------------------------------------

STUDENTS = ("base", "small", "tiny", "extreme")
CONFIGS = {"sd21_bksdm": ("sd-2.1-base", "v2", 128), "sd14_bksdm": ("sd-1.4", "v1", 256)}
NAMES = pytest.mark.parametrize("name", CONFIGS)


def get_config(name, arg=None, **fields):
    config = module(name).get_config(arg)
    config.data.path = "pictures"
    for field, value in fields.items():
        *rooms, last = field.split("__")
        functools.reduce(lambda node, room: node[room], rooms, config)[last] = value
    return config


@NAMES
def test_settings_are_the_published_ones(name):
    network, _, batch = CONFIGS[name]
    config = get_config(name)
    check_config(config)
    model = config_from_dict(config.model.to_dict(), partial=True)
    assert model == PUBLISHED_SD_UNETS[network]
    assert make_process(config.process) == GaussianDiffusion(
        beta_schedule("scaled_linear", 1000, 0.00085, 0.012), timesteps="uniform"
    )
    run = config.distill
    assert (run.task_scale, run.scale, run.feature_scale) == (1.0, 1.0, 1.0)
    assert run.feature.to_dict() == dict(
        reduction="mean", layers="sum", adapters=False, schedule="constant", mask_sigma=None
    )
    assert (run.loss.variant, run.loss.group_size, run.weight.name) == ("sd", 16, "adaptive")
    assert run.optimizer.to_dict() == dict(
        name="adamw",
        learning_rate=5e-5,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=1e-2,
        grad_clip=1.0,
        schedule="constant",
        warmup_steps=0,
        final_scale=0.0,
    )
    assert (run.batch_size, run.steps, run.ema_decay) == (batch, 50_000, 0.9999)
    assert (run.dtype, run.remat, run.write_pipeline) == ("bfloat16", "nothing_saveable", True)
    assert (config.text.dropout, config.data.image_size, config.data.flip) == (0.1, 512, True)
    fields = config.evaluation
    assert (fields.sampler, fields.sample_steps, fields.skip_type) == ("pndm", 25, "leading")
    assert (fields.steps_offset, fields.set_alpha_to_one, fields.guidance) == (1, False, 7.5)
    assert make_process(config.process).sampling(fields) == {"evaluations": 26}


@NAMES
def test_docstrings_say_the_sizes_and_fields_that_exist(name):
    network, version, _ = CONFIGS[name]
    text = module(name).__doc__
    rows = {"teacher": network} | {s: f"bk-{version}-{s}" for s in STUDENTS}
    for row in rows.values():
        model = PUBLISHED_SD_UNETS[row]
        assert f"{config_parameters(model):,}" in text and f"{count_macs(model) / 1e9:.2f}G" in text
    for student in STUDENTS:
        config = get_config(name, f"student={student}")
        made = make_context(config, "run").pruner.predict(
            config.compress, config_from_dict(config.model.to_dict(), partial=True)
        )
        assert made == PUBLISHED_SD_UNETS[f"bk-{version}-{student}"]
    for field in set(re.findall(r"--config\.([\w.]+)[=\s`]", text)):
        functools.reduce(lambda node, room: node[room], field.split("."), config)


def test_arguments_reach_the_config():
    config = get_config("sd21_bksdm", "teacher=sd-2.1,student=tiny,method=output_kd,seeds=0+1")
    assert (config.process.prediction, config.data.image_size) == ("v", 768)
    model = config_from_dict(config.model.to_dict(), partial=True)
    assert model == PUBLISHED_SD_UNETS["sd-2.1"]
    assert (config.method, config.seeds, config.compress.student) == ("output_kd", (0, 1), "tiny")
    with pytest.raises(ValueError, match="teacher must be sd-2.1-base or sd-2.1, got 'sd-3'"):
        get_config("sd21_bksdm", "teacher=sd-3")
    layers = "down_blocks.0.0+mid_block"
    assert get_config("sd14_bksdm", f"student={layers}").compress.student == layers.replace(
        "+", ","
    )
    # Another sampler needs no more than its name, although the preset has fields that it has not.
    for sampler in ("ddim", "dpmpp_2m"):
        check_config(get_config("sd21_bksdm", evaluation__sampler=sampler))
    with pytest.raises(ValueError, match="config.evaluation.eta must be 0.0 with config.evaluatio"):
        check_config(get_config("sd21_bksdm", evaluation__eta=0.5))


def test_one_field_says_the_pipeline():
    config = get_config("sd21_bksdm", "runlocal", pipeline="sd")
    fields = [config.teacher.checkpoint, config.latents.autoencoder, config.text.folder]
    assert fields == ["sd", "sd", "sd"]
    config.latents.autoencoder, config.teacher.checkpoint = "vae", None
    fields = [config.teacher.checkpoint, config.latents.autoencoder, config.text.folder]
    assert fields == [None, "vae", "sd"] and config.pipeline == "sd"
    digits = module("digits_dit").get_config()
    digits.pipeline = "sd"
    with pytest.raises(ValueError, match="config.pipeline is not for a 'dit': set config.teacher"):
        check_config(digits)


# What a folder says of the process ----------------------------------------------------------------


def sd_config(folder, **fields):
    """Of a tiny pipeline of diffusers."""
    config = get_config(
        "sd21_bksdm", "runlocal", pipeline=os.fspath(folder), latents__path="latents", **fields
    )
    model = load_checkpoint(folder).config
    config.model = ConfigDict({**model.to_dict(), "model": model.model})
    return config


def test_a_network_of_another_process_is_refused_by_name(theirs, tmp_path):
    folder = theirs("v_prediction")
    message = (
        r"config\.pipeline: .*scheduler_config\.json: prediction_type 'v_prediction' \('v'\), "
        "config.process.prediction is 'epsilon': set config.process"
    )
    with pytest.raises(ValueError, match=message):
        check_pipelines(make_context(sd_config(folder), tmp_path), trains=True)
    check_pipelines(make_context(sd_config(folder, process__prediction="v"), tmp_path), trains=True)
    # Also of the network in its own folder, and of a student that is given.
    for field in ("teacher__checkpoint", "compress__checkpoint"):
        config = sd_config(theirs("epsilon"), **{field: os.fspath(folder / "unet")})
        with pytest.raises(ValueError, match=f"config.{field.replace('__', '.')}: .*v_prediction"):
            check_pipelines(make_context(config, tmp_path), trains=True)
    with pytest.raises(ValueError, match="config.pipeline: .*beta_end 0.012: its betas differ"):
        config = sd_config(theirs("epsilon"), process__beta_end=0.02)
        check_pipelines(make_context(config, tmp_path), trains=True)


@pytest.mark.parametrize("fields, message", [
    ({"pipeline": "nowhere"}, "config.pipeline: nowhere: no model_index.json there"),
    ({"pipeline": None}, "write_pipeline: a pipeline needs config.latents.autoencoder: set it, or"),
    ({"pipeline": None, "latents__autoencoder": "{0}"}, "needs config.text.folder: set it, or co"),
    ({"pipeline": None, "latents__autoencoder": "{0}", "latents__path": "x", "text__folder": "{0}",
      "evaluation__sampler": "ddim", "evaluation__skip_type": "quad"}, "skip_type 'quad'"),
    ({"pipeline": None, "latents__autoencoder": "shifted", "text__folder": "{0}"}, "ents by 0.5"),
])  # fmt: skip
def test_a_pipeline_that_cannot_be_written_is_refused_before_training(
    theirs, tmp_path, monkeypatch, fields, message
):
    folder = theirs("epsilon")
    monkeypatch.chdir(tmp_path)
    write_random_autoencoder("shifted")
    described = json.loads((tmp_path / "shifted" / "config.json").read_text())
    (tmp_path / "shifted" / "config.json").write_text(json.dumps(described | {"shift_factor": 0.5}))
    fields = {name: value and value.format(folder) for name, value in fields.items()}
    config = sd_config(folder)
    for field, value in fields.items():
        *rooms, last = field.split("__")
        functools.reduce(lambda node, room: node[room], rooms, config)[last] = value
    config.latents.path = "latents" if config.latents.autoencoder else None
    context = make_context(config, tmp_path / "run")
    with pytest.raises(ValueError, match=re.escape(message)):
        check_pipelines(context, trains=True)
    if config.pipeline is None:
        config.distill.write_pipeline = False
        check_pipelines(context, trains=True)
