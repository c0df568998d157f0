"""Stable Diffusion 1.4 with BK-SDM's students, 512x512.

Teacher: the pipeline "stable-diffusion-v1-4", a U-Net of 859,520,964 parameters, 338.75G MACs;
published FID 13.05, Inception Score 36.76, CLIP score .2958. Students keep some of its blocks; the
paper has no row of them, BK-SDM's own are

    student   parameters      MACs   BK-SDM: FID / Inception Score / CLIP score
    base     579,384,964   223.76G   15.76 / 33.79 / .2878
    small    482,346,884   217.73G   16.98 / 31.68 / .2677
    tiny     323,384,964   205.04G   17.12 / 30.09 / .2653
    extreme   81,849,604   131.06G   none

First encode the images and captions, once; then the run, from the same folder of a pipeline:

    OPTIONS="--config.pipeline=stable-diffusion-v1-4
        --config.data.path=laion --config.latents.path=laion-latents"
    python -m liftplace_jax.encode --config=configs/sd14_bksdm.py $OPTIONS
    python -m liftplace_jax.main --config=configs/sd14_bksdm.py:student=small $OPTIONS \\
        --config.evaluation.prompts=coco.csv --workdir=runs/small14

The students' pipelines, the data, `convert` and all else are as in configs/sd21_bksdm.py. A
pipeline of version 1.5, or one that was fine-tuned from either, is as good.

Settings: as those of 2.1, but for batch 256. Source: "BK_SDM_EXP/scripts/train_main.sh" and
BK-SDM's model card; its published students are those of 50k steps, the script says 400k. What
differs: w is formed over the global batch here, in the published code on each GPU of each
micro-batch.

Hardware: by MACs a step of small takes 5.1e14 floating-point operations, of which the teacher's
forward pass is 1.7e14; 50k steps 2.5e19; 30,000 guided samples of small 6.8e17. BK-SDM's Base took
300 hours of one A100 (80 GB). Not timed here.

Arguments after a colon, as in `--config=configs/sd14_bksdm.py:student=tiny,method=output_kd`:
    student   base, small, tiny, extreme, or the layers that stay (small)
    method    one, several joined by "+", or all (lift_place_feature_kd); BK-SDM's is
              output_feature_kd
    seed      of the students (0); seeds=0+1+2 trains several
    runlocal  as in configs/sd21_bksdm.py, with a random pipeline made of this config
"""

from ml_collections import config_dict

from liftplace_jax.experiment.presets import family_config, runlocal


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = family_config(arg, "sd14_bksdm", "sd_unet", "sd-1.4", student="small")
    config.data.update(name="folder", test_split="train", image_size=512)
    config.distill.steps = 50_000
    for run in (config.teacher, config.distill):
        run.batch_size = 256
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
