"""The `mmlm calibrate` commands."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from mmlm_efficient.cli_paths import check_folder, reason
from mmlm_efficient.errors import MMLMError, SettingsError, require_extra

if TYPE_CHECKING:
    from mmlm_efficient.sinks.profiles import SinkProfile

app = typer.Typer(
    help="Find out what a method needs to know about a model.",
    epilog="Example: mmlm calibrate vflowopt --model pocket --data pocket --budget 0.25",
    no_args_is_help=True,
)


@app.callback()
def _group() -> None:
    """Find out what a method needs to know about a model."""


@app.command(
    epilog="Example: mmlm calibrate vflowopt --model llava-hf/llava-1.5-7b-hf --data pictures/ "
    "--budget 0.25 --device cuda"
)
def vflowopt(
    data: Annotated[
        str,
        typer.Option(
            help="Folder of pictures (with or without a questions.jsonl), a .jsonl file of images "
            "and questions, or 'pocket' for its calibration scenes."
        ),
    ],
    budget: Annotated[
        float, typer.Option(help="Mean kept share of the visual tokens over layers, 0 to 1.")
    ],
    model: Annotated[str, typer.Option(help="'pocket', a model folder or a hub id.")] = "pocket",
    out: Annotated[
        Path | None,
        typer.Option(help="Profile to write (YAML); log and PNG lie beside it."),
    ] = None,
    evaluations: Annotated[
        int, typer.Option(min=1, help="Schedules to try; 300 is thorough.")
    ] = 50,
    initial: Annotated[
        int, typer.Option(min=1, help="Of them, spread over the space before the search learns.")
    ] = 27,
    samples: Annotated[int, typer.Option(min=2, help="Prompts to compare on.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the draw of samples and of the search.")] = 42,
    space: Annotated[
        str, typer.Option(help="'budget' (always on budget) or 'released' (the authors' box).")
    ] = "budget",
    stage_layers: Annotated[
        str | None, typer.Option(help="Two decoder layers to cut at, such as 9-18.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Search VFlowOpt's schedule for a model and a budget; a killed search goes on."""
    if not 0.0 < budget < 1.0:
        raise SettingsError(f"--budget {budget}: must lie between 0 and 1, such as 0.25.")
    if space not in ("budget", "released"):
        raise SettingsError(f"--space {space}: must be 'budget' or 'released'.")
    layers = _layers(stage_layers)
    name = model.rstrip("/").rpartition("/")[2]
    target = Path(os.path.expanduser(out or Path(f"outputs/vflowopt-{name}-{budget:g}.yaml")))
    _check_target(target)
    require_extra("optuna", "calibrate")
    require_extra("matplotlib", "plots")

    from mmlm_efficient.calibration.data import find_samples

    found = find_samples(data, samples, seed)

    import torch

    from mmlm_efficient.calibration.search import plot_search
    from mmlm_efficient.calibration.vflowopt import optimize_profile, write_profile
    from mmlm_efficient.loading import load

    if threads is not None:
        torch.set_num_threads(threads)
    log = target.with_suffix(".search.jsonl")
    with load(model, device=device, dtype=dtype) as lmm:
        try:
            outcome = optimize_profile(
                lmm,
                found,
                budget,
                n_evaluations=evaluations,
                n_initial_points=min(initial, evaluations),
                seed=seed,
                space=cast('Literal["budget", "released"]', space),
                stage_layers=layers,
                log_path=log,
            )
            write_profile(outcome.profile, target)
            plot_search(outcome.result, target.with_suffix(".png"))
        except MMLMError:
            raise
        except OSError as error:  # such as a full disk
            raise MMLMError(
                f"--out {target}: {error}. The same command goes on from there."
            ) from error
    profile, count = outcome.profile, len(outcome.result.evaluations)
    summary: dict[str, Any] = {
        "profile": str(target),
        "picture": str(target.with_suffix(".png")),
        "log": str(log),
        "keep_ratio": profile.keep_ratio,
        "samples": len(found),
        "evaluations": count,
        "resumed": outcome.result.resumed,
        "mean_cosine": outcome.mean,
        "least_cosine": outcome.least,
        "untuned_mean_cosine": outcome.untuned_mean,
    }
    if as_json:
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
        return
    sys.stdout.write(
        f"{count} evaluations, {outcome.result.resumed} of them resumed from {log}\n"
        f"mean cosine with the unpruned model {outcome.mean:.4f} (untuned schedule "
        f"{outcome.untuned_mean:.4f}), {len(found)} samples\n"
    )
    if profile.keep_ratio != budget:  # the authors' box may leave a part of it unspent
        sys.stdout.write(
            f"the best schedule keeps {profile.keep_ratio:g} on average, the budget is {budget:g}\n"
        )
    sys.stdout.write(
        f"written: {target}, {target.with_suffix('.png')}\n"
        f"use it: VFlowOpt(keep_ratio={profile.keep_ratio!r}, profile={str(target)!r})\n"
    )


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, dash, second = text.partition("-")
    if not dash or not first.strip().isdigit() or not second.strip().isdigit():
        raise SettingsError(f"--stage-layers {text}: write two layers, such as 9-18.")
    return int(first), int(second)


