"""`crosslayer pretrain`: train a language model from scratch, as a recipe says."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import interrupt
from .options import spelled
from .recipes import recipe_option

if TYPE_CHECKING:
    from ..train.report import RunReport
    from ..train.run import Plan


def pretrain(
    context: typer.Context,
    recipe: Annotated[str, recipe_option("A name that `crosslayer recipes` lists, or a YAML file.")],
    output_dir: Annotated[str | None, spelled("output_dir", "Folder of the run [default: runs/NAME].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    resume_from: Annotated[
        int | None, spelled("resume_from", "Go on from checkpoint-N; later ones are thrown away.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away the run in the folder.")] = False,
    dry_run: Annotated[bool, spelled("dry-run", "Show what would run, then stop.")] = False,
    prompt: Annotated[
        str | None,
        typer.Option(help="Start of the sample at the end [default: 'def ' for python-library, none for the rest]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan or the report as JSON.")] = False,
) -> None:
    """Pre-train a language model as RECIPE says.

    Every field of the recipe can be overridden by its name, for example --learning_rate 1e-3, --hidden_size 256,
    --data ./texts, --per_device_train_batch_size 16. Fields: those of the model configuration (CRNetConfig), of the
    data (--data, --tokenizer, --block_size, ...), the learning-rate factors (--full_rank_lr_factor, ...), what is
    watched (--on_nonfinite, --max_hours, ...) and those of transformers' TrainingArguments. Where two sections know a
    name, write --data.seed.
    """
    from .common import parse_overrides, print_json, quiet_libraries

    overrides = parse_overrides(context.args)
    quiet_libraries()
    import transformers.trainer  # noqa: F401  its import is the slow part: before any clock runs

    from ..train import load_recipe
    from ..train import run as training

    parsed = load_recipe(recipe, overrides)
    folder = output_dir or f"runs/{parsed.name}"
    interrupt.goes_on(folder, resume=resume or resume_from is not None)
    report = training.pretrain(
        parsed,
        folder,
        resume=resume,
        resume_from=resume_from,
        overwrite=overwrite,
        dry_run=dry_run,
        show_plan=(lambda plan: print_json(asdict(plan)) if dry_run else None) if as_json else show_plan,
    )
    if report is None or not training.is_main_process():
        return
    if as_json:
        print_json(report.to_dict())
        return
    show_report(report)
    if prompt is None:
        prompt = "def " if parsed.data.data == "python-library" else ""
    show_sample(report, prompt)
    show_paths(folder)


def show_plan(plan: "Plan") -> None:
    """What was decided, before the first step."""
    from .common import print_summary

    groups = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items() if count)
    train, validation = plan.data["train"], plan.data["validation"]
    rows = [
        ("device", f"{plan.device} ({plan.device_reason}), {plan.precision}"),
        ("parameters", f"{sum(plan.parameters.values()):,}: {groups}"),
        ("dense model", f"{plan.dense_parameters:,} parameters"),
        (
            "data",
            f"{plan.data['source']}: {_count(train['documents'])} documents, {_count(train['tokens'])} tokens to "
            f"train, {_count(validation['tokens'])} to validate, vocabulary {plan.vocab_size:,}",
        ),
    ]
    if plan.data["skipped"]:
        rows.append(("skipped", f"{plan.data['skipped']:,} files or lines that could not be read"))
    if plan.data.get("cut"):
        rows.append(("cut", f"{plan.data['cut']:,} long texts, into documents"))
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in plan.estimated_memory_bytes.items() if size)
    estimate = sum(plan.estimated_memory_bytes.values()) / 2**20
    rows += [
        ("steps", f"{plan.steps:,} of {plan.tokens_per_step:,} tokens = {plan.tokens / 1e6:,.1f}M tokens"),
        ("operations", f"{plan.flops_per_token * plan.tokens:.2e} ({plan.flops_per_token:,} per token)"),
        ("recompute", plan.recompute),
        ("attention", plan.attention),
        ("memory, estimated", f"{estimate:,.0f} MiB: {parts}"),
    ]
    print_summary(plan.recipe, rows, frame=False)


def show_report(report: "RunReport") -> None:
    """The final table, a sample, and where everything is."""
    from .common import print_summary

    print_summary(report.recipe["name"], report.rows())


def show_sample(report: "RunReport", prompt: str) -> None:
    """What the model makes of a prompt."""
    from ..evaluate.sample import sample

    positions = report.model.config.max_position_embeddings
    tokens = len(report.tokenizer(prompt)["input_ids"]) + 1
    if tokens >= positions:
        return  # a long prompt for a model of short texts: the run itself is fine
    text = sample(report.model, report.tokenizer, prompt, max_new_tokens=min(80, positions - tokens), seed=0)
    print(f"\nSample, after {prompt!r}:\n{text}\n" if prompt else f"\nSample:\n{text}\n")


def show_paths(folder: str) -> None:
    """Where everything is."""
    from pathlib import Path

    print(f"checkpoint  {Path(folder) / 'model'}")
    curve = Path(folder) / "loss.png"
    print(f"loss curve  {curve}" if curve.exists() else "loss curve  none: matplotlib is missing (extra 'plots')")
    print(f"report      {Path(folder) / 'report.md'}")


def _count(number: int | None) -> str:
    return "unknown (streamed)" if number is None else f"{number:,}"
