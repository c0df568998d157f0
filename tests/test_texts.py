"""Texts in experiments: columns of captions, cached states, prompts, and all stages, tiny."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from ml_collections import ConfigDict

from liftplace_jax import data, evaluation
from liftplace_jax.conditioning import Text, check_sources
from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule
from liftplace_jax.encoders.autoencoder_folder import write_random_autoencoder
from liftplace_jax.encoders.clip import write_random_text_encoder
from liftplace_jax.encoders.texts import Texts, load_texts
from liftplace_jax.encoders.tokenizer import train_tokenizer
from liftplace_jax.evaluation.sampling import make_sampler
from liftplace_jax.experiment.configuration import compress_config
from liftplace_jax.experiment.context import make_context
from liftplace_jax.experiment.encoding import encode_data
from liftplace_jax.experiment.scoring import protocol, read_samples
from liftplace_jax.experiment.stages import open_experiment, run
from liftplace_jax.experiment.texts import Prompts, read_prompts, with_captions
from liftplace_jax.families.registry import family_named
from liftplace_jax.host import sharding
from liftplace_jax.training.objective import METHODS, Task, make_objective

WIDTH, POOLED, LENGTH = 16, 8, 6
DIGITS = "zero one two three four five six seven eight nine".split()
CAPTIONS = [f"the digit {name}" for name in DIGITS]
PROMPTS = ["the digit three", "$ a very long prompt, " + 30 * "of many words ", "seven"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder with tokenizer/ and text_encoder/, and a file of prompts."""
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = train_tokenizer(folder / "tokenizer", CAPTIONS, 540, LENGTH)
    write_random_text_encoder(
        folder / "text_encoder",
        vocab_size=tokenizer.vocab_size,
        width=WIDTH,
        length=LENGTH,
        projection_dim=POOLED,
    )
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture(scope="module")
def texts(pipeline):
    return load_texts(pipeline)


def images(captions=CAPTIONS):
    records = [{"image": np.zeros((2, 2, 1), np.uint8)} for _ in CAPTIONS]
    source = data.Source("pictures", records, image_shape=(2, 2, 1))
    source.captions = captions
    return source


# Columns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
def test_tokens_and_cached_states_tell_the_network_the_same(texts, pooled):
    text = Text(WIDTH, POOLED if pooled else None)
    found = []
    for cached in (False, True):
        bound = text.bound(lambda p, cached=cached: texts.encoding(p, cached))
        source = with_captions(images(), texts, bound)
        check_sources(bound, [source])
        batch = source.get([3, 0, 9])
        frozen = {"text": texts.frozen("", bound.columns)}
        assert ("params" in frozen["text"]) == (not cached)
        condition = bound.of(batch)
        condition["empty"] = condition["empty"].at[1].set(True)
        found.append(jax.tree.map(np.asarray, jax.jit(bound.embed)(frozen, condition)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-3), *found)
    states = found[0]["context"] if pooled else found[0]
    empty = texts.encoder.encode(texts.encoder.params, texts.tokenizer.encode([""]))
    np.testing.assert_allclose(
        states[1], (empty.hidden[-2] if pooled else empty.last)[0], atol=1e-5
    )
    assert np.abs(states[0] - states[2]).max() > 0.1


def test_data_of_another_tokenizer_or_without_captions_are_refused(texts, tmp_path):
    bound = Text(WIDTH).bound(texts.encoding)
    with pytest.raises(
        ValueError, match="pictures has no captions, and config.model is told texts"
    ):
        with_captions(images(None), texts, bound)
    other = train_tokenizer(tmp_path, ["quite another text"] * 3, 530, LENGTH)
    source = with_captions(images(), Texts(other, texts.encoder), bound)
    with pytest.raises(ValueError, match="column 'tokens' was made by .*: encode the data anew"):
        check_sources(bound, [source])


def test_what_does_not_belong_together_is_refused(pipeline, texts, tmp_path):
    (tmp_path / "tokenizer").symlink_to(pipeline / "tokenizer")
    write_random_text_encoder(tmp_path / "text_encoder", vocab_size=100)
    with pytest.raises(ValueError, match="its text encoder knows 100: they do not belong together"):
        load_texts(tmp_path)
    write_random_text_encoder(tmp_path / "text_encoder", vocab_size=600, width=8, length=4)
    short = load_texts(tmp_path)
    assert short.tokenizer.length == 4  # no more than the encoder takes
    with pytest.raises(ValueError, match="has an encoder without a projection"):
        Text(8, 4).bound(short.encoding)


# Prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"one\r\ntwo\n\n", ["one", "two"]),
        ("p.txt", "\ufeffcaf\u00e9".encode(), ["caf\u00e9"]),
        ("metadata.csv", b'file_name,text\na.png,"a, b"\nc.png,d\n', ["a, b", "d"]),
        ("p.CSV", b"caption\nx\n", ["x"]),
        ("p.txt", b"one\n\ntwo", "p.txt, line 2: an empty prompt"),
        ("p.txt", b"", "p.txt: it is empty"),
        ("p.txt", b"one\n\xff\n", "p.txt, line 2: is no text in UTF-8"),
        (
            "m.csv",
            b"file_name,label\na,b\n",
            "m.csv: has no column of ['text', 'caption', 'prompt']",
        ),
        ("m.csv", b"file_name,text\n", "m.csv: has no prompts"),
        ("m.csv", b"file_name,text\na.png,\n", "m.csv, line 2: an empty prompt"),
    ],
)
def test_files_of_prompts(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, list):
        assert read_prompts(tmp_path / name) == expected
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_prompts(tmp_path / name)


def prompts_of(texts, negative=""):
    conditioning = Text(WIDTH).bound(texts.encoding)
    return Prompts(tuple(PROMPTS), texts, conditioning, negative, {}, repeats=True)


def test_sample_i_has_prompt_i_and_guidance_its_null(texts):
    """The network predicts its text's mean: what samples are tells what it was told."""
    process = GaussianDiffusion(beta_schedule("linear", 4), "epsilon", "fixed")
    fields = ConfigDict(
        dict(
            sampler="ddim",
            sample_steps=1,
            skip_type="uniform",
            eta=0.0,
            guidance=3.0,
            guidance_channels=None,
            precision="highest",
        )
    )
    model = SimpleNamespace(conditioning=Text(WIDTH), in_channels=1, shape=(2, 2, 1))

    def apply(params, x, t, return_features, dropout_key, cond):
        assert cond.shape[1:] == (LENGTH, WIDTH)
        return params * jnp.broadcast_to(
            cond[:, :, :3].mean((1, 2))[:, None, None, None], x.shape
        ), {}

    keys = jax.vmap(lambda i: jax.random.key(7))(jnp.arange(5))  # the same noise for all
    samples = {}
    for negative in ("", "the digit nine"):
        prompts = prompts_of(texts, negative)
        sample = jax.jit(make_sampler(fields, process, model, apply, texts=prompts.conditioning))
        samples[negative] = sample((1.0, prompts.frozen), keys, prompts.condition(5))
        silent = sample((0.0, prompts.frozen), keys, prompts.condition(5))
    found = {k: np.asarray((v - silent)[:, 0, 0, 0]) for k, v in samples.items()}
    encoded = texts.encoder.encode(
        texts.encoder.params, texts.tokenizer.encode([*PROMPTS, "", "the digit nine"])
    )
    means = np.asarray(encoded.last[:, :, :3].mean((1, 2)))
    for negative, null in (("", means[3]), ("the digit nine", means[4])):
        said = null + 3 * (means[[0, 1, 2, 0, 1]] - null)
        ratio = found[negative] / said
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
        assert abs(ratio[0]) > 1e-3
    assert not np.allclose(found[""], found["the digit nine"])


def test_teacher_and_student_are_told_the_same_dropped_text(texts):
    process = GaussianDiffusion(beta_schedule("linear", 20))
    text, seen = Text(WIDTH).bound(texts.encoding, dropout=0.5), []

    def apply(params, x, t, return_features, dropout_key, cond):
        seen.append(cond)
        return x + params * cond.mean((1, 2))[:, None, None, None], {}

    objective = make_objective(
        METHODS["output_kd"],
        apply,
        process,
        0,
        teacher_apply=apply,
        task=Task("mean", conditioning=text),
    )
    batch = {"image": jnp.zeros((64, 2, 2, 1)), "tokens": texts.tokenizer.encode(["cat"] * 64)}
    frozen = {"teacher": 1.0, "text": texts.frozen("", text.columns)}
    _, metrics = objective({"student": 1.0}, frozen, batch, 0)
    assert len(seen) == 2 and seen[0] is seen[1]  # encoded once
    assert metrics["output_kd"] == 0
    assert len(np.unique(np.asarray(seen[0])[:, 3, 0])) == 2  # its own, or the empty one

    def of_encoder(params):
        arrays = frozen["text"] | {"params": params}
        return objective({"student": 1.0}, frozen | {"text": arrays}, batch, 0)[0]

    gradient = jax.grad(of_encoder)(frozen["text"]["params"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))  # it is frozen


