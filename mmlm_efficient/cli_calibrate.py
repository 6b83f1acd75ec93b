"""The `mmlm calibrate` commands."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from mmlm_efficient.cli_paths import check_folder
from mmlm_efficient.errors import MMLMError, SettingsError, require_extra

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
    """Refuse now what could not be written after the search."""
    if target.suffix.lower() not in (".yaml", ".yml"):
        raise SettingsError(f"--out {target}: must end in '.yaml'.")
    if target.is_dir():
        raise SettingsError(f"--out {target}: is a folder. Give the path of a YAML file.")
    check_folder(f"--out {target}", target.parent)
