"""The tuning log as text, page and pictures: sections, both languages, links, escaping, the same bytes."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from search.diagnosis.messages import LANGS, Lang
from search.planning.coordinates import effective_rate
from search.records import EpochRecord, StudyRecord
from search.report import plots, write
from search.report.blocks import MOST_EPOCHS, literal, thinned
from search.report.facts import Facts, gather
from search.report.page import html
from search.report.plots.canvas import OTHER
from search.report.render import markdown
from tests.support.report_data import falling, hand_run, many, recorded, study, trial
from trainer.config import TrainConfig

HEADINGS = (
    "项目概述",
    "调参历程",
    "关键发现",
    "数值稳定性",
    "学习率敏感性",
    "LoRA配置权衡",
    "训练策略",
    "最佳实践总结",
    "推荐",
    "调参策略",
    "监控指标",
    "健康训练的特征",
    "问题信号",
    "下一步计划",
    "技术细节",
    "LoRA实现要点",
    "自定义Forward的必要性",
    "数值稳定性技巧",
    "实验数据记录",
    "调参决策树",
    "经验教训",
    "调参顺序很重要",
    "监控多个指标",
    "保守策略更可靠",
)
"""Every section of the hand-run log, but for those named after its experiments."""
LINKS = {name: f"plots/{name}.svg" for name in plots.PLOTS}


@pytest.fixture(scope="module")
def hand() -> Facts:
    return gather(hand_run())


def headings(text: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(text)
    return [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]


class Page(HTMLParser):
    """Ids, links, images and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "a":
            self.links.append(str(values.get("href")))
        if tag == "svg":
            self.pictures.append(str(values["aria-label"]))


class TestSections:
    def test_no_section_of_the_hand_run_log_is_missing(self, hand: Facts) -> None:
        found = "\n".join(headings(markdown(hand, "zh", LINKS))).replace(" ", "")
        assert [name for name in HEADINGS if name not in found] == []

    def test_every_experiment_is_told_as_the_hand_run_tells_it(self, hand: Facts) -> None:
        text = markdown(hand, "zh", LINKS)
        for number in range(6):
            section = re.split(rf"^### 实验 {number}: .*$", text, flags=re.MULTILINE)[1].split("\n### ")[0]
            assert "TRAINING_CONFIG = {" in section
            assert [part for part in ("**结果**", "**问题分析**", "**学到的经验**") if part not in section] == []
            assert section.count("✅") + section.count("⚠️") + section.count("❌") >= 1

    def test_both_languages_have_the_same_sections(self, hand: Facts) -> None:
        levels = [re.findall(r"^#+ ", markdown(hand, lang, LINKS), flags=re.MULTILINE) for lang in LANGS]
        assert levels[0] == levels[1]

    @pytest.mark.parametrize("lang", LANGS)
    def test_each_point_of_a_list_begins_a_line(self, hand: Facts, lang: Lang) -> None:
        """Jinja drops the line's end behind a tag; `+%}` keeps it."""
        assert not re.findall(r"[^\n>\s]- \*\*.*", markdown(hand, lang, LINKS))

    @pytest.mark.parametrize("record", [hand_run(), many(14)], ids=["hand_run", "many"])
    def test_both_languages_give_the_same_losses_in_the_same_order(self, record: StudyRecord) -> None:
        facts = gather(record)
        numbers = [sorted(re.findall(r"\d\.\d{4}", markdown(facts, lang, LINKS))) for lang in LANGS]
        assert numbers[0] == numbers[1]
        assert len(numbers[0]) > 100

    def test_chinese_has_no_english_prose(self, hand: Facts) -> None:
        text = re.sub(r"```.*?```|`[^`]*`|\(#[^)]*\)", "", markdown(hand, "zh", LINKS), flags=re.DOTALL)
        assert re.findall(r"\b(?:the|trials?|with|not|best|lowest|within|noise|validation)\b", _own_words(text)) == []

    def test_several_captions_an_image_are_told_with_how_they_are_used(self) -> None:
        tags = {"split.rows": "40", "split.captions": "200"}
        facts = gather(study([trial(0, [(2.0, 1.9), (1.8, 1.7)], tags=tags)]))
        english, chinese = (markdown(facts, lang, {}) for lang in LANGS)
        assert "**Captions**: 200 of 40 images. Training draws one" in english
        assert "mean over all tokens of every caption" in english and "40 张图像共 200 条" in chinese
        one = gather(study([trial(0, [(2.0, 1.9)], tags={"split.rows": "40", "split.captions": "40"})]))
        assert "**Captions**" not in markdown(one, "en", {})

    def test_configurations_can_be_pasted(self, hand: Facts) -> None:
        blocks = re.findall(r"```python\n(TRAINING_CONFIG.*?)```", markdown(hand, "en", LINKS), flags=re.DOTALL)
        assert len(blocks) == 7  # the recommended one, and those of the six given by hand
        for block in blocks:
            scope: dict[str, dict[str, object]] = {}
            exec(block, scope)
            assert scope["TRAINING_CONFIG"]["torch_dtype"] in ("float16", "float32")
        assert hand.chosen is not None
        exec(blocks[0], scope)
        # What is left out has its default: pasted, it is the same configuration.
        assert TrainConfig.parse(scope["TRAINING_CONFIG"]) == TrainConfig.parse(hand.chosen.record.config)

    def test_what_the_hand_run_found_is_found(self, hand: Facts) -> None:
        text = markdown(hand, "en", LINKS)
        assert "0/0" in text
        assert "see the analysis" in text
        assert "312 batches of 8" in text
        assert "Epoch 4: Train=1.8700, Val=1.7100, lr=1e-3, grad_norm_max=1.9, 75.0 s ❌" in text
        assert "Step 2: param: qformer.layer.0.query.lora_A.default.weight = nan ❌" in text
        assert "not yet known (1 trial)" in text


