"""The README and the laboratory's pages: their code runs, their links lead somewhere, their flags exist."""

import re
from pathlib import Path

import pytest

import train_small

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(ROOT / "experiments").rglob("*.md")]


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=["equation", "operator", "model"]
)
def test_code_runs(code):
    exec(code, {})


def test_the_equation_is_the_operator():
    from kernel import moda_attention_reference

    names = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    q, k, v, depth_k, depth_v, out = (names[name] for name in ("q", "k", "v", "depth_k", "depth_v", "out"))
    assert (out - moda_attention_reference(q, k, v, depth_k, depth_v)).abs().max() < 1e-5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.split("#")[0]).exists(), link


def test_flags_exist():
    commands = [
        line.split("#")[0] for line in README.splitlines() if "train_small.py " in line and line.startswith(".venv")
    ]
    assert len(commands) >= 4
    for flag in re.findall(r"--[a-z-]+", " ".join(commands)):
        assert flag in train_small.PARSER.format_help(), flag