# All stages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(pipeline):
    config = tiny_config.get_config("method=lift_place_feature_kd")
    config.model = ConfigDict(
        dict(
            model="mmdit",
            image_size=8,
            in_channels=1,
            depth=2,
            num_heads=2,
            head_size=8,
            context_dim=WIDTH,
            pooled_dim=POOLED,
            position_size=4,
            context_tokens=LENGTH,
        )
    )
    config.compress = compress_config(family_named("mmdit"))
    config.compress.update(depth=1, layers="loss", score_batches=1, score_batch_size=8)
    config.distill.loss.variant = "sd"
    config.teacher.steps = config.distill.steps = 2
    config.text.update(folder=str(pipeline), dropout=0.25)
    config.evaluation.update(
        prompts=str(pipeline / "prompts.txt"),
        guidance=2.0,
        clip=None,
        num_samples=8,
        batch_size=8,
        sample_steps=2,
        features=None,
        negative_prompt="the digit nine",
        repeat_prompts=True,
    )
    return config


@pytest.fixture
def captioned(monkeypatch):
    """The digits of TFDS, with captions."""
    labels = property(
        lambda self: [CAPTIONS[label] for label in self.get(np.arange(len(self)))["label"]]
    )
    monkeypatch.setattr(data.Source, "captions", labels, raising=False)


def test_from_teacher_to_report(config, pipeline, captioned, tmp_path):
    run(config, tmp_path, "all")
    folders = [tmp_path / "teacher", *tmp_path.glob("student/*/seed0")]
    assert len(folders) == 2
    for folder in folders:
        protocol = json.loads((folder / "evaluation.json").read_text())["protocol"]["prompts"]
        assert (protocol["file"], protocol["count"]) == ("prompts.txt", 3)
        assert len(protocol["text"]["encoder"]["sha256"]) == 64
        samples = read_samples(folder)
        assert list(samples["prompts"]) == [prompt.strip() for prompt in PROMPTS]
        assert samples["images_by_prompt"].shape == (3, 8, 8, 1)
        # The first samples are of the first prompts, from the same noise.
        np.testing.assert_array_equal(samples["images"][:3], samples["images_by_prompt"])
    assert "Prompts: 3 of prompts.txt" in (tmp_path / "report.md").read_text()
    assert (
        "tokens" in json.loads((tmp_path / "data.json").read_text())["images"]["train"]["columns"]
    )
    # The record of the importances was made with texts.
    assert len(json.loads((tmp_path / "pruned" / "layers.json").read_text())["scores"]) == 2


