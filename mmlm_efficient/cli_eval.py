"""The `mmlm eval` commands."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmlm_efficient.cli_paths import check_folder
from mmlm_efficient.errors import SettingsError

if TYPE_CHECKING:
    from eval.plan import EvalConfig
    from eval.runner import RunResult

STOPPED = 130  # as shells say it of a command that Ctrl-C ended

app = typer.Typer(
    help="Accuracy, tokens, time and memory of methods on tasks, in one run and one report.",
    epilog="Example: mmlm eval --model pocket --methods flowcut:36,random:36 "
    "--tasks mmlm_pocket_vqa --limit 200",
    invoke_without_command=True,
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.callback()
def evaluate(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(help="YAML file or preset, such as pocket; other options win over it."),
    ] = None,
    runs: Annotated[
        list[str] | None, typer.Option(help="Of a --config with several models, the runs to do.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="'pocket', a model folder or a hub id.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows, such as flowcut:64,vflowopt:0.25 or flowcut:72+fastv:36 for two methods "
            "together. The unpruned model is always there."
        ),
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(help="For methods without one of their own: 0.5,0.25 or 64,32."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks, bundled or of lmms-eval: mmlm_pocket_vqa,gqa.")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="Folder with YAMLs of further tasks; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Ids of single samples: 0007-list,0012; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; without it, in outputs/eval.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped or killed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List every run and what this machine lacks for it.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples at once.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling and of random methods.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="int8 or nf4: the language model's weights.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray workers, each with a model; 0 does without Ray.")
    ] = 0,
    ray_address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; without it, Ray on this machine.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each process with a model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run methods x budgets x tasks and write report.json, report.md and report.html.

    Exit codes: 0 all good, 1 failed, 2 wrong usage, 3 finished with failed samples.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    from eval.plan import config_from_options

    if config is None and tasks is None:
        raise SettingsError(
            "eval: there is nothing to run. Give --config pocket, or --tasks; `mmlm eval tasks` "
            "lists the bundled ones."
        )
    if ray_address is not None and workers == 0:
        raise SettingsError("--ray-address: give --workers too, such as --workers 4.")
    plan = config_from_options(
        config=config,
        runs=_names(_joined(runs)),
        model=model,
        methods=_joined(methods),
        budgets=_joined(budgets),
        tasks=_joined(tasks),
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        quantization=quantization,
        lenient=dry_run,
    )
    if dry_run:
        _dry_run(plan, as_json)
        return
    from eval.runner import Options, run_eval

    name = plan.name if config is not None else f"{plan.name}-{_first_task(plan)}"
    target = Path(os.path.expanduser(out or Path("outputs/eval") / name))
    if target.exists() and not target.is_dir():
        raise SettingsError(f"--out {target}: is a file. Give a folder.")
    check_folder(f"--out {target}", target)
    options = Options(
        out=target,
        resume=resume,
        only=_only(only),
        workers=workers,
        ray_address=ray_address,
        threads=threads,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left running
    try:
        result = run_eval(plan, options)
    except KeyboardInterrupt:
        _complain("eval: stopped. All answers are kept: the same command with --resume goes on.")
        raise typer.Exit(STOPPED) from None
    if as_json:
        sys.stdout.write(json.dumps(result.report, indent=2) + "\n")
    else:
        _show(result)
    _tell_failures(result)
    raise typer.Exit(result.exit_code)


def _first_task(plan: EvalConfig) -> str:
    """What to call the folder of a run that has no name: its first task, and whether there are
    more."""
    entries = [entry for group in plan.jobs()[0].tasks for entry in group]
    return entries[0] + ("-and-more" if len(entries) > 1 else "")


def _refuse_options(context: typer.Context) -> None:
    """Options of a run in front of a command that runs nothing."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, one in sources.items() if one and one.name == "COMMANDLINE"]
    if given:
        raise SettingsError(
            f"eval: --{given[0].replace('_', '-')} belongs to a run. Write the options of "
            f"{context.invoked_subcommand} behind its name."
        )


def _only(given: list[str] | None) -> tuple[str, ...]:
    found = tuple(name for text in given or () for name in _names(text) or ())
    if given is not None and not found:
        raise SettingsError("--only: names no sample. Leave it out to run all.")
    return found


def _joined(values: list[str] | None) -> str | None:
    """An option given several times is one list."""
    return None if values is None else ",".join(values)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [one.strip() for one in text.split(",") if one.strip()]