@dataclass(frozen=True, kw_only=True)
class WithBleu(EpochRecord):
    """What a further metric looks like in the records."""

    bleu: float | None = field(
        default=None, metadata={"heading": {"en": "BLEU | 4", "zh": "BLEU 分"}, "format": ".1%"}
    )


class TestEpochTable:
    @pytest.mark.parametrize(
        ("lang", "names"),
        [
            ("en", ("training loss", "validation loss", "BLEU \\| 4")),
            ("zh", ("训练 loss", "验证 loss", "BLEU 分")),
        ],
    )
    def test_a_metric_with_a_heading_is_a_line(self, lang: Lang, names: tuple[str, ...]) -> None:
        known = trial(0, [(2.0, 1.5), (1.9, 1.4), (1e5, float("nan"))])
        bleu = (0.12345, None, float("nan"))
        epochs = tuple(WithBleu(**vars(e), bleu=value) for e, value in zip(known.epochs, bleu, strict=True))
        text = markdown(gather(study([replace(known, epochs=epochs)])), lang, {})
        table = text[text.index("| epoch | 1 |") :].splitlines()
        assert table[:2] == ["| epoch | 1 | **2** | 3 |", "| --- | --- | --- | --- |"]
        assert table[2] == f"| {names[0]} | 2.0000 | 1.9000 | 1e+05 |"
        assert table[3] == f"| {names[1]} | 1.5000 | 1.4000 | – |"
        assert table[4] == f"| {names[2]} | 12.3% | – | – |"
        assert table[5].startswith("|  | ✅ | ✅ | ")

    def test_a_metric_that_no_epoch_of_the_study_has_is_left_out(self) -> None:
        known = trial(0, [(2.0, None), (1.9, None)])
        epochs = tuple(WithBleu(**vars(e)) for e in known.epochs)
        facts = gather(study([replace(known, epochs=epochs, attrs={**known.attrs, "label": "x"})]))
        text = markdown(facts, "en", {})
        assert "| training loss | 2.0000 | 1.9000 |\n| validation loss | – | – |\n|  |" in text

    def test_of_many_epochs_the_first_the_last_and_the_best_are_shown(self) -> None:
        losses = [(2.0, 1.9 - 0.01 * n if n < 33 else 1.7) for n in range(80)]
        e = gather(study([trial(0, losses)])).experiment(0)
        shown = [row.epoch for row in thinned(e.rows)]
        assert len(shown) <= MOST_EPOCHS + 1 and (shown[0], shown[-1]) == (1, 80) and 33 in shown


