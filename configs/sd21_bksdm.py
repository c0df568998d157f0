"""Stable Diffusion 2.1-base with BK-SDM's students, 512x512: the paper's table of text to image.

Teacher: the pipeline "stable-diffusion-2-1-base", a U-Net of 865,910,724 parameters, 339.24G MACs;
published FID 13.93, Inception Score 35.93, CLIP score .3075. Students keep some of its blocks:

    student   parameters      MACs   published FID / Inception Score / CLIP score
    base     583,480,964   224.07G   16.72 / 31.82 / .2900   (BK-SDM 15.85 / 31.70 / .2868)
    small    485,787,524   217.99G   14.65 / 31.99 / .2918   (BK-SDM 16.61 / 31.73 / .2901)
    tiny     326,825,604   205.30G   14.60 / 31.75 / .2916   (BK-SDM 15.68 / 31.64 / .2897)
    extreme   83,324,164   131.17G   no row in the paper

First encode the images and captions, once; then the run, from the same folder of a pipeline:

    OPTIONS="--config.pipeline=stable-diffusion-2-1-base
        --config.data.path=laion --config.latents.path=laion-latents"
    python -m liftplace_jax.encode --config=configs/sd21_bksdm.py $OPTIONS
    python -m liftplace_jax.main --config=configs/sd21_bksdm.py:student=small $OPTIONS \\
        --config.evaluation.prompts=coco.csv --workdir=runs/small

"laion" holds images with metadata.csv (file_name, text) or name.txt beside name.jpg, or
webdataset's tar files; docs/text-to-image.md goes step by step. Each student becomes a pipeline
that diffusers loads, with its averaged weights: student/lift_place_feature_kd/seed0/pipeline (about
3.6 GB in float32; `--config.distill.write_pipeline=False` does without). That of a run which did:

    python -m liftplace_jax.convert --model=runs/small/student/lift_place_feature_kd/seed0 \\
        --to=diffusers --pipeline=stable-diffusion-2-1-base --out=small-sd

Settings: task + LIFT + PLACE in groups of 16 + mean squared errors of block outputs, each of
weight 1; AdamW 5e-5 (weight decay 1e-2), clip 1.0, batch 128, 50k steps, EMA 0.9999, bfloat16,
flips; 10 % of captions become "", the same for teacher and student. Sampling: PNDM, 25 steps (26
evaluations), guidance 7.5. Source: "BK_SDM_EXP/scripts/train_main_sd2.sh, src/kd_t2i.py,
src/generate.py" and the paper. What differs: its w, which lets the fine term in, is formed on each
GPU of each micro-batch (32 images), ours over the global batch; and it computes in float16.
BK-SDM's numbers are its own: without dropped captions or averaging.

Data: LAION-Aesthetics V2 6.5+, 212,776 pairs, which have no second split: the error against the
teacher is measured on them too (`--config.data.test_split=test` where there is one). Latents of
both flips and token ids take 28 GB; `--config.text.cached=True` stores text states too, 34 GB more,
and the text encoder is not run in training.

Hardware: by MACs a step of small takes 2.5e14 floating-point operations, of which the teacher's
forward pass is 8.7e13; 50k steps 1.3e19 (base 1.3e19, tiny 1.2e19, extreme 9.4e18); 30,000 guided
samples of small 6.8e17. Blocks are computed again in the backward pass (remat), which is a third
more of the student's part. Not timed here. `--config.distill.accumulation=4` takes batches in four
parts, each with its own w.

Arguments after a colon, as in `--config=configs/sd21_bksdm.py:student=tiny,method=output_kd`:
    student   base, small, tiny, extreme, or the layers that stay, as
              down_blocks.0.0+down_blocks.0.1+mid_block+up_blocks.3 (small)
    teacher   sd-2.1-base, or sd-2.1: 768x768, predicts v (760.80G MACs)
    method    one, several joined by "+", or all. Default: lift_place_feature_kd, the published sum.
              OutKD is output_kd, BK-SDM's sum output_feature_kd
    seed      of the students (0); seeds=0+1+2 trains several
    runlocal  encoded images to report on two CPU cores in a minute or two: 32x32 images, latents of
              8x8, 32 channels, 30 steps; its numbers mean nothing. A random pipeline will do:
              python -c "from liftplace_jax.experiment import config_flag, presets
              config = config_flag.load_config('configs/sd21_bksdm.py:runlocal')
              presets.write_random_pipeline('tiny-sd', config)"
"""

from ml_collections import config_dict

from liftplace_jax.experiment.presets import family_config, runlocal


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = family_config(
        arg,
        "sd21_bksdm",
        "sd_unet",
        "sd-2.1-base",
        student="small",
        others={"teacher": "sd-2.1-base"},
    )
    config.data.image_size = 512
    if args.teacher == "sd-2.1":
        config.model.update(image_size=96, upcast_attention=True)
        config.data.image_size = 768
        config.process.prediction = "v"
    elif args.teacher != "sd-2.1-base":
        raise ValueError(f"teacher must be sd-2.1-base or sd-2.1, got {args.teacher!r}")
    config.data.update(name="folder", test_split="train")
    config.teacher.steps = 1_620_000
    config.distill.steps = 50_000
    for run in (config.teacher, config.distill):
        run.log_every = 100
        run.checkpoint_every = 5000
    config.evaluation.features = config_dict.placeholder(str)
    config.evaluation.update(num_samples=30_000, batch_size=16)
    if args.runlocal:
        return runlocal(config)  # in float32, without remat: it compiles in a quarter of the time
    for run in (config.teacher, config.distill):
        run.dtype = "bfloat16"
        run.remat = "nothing_saveable"
    config.text.dtype = config.evaluation.dtype = "bfloat16"
    return config