def _dry_run(plan: Any, as_json: bool) -> None:
    from eval.dry_run import dry_run, dry_run_table

    planned = dry_run(plan)
    if as_json:
        sys.stdout.write(json.dumps([one.to_dict() for one in planned], indent=2) + "\n")
        return
    _console().print(dry_run_table(planned))


def _console() -> Console:
    """Standard output; pipes get lines long enough for a table."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _show(result: RunResult) -> None:
    """The table of each task, then where the report is."""
    console = _console()
    for task in result.report["tasks"]:
        console.print(_task_table(task))
    for path in result.files:
        console.print(f"written: {path}", highlight=False, style="dim", markup=False)


def _tell_failures(result: RunResult) -> None:
    """What went wrong, on standard error."""
    for task in result.report["tasks"]:
        where = f"{task['run']}, {task['task']}"
        for one in task["failures"]:
            if one["id"] is None:
                _complain(f"{where}: row {one['row']} has no figure: {one['message']}")
        failed = sum(row["failed"] for row in task["rows"])
        first = next((one for one in task["failures"] if one["id"] is not None), None)
        if failed and first is not None:
            _complain(
                f"{where}: {failed} answer{'s' if failed > 1 else ''} failed, the first of row "
                f"{first['row']} for sample {first['id']}: {first['type']}: {first['message']}. "
                "--resume asks again."
            )
        for row in task["rows"]:
            if row["samples"] and row["empty"] > row["samples"] / 2:
                _complain(
                    f"{where}: row {row['row']} answered {row['empty']} of {row['samples']} "
                    "samples with nothing. Does the prompt suit the model?"
                )
    for trouble in result.troubles:
        _complain(", ".join(filter(None, [trouble.run, trouble.task])) + f": {trouble.error}")


def _complain(text: str) -> None:
    Console(stderr=True).print(f"mmlm: {text}", style="bold red", markup=False, soft_wrap=True)


def _task_table(task: dict[str, Any]) -> Table:
    from eval.report import shown_score

    table = Table(
        "row",
        task["metric"],
        "95 %",
        "to unpruned",
        "tokens",
        "per layer",
        "first token ms",
        "tokens/s",
        "KV MiB",
        "failed",
        title=f"{task['task']}: {task['samples']} samples",
    )
    for row in task["rows"]:
        table.add_row(row["row"], *shown_score(task, row), *_costs(row))
    return table


def _costs(row: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str, factor: float = 1.0) -> str:
        return "–" if value is None else format(value * factor, form)

    return [
        number(row["visual_tokens_kept"], ".0f"),
        number(row["visual_tokens_mean"], ".1f"),
        number((row["ttft_s"] or {}).get("median"), ".1f", 1e3),
        number(row["decode_tokens_per_s"], ".0f"),
        number(row["kv_bytes"], ".2f", 2**-20),
        str(row["failed"]),
    ]


@app.command(epilog="Example: mmlm eval compare outputs/eval/before outputs/eval/after")
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.json, compare.md and compare.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put two runs side by side, sample by sample where both asked the same."""
    from eval.compare import compare as compared
    from eval.compare import compare_tables, write_comparison

    result = compared(first, second)
    if out is not None:
        check_folder(f"--out {out}", Path(os.path.expanduser(out)))
    console = _console()
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        for table in compare_tables(result):
            console.print(table)
    if out is not None:
        for path in write_comparison(Path(os.path.expanduser(out)), result):
            Console(stderr=True).print(f"written: {path}", style="dim", markup=False)


@app.command(epilog="Example: mmlm eval report outputs/eval/pocket")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or its report.json.")],
) -> None:
    """Write a run's report again from its report.json, such as after an update."""
    from eval.report import read_report, report_folder, write_report

    for path in write_report(report_folder(folder), read_report(folder)):
        sys.stdout.write(f"{path}\n")


@app.command(epilog="Example: mmlm eval tasks --json")
def tasks(
    include_path: Annotated[
        list[Path] | None, typer.Option(help="Folder with YAMLs of further tasks; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the tasks that need no lmms-eval; its own are taken by their names too."""
    from eval.find_tasks import task_table

    rows = task_table(include_path or ())
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table("task", "samples", "metric", "source")
    for row in rows:
        table.add_row(str(row["task"]), str(row["samples"]), str(row["metric"]), str(row["source"]))
    _console().print(table)
    _console().print("Any task of lmms-eval works by its name where lmms-eval is installed.")
