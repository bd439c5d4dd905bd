"""Promises of SECURITY.md that can be checked by reading our code, and where passwords and text from data may go."""

import ast
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import sqlalchemy
from markdown_it import MarkdownIt

from search.errors import StorageError, Unavailable
from search.places import Places
from search.planning.budget import Budget
from search.space import Int
from search.storage import database
from search.study import Study
from search.tracking import address
from search.tracking.errors import translated
from search.urls import LogFormatter, first_line, has_secret, masked_in, secrets, shown, without_secrets
from search.workers.protocol import Job
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
QUERIES = [
    f"postgresql:///optuna?host=db.example&user=postgres&password={SECRET}",
    *(
        f"mysql://db.example/optuna?user=ann&{name}={SECRET}"
        for name in ("pwd", "passwd", "token", "sslkey", "PassWord")
    ),
    f"http://mlflow.example:5000/base?token={SECRET}",
    f"mssql+pyodbc:///?odbc_connect=SERVER%3Ddb.example%3BPWD%3D{SECRET}",
    f"postgresql:///?dbname=postgresql%3A%2F%2Fann%3A{SECRET}%40db.example%2Foptuna&host=db.example",
]
NO_URLS = [
    f"postgresql://ann:{SECRET}@db.example:port/optuna",
    f"postgresql:/ann:{SECRET}@db.example/optuna",
    f"ann:{SECRET}@db.example",
    f"db.example/optuna?password={SECRET}",
    f"http://[db.example?a=b&token={SECRET}",
]


@pytest.mark.parametrize("url", [*URLS, *QUERIES, f"http://ann:{SECRET}@mlflow.example:5000"])
def test_a_shown_url_keeps_everything_but_the_password(url: str) -> None:
    text = shown(url)
    assert SECRET not in text and "***" in text and has_secret(url)
    assert ".example" in text or "odbc_connect" in text
    parsed = sqlalchemy.make_url(url)
    assert shown(parsed) == text
    (secret,) = secrets(parsed)
    assert SECRET in secret
    assert without_secrets(f"no connection with {secret}", parsed) == "no connection with ***"


@pytest.mark.parametrize("text", NO_URLS)
def test_a_text_that_is_not_a_url_is_shown_without_what_could_be_a_password(text: str) -> None:
    assert SECRET not in shown(text) and "db.example" in shown(text) and has_secret(text)


def test_a_url_without_a_password_is_shown_as_it_is() -> None:
    for url in (
        "sqlite:///runs/optuna.db",
        "sqlite:///runs/a%20b.db",
        "postgresql+psycopg://optuna@db:5432/optuna?sslmode=require",
        "http://mlflow:5000",
        "not a URL",
    ):
        assert shown(url) == url and not has_secret(url)
    assert len(shown("sqlite:///" + "n/" * 3000)) < 1000


@pytest.mark.parametrize("url", [url for url in [*URLS, *QUERIES] if "%3" not in url])
def test_texts_of_others_lose_passwords_in_urls(url: str) -> None:
    assert SECRET not in masked_in(f"404 Client Error for url: {url}") and "Client Error" in masked_in(
        f"a {url}: Client Error"
    )
    assert first_line(ValueError(f"{url}\nmore")) == masked_in(url)
    try:
        raise ValueError(f"no answer from {url}")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "at %s", (url,), sys.exc_info())
    line = LogFormatter("%(message)s").format(record)
    assert SECRET not in line and "Traceback" in line and "no answer from" in line


def test_an_error_of_mlflows_server_tells_no_password() -> None:
    """The error of a request that failed quotes its URL, as files of runs on a server show."""
    response = requests.Response()
    response.status_code, response.url = (
        500,
        f"http://ann:{SECRET}@mlflow.example/api/2.0/mlflow-artifacts/x?token={SECRET}",
    )
    with pytest.raises(Unavailable, match=r"keeping x: 500 Server Error.*ann:\*\*\*@mlflow.example") as told:  # noqa: SIM117
        with translated("keeping x"):
            response.raise_for_status()
    assert SECRET not in str(told.value)


def test_urls_are_shown_through_one_function() -> None:
    """No message formats one of these names as it is."""
    names = {"storage_url", "tracking_uri", "uri", "storage", "remote"}

    def bare(node: ast.AST) -> bool:
        return isinstance(node, ast.FormattedValue) and (
            (isinstance(node.value, ast.Name) and node.value.id in names)
            or (isinstance(node.value, ast.Attribute) and node.value.attr in names)
        )

    found = [
        f"{file.name}:{node.lineno}" for file in FILES for node in ast.walk(ast.parse(file.read_text())) if bare(node)
    ]
    assert found == []


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
        places=Places.of(Path("runs"), URLS[0], URLS[1]),
        budget=Budget(1),
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