def _check_target(target: Path) -> None:
    """Refuse now what could not be written after the work."""
    if target.suffix.lower() not in (".yaml", ".yml"):
        raise SettingsError(f"--out {target}: must end in '.yaml'.")
    if target.is_dir():
        raise SettingsError(f"--out {target}: is a folder. Give the path of a YAML file.")
    check_folder(f"--out {target}", target.parent)


# -- sinks -----------------------------------------------------------------------------------


@app.command(
    epilog="Example: mmlm calibrate sinks --model llava-hf/llava-1.5-7b-hf --images pictures/ "
    "--device cuda"
)
def sinks(
    images: Annotated[
        str,
        typer.Option(
            help="Folder of pictures (with or without a questions.jsonl), a .jsonl file of images "
            "and questions, or 'pocket' for its calibration scenes."
        ),
    ],
    model: Annotated[str, typer.Option(help="'pocket', a model folder or a hub id.")] = "pocket",
    out: Annotated[
        Path | None, typer.Option(help="Profile to write (YAML); a PNG lies beside it.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Prompts to look at; 32 or more.")] = 32,
    threshold: Annotated[
        float | None,
        typer.Option(help="Least |x| / RMS(x) of a sink; 20 for wide models by default."),
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(help="Dimensions to check instead of searching some, such as 1415,2533."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of samples.")] = 42,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="int8 or nf4: for the model with these weights, not the plain one."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Find the hidden dimensions in which a model's attention sinks are massive, for VAR."""
    chosen = _dims(dims)
    name = model.rstrip("/").rpartition("/")[2]
    name = name if quantization is None else f"{name}-{quantization}"
    target = Path(os.path.expanduser(out or Path(f"outputs/sinks-{name}.yaml")))
    _check_target(target)
    _check_own(target)
    picture = target.with_suffix(".png")
    require_extra("matplotlib", "plots")

    from mmlm_efficient.calibration.data import find_samples

    found = find_samples(images, samples, seed)

    import torch

    from mmlm_efficient.calibration.sinks import calibrate_sinks
    from mmlm_efficient.calibration.sinks_plot import plot_sinks
    from mmlm_efficient.loading import load
    from mmlm_efficient.plots import write_png
    from mmlm_efficient.sinks.profiles import write_profile

    if threads is not None:
        torch.set_num_threads(threads)
    weights: Any = quantization  # `load` refuses what it does not know
    with load(model, device=device, dtype=dtype, quantization=weights) as lmm:
        result = calibrate_sinks(lmm, found, threshold=threshold, dims=chosen)
    try:
        drawn = plot_sinks(result)
        write_profile(result.profile, target)
        write_png(picture, drawn)
    except OSError as error:  # such as a full disk
        raise MMLMError(f"--out {target}: cannot be written ({reason(error)}).") from error
    _tell_sinks(result.profile, len(found), target, picture, as_json)


def _tell_sinks(
    profile: SinkProfile, samples: int, target: Path, picture: Path, as_json: bool
) -> None:
    """What was found, for people or scripts."""
    if as_json:
        shown = {"model", "dims", "threshold", "visual_only", "attention_ratio", "warnings"}
        summary: dict[str, Any] = {
            "profile": str(target),
            "picture": str(picture),
            "samples": samples,
            **profile.model_dump(mode="json", include={*shown, "layers"}),
        }
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
        return
    ratio = profile.attention_ratio
    sys.stdout.write(
        f"sink dimensions {', '.join(map(str, profile.dims))} at the threshold "
        f"{profile.threshold:.4g}, {samples} prompts\n"
        f"attention to visual sinks over other visual tokens: "
        f"{'unknown' if ratio is None else f'{ratio:.3g}'}\n"
        + "".join(f"warning: {warning}\n" for warning in profile.warnings)
        + f"written: {target}, {picture}\n"
        f"use it: VAR(sink_dims={str(target)!r})\n"
    )


def _dims(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise SettingsError(f"--dims {text}: write numbers with commas, such as 1415,2533.")
    return [int(part) for part in parts]


def _check_own(target: Path) -> None:
    """Refuse to overwrite a file that is no sink profile, and a picture that is not its own."""
    picture = target.with_suffix(".png")
    if not target.exists():
        if picture.exists():
            raise SettingsError(
                f"--out {target}: its picture would overwrite {picture}, which belongs to no sink "
                "profile. Give another path, or remove that file."
            )
        return
    from mmlm_efficient.sinks.profiles import named_profile

    try:
        named_profile(str(target))
    except SettingsError as error:
        raise SettingsError(
            f"--out {target}: exists and is no sink profile, so it is not overwritten. Give "
            "another path, or remove the file."
        ) from error
    if picture.is_dir():
        raise SettingsError(f"--out {target}: {picture}, for its picture, is a folder.")
