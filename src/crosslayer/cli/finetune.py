"""`crosslayer finetune`: train an adapter (or all) of a pre-trained model on a task."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import interrupt
from .options import spelled
from .recipes import recipe_option

if TYPE_CHECKING:
    from ..train.finetune import FinetunePlan
    from ..train.finetune_report import FinetuneReport


def finetune(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Folder of a model or of a run, or a name on the hub [default: the recipe's].")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli; for your own --data: classification, "
            "regression, instruction [default: told by the columns]."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Your own rows: a file, a folder with train.* and validation.*, or hf:owner/name "
            "[default: the GLUE task from the hub]."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="lor2c, sharelor2c, mergelor2c, injectlor2c, imlor2c, lora, full, head "
            "[default: the recipe's, or lor2c]."
        ),
    ] = None,
    recipe: Annotated[
        str | None, recipe_option("A name that `crosslayer recipes` lists, or a YAML file [default: none].")
    ] = None,
    output_dir: Annotated[
        str | None,
        spelled("output_dir", "Folder of the run [default: runs/NAME, or TASK_METHOD]."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    resume_from: Annotated[
        int | None, spelled("resume_from", "Go on from checkpoint-N; later ones are thrown away.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away the run in the folder.")] = False,
    dry_run: Annotated[bool, spelled("dry-run", "Show what would run, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan or the report as JSON.")] = False,
) -> None:
    """Fine-tune a pre-trained MODEL on a task with LoR2C, LoRA or all weights.

    Other fields are overridden by their names: of the data (--text_column, --text_pair_column, --label_column,
    --num_labels, --max_length, --max_train_rows, --validation_data, ...), of the method (--rank, --alpha, --dropout,
    --max_fuses, --max_injections, --criterion, ...), of what is watched (--on_nonfinite, --max_hours, ...) and of
    transformers' TrainingArguments (--learning_rate 1e-3, --num_train_epochs 5, ...).
    """
    from .common import parse_overrides, print_json, quiet_libraries

    given = {"model": model, "task": task, "data": data, "method": method}
    overrides = {name: value for name, value in given.items() if value is not None}
    overrides.update(parse_overrides(context.args))
    quiet_libraries()
    import transformers.trainer  # noqa: F401  its import is the slow part: before any clock runs

    from ..train import build_finetune_recipe, load_finetune_recipe
    from ..train import finetune as training
    from ..train.run_folder import is_main_process

    if recipe is None:
        parsed = build_finetune_recipe({"name": "finetune"}, overrides)
        if "name" not in overrides:
            parsed.name = f"{parsed.data.task or 'own_data'}_{parsed.adapter.method}"
    else:
        parsed = load_finetune_recipe(recipe, overrides)
    folder = output_dir or f"runs/{parsed.name}"
    interrupt.goes_on(folder, resume=resume or resume_from is not None)
    report = training.finetune(
        parsed,
        folder,
        resume=resume,
        resume_from=resume_from,
        overwrite=overwrite,
        dry_run=dry_run,
        show_plan=(lambda plan: print_json(asdict(plan)) if dry_run else None) if as_json else show_plan,
    )
    if report is None or not is_main_process():
        return
    if as_json:
        print_json(report.to_dict())
        return
    show_report(report, folder)


def show_plan(plan: "FinetunePlan") -> None:
    """What was decided, before the first step."""
    from .common import print_summary

    trained = ", ".join(f"{count:,} {name}" for name, count in plan.trained.items() if count)
    labels = f", classes {', '.join(plan.labels[:8])}" if plan.labels else ""
    rows = [
        ("device", f"{plan.device} ({plan.device_reason}), {plan.precision}"),
        ("model", f"{plan.model}, {plan.parameters:,} parameters"),
        ("method", f"{plan.method}: trains {trained}"),
        ("data", f"{plan.source}: {plan.train_rows:,} rows to train, {plan.validation_rows:,} to validate{labels}"),
        ("metrics", f"{', '.join(plan.metrics)} (the first decides which checkpoint is best)"),
        ("steps", f"{plan.steps:,} of {plan.rows_per_step:,} rows"),
    ]
    print_summary(plan.recipe, rows, frame=False)


def show_report(report: "FinetuneReport", folder: str) -> None:
    """The final table, sample answers, and where everything is."""
    from pathlib import Path

    from .common import print_summary

    print_summary(report.recipe["name"], report.rows())
    for sample in report.samples:
        print(f"\n{sample['prompt'].strip()}\n{sample['answer'].strip()}")
    for name, what in (("adapter", "adapter"), ("model", "model"), ("structure.png", "structure")):
        if (Path(folder) / name).exists():
            print(f"{what:11s} {Path(folder) / name}")
    print(f"{'report':11s} {Path(folder) / 'report.md'}")
