"""Study files: bytes that are no Python, code that fails, definitions wrong in every field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.bad_input.harness import ODD, examples, folder, search, written
from tests.support.called import Outcome
from trainer.config import RETIRED, TrainConfig

HEAD = "import decimal, enum, math, sys, types\nfrom search.study import Fixed, Study\nfrom search.space import *\n"
GOOD = {
    "name": "'mine'",
    "description": "'d'",
    "space": "{'lora_r': Int(2, 8)}",
    "n_trials": "2",
    "base": "{'max_samples': 24}",
    "sampler": "'random'",
    "enqueue": "(Fixed(label='a', config={'lora_r': 4}),)",
    "data_env": "None",
    "get_data": "''",
    "get_model": "''",
    "seed": "0",
    "patience": "3",
    "min_delta": "0.0",
}


def tried(content: str | bytes) -> Outcome:
    """The study file checked to its end, and nothing written."""
    with folder() as here:
        file = here / "mine.py"
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        outcome = search(["--study", str(file), "--runs-dir", str(here / "runs"), "--dry-run", "--no-measure"])
        assert [name for name in written(here) if "__pycache__" not in name] == ["mine.py"]
    return outcome


def definition(**changes: str) -> str:
    fields = {**GOOD, **changes}
    return f"{HEAD}STUDY = Study({', '.join(f'{name}={code}' for name, code in fields.items())})\n"


def test_the_good_one_is_accepted() -> None:
    assert tried(definition()).accepted


VALUES = st.sampled_from(
    [
        *map(repr, ODD),
        *("None", "True", "-1", "0", "1", "2.5", "10**30", "10**5000", "math.inf", "math.nan", "1e-320", "b'mini'"),
        *("'2'", "'tpe'", "()", "[]", "{}", "{3: 4}", "[1]", "object()", "int", "lambda: 0", "set()", "range(3)"),
        *("decimal.Decimal('0.1')", "types.MappingProxyType({})", "'\\ud800'", "'a\\nb'", "'optuna.db'", "'n' * 300"),
        *("Int(1, 4)", "Fixed(label='x', config={})", "type('Odd', (), {'__repr__': lambda self: 1 / 0})()"),
    ]
)
FIELDS = st.sampled_from([*TrainConfig.model_fields, *RETIRED, "lora_rank", ""]).map(repr)
NUMBERS = st.sampled_from(
    ["-1", "0", "1", "2", "8", "1e-3", "0.5", "10**9", "10**400", "math.nan", "math.inf", "True", "'4'"]
)
PARAMS = (
    st.builds("{}({}, {}, log={})".format, st.sampled_from(["Float", "Int"]), NUMBERS, NUMBERS, st.booleans())
    | st.builds("Choice(({},))".format, st.lists(NUMBERS | VALUES, max_size=3).map(", ".join))
    | st.builds("Choice({})".format, VALUES)
    | st.builds("Multiple({}, ({},))".format, FIELDS | VALUES, st.lists(NUMBERS, max_size=3).map(", ".join))
    | VALUES
)
SPACES = st.dictionaries(FIELDS | VALUES.filter(lambda v: v[0] not in "{[s"), PARAMS, max_size=3).map(
    lambda d: "{" + ", ".join(f"{k}: {v}" for k, v in d.items()) + "}"
)
CONFIGS = st.dictionaries(FIELDS, NUMBERS | VALUES, max_size=3).map(
    lambda d: "{" + ", ".join(f"{k}: {v}" for k, v in d.items()) + "}"
)
FIXED = st.lists(
    st.builds("Fixed(label={}, config={}, note={})".format, VALUES, CONFIGS | VALUES, VALUES | st.just("''")) | VALUES,
    max_size=2,
).map(lambda each: "(" + "".join(f"{one}, " for one in each) + ")")


def all_configurations(content: str) -> None:
    """Every configuration that an accepted definition can give is one that can be trained."""
    import optuna

    from search.sampling.params import suggest
    from search.study import fixed_trial
    from search.study_file import load

    with folder() as here:
        (here / "mine.py").write_bytes(content.encode("utf-8", "surrogatepass"))
        study = load(str(here / "mine.py"))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for fixed in study.enqueue:
        study.config(*fixed_trial(study, fixed))
        trials.enqueue_trial(fixed_trial(study, fixed)[0])
    for _ in range(10 + len(study.enqueue)):
        trial = trials.ask()
        suggest(trial, study)
        study.config(trial.params)


@pytest.mark.long
@examples(80, deep_factor=30)
@given(st.sampled_from(list(GOOD)), VALUES)
@example("seed", "-1")
@example("sampler", "'tpee'")
@example("n_trials", "2.5")
@example("patience", "0")
@example("min_delta", "10**400")
@example("data_env", "3")
@example("description", "'\\ud800'")
def test_a_field_of_another_kind(field: str, value: str) -> None:
    code = definition(**{field: value})
    outcome = tried(code)
    if outcome.accepted:
        all_configurations(code)
    else:
        outcome.check_refused("mine.py")


@pytest.mark.long
@examples(100, deep_factor=30)
@given(SPACES)
@example("{'lora_r': Float(1, 8)}")  # half ranks would be sampled
@example("{'batch_size': Int(1, 8), 'micro_batch_size': Int(1, 8)}")
@example("{'warmup_steps': Multiple('lora_r', (0.5,)), 'lora_r': Int(2, 8)}")
@example("{'lora_alpha': Multiple('lora_alpha', (2,))}")
@example("{'data': Choice(('mini', '/nowhere'))}")
@example("{'model': Choice(('mini', '/nowhere'))}")
@example("{'patience': Int(2, 5)}")
@example("{'num_workers': Choice(('4',))}")
@example("{'num_workers': Choice((4.0, 2.0))}")
@example("{'prefetch_factor': Choice((None,))}")
@example("{'batch_size': Choice(('4', 8)), 'micro_batch_size': Choice(('2', None))}")
@example("{'learning_rate': Choice(('1e-4', '1e-3'))}")
@example("{'lora_r': Choice(('4', 4))}")
@example("{'lora_alpha': Multiple('lora_r', (2,)), 'lora_r': Choice(('4', '8'))}")
@example("{'cache_features': Choice(('false',))}")
def test_spaces(space: str) -> None:
    code = definition(space=space, enqueue="()")
    outcome = tried(code)
    outcome.check()
    if outcome.accepted:
        all_configurations(code)


@examples(80)
@given(CONFIGS | VALUES, FIXED)
@example("{}", "(Fixed(label='a', config={'model': b'mini'}),)")  # bytes that TrainConfig takes, and JSON does not
@example("{}", "(Fixed(label='a', config={'data': '/nowhere'}),)")
@example("{}", "(Fixed(label='\\ud800', config={}),)")
def test_bases_and_trials_given_by_hand(base: str, enqueue: str) -> None:
    import json

    from search.study import fixed_trial
    from search.study_file import load

    code = definition(base=base, enqueue=enqueue)
    outcome = tried(code)
    outcome.check()
    if outcome.accepted:
        all_configurations(code)
        with folder() as here:
            (here / "mine.py").write_bytes(code.encode())
            study = load(str(here / "mine.py"))
        json.dumps([study.definition(), [fixed_trial(study, fixed) for fixed in study.enqueue]])


@pytest.mark.parametrize(
    "changes",
    [
        {"base": "{'patience': 5}"},
        {"enqueue": "(Fixed(label='a', config={'patience': 5}),)"},
        {"space": "{'patience': Int(2, 5)}"},
    ],
    ids=["base", "by hand", "space"],
)
def test_a_study_file_of_an_older_version_is_told_where_patience_goes(changes: dict[str, str]) -> None:
    tried(definition(**changes)).check_refused("mine.py", "write Study(patience=...)")


CODE: list[tuple[Any, str]] = [
    ("import sys; sys.exit(0)", "SystemExit"),
    ("raise SystemExit('x')", "line 1: SystemExit: x"),
    ("class Odd(BaseException): pass\n\nraise Odd('said')", "line 3: Odd: said"),
    ("def f(): f()\nf()", "RecursionError"),
    ("raise ValueError('x' * 100_000)", "ValueError: xxx"),
    ("class Odd(Exception):\n  def __str__(self): return 1 / 0\nraise Odd", "Odd: (no message)"),
    ("STUDY = type('Odd', (), {'__repr__': lambda self: 1 / 0})()", "STUDY is <Odd>"),
    ("STUDY = 'x' * 100_000", "STUDY is 'xxx"),
    ("", "STUDY is None"),
    ("(" * 500, "SyntaxError"),
    (b"\xff\xfe\x00", "Error: "),  # Python 3.11.2 says ValueError
    (b"x = '\xff'", "SyntaxError"),
    (b"\x00", "null bytes"),
    ("# -*- coding: nothing -*-\n", "SyntaxError"),
    ("x = '\ud800'", "SyntaxError"),
    ("import studies.nothing", "ModuleNotFoundError"),
    ("open('/nonexistent')", "FileNotFoundError"),
]


@pytest.mark.parametrize(("content", "said"), CODE, ids=[repr(content)[:30] for content, _ in CODE])
def test_files_that_do_not_run(content: str | bytes, said: str) -> None:
    tried(content).check_refused(said, "mine.py")


@examples(40)
@given(st.binary(max_size=60))
def test_bytes(content: bytes) -> None:
    tried(content).check_refused("mine.py")


@examples(40)
@given(st.data())
def test_a_file_cut_or_changed_anywhere(data: st.DataObject) -> None:
    code = definition()
    place = data.draw(st.integers(len(HEAD), len(code) - 1))
    changed = (
        code[:place]
        + data.draw(st.sampled_from(["", "(", "'", "\n", "0", "é", "\t", "*", "=", ","]))
        + code[place + 1 :]
    )
    tried(changed if data.draw(st.booleans()) else code[:place]).check("mine")
