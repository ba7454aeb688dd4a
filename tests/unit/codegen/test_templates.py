"""Digests of templates: of what they say, and not of where or how it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from taken import having

from gdn2gen.base.errors import TemplateError
from gdn2gen.codegen import templates
from gdn2gen.codegen.render import TABLES_TEMPLATE, render, template_digest
from gdn2gen.codegen.templates import text_digest
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.stages import STAGES

MAIN = """\
{% import "lib.jinja" as lib with context %}
{% set width = 4 %}
{{ lib.head(width) }}
x = {{ width }}
"""
LIB = """\
{% import "deep.jinja" as deep with context %}
{% set COLUMNS = ["a", "b"] %}
{# What stands above. #}
{% macro head(n) %}
head of {{ n }} {{ COLUMNS }}
{{ deep.line() }}
{% endmacro %}

{% macro unused() %}
nothing calls this
{% endmacro %}
"""
DEEP = """\
{% macro line() %}
a line
{% endmacro %}
"""
Digest = Callable[..., str]


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Digest]:
    """The digest of main.jinja among files of these texts."""
    monkeypatch.setattr(templates, "templates_dir", lambda: tmp_path)

    def made(main: str = MAIN, **files: str) -> str:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in {"main": main, "lib": LIB, "deep": DEEP, **files}.items():
            (tmp_path / f"{name}.jinja").write_text(text)
        for cached in (templates._parsed, templates._template_digest, templates._macro_digest):
            cached.cache_clear()
        return text_digest(["main.jinja"])

    yield made
    for cached in (templates._parsed, templates._template_digest, templates._macro_digest):
        cached.cache_clear()


@pytest.mark.parametrize(
    "files",
    [
        {"lib": LIB.replace("What stands above.", "Another comment.")},
        {"lib": LIB.replace("head of", "head {# inside a line #}of")},
        {"lib": LIB.replace("nothing calls this", "nothing does")},
        {"lib": LIB.replace("{% macro unused", "\n\n{% macro unused")},
        {"lib": LIB.replace("{{ deep.line() }}", "{{ line() }}") + DEEP},
        {"lib": LIB.replace("deep", "other"), "other": DEEP},
        {"lib": LIB.replace("as deep", "as below").replace("deep.line", "below.line")},
        {"main": MAIN.replace(".head", ".top"), "lib": LIB.replace("head(n)", "top(n)")},
        {"main": MAIN.replace("width", "size")},
        {"main": MAIN.replace("lib.jinja", "page.jinja"), "page": LIB},
        {
            "main": MAIN.replace("lib.head", "head") + LIB.split("#}\n")[1].split("\n\n")[0]
            + '{% import "deep.jinja" as deep %}{% set COLUMNS = ["a", "b"] %}'
        },
    ],
    ids=[
        "comment", "comment in a line", "macro that nothing calls", "empty lines between macros",
        "macro to its caller's file", "file renamed", "alias renamed", "macro renamed",
        "variable renamed", "library renamed", "macro into the template",
    ],
)  # fmt: skip
def test_what_is_not_said_keeps_the_digest(digest: Digest, files: dict[str, str]) -> None:
    assert digest(**files) == digest()


@pytest.mark.parametrize(
    "files",
    [
        {"deep": DEEP.replace("a line", "another line")},
        {"lib": LIB.replace('"a", "b"', '"b", "a"')},
        {"lib": LIB.replace("head(n)", "head(n=1)")},
        {"main": MAIN.replace("width = 4", "width = 8")},
        {"main": MAIN.replace("x =", "y =")},
        {"main": MAIN.replace("(width)", "(4)")},
        {"main": MAIN.replace("lib.head(width)", "lib.unused()")},
    ],
)
def test_what_is_said_changes_the_digest(digest: Digest, files: dict[str, str]) -> None:
    assert digest(**files) != digest()


def test_one_macro_in_the_place_of_another_of_its_name(digest: Digest) -> None:
    """Files may define macros of the same name."""
    main = '{% import "a.jinja" as a %}{% import "b.jinja" as b %}{{ a.f() }}{{ b.f() }}'
    first, second = "{% macro f() %}1{% endmacro %}", "{% macro f() %}2{% endmacro %}"
    assert digest(main, a=first, b=second) != digest(main, a=second, b=first)


def test_a_macro_that_is_not_there(digest: Digest) -> None:
    with pytest.raises(TemplateError, match=r"there is no foot in the template lib\.jinja"):
        digest(MAIN.replace("lib.head", "lib.foot"))


def test_an_alias_that_is_defined_too(digest: Digest) -> None:
    """Where Jinja would take the one that comes last."""
    with pytest.raises(TemplateError, match=r"main\.jinja: \['lib'\] are both"):
        digest(MAIN + "{% macro lib() %}{% endmacro %}")


@pytest.mark.parametrize(
    "line",
    [
        '{% include "lib.jinja" %}',
        '{% from "lib.jinja" import head %}',
        '{% extends "lib.jinja" %}',
    ],
)
def test_what_digests_do_not_follow_is_refused(digest: Digest, line: str) -> None:
    with pytest.raises(TemplateError, match="import the template by an alias"):
        digest(f"{line}\n{MAIN}")


def test_a_template_that_is_not_there_is_an_oserror() -> None:
    """So that entries of it are stale, rather than an error."""
    with pytest.raises(OSError, match="nowhere"):
        text_digest(["nowhere.jinja"])


@pytest.mark.parametrize("stage", STAGES)
def test_rendering_leaves_the_digest(stage: str) -> None:
    """Compiling a template changes the tree that it is parsed to."""
    problem = having(Problem(), stage)
    config = default_config(stage, problem)
    render(problem, stage, config)
    kept = template_digest(config)
    for cached in (templates._parsed, templates._template_digest, templates._macro_digest):
        cached.cache_clear()
    assert template_digest(config) == kept


def test_the_order_of_templates_does_not_count() -> None:
    names = [TABLES_TEMPLATE, "triton/stages/scan.py.jinja"]
    assert text_digest(names) == text_digest(reversed(names)) != text_digest(names[:1])