def _own_words(text: str) -> str:
    """Without what the tests' own trials say in English: details, notes, measurements."""
    for known in ("eps 1e-08 rounds to 0; the gradient of lora_A was exactly 0 at step 1",
                  "the log says 100 samples here and 312 batches of 8 (2,500 samples) in its text",
                  "validation loss rising since epoch 3"):  # fmt: skip
        text = text.replace(known, "")
    return text


class TestSameBytes:
    @pytest.mark.parametrize("lang", LANGS)
    def test_text(self, lang: Lang) -> None:
        record = many(14)
        turned = replace(
            record,
            trials=tuple(
                replace(t, attrs=dict(reversed(t.attrs.items())), tags=dict(reversed(t.tags.items())))
                for t in record.trials
            ),
        )
        assert markdown(gather(record), lang, LINKS) == markdown(gather(turned), lang, LINKS)

    def test_plots(self, hand: Facts) -> None:
        assert plots.draw(hand) == plots.draw(gather(hand_run()))

    def test_page(self, hand: Facts, tmp_path: Path) -> None:
        one, two = (write.write_html(hand, "zh", tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
        assert one == two


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Lang, str]:
    folder = tmp_path_factory.mktemp("pages")
    facts = gather(hand_run())
    return {lang: write.write_html(facts, lang, folder / f"{lang}.html").read_text() for lang in LANGS}


class TestPage:
    @pytest.mark.parametrize("lang", LANGS)
    def test_is_one_file(self, pages: dict[Lang, str], lang: Lang) -> None:
        page = Page(pages[lang])
        assert len(page.pictures) == len(plots.PLOTS)
        assert page.tags.isdisjoint({"link", "iframe", "object", "img"})
        assert [link for link in page.links if not link.startswith("#")] == []
        assert set(re.findall(r"url\((.)", pages[lang])) <= {"#"}, "parts of the page itself"
        assert set(re.findall(r'href="(#|data:image/png;base64|.)', pages[lang])) == {"#", "data:image/png;base64"}

    def test_runs_its_own_script_and_no_other(self, pages: dict[Lang, str]) -> None:
        (script,) = re.findall(r"<script>(.*?)</script>", pages["en"], re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in pages["en"]

    def test_sections_fold_and_what_is_long_begins_folded(self, pages: dict[Lang, str]) -> None:
        shut = re.findall(r"<details><summary><h\d id=\"([^\"]*)", pages["en"])
        assert any(name.startswith("experiment-") for name in shut), "six experiments"
        assert pages["en"].count("<details") == pages["en"].count("</details>")
        top = re.findall(r"<details open><summary><h2", pages["en"])
        assert len(top) >= 3

    @pytest.mark.parametrize(
        "text", ["", "# A", "## A\n\nb\n\n### C\n\n# D\n\n### E", "> ## quoted\n\n## A\n\n- ### b", "### C\n\n## A"]
    )
    def test_any_markdown_becomes_a_page(self, text: str) -> None:
        class Nested(HTMLParser):
            def __init__(self) -> None:
                super().__init__()
                self.open: list[str] = []

            def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
                if tag in ("details", "summary", "blockquote", "li", "main"):
                    self.open.append(tag)

            def handle_endtag(self, tag: str) -> None:
                if tag in ("details", "summary", "blockquote", "li", "main"):
                    assert self.open.pop() == tag

        nested = Nested()
        nested.feed(html(text, "en", "t", {}))
        assert nested.open == []

    @pytest.mark.parametrize("lang", LANGS)
    def test_every_picture_says_in_words_what_is_seen(self, pages: dict[Lang, str], lang: Lang) -> None:
        for said in Page(pages[lang]).pictures:
            assert len(said) > 15
            assert re.search(r"\d", said)

    @pytest.mark.parametrize("lang", LANGS)
    def test_every_link_leads_somewhere(self, pages: dict[Lang, str], lang: Lang) -> None:
        page = Page(pages[lang])
        assert len(page.links) > 20
        assert len(page.ids) == len(set(page.ids))
        assert [link for link in page.links if unquote(link[1:]) not in page.ids] == []


class TestLinks:
    def test_a_server_is_linked_at_every_figure(self) -> None:
        facts = gather(replace(hand_run(), tracking_url="http://127.0.0.1:5000"))
        text = markdown(facts, "en", LINKS)
        assert (
            f"[trial 3](http://127.0.0.1:5000/#/experiments/1/runs/{3:032x}?workflowType=machine_learning), epoch 15"
            in text
        )

    def test_without_a_server_figures_lead_to_the_trial_and_its_run_id(self, hand: Facts) -> None:
        text = markdown(hand, "en", LINKS)
        assert "[trial 3](#experiment-3-4-still-falling), epoch 15" in text
        assert f"MLflow run `{3:032x}`" in text


HOSTILE = "<script>alert(1)</script> | ![x](http://evil/x.png) [y](javascript:alert(1)) `` ``` **b** _i_ # h\n\n# New"


@pytest.fixture(scope="module")
def facts() -> Facts:
    named = trial(0, falling(2.0, 1.5, 5), label=HOSTILE, note=HOSTILE, detail=HOSTILE, reason="odd" + HOSTILE,
                  values={"model": HOSTILE, "data": "``` \n# x <b>"})  # fmt: skip
    named = replace(named, run_id="<img src=x onerror=alert(1)>`", violated=(HOSTILE,))
    return gather(study([named], name="s<u>x</u>"))


class TestEscaping:
    @pytest.mark.parametrize("lang", LANGS)
    def test_hostile_text_stays_text(self, facts: Facts, lang: Lang) -> None:
        text = markdown(facts, lang, {})
        plain = markdown(gather(study([trial(0, falling(2.0, 1.5, 5))])), lang, {})
        # Rendered by one that lets HTML through, as some viewers do.
        tokens = list(_flat(MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)))
        assert {t.type for t in tokens}.isdisjoint({"html_block", "html_inline", "image"})
        assert [t.attrGet("href") for t in tokens if t.type == "link_open" and "#" not in str(t.attrGet("href"))] == []
        assert len(headings(text)) == len(headings(plain))

    def test_hostile_text_on_the_page(self, facts: Facts) -> None:
        page = html(markdown(facts, "en", {}), "en", "t<script>", {})
        assert Page(page).tags.isdisjoint({"img", "u", "b"}) and page.count("<script>") == 1
        assert "&lt;script&gt;alert(1)" in page


def _flat(tokens: list) -> Iterator:  # type: ignore[type-arg]
    for token in tokens:
        yield token
        yield from _flat(token.children or [])


class TestPlots:
    @pytest.mark.parametrize("record", [hand_run(), recorded(), many(30)], ids=["hand_run", "recorded", "many"])
    def test_are_drawn_wide_enough_to_be_read(self, record: StudyRecord) -> None:
        for name, data in plots.draw(gather(record)).items():
            root = ElementTree.fromstring(data)
            width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
            assert width >= 450 and height >= 150, name
            assert all(float(size) >= 8 for size in re.findall(r"font: (?:bold )?([\d.]+)px", data.decode())), name
            assert b"Matplotlib" not in data and b"dc:date" not in data

    def test_all_of_them_for_a_whole_study(self, hand: Facts) -> None:
        assert set(plots.draw(hand)) == {f"{name}.svg" for name in plots.PLOTS}

    def test_the_effective_rates_are_those_of_the_table(self) -> None:
        from search.report.plots.by_parameter import effective_rate_against_loss

        made = [trial(n, falling(2.0, 1.4, 8), values={"batch_size": 16, "lora_r": 2 * n}) for n in (1, 2, 4)]
        made.append(trial(5, falling(2.0, 1.5, 8), values={"lr_scheduler_type": "linear"}))
        facts = gather(study(made))
        figure = effective_rate_against_loss(facts)
        assert figure is not None
        drawn = {round(float(x), 9) for line in figure.axes[0].lines for x in np.asarray(line.get_xdata())}
        rows = facts.tables["effective_rate"].rows
        assert len(rows) > 2 and {round(row.low, 9) for row in rows} <= drawn
        assert {round(10 ** effective_rate(e.record.config), 9) for e in facts.experiments} - drawn, "another unit"

    def test_none_for_an_empty_study(self) -> None:
        assert plots.draw(gather(study([]))) == {}

    def test_a_diverged_trial_does_not_flatten_the_others(self) -> None:
        wild = trial(9, [(2.0, 1.6), (3e4, 2e4)], values={"learning_rate": 1e-3})
        calm = [trial(i, falling(2.0, 1.4, 8)) for i in range(4)]
        from search.report.plots import curves

        axes = curves.loss_curves(gather(study([*calm, wild]))).axes[0]  # type: ignore[union-attr]
        assert axes.get_ylim()[1] < 3
        assert any("1 value(s) above" in text.get_text() for text in axes.texts)

    def test_curves_are_named_at_their_ends_and_losers_are_grey(self) -> None:
        from search.report.plots import curves

        facts = gather(study([trial(i, falling(2.0, 1.4 + 0.05 * i, 6)) for i in range(6)]))
        axes = curves.loss_curves(facts).axes[0]  # type: ignore[union-attr]
        names = [text.get_text() for text in axes.texts]
        assert sorted(names) == ["0 (best)", "1", "2", "3", "4", "5"]
        places = sorted(text.xy[1] for text in axes.texts)  # type: ignore[attr-defined]
        low, high = axes.get_ylim()
        assert all(b - a > 0.03 * (high - low) for a, b in pairwise(places)), "none covers another"
        assert sum(line.get_color() == OTHER for line in axes.lines) == 2 * 3

    def test_the_colour_tells_the_losses_near_the_best_apart(self) -> None:
        from search.report.plots.by_parameter import _near_the_best

        norm, ticks = _near_the_best([0.3656, 0.379, 0.388, 0.476], 0.004)
        near, far = float(norm(0.388)) - float(norm(0.379)), float(norm(0.476)) - float(norm(0.388))
        assert near > 0.1 and far > 0.1, "0.388 is neither 0.379 nor 0.476"
        assert ticks[0] == pytest.approx(0.3656) and ticks[-1] == pytest.approx(0.476)


class TestFiles:
    def test_refresh_writes_both_languages_and_the_plots_they_link(self, tmp_path: Path) -> None:
        written = write.refresh(hand_run(), tmp_path / "hand_run")
        assert [path.name for path in written[:3]] == ["tuning-log.md", "tuning-log.zh.md", "tuning-log-data.csv"]
        assert all(path.is_file() for path in written)
        assert all("(tuning-log-data.csv)" in path.read_text() for path in written[:2])
        for path in written[:2]:
            linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text())
            assert len(linked) == len(plots.PLOTS)
            assert all((path.parent / link).is_file() for link in linked)
        assert not list(tmp_path.rglob(".*"))

    def test_the_same_again_touches_nothing(self, tmp_path: Path) -> None:
        first = {path: path.stat().st_mtime_ns for path in write.refresh(hand_run(), tmp_path)}
        second = {path: path.stat().st_mtime_ns for path in write.refresh(hand_run(), tmp_path)}
        assert first == second

    def test_an_empty_study_has_its_log_too(self, tmp_path: Path) -> None:
        written = write.refresh(study([]), tmp_path)
        assert [path.name for path in written] == ["tuning-log.md", "tuning-log.zh.md", "tuning-log-data.csv"]
        assert all(len(headings(path.read_text())) > 20 for path in written[:2])


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [(2e-4, "learning_rate", "2e-4"), (0.001, "learning_rate", "1e-3"), (0.000146435, "learning_rate", "1.464e-4"),
     (16.0, "lora_alpha", "16"), (1.0, "max_grad_norm", "1.0"), (0.05, "lora_dropout", "0.05"), (None, "", "None"),
     (["query", "key"], "target_modules", '["query", "key"]'), ('a"\n', "", '"a\\"\\n"')],
)  # fmt: skip
def test_values_are_written_as_the_log_writes_them(value: object, name: str, text: str) -> None:
    assert literal(value, name) == text
