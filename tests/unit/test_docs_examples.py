"""What the documentation gives as an example is valid: commands, keys, recipes, imports. Nothing is carried out."""

import ast
import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from unicom_dist.cli.main import app
from unicom_dist.config.explain import explain
from unicom_dist.config.load import load_recipe
from unicom_dist.config.problems import known_keys
from unicom_dist.config.schema import Config

ROOT = Path(__file__).parents[2]
NAMES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "docs/results/README.md"]
PAGES = [ROOT / name for name in NAMES] + sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.yaml")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILES = (".html", ".json", ".py")
SOME_RECIPE = "unicom_7b/sft"  # what RECIPE may stand for


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return re.sub(r"\n# *", " ", text) if page.suffix == ".yaml" else text


def blocks(page: Path, language: str) -> list[str]:
    return [content for kind, content in BLOCK.findall(text_of(page)) if kind == language]


def spans(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text_of(page)))]


def commands(texts: list[str]) -> Iterator[list[str]]:
    """Words after `unicom` of each command. Cut where an explanation follows; `a|b` gives one with each."""
    for text in texts:
        for part in text.split(" && "):
            match = re.match(r"(?:\$ )?(?:\.venv/bin/)?unicom (.*?)(?:  |$)", part.strip())
            if match:
                words = shlex.split(re.sub(r"[][…\\]|\.\.\.", "", match[1]), comments=True)
                yield from map(list, itertools.product(*(word.split("|") for word in words)))


@pytest.fixture(scope="module")
def parse():
    """A function from words to the parameters the command would be called with; it raises what the parser raises."""
    command, called = typer.main.get_command(app), {}

    def disarm(group) -> None:
        for item in group.commands.values():
            if hasattr(item, "commands"):
                disarm(item)
            else:
                item.callback = lambda **parameters: called.update(parameters)

    def parameters(words: list[str]) -> dict:
        called.clear()
        command.main(["1" if word == "N" else word for word in words], "unicom", standalone_mode=False)
        return dict(called)

    disarm(command)
    return parameters


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_taken_as_they_are_written(page, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    for words in commands(lines):
        given = parse(words)
        changes = [text for text in given.get("overrides") or [] if "=" in text]
        recipe = SOME_RECIPE if given.get("recipe") == "RECIPE" else given.get("recipe")
        if changes:
            load_recipe(recipe or given["source"], changes)
    for words in commands(spans(page)):
        try:
            parse(words)
        except Exception as error:
            if type(error).__name__ not in ("MissingParameter", "NoArgsIsHelpError"):  # a command is spoken of
                raise


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_are_those_of_the_configuration(page):
    tails = {key[i:] for key, _ in known_keys() for i in [0, *(m.end() for m in re.finditer(r"\.", key))]}
    tails |= {*Config.model_fields, "base", *(key.rsplit(".", 1)[0].rsplit(".", 1)[-1] for key, _ in known_keys())}
    for span in spans(page):
        short = re.fullmatch(r"([a-z_.]+): .+", span)
        if short:
            assert short[1] in tails, span
        whole = re.fullmatch(r"([a-z_]+)(\.[a-z_<>]+)+(=.*)?", span)
        key = span.partition("=")[0]
        of_any_stage = re.fullmatch(r"stages\.[a-z]+", key)
        if whole and whole[1] in Config.model_fields and Path(key).suffix not in FILES and not of_any_stage:
            explain(key)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_are_valid(page, tmp_path):
    path = tmp_path / "recipe.yaml"
    for content in blocks(page, "yaml"):
        path.write_text(f"base: {ROOT}/recipes/tiny.yaml\n{content.replace('…', 'steps: 100')}", encoding="utf-8")
        load_recipe(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_imports_what_exists(page):
    for content in blocks(page, "python"):
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names:
                    hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
            elif isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
