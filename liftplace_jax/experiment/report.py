"""The report of a work directory: table, samples, curves, and where the errors are."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liftplace_jax.evaluation import INCEPTION_RULES
from liftplace_jax.experiment.compressing import RECORD
from liftplace_jax.experiment.conclusion import conclude, spread
from liftplace_jax.experiment.context import Context
from liftplace_jax.experiment.pictures import (
    curves_figure,
    groups_figure,
    samples_figure,
    save_figure,
)
from liftplace_jax.experiment.scoring import (
    read_evaluation,
)
from liftplace_jax.families import registry
from liftplace_jax.families.registry import count_macs
from liftplace_jax.host import processes
from liftplace_jax.host.files import read_json, replacing, write_json
from liftplace_jax.host.versions import command, line, versions
from liftplace_jax.training.metrics_io import read_metrics

FILES = ("report.json", "report.md", "samples.png", "curves.png", "groups.png")
MEASURES = (
    "frechet", "precision", "recall", "frechet_clipped", "precision_clipped", "recall_clipped",
    "inception_score", "clip_score", "clip_score_error", "output_error", "images_per_second",
    "train_seconds",
)  # fmt: skip
SMOKE = 500  # fewer samples than this say little
Report = dict[str, Any]  # the content of report.json


def is_reported(context: Context) -> bool:
    """Whether all files of the report are there."""
    workdir = context.workdir
    return processes.told_by_first(lambda: all((workdir / name).exists() for name in FILES))


def write_report(context: Context) -> None:
    """Writes report.json, report.md, samples.png, curves.png and groups.png; process 0 does.

    Raises:
      ValueError: teacher or a student is not evaluated yet.
    """
    rows = collect_rows(context)
    if processes.is_first():
        _write_files(context, rows)
    processes.wait_for(context.workdir / "report.json")


def _write_files(context: Context, rows: list[dict[str, Any]]) -> None:
    report, workdir = describe(context, rows), context.workdir
    save_figure(samples_figure(context, rows), workdir / "samples.png")
    save_figure(curves_figure(context), workdir / "curves.png")
    save_figure(groups_figure(context), workdir / "groups.png")
    with replacing(workdir / "report.md") as temporary:
        temporary.write_text(markdown(context, report))
    write_json(workdir / "report.json", report)


def describe(context: Context, rows: list[dict[str, Any]]) -> Report:
    """The content of report.json: rows, their summary, what came out, when and by what."""
    summary = summarise(rows)
    few = context.config.evaluation.num_samples < SMOKE
    return {
        "name": context.config.name,
        "conclusion": conclude(summary, few),
        "rows": rows,
        "summary": summary,
        "versions": versions(),
        "made": {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "command": command()},
    }


def read_report(workdir: Path) -> str:
    """Table and conclusion of a finished report, for a terminal.

    Raises:
      ValueError: report.json is damaged.
    """
    path = workdir / "report.json"
    try:
        report = json.loads(path.read_text())
        if not report["summary"]:
            raise ValueError("its summary is empty")
        text = "\n".join(_aligned(_cells(report["summary"])))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no report ({error}): delete it, and the same command makes it anew"
        ) from error
    # Reports of earlier versions conclude nothing.
    return text + (f"\n\n{report['conclusion']}" if report.get("conclusion") else "")


def collect_rows(context: Context) -> list[dict[str, Any]]:
    """One row for the teacher and for each student."""
    rows, teacher_macs = [], None
    entries = [("teacher", context.config.seed, context.teacher_folder)]
    entries += [(run.method, run.seed, run.folder) for run in context.runs]
    for method, seed, folder in entries:
        result = read_evaluation(folder)
        fields = read_json(folder / "config.json", "Bring back a whole one")
        config = registry.config_from_dict(fields)
        metrics = read_metrics(folder)
        macs = count_macs(config)
        teacher_macs = teacher_macs or macs
        rows.append(
            {
                "method": method,
                "seed": seed,
                "macs": macs,
                "folder": str(folder.relative_to(context.workdir)),
                "steps": int(metrics[-1]["step"]) if metrics else None,
                "train_seconds": metrics[-1]["seconds"] if metrics else None,
                "final_loss_terms": metrics[-1] if metrics else None,
                "training": _training(context, method),
                **result,
            }
        )
    for row in rows:
        row["compression"] = rows[0]["parameters"] / row["parameters"]
        row["macs_ratio"] = teacher_macs / row["macs"]
    return rows


def _training(context: Context, method: str) -> dict[str, str] | None:
    """What a network was computed in while it was trained; None if it was not trained here."""
    fields = context.config.teacher if method == "teacher" else context.config.distill
    if fields.get("checkpoint"):
        return None
    return {"dtype": fields.dtype, "precision": fields.precision}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and, over several seeds, the standard deviation of each method."""
    summary = []
    for method in dict.fromkeys(row["method"] for row in rows):
        members = [row for row in rows if row["method"] == method]
        entry = {"method": method, "seeds": [row["seed"] for row in members]}
        for key in ("parameters", "macs", "compression", "steps"):
            entry[key] = members[0][key]
        for key in MEASURES:
            values = [row[key] for row in members if row.get(key) is not None]
            entry[key] = statistics.fmean(values) if values else None
            entry[f"{key}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        summary.append(entry)
    return summary


def markdown(context: Context, report: Report) -> str:
    """The report as text."""
    lines = [
        f"# {report['name']}",
        "",
        report["conclusion"],
        "",
        *_table(report["summary"]),
        "",
        *_protocol(context, report["summary"]),
        "",
        *_provenance(report),
        "",
        "Teacher and students from the same noise:",
        "",
        "![samples](samples.png)",
        "",
        "Loss terms, slope, intercept and weight over steps:",
        "",
        "![curves](curves.png)",
        "",
        "Where the student errs, and the groups that PLACE makes of it:",
        "",
        "![groups](groups.png)",
        "",
    ]
    return "\n".join(lines)


def _provenance(report: Report) -> list[str]:
    """When, by what command, on which processors."""
    machines: dict[str, list[str]] = {}
    for row in report["rows"]:
        title = row["method"] if row["method"] == "teacher" else f"{row['method']} {row['seed']}"
        machines.setdefault(line(row.get("versions", {})), []).append(title)
    where = "; ".join(
        machine + (f" ({', '.join(titles)})" if len(machines) > 1 else "")
        for machine, titles in machines.items()
    )
    libraries = ", ".join(
        f"{name} {report['versions'][name]}" for name in ("liftplace_jax", "jax", "flax", "optax")
    )
    return [
        f"Made {report['made']['date']}, evaluated on {where}, with {libraries}, by",
        "",
        "```bash",
        report["made"]["command"],
        "```",
    ]


def _importances(context: Context) -> str:
    """What importances were computed in, where the student was made by some."""
    path = context.pruned_folder / RECORD
    record = read_json(path, "Bring back a whole one") if path.exists() else {}
    found = record.get("importances")
    return f"; importances {found['dtype']}, precision {found['precision']}" if found else ""


def _protocol(context: Context, summary: list[dict[str, Any]]) -> list[str]:
    """What the columns of the table are."""
    config, evaluation = context.config, context.config.evaluation
    lines = []
    if context.judge.extractor:
        real = f"all of {config.data.name} {config.data.train_split}"
        if evaluation.reference:
            real = f"the reference {Path(evaluation.reference).name}"
        lines.append(
            f"Frechet: {context.judge.extractor.label}, {evaluation.num_samples} samples against "
            f"{real}; lower is better."
        )
        if any(row["precision"] is not None for row in summary):
            lines[-1] += f" Precision, recall: k = {evaluation.neighbours}."
    else:
        lines.append(
            "No feature extractor was named (config.evaluation.features): "
            f"{evaluation.num_samples} samples were drawn from each model and compared with "
            "nothing, so there is no Frechet distance, precision or recall."
        )
    lines.append(
        f"Matrix products: evaluation {evaluation.dtype}{_decoding(context)}, precision "
        f"{evaluation.precision}; training {config.distill.dtype}, precision "
        f"{config.distill.precision}{_importances(context)} (jax.default_matmul_precision)."
    )
    if evaluation.clip:
        lines.append(
            "Clipped: predicted data limited to the image range at each sampling step, which "
            "forgives errors in mean and variance."
        )
    lines += [
        f"Sampler: {evaluation.sampler}, {evaluation.sample_steps} {evaluation.skip_type} steps, "
        f"{_sampling(context)}EMA weights, seed {evaluation.seed}{_guidance(evaluation)}.",
        "Output error: mean squared difference to the teacher's prediction on "
        f"{config.data.name} {config.data.test_split}.",
    ]
    if context.judge.prompts:
        lines.append(_prompts(context.judge.prompts.identity, evaluation))
    lines += _looks(context, summary)
    if any(row["images_per_second"] is not None for row in summary):
        lines.append(
            f"Images/s: drawn at batch {evaluation.batch_size}"
            f"{', features included' if context.judge.extractor else ''}, without the first batch."
        )
    if any(row["frechet_spread"] is not None for row in summary):
        lines.append("After +-: standard deviation over seeds.")
    if context.judge.extractor and evaluation.num_samples < context.judge.extractor.dim:
        lines.append(
            f"allow_few: {evaluation.num_samples} samples are fewer than the "
            f"{context.judge.extractor.dim} features; such a distance compares with nothing."
        )
    if evaluation.num_samples < SMOKE:
        lines.append("So few samples are for a smoke run: the numbers mean little.")
    return lines


def _cells(summary: list[dict[str, Any]]) -> list[list[str]]:
    """The table, line by line, with its header; a measure that no row has is no column."""
    columns = {
        "method": lambda row: (
            row["method"] + (f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else "")
        ),
        "params": lambda row: f"{row['parameters']:,}",
        "MACs": lambda row: _si(row["macs"]),
        "compression": lambda row: f"{row['compression']:.1f}x",
        "Frechet": lambda row: spread(row, "frechet", ".1f"),
        "precision": lambda row: spread(row, "precision", ".3f"),
        "recall": lambda row: spread(row, "recall", ".3f"),
        "IS": lambda row: spread(row, "inception_score", ".2f"),
        "CLIP score": lambda row: spread(row, "clip_score", ".4f"),
        "Frechet, clipped": lambda row: spread(row, "frechet_clipped", ".1f"),
        "output error": lambda row: spread(row, "output_error", ".4f"),
        "images/s": lambda row: spread(
            row, "images_per_second", ",.0f" if (row["images_per_second"] or 0) >= 100 else ".3g"
        ),
        "steps": lambda row: "-" if row["steps"] is None else str(row["steps"]),
        "time": lambda row: spread(row, "train_seconds", ".0f", " s"),
    }
    cells = {name: [cell(row) for row in summary] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {"-"}}
    return [list(cells), *map(list, zip(*cells.values(), strict=True))]


def _table(summary: list[dict[str, Any]]) -> list[str]:
    """Lines of the table in markdown."""
    header, *rows = ("| " + " | ".join(row) + " |" for row in _cells(summary))
    return [header, "|" + "---|" * (header.count("|") - 1), *rows]


def _aligned(cells: list[list[str]]) -> list[str]:
    """Lines of the table as plain text: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]


def _decoding(context: Context) -> str:
    fields = context.config.latents
    if not fields.autoencoder:
        return ""
    return f", decoding {fields.decode_dtype}" + (f" in tiles of {fields.tile}" * bool(fields.tile))


def _sampling(context: Context) -> str:
    """What else decides of the sampler: fields that it reads, and what the process adds."""
    fields = context.config.evaluation
    read = [name for name in context.process.samplers[fields.sampler] if name != "skip_type"]
    values = {name: fields[name] for name in read} | context.process.sampling(fields)
    return "".join(f"{name} {value}, " for name, value in values.items())


def _prompts(identity: Mapping[str, Any], evaluation: Any) -> str:
    count = identity["count"]
    away = f"; guidance leads away from {evaluation.negative_prompt!r}"
    texts = identity["text"]
    # Of several, those that are not left out.
    parts = [texts] if "encoder" in texts else [part for part in texts.values() if part]
    encoders = [part["encoder"] for part in parts]
    named = ", ".join(f"{encoder['name']} ({encoder['sha256'][:12]})" for encoder in encoders)
    return (
        f"Prompts: {count} of {identity['file']} (SHA-256 {identity['sha256'][:12]}), "
        f"sample i has prompt i{f' mod {count}' if evaluation.repeat_prompts else ''}"
        f"{away if evaluation.negative_prompt else ''}. Text encoder{'s'[: len(encoders) - 1]}: "
        f"{named}."
    )


def _looks(context: Context, summary: list[dict[str, Any]]) -> list[str]:
    """How samples are looked at beside their features."""
    judge, rule, lines = context.judge, context.config.evaluation.inception_rule, []
    if judge.handling:
        lines.append(f"Samples are looked at {judge.handling}.")
    if any(row["inception_score"] is not None for row in summary):
        splits = ", ".join(f"{k} {v}" for k, v in INCEPTION_RULES[rule].items())
        lines.append(f"IS: Inception Score, as {rule} splits ({splits}).")
    errors = [e for row in summary if (e := row["clip_score_error"]) is not None]
    if judge.clip:
        image = judge.clip.identity["image"]
        lines.append(
            "CLIP score: mean cosine of samples' and prompts' projected features by "
            f"{image['name']} ({image['sha256'][:12]}), without a factor"
            + (f"; standard error {max(errors):.2g}" if errors else "")
            + "."
        )
    return lines


def _guidance(evaluation: Any) -> str:
    if evaluation.guidance == 1:
        return ""
    channels = evaluation.guidance_channels
    where = "" if channels is None else f" on the first {channels} channels"
    return f", guidance {evaluation.guidance:g}{where}"


def _si(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f}{suffix}"
    return str(value)
