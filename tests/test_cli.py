"""The command line: answers, tables, exit codes, and one clean message per mistake."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmlm_efficient import VAR, RandomPruning, cli
from tests.clips import write_clip
from tests.command import Run, runner
from tests.original_llava.sources import (
    original_names,
    original_settings,
    source,
    without_tower,
    write,
    write_tower,
)
from tests.tiny_families import tiny_model, tiny_processor
from tests.tiny_processor import picture, save_tiny


@pytest.fixture
def mmlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    picture().save(path)
    return path


QUESTION = ("--question", "where cat ?", "--max-new-tokens", 5)
SET = "--method-set"


def test_ask(mmlm: Run, model: Path, image: Path) -> None:
    result = mmlm("ask", "--model", model, "--image", image, *QUESTION, "--method", "flowcut:9")
    assert result.code == 0
    assert len(result.out.split()) == 5
    assert "9 of 36 visual tokens" in result.err


def test_ask_json_and_stream_agree(mmlm: Run, model: Path, image: Path) -> None:
    common = ("ask", "--model", model, "--image", image, *QUESTION)
    method = ("--method", "flowcut", "--keep-tokens", 9)
    answer = json.loads(mmlm(*common, *method, "--json").out)
    assert answer["methods"] == ["flowcut"]
    assert answer["usage"]["visual_tokens_kept"]["layer"] == 9
    assert len(answer["images"][0]["kept"]) == 9
    assert mmlm(*common, *method, "--stream").out == answer["text"] + "\n"
    half = json.loads(mmlm(*common, "--method", "random", "--keep-ratio", 0.5, "--json").out)
    assert half["usage"]["visual_tokens_kept"]["layer"] == 18


def test_ask_about_several_images_with_a_plot(
    mmlm: Run, model: Path, image: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "plots" / "kept.png"
    images = ("--image", image, "--image", image, "--plot", plot)
    result = mmlm("ask", "--model", model, *images, *QUESTION, "--method", "uniform:4", "--json")
    assert [len(one["kept"]) for one in json.loads(result.out)["images"]] == [4, 4]
    assert Image.open(plot).size[0] > 100


SINKS = ("sink_dims=3,11", "sink_threshold=1.2", "min_nonsink_ratio=0.2", "min_image_mass=0.0")
SINKS += ("first_layer=1",)


def test_ask_with_var(mmlm: Run, model: Path, image: Path, tmp_path: Path) -> None:
    var = ("--method", "var", *(part for one in SINKS for part in (SET, one)))
    common = ("ask", "--model", model, "--image", image, *QUESTION, *var, "--json")
    assert json.loads(mmlm(*common).out)["redistribution"] == []
    one = json.loads(mmlm(*common, SET, "return_stats=true").out)
    assert [layer["layer"] for layer in one["redistribution"]] == [1, 2]
    # A plot switches the report on, and shows the sinks.
    plot = tmp_path / "sinks.png"
    drawn = mmlm(*common, "--image", image, "--plot", plot)
    layers = json.loads(drawn.out)["redistribution"]
    assert set(layers[0]["sinks"]) == {"0", "1"}
    assert sum(layers[0]["changed"]) > 0
    second = plot.with_name("sinks_2.png")
    assert f"drew {second}" in drawn.err.replace("\n", "")
    assert Image.open(plot).size == Image.open(second).size


def test_var_beside_pruning_draws_two_pictures(
    mmlm: Run, image: Path, tmp_path: Path, model: Path
) -> None:
    config = tmp_path / "both.yaml"
    settings = "sink_dims: [3, 11], sink_threshold: 1.2, min_image_mass: 0.0, first_layer: 1"
    config.write_text(f"methods: [random:0.5, {{name: var, {settings}}}]\n")
    plot = tmp_path / "kept.png"
    shown = ("--model", model, "--image", image, *QUESTION, "--plot", plot, "--json")
    answer = json.loads(mmlm("ask", "--config", config, *shown).out)
    assert answer["methods"] == ["random", "var"]
    assert set(answer["redistribution"][0]["sinks"]["0"]) <= set(answer["images"][0]["kept"])
    assert plot.is_file()
    assert plot.with_name("kept_sinks.png").is_file()


def test_ask_about_a_video(mmlm: Run, model: Path, tmp_path: Path) -> None:
    clip, plot = write_clip(tmp_path / "clip.mp4", 12), tmp_path / "kept.png"
    common = ("ask", "--model", model, "--video", clip, *QUESTION, "--method", "uniform:4")
    answer = json.loads(mmlm(*common, "--frames", 3, "--plot", plot, "--json").out)
    assert [len(one["kept"]) for one in answer["images"]] == [4, 4, 4]
    assert Image.open(plot).size[0] > 300
    assert mmlm(*common, "--frames", 3, "--stream").out == answer["text"] + "\n"
    # A LLaVA sees eight frames unless it is told otherwise.
    assert len(json.loads(mmlm(*common, "--json").out)["images"]) == 8


def test_ask_a_model_with_an_input_for_videos(mmlm: Run, tmp_path: Path) -> None:
    folder, clip = tmp_path / "model", write_clip(tmp_path / "clip.mp4", 12)
    tiny_model("qwen2_vl").save_pretrained(folder)
    processor = tiny_processor("qwen2_vl")
    processor.save_pretrained(folder)
    plot = tmp_path / "kept.png"
    shown = ("--video", clip, "--frames", 5, "--plot", plot)
    result = mmlm("ask", "--model", folder, *shown, *QUESTION, "--method", "random:0.5", "--json")
    (one,) = json.loads(result.out)["images"]
    assert len(one["kept"]) == 3 * one["grid"][0] * one["grid"][1] // 2
    assert Image.open(plot).size[0] > 300


def test_ask_an_original_model(mmlm: Run, tmp_path: Path, image: Path) -> None:
    stock = source("llava", "llama")
    inside, apart = without_tower(original_names(stock))
    folder = write(tmp_path / "llava", inside, original_settings(stock, "llava"))
    tower = write_tower(tmp_path / "clip", apart, stock.config.vision_config)
    common = ("ask", "--model", folder, "--image", image, *QUESTION)
    assert len(mmlm(*common, "--vision-tower", tower).out.split()) > 0
    result = mmlm(*common, "--vision-tower", tmp_path / "gone")
    assert result.code == 1
    assert "no folder with a config.json" in result.err


def test_ask_with_a_config_file(mmlm: Run, model: Path, image: Path, tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(
        f"model: {model}\nmethods: [flowcut:9]\ngeneration: {{max_new_tokens: 3, seed: 1}}\n"
    )
    common = ("ask", "--config", config, "--image", image, "--question", "where ?", "--json")
    answer = json.loads(mmlm(*common).out)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["usage"]["visual_tokens_kept"]["layer"] == 9
    # The command line wins over the file.
    answer = json.loads(mmlm(*common, "--method", "none", "--set", "max_new_tokens=2").out)
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["usage"]["visual_tokens_kept"]["layer"] == 36


def test_ask_sets_any_setting_of_the_method(mmlm: Run, model: Path, image: Path) -> None:
    common = ("ask", "--model", model, "--image", image, *QUESTION, "--json")

    def run(*arguments: object) -> dict[str, Any]:
        settings = [part for one in arguments[1:] for part in ("--method-set", one)]
        result = mmlm(*common, "--method", arguments[0], *settings)
        assert result.code == 0, result.err
        return dict(json.loads(result.out))

    both = run("flowcut:9", "llm_prune_layer=1", "llm_keep_tokens=4", "position_ids=original")
    assert both["usage"]["visual_tokens_kept"] == {"tower": 9, "bridge": 9, "layer": 4}
    usual, other, same = (run("random", "keep_tokens=9", f"seed={seed}") for seed in (0, 3, 0))
    assert usual["images"] == same["images"] != other["images"]
    chosen = run("keep_mask", "mask=[1, 5, 30]")["images"][0]["kept"]
    assert chosen == [1, 5, 30]
    added = ("--method", "random", "--keep-tokens", 9, "--method-set", "seed=3")
    assert json.loads(mmlm(*common, *added).out)["images"] == other["images"]


def test_position_ids_reach_the_method() -> None:
    (method,) = cli._methods(["random:9"], {}, ["position_ids=original", "seed=4"]) or []
    assert method == RandomPruning(keep_tokens=9, position_ids="original", seed=4)


def test_settings_are_given_to_several_methods() -> None:
    def methods(*names: str, to: str) -> list[Any] | None:
        return cli._methods(list(names), {}, to.split())

    var, random = VAR(sink_dims=[1415, 2533], layers=[5]), RandomPruning(keep_tokens=9, seed=4)
    settings = "var.sink_dims=1415,2533 random.seed=4 var.layers=5"
    assert methods("var", "random:9", to=settings) == [var, random]
    # What has no setting of its own stays as it is; a budget may be a setting.
    assert methods("random:9", "none", "var", to="var.sink_dims=85") == [
        "random:9",
        "none",
        VAR(sink_dims=[85]),
    ]
    half = RandomPruning(keep_ratio=0.5)
    assert methods("random", "none", to="random.keep_ratio=0.5") == [half, "none"]
    # The name may stand before the field of a single method, too.
    assert methods("random:9", to="random.seed=4") == [random]


def test_ask_sets_var_beside_a_pruning_method(mmlm: Run, model: Path, image: Path) -> None:
    named = [part for one in SINKS for part in (SET, f"var.{one}")]
    chosen = ("--method", "random:9", "--method", "var", *named, SET, "random.seed=3")
    common = ("ask", "--model", model, "--image", image, *QUESTION, "--json")
    answer = json.loads(mmlm(*common, *chosen, SET, "var.return_stats=true").out)
    assert answer["methods"] == ["random", "var"]
    alone = json.loads(mmlm(*common, "--method", "random:9", SET, "seed=3").out)
    assert answer["images"] == alone["images"]
    assert set(answer["redistribution"][0]["sinks"]["0"]) <= set(answer["images"][0]["kept"])


@pytest.mark.parametrize("output", ["--json", "--stream", None])
def test_ask_answers_though_the_plot_fails(
    mmlm: Run,
    model: Path,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str | None,
) -> None:
    def full_disk(temporary: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", temporary, None, str(target))

    monkeypatch.setattr("mmlm_efficient.plots.os.replace", full_disk)
    common = ("ask", "--model", model, "--image", image, *QUESTION, *([output] if output else []))
    plot = tmp_path / "kept.png"
    result = mmlm(*common, "--plot", plot)
    assert result.code == 1
    assert result.out.split("\n")[0] == mmlm(*common).out.split("\n")[0] != ""
    assert f"{plot}: cannot be written (No space left on device)" in result.err
    assert ".part" not in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "--image", "gone.png", *QUESTION, "--plot"),
        ("demo", "--output"),
        ("train", "pocket", "--out"),
    ],
)
@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("/proc/x.png", "/proc/x.png: cannot be written, /proc takes no new files"),
        ("/proc/new/x.png", "/proc/new/x.png: cannot be written, /proc takes no new files"),
        ("{file}/x.png", "x.png: cannot be written, {file} takes no new files (Not a directory)"),
    ],
)
def test_folders_are_checked_before_the_work(
    mmlm: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[object, ...],
    target: str,
    part: str,
) -> None:
    for work in ("loading.load", "pocket.train.train_pocket"):
        monkeypatch.setattr(f"mmlm_efficient.{work}", None)  # calling it would be a TypeError
    file = tmp_path / "file"
    file.touch()
    result = mmlm(*arguments, target.format(file=file))
    assert result.code == 1
    assert f"{arguments[-1]} " in result.err
    assert part.format(file=file) in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_tilde_is_the_home_folder(
    mmlm: Run, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture().save(tmp_path / "scene.png")
    files = ("--image", "~/scene.png", "--plot", "~/plots/kept.png")
    assert mmlm("ask", "--model", model, *files, *QUESTION).code == 0
    assert (tmp_path / "plots" / "kept.png").is_file()


def test_ask_samples_reproducibly(mmlm: Run, model: Path, image: Path) -> None:
    common = ("ask", "--model", model, "--image", image, *QUESTION, "--set", "do_sample=true")
    outs = [mmlm(*common, "--set", "temperature=2.0", "--seed", seed).out for seed in (4, 4, 5, 6)]
    assert outs[0] == outs[1]
    assert len(set(outs)) > 1


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--method", "flowcat:9"), 2, "did you mean 'flowcut'"),
        (("--method", "flowcut:0"), 2, "keep_tokens must be an integer >= 1"),
        (("--method", "flowcut", "--keep-tokens", -4), 2, "keep_tokens must be an integer >= 1"),
        (("--method", "flowcut", "--keep-tokens", 4, "--keep-ratio", 0.5), 2, "give one of them"),
        (("--method", "flowcut"), 2, "give a budget"),
        (("--keep-tokens", 4), 2, "belongs to one --method"),
        (("--method", "flowcut:4", "--keep-ratio", 0.5), 2, "belongs to one --method"),
        (("--method", "random:4", "--method", "uniform:4"), 2, "'random' and 'uniform'"),
        (("--set", "temprature=1"), 2, "'temperature'"),
        (("--set", "nonsense"), 2, "NAME=VALUE"),
        (("--set", "top_k=2020-13-45"), 2, "--set top_k=2020-13-45: the value is not valid YAML"),
        (("--set", "top_k=" + "[" * 2000), 2, "the value is not valid YAML"),
        ((SET, "seed=3"), 2, "--method-set: belongs to a --method"),
        (
            ("--method", "flowcut:4", "--method", "random:4", SET, "seed=3"),
            2,
            "--method-set seed: there are several methods. Name the one that it belongs to: "
            "--method-set random.seed=VALUE.",
        ),
        (
            ("--method", "none", "--method", "flowcut:4", SET, "sed=3"),
            2,
            "--method-set none.sed=VALUE or flowcut.sed=VALUE.",
        ),
        (("--method", "random:4", SET, "uniform.seed=3"), 2, "'uniform' is not among the --method"),
        (("--method", "random:4", SET, "randon.seed=3"), 2, "Did you mean 'random'? Given: random"),
        (
            ("--method", "random:4", SET, "random.sed=3"),
            2,
            "random: unknown setting 'sed'",
        ),
        (("--method", "random:4", SET, "random.=3"), 2, "'random.': write NAME.FIELD=VALUE"),
        (("--method", "random:4", SET, ".seed=3"), 2, "'.seed': write NAME.FIELD=VALUE"),
        (("--method", "random:4", SET, "seed=1", SET, "random.seed=2"), 2, "seed: is given twice"),
        (
            ("--method", "random:4", "--method", "random:8", SET, "random.seed=3"),
            2,
            "--method-set random.seed: there are 2 methods 'random'",
        ),
        (("--method", "vra", SET, "vra.seed=3"), 2, "unknown method 'vra', did you mean 'var'"),
        (("--method", "var", SET, "var.mu=0.2"), 2, "The paper's mu is min_image_mass"),
        (("--method", "var", SET, "sink_dims=[true]"), 2, "sink_dims must be one or more"),
        (("--method", "random:4", SET, "seed"), 2, "--method-set seed: write NAME=VALUE"),
        (("--method", "random:4", SET, "seed=[3"), 2, "--method-set seed=[3: the value"),
        (("--method", "random:4", SET, "sed=3"), 2, "did you mean 'seed'"),
        (("--method", "random:4", SET, "name=uniform"), 2, "unknown setting 'name'"),
        (("--method", "random:4", SET, "self=1"), 2, "unknown setting 'self'"),
        (("--method", "random:4", SET, "seed=-1"), 2, "greater than or equal to 0"),
        (("--method", "random:4", SET, "keep_tokens=3"), 2, "keep_tokens: is given twice"),
        (("--method", "random:4", SET, "seed=1", SET, "seed=2"), 2, "seed: is given twice"),
        (("--method", "none", SET, "seed=3"), 2, "takes no settings, got 'seed'"),
        (("--method", "flowcut:4", SET, "llm_prune_layer=1"), 2, "belong together"),
        (("--method", "flowcat:4", SET, "relay=cls"), 2, "did you mean 'flowcut'"),
        (("--method", "var"), 2, "mmlm calibrate sinks --model"),
        (("--method", "var:0.5"), 2, "var takes no budget"),
        (("--method", "var", "--keep-tokens", 4), 2, "unknown setting 'keep_tokens'"),
        (("--seed", "9" * 23), 2, "seed must be a whole number"),
        (("--seed", -1), 2, "seed must be a whole number"),
        (("--set", "top_k=[1"), 2, "not valid YAML"),
        (("--set", "image=a.png"), 2, "'image' is unknown"),
        (("--set", "methods=none"), 2, "'methods' is unknown"),
        (("--set", "num_beams=0"), 2, "num_beams must be a whole number >= 1"),
        (("--set", "temperature=-1"), 2, "temperature must be a number above 0"),
        (("--set", "early_stopping=perhaps"), 2, "(early_stopping)"),
        (("--dtype", "float8"), 2, "'float8' is unknown"),
        (("--device", "gpu"), 2, "'gpu' is unknown"),
        (("--quantization", "int4"), 2, "'int8', 'nf4'"),
        (("--config", "nowhere"), 2, "neither a file nor a preset"),
        (("--json", "--stream"), 2, "use one of them"),
        (("--plot", "kept.png"), 2, "no --image"),
        (("--frames", 4), 2, "no --video"),
        (("--video", "gone.mp4", "--frames", 0), 2, "frames must be a whole number >= 1"),
        (("--video", "gone.mp4"), 1, "gone.mp4: no such file"),
        (("--vision-tower", "clip"), 2, "vision_tower: "),
        (("--image", "gone.png", "--plot", "kept.jpg"), 2, "must end in '.png'"),
        (("--image", "gone.png"), 1, "gone.png: no such file"),
        (("--question", " "), 1, "question: is empty"),
        (("--question", "<image> where"), 1, "holds 1 <image>"),
        (("--model", "nobody"), 1, "'pocket', an existing folder, nor a hub id"),
        (("--unknown",), 2, "No such option"),
        (("--keep-tokens", "many"), 2, "--keep-tokens"),
    ],
)
def test_mistakes(
    mmlm: Run, model: Path, arguments: tuple[object, ...], code: int, part: str
) -> None:
    result = mmlm("ask", "--model", model, *QUESTION, *arguments)
    assert result.code == code
    assert part in " ".join(result.err.split())
    assert "Traceback" not in result.err
    assert result.out == ""


def test_no_command_shows_the_help(mmlm: Run) -> None:
    result = mmlm()
    assert result.code == 2
    assert "demo" in result.out + result.err


@pytest.mark.parametrize(
    "command", [(), ("ask",), ("demo",), ("models",), ("methods",), ("train", "pocket"), ("bench",)]
)
def test_help_shows_an_example(mmlm: Run, command: tuple[str, ...]) -> None:
    result = mmlm(*command, "--help")
    assert result.code == 0
    assert "Example: mmlm" in result.out


def test_help_shows_how_to_set_one_of_several_methods(mmlm: Run) -> None:
    words = " ".join(mmlm("ask", "--help").out.replace("│", " ").split())
    assert "[NAME.]FIELD=VALUE" in words
    assert "var.sink_dims=1415,2533" in words


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom mmlm_efficient import cli\nsys.argv = ['mmlm', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'cv2'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_methods(mmlm: Run) -> None:
    table = mmlm("methods").out
    for part in ("flowcut", "2505.19536", "tower", "all", "keep_tokens"):
        assert part in table
    rows = {row["name"]: row for row in json.loads(mmlm("methods", "--json").out)}
    assert rows["flowcut"]["stations"] == ["tower", "layer"]
    assert rows["none"]["families"] == "all"
    assert "seed" in rows["random"]["options"]
    assert rows["var"]["stations"] == ["attention"]
    assert not {"keep_tokens", "keep_ratio"} & set(rows["var"]["options"])


def test_models(mmlm: Run) -> None:
    table = mmlm("models").out
    assert "pocket" in table
    assert "flowcut-llava15-64" in table
    plain = json.loads(mmlm("models", "--json").out)
    assert plain["families"][0]["name"] == "llava"
    assert "flowcut-llava15-64" in plain["presets"]


def test_demo(mmlm: Run, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "kept.png"
    result = mmlm("demo", "--model", model, "--output", output)
    assert result.code == 0
    for part in ("unpruned", "flowcut", "random", "36 (100.0%)", "18 (50.0%)", "4 (11.1%)"):
        assert part in result.out
    assert f"Drew {output}" in result.out
    assert Image.open(output).size[0] > 400
    assert Image.open(tmp_path / "kept_cuts.png").size[0] > 200


def test_demo_shows_its_results_though_the_plot_fails(
    mmlm: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept_cuts.png").mkdir()
    monkeypatch.setattr("mmlm_efficient.demo.METHODS", ("none", "flowcut:0.25"))
    result = mmlm("demo", "--model", model, "--output", tmp_path / "kept.png", "--json")
    assert result.code == 1
    assert [row["method"] for row in json.loads(result.out)["rows"]] == ["none", "flowcut:0.25"]
    assert f"{tmp_path / 'kept_cuts.png'}: cannot be written" in result.err


@pytest.mark.slow
def test_demo_json(mmlm: Run, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "kept.png"
    plain = json.loads(mmlm("demo", "--model", model, "--output", output, "--json").out)
    assert len(plain["questions"]) == 4
    assert [row["visual_tokens_kept"] for row in plain["rows"]] == [36, 18, 9, 4, 18, 9, 4]
    assert len({row["kv_bytes"] for row in plain["rows"]}) == 4
