"""The `mmlm` command.

Exit codes: 0 good, 1 failure, 2 wrong usage. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmlm_efficient.errors import MMLMError, SettingsError, nearest, require_extra

if TYPE_CHECKING:
    from mmlm_efficient.answers import Answer
    from mmlm_efficient.demo import Demo
    from mmlm_efficient.settings import Config

app = typer.Typer(
    help="Cheaper LLaVA-style models: visual tokens pruned through public extension points.",
    epilog="Example: mmlm demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
train_app = typer.Typer(
    help="Train the models that this package ships.",
    epilog="Example: mmlm train pocket",
    no_args_is_help=True,
)
app.add_typer(train_app, name="train")

# Programs beside the benchmarks that measure nothing.
_NO_BENCHMARKS = ("readme_tables",)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def main() -> NoReturn:
    """Run the command line; our own errors become one message and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app(prog_name="mmlm")
    except SettingsError as error:
        _complain(error)
        sys.exit(2)
    except MMLMError as error:
        _complain(error)
        sys.exit(1)
    sys.exit(0)


def _complain(error: MMLMError) -> None:
    Console(stderr=True).print(Text(f"mmlm: {error}", style="bold red"), soft_wrap=True)


def _console() -> Console:
    """Standard output; pipes get lines long enough for a table."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


# ask


@app.command(
    epilog="Example: mmlm ask --image scene.png --question 'Where is the cat?' "
    "--method flowcut --keep-tokens 36"
)
def ask(
    question: Annotated[str, typer.Option(help="What you want to know.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture file; repeat it for several.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model folder or a hub id; without it, pocket.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method, such as flowcut or flowcut:36; repeat it for several."),
    ] = None,
    keep_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens to keep per image.")
    ] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Share of the visual tokens to keep, 0 to 1.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML file or preset; other options win over it.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens; without it, 64.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    generation: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Argument of generate(), such as do_sample=true."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="int8 or nf4: the language model's weights.")
    ] = None,
    as_json: Json = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print while generating.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file: draw which patches of the images were kept.")
    ] = None,
) -> None:
    """Ask one question about one or several pictures."""
    if as_json and stream:
        raise SettingsError("--json and --stream: use one of them.")
    if plot is not None:
        if not image:
            raise SettingsError("--plot: there is no --image to draw on.")
        _check_png("--plot", plot)
        require_extra("matplotlib", "plots")
    given = {"model": model, "device": device, "dtype": dtype, "quantization": quantization}
    settings = _settings(config, given, _methods(method, keep_tokens, keep_ratio))
    options: dict[str, Any] = {**settings.generation, **_assignments(generation)}
    options |= {"max_new_tokens": max_new_tokens} if max_new_tokens is not None else {}
    options |= {"seed": seed} if seed is not None else {}

    from mmlm_efficient.loading import load

    _quiet_transformers(settings.model)
    lmm = load(**settings.load_options())
    images: Any = image or None
    with _refusals(options):
        if stream:
            with lmm.stream(question, images, **options) as pieces:
                for piece in pieces:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            sys.stdout.write("\n")
            answer = cast("Answer", pieces.answer)
        else:
            answer = lmm.ask(question, images, **options)
    if plot is not None:
        _draw(answer, image or [], plot, lmm.image_fit)
    if as_json:
        _print_json(answer.to_dict())
        return
    if not stream:
        sys.stdout.write(answer.text + "\n")
    Console(stderr=True).print(_summary(answer), style="dim")


@contextmanager
def _refusals(options: dict[str, Any]) -> Iterator[None]:
    """What transformers refuses about generation settings is wrong usage, not a failure."""
    try:
        yield
    except MMLMError:
        raise
    except (ValueError, TypeError) as error:
        names = [name for name in options if name not in ("max_new_tokens", "seed")]
        if not names:
            raise
        raise SettingsError(f"generation settings ({', '.join(names)}): {error}") from error


def _check_png(option: str, path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise SettingsError(f"{option} {path}: must end in '.png'.")


def _settings(name: str | None, given: dict[str, Any], methods: list[Any] | None) -> Config:
    """The config file or preset, with what was given on the command line in its place."""
    from mmlm_efficient.settings import Config, load_config

    base = Config() if name is None else load_config(name)
    changes = {key: value for key, value in given.items() if value is not None}
    if methods is not None:
        changes["methods"] = methods
    fields = {key: getattr(base, key) for key in Config.model_fields}
    return Config.read({**fields, **changes}, "command line")


def _methods(
    names: list[str] | None, keep_tokens: int | None, keep_ratio: float | None
) -> list[Any] | None:
    budget = {
        name: value
        for name, value in (("keep_tokens", keep_tokens), ("keep_ratio", keep_ratio))
        if value is not None
    }
    if not budget:
        return None if names is None else list(names)
    if names is None or len(names) != 1 or ":" in names[0]:
        raise SettingsError(
            f"--{next(iter(budget)).replace('_', '-')}: belongs to one --method without a budget "
            "of its own, such as --method flowcut --keep-tokens 36."
        )
    return [{"name": names[0], **budget}]


def _assignments(pairs: list[str] | None) -> dict[str, Any]:
    import yaml

    from mmlm_efficient.settings import Config

    values = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingsError(f"--set {pair}: write NAME=VALUE, such as do_sample=true.")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {pair}: the value is not valid YAML: {error}") from error
    return Config.read({"generation": values}, "--set").generation


def _summary(answer: Answer) -> str:
    usage = answer.usage
    first_ms = (usage.preprocess_s + usage.tower_s + usage.prefill_s) * 1e3
    return (
        f"{usage.visual_tokens_kept['bridge']} of {usage.visual_tokens_in} visual tokens, "
        f"{usage.prompt_tokens} prompt tokens, {usage.kv_bytes:,} bytes of keys and values, "
        f"first token after {first_ms:.0f} ms, then {usage.tokens_per_s:.0f} tokens/s"
    )


def _draw(answer: Answer, images: list[Path], path: Path, fit: Literal["crop", "stretch"]) -> None:
    from mmlm_efficient.plots import Panel, kept_tokens_panel

    panels = [
        Panel(file, report, fit=fit)
        for file, report in zip(images, answer.report.images, strict=True)
    ]
    kept_tokens_panel(panels, path, ", ".join(answer.report.methods) or "nothing pruned")
    Console(stderr=True).print(f"drew {path}", style="dim")


def _quiet_transformers(model: str) -> None:
    """No progress bar for weights that are read in a moment."""
    if model == "pocket":
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


# demo


@app.command(epilog="Example: mmlm demo --scene 26 --output kept.png")
def demo(
    scene: Annotated[int, typer.Option(min=0, help="Number of the held-out scene.")] = 47,
    output: Annotated[Path, typer.Option(help="PNG file of the kept patches.")] = Path(
        "outputs/demo_kept_tokens.png"
    ),
    model: Annotated[str, typer.Option(help="A model that knows pocket's objects.")] = "pocket",
    as_json: Json = False,
) -> None:
    """One scene, four questions: the answers with and without pruning, and what they cost."""
    _check_png("--output", output)
    require_extra("matplotlib", "plots")
    from tqdm import tqdm

    from mmlm_efficient.demo import run_demo
    from mmlm_efficient.loading import load

    _quiet_transformers(model)
    lmm = load(model)
    result = run_demo(
        lmm, scene, lambda methods: tqdm(methods, unit="method", leave=False, file=sys.stderr)
    )
    files = [str(path) for path in result.draw(output)]
    if as_json:
        _print_json({**result.to_dict(), "files": files})
    else:
        _show_demo(result, files)


def _show_demo(result: Demo, files: list[str]) -> None:
    console = _console()
    total = result.rows[0].kept
    console.print(
        f"Scene {result.scene.index} (held out, {len(result.scene.objects)} objects, "
        f"{total} visual tokens). Questions and right answers:"
    )
    for number, one in enumerate(result.questions, 1):
        console.print(f"  {number}. {one.text}  ->  {one.answer}", markup=False, highlight=False)
    table = Table()
    table.add_column("method")
    table.add_column("tokens kept", justify="right")
    table.add_column("KV bytes", justify="right")
    table.add_column("tower ms", justify="right")
    table.add_column("prefill ms", justify="right")
    for number in range(len(result.questions)):
        table.add_column(f"answer {number + 1}")
    for row in result.rows:
        name = "unpruned" if row.method == "none" else row.method.split(":")[0]
        cells = [
            Text(_short(answer.text), style="green" if right else "red strike")
            if console.is_terminal
            else Text(("" if right else "x ") + _short(answer.text))
            for answer, right in zip(row.answers, row.right, strict=True)
        ]
        table.add_row(
            name,
            f"{row.kept} ({row.kept / total:.1%})",
            f"{row.kv_bytes:,}",
            f"{row.tower_ms:.1f}",
            f"{row.prefill_ms:.1f}",
            *cells,
            end_section=row.method in ("none", "flowcut:0.125"),
        )
    console.print(table)
    console.print(
        "Wrong answers are struck out." if console.is_terminal else "x: a wrong answer.",
        "Times are medians over the questions; FlowCut prunes inside the tower.",
    )
    for path in files:
        console.print(f"Drew {path}", markup=False, highlight=False, soft_wrap=True)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


# models, methods


@app.command(epilog="Example: mmlm models --json")
def models(as_json: Json = False) -> None:
    """What `--model` and `--config` take: the embedded model, supported families, presets."""
    from mmlm_efficient.families import FAMILIES
    from mmlm_efficient.loading import POCKET, POCKET_WEIGHTS, missing_files
    from mmlm_efficient.settings import preset_names

    missing = missing_files(POCKET_WEIGHTS)
    if as_json:
        _print_json(
            {
                "embedded": [{"name": POCKET, "missing": missing}],
                "families": [{"name": one.name, "models": one.describes} for one in FAMILIES],
                "presets": preset_names(),
            }
        )
        return
    console = _console()
    state = f"missing: {'; '.join(missing)}" if missing else "ready"
    table = Table("model", "what it is")
    table.add_row(POCKET, Text(f"embedded, a small LLaVA that was trained on scenes ({state})"))
    for family in FAMILIES:
        table.add_row(f"any {family.name}", Text(f"folder or hub id: {family.describes}"))
    console.print(table)
    console.print(f"Presets for --config: {', '.join(preset_names())}", highlight=False)


@app.command(epilog="Example: mmlm methods")
def methods(as_json: Json = False) -> None:
    """Every method: its paper, the stations where it works, the model families it knows."""
    from mmlm_efficient.pruning.registry import METHODS

    rows = [
        {
            "name": name,
            "paper": cls.paper,
            "stations": list(cls.stations),
            "families": cls.families if cls.families == "all" else list(cls.families),
            "options": {
                option: field.description or "" for option, field in cls.model_fields.items()
            },
        }
        for name, cls in METHODS.items()
    ]
    if as_json:
        _print_json(rows)
        return
    table = Table("method", "paper", "stations", "families", "options")
    for row in rows:
        families = row["families"]
        table.add_row(
            str(row["name"]),
            Text(str(row["paper"]) or "-"),
            ", ".join(row["stations"]) or "-",
            families if isinstance(families, str) else ", ".join(families),
            ", ".join(row["options"]) or "-",
        )
    _console().print(table)


# train, bench


@train_app.command("pocket", epilog="Example: mmlm train pocket --out runs/pocket --threads 2")
def train_pocket(
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints, logs and the finished weights.")
    ] = Path("runs/pocket"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    scale: Annotated[float, typer.Option(help="Share of the steps; below 1 for a trial.")] = 1.0,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Then measure its accuracy on held-out scenes.")
    ] = False,
) -> None:
    """Train the embedded model again; a killed run goes on where it was."""
    if evaluate:
        _check_benchmark("pocket_accuracy", "--evaluate")  # now, not after hours

    from mmlm_efficient.pocket import train

    logging.getLogger("mmlm_efficient").setLevel(logging.INFO)
    folder = train.train_pocket(out, seed=seed, threads=threads, scale=scale)
    sys.stdout.write(f"{folder}\n")
    if evaluate:
        result = str(out / "accuracy.json")
        arguments = ["--model", str(folder), "--methods", "none", "--out", result]
        _run_benchmark("pocket_accuracy", [*arguments, "--threads", str(threads)])


# Not interspersed: what follows the name, --help too, is the benchmark's own.
@app.command(
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False},
    epilog="Example: mmlm bench flowcut --out outputs/flowcut_bench.json",
)
def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(help="Benchmark; mmlm bench flowcut --help shows the options of flowcut."),
    ],
) -> None:
    """Run a benchmark of the checkout; what follows its name is passed on to it."""
    _check_benchmark(name, "bench")
    _run_benchmark(name, context.args)


def _check_benchmark(name: str, where: str) -> None:
    """Refuse a benchmark that this installation does not have."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    known = sorted(
        file.stem
        for file in folder.glob("*.py")
        if file.stem not in _NO_BENCHMARKS and "def main(" in file.read_text(encoding="utf-8")
    )
    if not known:
        raise SettingsError(
            f"{where}: benchmarks are not part of the installed package. Clone the repository and "
            "run `make bench` there, or install it with pip install -e ."
        )
    if name not in known:
        close = nearest(name, known)
        hint = f" Did you mean {close!r}?" if close else ""
        raise SettingsError(f"{where}: {name!r} is unknown; there are {', '.join(known)}.{hint}")


def _run_benchmark(name: str, arguments: list[str]) -> NoReturn:
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    raise typer.Exit(importlib.import_module(f"benchmarks.{name}").main(arguments) or 0)
