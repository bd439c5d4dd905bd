"""A log is short, opens on the answer, and loses nothing for it."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import fields

import pytest

from search.diagnosis.messages import LANGS, Lang
from search.records import EpochRecord
from search.report import plots
from search.report.data import table
from search.report.facts import Facts, gather
from search.report.render import markdown
from tests.support.report_data import many

LINKS = {name: f"plots/{name}.png" for name in plots.PLOTS}


@pytest.fixture(scope="module")
def made() -> dict[int, Facts]:
    return {trials: gather(many(trials)) for trials in (12, 40)}


class TestLength:
    """A log is read to its end only if that is near; nothing measured is lost for it."""

    @pytest.mark.parametrize(("trials", "most"), [(12, 250), (40, 400)])
    @pytest.mark.parametrize("lang", LANGS)
    def test_a_log_is_short(self, made: dict[int, Facts], trials: int, most: int, lang: Lang) -> None:
        facts = made[trials]
        text = markdown(facts, lang, LINKS, "tuning-log-data.csv")
        assert len(text.splitlines()) < most
        # Every trial is in the table of all, and told, in full or in a line.
        words = "trial" if lang == "en" else "实验"
        told = {e.number for e in facts.experiments if f"**{words} {e.number}**" in text} | {*facts.full}
        assert told == {e.number for e in facts.experiments}

    def test_page_one_is_the_answer(self, made: dict[int, Facts]) -> None:
        page = markdown(made[12], "en", LINKS, "tuning-log-data.csv").split("## 📋 Overview")[0]
        assert len(page.splitlines()) < 75
        assert page.count("\n- **") == 5 and page.count("![") == 1 and page.count("```bash") == 1
        assert len(re.findall(r"^\| (?:\d+|–) \| \[\d+\]", page, flags=re.MULTILINE)) == 12
        parts = ("**not decided", "| rank |", "![", "TRAINING_CONFIG", "**Next command**")
        order = [page.index(part) for part in parts]
        assert order == sorted(order)

    def test_every_epoch_is_in_the_file_beside_it(self, made: dict[int, Facts]) -> None:
        rows = list(csv.DictReader(io.StringIO(table(made[40]).decode())))
        known = {(t.number, e.epoch): e for t in made[40].record.trials for e in t.epochs}
        assert len(rows) == len(known)
        for row in rows:
            epoch = known[int(row["trial"]), int(row["epoch"])]
            for each in fields(EpochRecord):
                value = getattr(epoch, each.name)
                assert row[each.name] == ("" if value is None else repr(value))
