"""The `mmlm` command.

Exit codes: 0 good, 1 failure, 2 wrong usage. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmlm_efficient.cli_bench import BENCH, bench, train_app
from mmlm_efficient.cli_calibrate import app as calibrate_app
from mmlm_efficient.cli_eval import app as eval_app
from mmlm_efficient.cli_paths import checked_png
from mmlm_efficient.errors import MMLMError, SettingsError, require_extra

if TYPE_CHECKING:
    from mmlm_efficient.answers import Answer
    from mmlm_efficient.families.base import Fit
    from mmlm_efficient.model import EfficientLMM
    from mmlm_efficient.pruning.base import Method
    from mmlm_efficient.settings import Config
    from mmlm_efficient.video import Video

app = typer.Typer(
    help="Cheaper LLaVA-style models: visual tokens pruned through public extension points.",
    epilog="Example: mmlm demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(train_app, name="train")
app.add_typer(calibrate_app, name="calibrate")
app.add_typer(eval_app, name="eval")

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
    video: Annotated[Path | None, typer.Option(help="Video file.")] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames to take of the video, evenly spread.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model folder or a hub id; without it, pocket.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method, such as flowcut or flowcut:36; repeat it for several."),
    ] = None,
    method_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--method-set",
            metavar="[NAME.]FIELD=VALUE",
            help="Any setting of the --method, such as position_ids=original or seed=3; with "
            "several methods NAME says of which, such as var.sink_dims=1415,2533. Repeat it for "
            "several settings. mmlm methods lists them.",
        ),
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
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="Folder of the CLIP or SigLIP tower, for a model of the original LLaVA code."
        ),
    ] = None,
    as_json: Json = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print while generating.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="PNG file: draw which patches of the images were kept; with --method var, the "
            "attention sinks (beside other methods in FILE_sinks.png)."
        ),
    ] = None,
) -> None:
    """Ask one question about one or several pictures, or a video."""
    if as_json and stream:
        raise SettingsError("--json and --stream: use one of them.")
    if frames is not None and video is None:
        raise SettingsError("--frames: there is no --video to take them of.")
    if plot is not None:
        if not image and video is None:
            raise SettingsError("--plot: there is no --image and no --video to draw on.")
        plot = checked_png("--plot", plot)
        require_extra("matplotlib", "plots")
    given = {"model": model, "device": device, "dtype": dtype, "quantization": quantization}
    given["vision_tower"] = vision_tower
    budget = {"keep_tokens": keep_tokens, "keep_ratio": keep_ratio}
    settings = _settings(config, given, _methods(method, budget, method_settings))
    if plot is not None:
        settings = settings.model_copy(update={"methods": _drawable(settings.methods)})
    options: dict[str, Any] = {**settings.generation, **_generation(generation)}
    options |= {"max_new_tokens": max_new_tokens} if max_new_tokens is not None else {}
    options |= {"seed": seed} if seed is not None else {}

    from mmlm_efficient.loading import load

    _quiet_transformers(settings.model)
    lmm = load(**settings.load_options())
    images: Any = image or None
    clip = None if video is None else _clip(video, frames, lmm)
    if stream:
        with lmm.stream(question, images, video=clip, **options) as pieces:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
        answer = cast("Answer", pieces.answer)
    else:
        answer = lmm.ask(question, images, video=clip, **options)
    # The answer before the drawing, which may fail.
    if as_json:
        _print_json(answer.to_dict())
    elif not stream:
        sys.stdout.write(answer.text + "\n")
    sys.stdout.flush()
    if plot is not None:
        _draw(answer, image or [], clip, plot, lmm.image_fit)
    if not as_json:
        Console(stderr=True).print(_summary(answer), style="dim")


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
    names: list[str] | None, budget: dict[str, Any], pairs: list[str] | None
) -> list[Any] | None:
    """What --method says, with the settings that other options add to it."""
    budget = {name: value for name, value in budget.items() if value is not None}
    added = _assignments("--method-set", pairs, "position_ids=original")
    if not budget and not added:
        return names
    if budget and (names is None or len(names) != 1 or ":" in names[0]):
        raise SettingsError(
            f"--{next(iter(budget)).replace('_', '-')}: belongs to one --method without a budget "
            "of its own, such as --method flowcut --keep-tokens 36."
        )
    if names is None:
        raise SettingsError(
            "--method-set: belongs to a --method, such as --method flowcut:36 "
            "--method-set position_ids=original."
        )
    settings = _by_method([name.partition(":")[0].strip() for name in names], added)
    return [
        _with_settings(name, budget, own) if budget or own else name
        for name, own in zip(names, settings, strict=True)
    ]


def _with_settings(text: str, budget: dict[str, Any], added: dict[str, Any]) -> Method:
    """The method of one --method, with a budget of its own or another option's, and settings."""
    from mmlm_efficient.pruning.registry import method_class
    from mmlm_efficient.settings import parse_method

    name, colon, _ = text.partition(":")
    if colon:
        method = parse_method(text)
        budget = {field: getattr(method, field) for field in method.model_fields_set}
    for field in budget.keys() & added.keys():
        raise SettingsError(f"--method-set {field}: is given twice. Leave one of them out.")
    return method_class(name.strip())(**budget, **added)


