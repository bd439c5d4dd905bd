"""Promises of SECURITY.md that can be checked by reading our code, and where passwords and text from data may go."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from markdown_it import MarkdownIt

from search.errors import StorageError
from search.space import Int
from search.storage import database
from search.study import Study
from search.tracking import address
from search.urls import secrets, shown
from search.workers.job import Job
from tests.support.compose import ROOT
from trainer.data.dataset import Examined

FILES = sorted(path for folder in ("search", "trainer", "studies") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "telnetlib"}
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
METHODS = {("os", "system"), ("os", "popen"), ("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load")}
SECRET = "s3cret-0123456789"


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What could run code that came as data."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield name
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)) if (owner, name) in METHODS:
                yield f"{owner}.{name}"
        if isinstance(node, ast.keyword):
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if (node.arg, value) in (("shell", True), ("allow_pickle", True), ("weights_only", False)):
                yield f"{node.arg}={value}"
            if node.arg == "trust_remote_code" and value is not False:
                yield "trust_remote_code"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from dill import load", "import torch\ntorch.load(path)", "eval(text)", "exec(text)",
        "run(x, shell=True)", "np.load(f, allow_pickle=True)", "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=flag)", "os.system(text)",
    ],
)  # fmt: skip
def test_the_check_sees_what_it_looks_for(code: str) -> None:
    assert list(forbidden(ast.parse(code)))


def test_no_code_of_ours_runs_what_comes_as_data() -> None:
    assert len(FILES) > 80
    found = {str(file.relative_to(ROOT)): list(forbidden(ast.parse(file.read_text("utf-8")))) for file in FILES}
    assert {file: what for file, what in found.items() if what} == {}


def test_models_are_read_from_safetensors_only() -> None:
    """Each call that loads weights says so: Transformers would otherwise fall back to pickled ones."""
    calls = [
        (file.name, node)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and "ForConditionalGeneration" in ast.unparse(node.func)
    ]
    assert calls
    for name, call in calls:
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert given.get("use_safetensors") == "True", name


URLS = [
    f"postgresql+psycopg://ann:{SECRET}@db.example/optuna",
    f"postgresql://db.example/optuna?user=ann&password={SECRET}",
    f"postgresql://db.example/optuna?sslpassword={SECRET}&sslmode=require",
    f"mysql+pymysql://ann:{SECRET}@db.example/optuna",
]


@pytest.mark.parametrize("url", [*URLS, f"http://ann:{SECRET}@mlflow.example:5000"])
def test_a_shown_url_keeps_everything_but_the_password(url: str) -> None:
    text = address.masked(url)
    assert SECRET not in text and "***" in text
    assert ".example" in text
    assert secrets(sqlalchemy.make_url(url)) == (SECRET,)


def test_a_url_without_a_password_is_shown_as_it_is() -> None:
    for url in ("sqlite:///runs/optuna.db", "postgresql+psycopg://optuna@db:5432/optuna?sslmode=require"):
        assert shown(sqlalchemy.make_url(url)) == url


@pytest.mark.parametrize("url", URLS[:3])
def test_messages_about_a_database_hold_no_password(url: str) -> None:
    unreachable = url.replace("db.example", "127.0.0.1:1")
    for opened in (database.open_storage, address.check):
        with pytest.raises(StorageError) as told:
            opened(unreachable)
        assert SECRET not in str(told.value)
        assert "127.0.0.1:1" in str(told.value)


def test_a_job_shows_no_url() -> None:
    job = Job(
        study=Study(name="a", description="", space={"lora_r": Int(2, 4)}, n_trials=1),
        study_name="a",
        storage_url=URLS[0],
        tracking_uri=URLS[1],
        runs_dir=Path("runs"),
        n_trials=1,
        strategy="joint",
        pruner="rising",
        examined=Examined("data", (), (), ""),
        threads=1,
    )
    assert SECRET not in repr(job) and "db.example" not in repr(job)


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "<http://evil.example>",
    "# heading",
    "1. item\n\n---\n\n> quote",
    "| cell | `code` | **bold** | _i_ | ~~s~~ |",
    "&lt;b&gt; &#60;script&#62;",
    "```\ncode",
    "\u2028<svg/onload=alert(1)>",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("html", [False, True])
def test_text_from_data_stays_text_in_descriptions_and_notes(text: str, html: bool) -> None:
    """With raw HTML on and off: MLflow and optuna-dashboard render Markdown each in its own way."""
    from search.markdown import escape

    before = "**FAIL** (error): "
    tokens = MarkdownIt("commonmark", {"html": html}).enable(["table", "strikethrough"]).parse(before + escape(text))
    kinds = {child.type for token in tokens for child in token.children or ()} | {token.type for token in tokens}
    assert kinds <= {
        "paragraph_open",
        "paragraph_close",
        "inline",
        "text",
        "text_special",
        "strong_open",
        "strong_close",
    }
    shown_text = "".join(child.content for token in tokens for child in token.children or ())
    assert shown_text.removeprefix("FAIL (error): ").strip() == " ".join(text.split())
