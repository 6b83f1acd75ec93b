"""README and docs: links and paths lead somewhere, examples run, every public name is explained."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mmlm_efficient
from benchmarks.common import ROOT
from benchmarks.readme_tables import documents

PAGES = [*documents(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
RUN = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.DOTALL)
# Folders that a page may name a file by its place in.
FOLDERS = [ROOT, ROOT / "eval", ROOT / "mmlm_efficient", ROOT / "mmlm_efficient" / "pocket"]
FOLDERS += [path for path in (ROOT / "mmlm_efficient").iterdir() if path.is_dir()]


def name_of(path: Path) -> str:
    """A page as tests are called after it."""
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What a link may name behind '#'."""
    heads = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


def expanded(text: str) -> Iterator[str]:
    """The names that a pattern like a-{1,2}.yaml stands for."""
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [part.split(",") if odd % 2 else [part] for odd, part in enumerate(parts)]
    return ("".join(choice) for choice in itertools.product(*choices))


def test_a_pattern_is_expanded() -> None:
    assert list(expanded("a-{1,2}.yaml")) == ["a-1.yaml", "a-2.yaml"]
    assert list(expanded("a.py")) == ["a.py"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    named = re.findall(r"`([\w./{},-]+/[\w.{},-]+\.(?:py|yaml|json|npz|md|png)|\w+\.py)`", text)
    missing = [
        name
        for pattern in named
        for name in expanded(pattern)
        if not name.startswith("outputs/")
        and not any((folder / name).is_file() for folder in FOLDERS)
    ]
    assert missing == []


def test_every_public_name_is_explained() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in documents())
    absent = [
        name
        for name in mmlm_efficient.__all__
        if not name.startswith("_") and not re.search(rf"\b{name}\b", text)
    ]
    assert absent == []


EXAMPLES = [
    pytest.param(match[1], id=f"{name_of(page)}-{number}")
    for page in documents()
    for number, match in enumerate(RUN.finditer(page.read_text(encoding="utf-8")))
]


def promised(line: str) -> Any:
    """The value in the comment behind a print, None where it is words."""
    comment = re.search(r"\)\s+# (.*)$", line)
    if comment is None:
        return None
    for text in (comment[1], *re.split(r": | of ", comment[1])[:1]):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            continue
    return None


def test_what_a_comment_promises() -> None:
    assert promised("print(x)   # (1, 2)") == (1, 2)
    assert promised("print(x)   # 36.0: a quarter") == 36.0
    assert promised("print(x)   # 14 of 144") == 14
    assert promised("print(x)   # which patches") is None
    assert promised("print(x)") is None


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run_and_print_what_they_say(code: str) -> None:
    lines, wrong = code.splitlines(), []

    def printed(*values: Any) -> None:
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        want = promised(lines[frame.f_back.f_lineno - 1])
        if want is not None and " ".join(map(str, values)) != str(want):
            wrong.append((lines[frame.f_back.f_lineno - 1], values))

    exec(code, {"print": printed})
    assert wrong == []


def test_most_pages_have_an_example() -> None:
    with_one = {parameter.id.rpartition("-")[0] for parameter in EXAMPLES if parameter.id}
    pages = sorted((ROOT / "docs" / "methods").glob("*.md"))
    assert {name_of(page) for page in pages} <= with_one