def _by_method(names: list[str], added: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings FIELD and NAME.FIELD of --method-set, for each method."""
    from mmlm_efficient.errors import nearest

    settings: list[dict[str, Any]] = [{} for _ in names]
    for key, value in added.items():
        name, dot, field = key.rpartition(".")
        if dot and not (name and field):
            raise SettingsError(f"--method-set {key!r}: write NAME.FIELD=VALUE or FIELD=VALUE.")
        if not dot and len(names) > 1:
            raise SettingsError(
                f"--method-set {field}: there are several methods. Name the one that it belongs "
                f"to: --method-set {_named_forms(names, field)}."
            )
        places = [place for place, one in enumerate(names) if not dot or one == name]
        if not places:
            close = nearest(name, names)
            hint = f" Did you mean {close!r}?" if close else ""
            raise SettingsError(
                f"--method-set {key}: {name!r} is not among the --method options.{hint} Given: "
                f"{', '.join(names)}."
            )
        if len(places) > 1:
            raise SettingsError(
                f"--method-set {key}: there are {len(places)} methods {name!r}. Give one of them."
            )
        if field in settings[places[0]]:
            raise SettingsError(f"--method-set {field}: is given twice. Leave one of them out.")
        settings[places[0]][field] = value
    return settings


def _named_forms(names: list[str], field: str) -> str:
    """How to write a setting of one of several methods: of those that have it, if any."""
    from mmlm_efficient.pruning.registry import method_class

    own = [name for name in names if field in method_class(name).model_fields]
    return " or ".join(f"{name}.{field}=VALUE" for name in dict.fromkeys(own or names))


def _generation(pairs: list[str] | None) -> dict[str, Any]:
    from mmlm_efficient.settings import Config

    values = _assignments("--set", pairs, "do_sample=true")
    return Config.read({"generation": values}, "--set").generation


def _assignments(option: str, pairs: list[str] | None, example: str) -> dict[str, Any]:
    """NAME=VALUE of a repeatable option; the values are read as YAML."""
    import yaml

    values: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingsError(f"{option} {pair}: write NAME=VALUE, such as {example}.")
        if name.strip() in values:
            raise SettingsError(f"{option} {name.strip()}: is given twice. Leave one of them out.")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as the 32nd of a month
            raise SettingsError(
                f"{option} {pair:.80}: the value is not valid YAML: {error}"
            ) from error
    return values


def _summary(answer: Answer) -> str:
    usage = answer.usage
    first_ms = (usage.preprocess_s + usage.tower_s + usage.prefill_s) * 1e3
    return (
        f"{usage.visual_tokens_kept['bridge']} of {usage.visual_tokens_in} visual tokens, "
        f"{usage.prompt_tokens} prompt tokens, {usage.kv_bytes:,} bytes of keys and values, "
        f"first token after {first_ms:.0f} ms, then {usage.tokens_per_s:.0f} tokens/s"
    )


def _clip(path: Path, frames: int | None, lmm: EfficientLMM) -> Video:
    from mmlm_efficient.video import FrameSampling, load_video

    sampling = lmm.sampling if frames is None else FrameSampling(frames=frames)
    return load_video(path, sampling)


def _drawable(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    """The methods, with what a drawing needs to know switched on."""
    return tuple(
        one.model_copy(update={"return_stats": True})
        if "return_stats" in type(one).model_fields
        else one
        for one in methods
    )


def _draw(answer: Answer, images: list[Path], clip: Video | None, path: Path, fit: Fit) -> None:
    from mmlm_efficient.plot_grids import is_video
    from mmlm_efficient.plots import Panel, kept_tokens_panel

    reports = answer.report.images
    shown: list[Any] = list(images)
    if clip is not None:  # one video, or as many pictures as it has frames
        shown += [clip] if is_video(reports[-1]) else clip.frames
    names = ", ".join(answer.report.methods) or "nothing pruned"
    sinks = path
    if not answer.report.redistribution or set(answer.report.methods) - {"var", "none"}:
        panels = [Panel(one, report, fit=fit) for one, report in zip(shown, reports, strict=True)]
        kept_tokens_panel(panels, path, names)
        Console(stderr=True).print(f"drew {path}", style="dim")
        sinks = path.with_stem(f"{path.stem}_sinks")
    if answer.report.redistribution:
        from mmlm_efficient.sinks.plots import attention_panel

        for place, one in enumerate(shown):
            target = sinks.with_stem(f"{sinks.stem}_{place + 1}") if place else sinks
            title = names if len(shown) == 1 else f"{names}: picture {place + 1} of {len(shown)}"
            attention_panel(one, answer.report, target, title, image=place, fit=fit)
            Console(stderr=True).print(f"drew {target}", style="dim")


def _quiet_transformers(model: str) -> None:
    """No progress bar for weights that are read in a moment."""
    if model == "pocket":
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


# demo


@app.command(epilog="Example: mmlm demo --scene 26 --output kept.png")
def demo(
    scene: Annotated[int, typer.Option(min=0, help="Number of the held-out scene.")] = 56,
    output: Annotated[Path, typer.Option(help="PNG file of the kept patches.")] = Path(
        "outputs/demo_kept_tokens.png"
    ),
    model: Annotated[str, typer.Option(help="A model that knows pocket's objects.")] = "pocket",
    as_json: Json = False,
) -> None:
    """One scene, four questions: the answers with and without pruning, and what they cost."""
    output = checked_png("--output", output)
    require_extra("matplotlib", "plots")
    from tqdm import tqdm

    from mmlm_efficient.demo import run_demo, show_demo
    from mmlm_efficient.loading import load

    _quiet_transformers(model)
    lmm = load(model)
    result = run_demo(
        lmm, scene, lambda methods: tqdm(methods, unit="method", leave=False, file=sys.stderr)
    )
    files: list[str] = []
    try:
        files = [str(path) for path in result.draw(output)]
    finally:  # what was measured is shown even if it cannot be drawn
        if as_json:
            _print_json({**result.to_dict(), "files": files})
        else:
            show_demo(result, files, _console())


# models, methods


@app.command(epilog="Example: mmlm models --json")
def models(as_json: Json = False) -> None:
    """What `--model` and `--config` take: the embedded model, supported families, presets."""
    from mmlm_efficient.families import FAMILIES
    from mmlm_efficient.loading import missing_files
    from mmlm_efficient.names import POCKET, POCKET_WEIGHTS
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


app.command(**BENCH)(bench)