def test_samples_are_scored_with_their_prompts_as_the_protocol_says(
    config, pipeline, captioned, clip_folder, tmp_path
):
    """From JPEGs of half the size; the report and the result file name all of it."""
    config = config.copy_and_resolve_references()
    config.method = "no_kd"
    config.evaluation.update(
        clip_model=str(clip_folder), jpeg_before=60, resize=4, jpeg=75, num_samples=16
    )
    run(config, tmp_path, "all")
    for folder in (tmp_path / "teacher", *tmp_path.glob("student/*/seed0")):
        result = json.loads((folder / "evaluation.json").read_text())
        protocol = result["protocol"]
        assert {name: protocol[name] for name in ("jpeg_before", "resize", "jpeg")} == {
            "jpeg_before": 60,
            "resize": 4,
            "jpeg": 75,
        }
        assert protocol["repeat_prompts"] and protocol["inception_rule"] == "adm"
        assert protocol["clip_model"]["image"]["name"] == clip_folder.name
        assert protocol["clip_model"]["preparation"]["resample"] == "BICUBIC"
        images = read_samples(folder)["images"]
        assert images.shape == (16, 4, 4, 1)  # as they were looked at
        clip = evaluation.load_clip(clip_folder)
        pictures = np.stack([clip.preparation.picture(image) for image in images])
        told = [PROMPTS[index % 3].strip() for index in range(16)]
        cosines = np.asarray(clip.cosines(pictures, clip.text_features(told)))
        expected = evaluation.clip_score(cosines)
        for name, value in expected.items():
            assert result[name] == pytest.approx(value, abs=1e-6)
    report = (tmp_path / "report.md").read_text()
    for words in (
        "| CLIP score |",
        "Samples are looked at saved as JPEG of quality 60, then squeezed to 4x4",
        "CLIP score: mean cosine of samples' and prompts' projected features by ",
        f"{result['clip_score']:.4f}",
    ):
        assert words in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text.folder": None}, "config.text.folder must be set: the network is told texts"),
        (
            {"text.folder": "/nowhere"},
            "config.text.folder: /nowhere: no config.json of a CLIP text",
        ),
        ({"evaluation.prompts": None}, "config.evaluation.prompts must be set"),
        (
            {"evaluation.prompts": "/nowhere.txt"},
            "config.evaluation.prompts: /nowhere.txt: no such",
        ),
        (
            {"evaluation.repeat_prompts": False},
            "config.evaluation.num_samples 8 is more than the 3 ",
        ),
        (
            {"evaluation.clip_model": "/nowhere"},
            "config.evaluation.clip_model: /nowhere: no config",
        ),
        (
            {"evaluation.guidance": 1.0},
            "config.evaluation.negative_prompt needs config.evaluation.gu",
        ),
        (
            {"model.context_dim": 12},
            "config.text.folder has an encoder of states of width 16, config",
        ),
        (
            {"model.pooled_dim": 12},
            "config.text.folder has an encoder of pooled vectors of width 8, ",
        ),
        ({"text.dropout": 1.0}, "config.text.dropout must be a number in [0, 1)"),
        ({"text.dtype": "float16"}, "config.text.dtype must be one of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(config, tmp_path, changes, message):
    config = config.copy_and_resolve_references()
    for field, value in changes.items():
        room, name = field.split(".")
        config[room][name] = value
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        open_experiment(config, tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text.folder", None, "config.text.folder is for networks that are told texts"),
        ("evaluation.prompts", "prompts.txt", "config.evaluation.prompts is for networks that are"),
        ("evaluation.negative_prompt", "blur", "config.evaluation.negative_prompt is for networks"),
        ("evaluation.clip_model", "emoji", "config.evaluation.clip_model is for networks that are"),
    ],
)
def test_texts_of_a_network_that_is_told_none(pipeline, tmp_path, field, value, message):
    config = tiny_config.get_config()
    room, name = field.split(".")
    config[room][name] = value or str(pipeline)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        open_experiment(config, tmp_path / "work")


def test_encoded_data_carry_tokens_and_cached_states(config, captioned, tmp_path, monkeypatch):
    config = config.copy_and_resolve_references()
    config.model.update(image_size=4, in_channels=4)
    config.data.train_split, config.data.test_split = "train[:2%]", "test[:3%]"
    write_random_autoencoder(tmp_path / "vae", channels=1, image_size=8, levels=2)
    config.latents.update(autoencoder=str(tmp_path / "vae"), path=str(tmp_path / "latents"))
    config.text.cached = True
    over = sharding.batch_sharding(sharding.make_mesh({"data": -1}))
    encode_data(config, over, batch_size=8)
    monkeypatch.undo()  # from here on the captions are in the shards alone
    batches = {}
    for cached in (True, False):
        config.text.cached = cached
        context = make_context(config, tmp_path / f"work{cached}", writes=False)
        source = context.sources["train"]
        assert {"tokens", "text", "pooled", "label"} <= source.columns.keys()
        batch = source.get(np.arange(3))
        batches[cached] = jax.tree.map(np.asarray, context.embed(batch))
        assert ("params" in context.frozen["text"]) == (not cached)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-3), *batches.values())
    # Another encoder's states are not these.
    encoder = Path(config.text.folder) / "text_encoder"
    other = tmp_path / "other"
    shutil.copytree(encoder.parent, other)
    fields = {"vocab_size": 540, "width": WIDTH, "length": LENGTH, "projection_dim": POOLED}
    write_random_text_encoder(other / "text_encoder", **fields, seed=1)
    config.text.update(folder=str(other), cached=True)
    with pytest.raises(ValueError, match="column 'text' was made by .*: encode the data anew"):
        _ = make_context(config, tmp_path / "new", writes=False).sources
    config.text.cached = False  # the ids are those of the same tokenizer
    assert make_context(config, tmp_path / "new", writes=False).sources


def test_the_protocol_of_networks_without_texts_says_nothing_of_them(tmp_path):
    config = tiny_config.get_config()
    config.evaluation.features = None
    found = protocol(make_context(config, tmp_path, writes=False))
    assert "guidance" in found and not {"prompts", "negative_prompt"} & found.keys()


def test_data_without_captions_are_refused_by_name(config, tmp_path):
    context = make_context(config, tmp_path)
    with pytest.raises(
        ValueError, match="digits.* has no captions, and config.model is told texts"
    ):
        _ = context.sources
