"""The report as it grows: chapters with every kind of figure, the page of the paper's claims, contents, size."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from convergent.core.chapter import Chapter, Chart, Grid, Panel, Series
from convergent.experiments.registry import EXPERIMENTS
from convergent.report import figures, heat, page, panels
from convergent.report.chapters import drawn
from convergent.report.drawing import Drawings, Figure, begin
from convergent.report.paper import NOT_HERE, paper_claims, paper_rows
from convergent.report.results import Results
from convergent.report.tables import claim_rows
from convergent.report.text import short_labels
from report_fixture import HOSTILE, a_chapter, build, enlarged
from test_report import Page, assert_nothing_injected

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results() -> Results:
    return build()


def one(panel: Panel, *more: Panel) -> Figure:
    return drawn(Chapter("c", "C", [], [Chart("f", "F", "n = 1.", (panel, *more))])).figures[0]


def texts(drawing: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawing)


def line(label: str = "s", n: int = 3, **kwargs: object) -> Series:
    return Series(label, list(range(n)), [float(i) for i in range(n)], **kwargs)  # type: ignore[arg-type]


# Charts


def test_a_label_looks_the_same_in_every_chart_and_no_two_look_alike() -> None:
    labels = [f"label {i}" for i in range(20)]
    first = Chart("a", "", "", (Panel("", "", tuple(line(label) for label in labels)),))
    second = Chart("b", "", "", (Panel("", "", (line(labels[7]), line(labels[2], role="baseline"))),))
    style = panels.styles([first, second])
    looks = [(s.colour, s.marker, str(s.dash)) for s in style.values()]
    assert len(set(looks)) == 20 and list(style) == labels
    both = [panels.legend(c, style) for c in (first, second)]
    assert both[1][0] == both[0][7] and both[1][1] == both[0][2]


def test_the_legend_names_the_band_of_chance() -> None:
    band = ([0, 1], [-1, -1], [1, 1])
    figure = one(Panel("y", "x", (line(),), band, null_label="Chance: 200 random vectors"), Panel("z", "x", (line(role="control"),)))
    assert [(e.label, e.marker) for e in figure.legend] == [("s", "o"), ("Chance: 200 random vectors", "band")]
    assert figure.wide.count("var(--band)") == 1 and figure.narrow == ""
    assert figure.header == ("x", "s", "Chance")
    assert figure.groups[0] == ("y", (("0", "0.000", "−1.000 to 1.000"), ("1", "1.000", "−1.000 to 1.000"), ("2", "2.000", "–")))
    assert all(len(row) == 3 for _, rows in figure.groups for row in rows), "a panel without a band has its column too"


def test_names_are_rows_with_dots_intervals_and_numbers() -> None:
    ticks = ["layer-wise", "single, and a name too long for half a page but not for a row", "none"]
    series = line(low=[-1.0, 0.5, math.nan], high=[1.0, 1.5, math.nan])
    figure = one(Panel("Change", "Intervention", (dataclasses.replace(series, y=[0.0, 1.0, math.nan]),), ticks=ticks))
    shown = texts(figure.wide)
    assert [t for t in shown if t in ticks[0] or t.startswith("single, and a name too long for half a page")] and "not measured" in shown
    assert "1.00" in shown and figure.groups[0][1][1] == (ticks[1], "1.000 (0.500 to 1.500)")
    assert figure.groups[0][1][2][1] == "not measured" and figure.legend[0].dash == "none"
    assert figure.wide.count("M") > 2


def test_a_logarithmic_axis_has_its_ticks_at_the_values_and_leaves_out_zero() -> None:
    doses = [0.0, 1.0, 2.0, 8.0, 32.0]
    panel = Panel("y", "dose", (Series("s", doses, [5.0, 1.0, 2.0, 3.0, 4.0], low=[4.0] * 5, high=[6.0] * 5),), log_x=True)
    plain, log = one(dataclasses.replace(panel, log_x=False)).wide, one(panel).wide
    assert {"1", "2", "8", "32"} <= set(texts(log)) and "0" not in texts(log) and "$" not in "".join(texts(log))
    assert not {"2", "8", "32"} <= set(texts(plain))
    uses = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"', log)]
    assert len(uses) == 4  # of five points the one at zero has no place
    steps = [b - a for a, b in pairwise(uses)]
    assert steps[1] == pytest.approx(2 * steps[0], abs=0.3) and steps[2] == pytest.approx(steps[1], abs=0.3)  # doublings: 1, 2, 2
    heights = [float(y) for y in re.findall(r'<use [^>]*y="([\d.]+)"', log)]
    assert max(heights) - min(heights) > 50, "the axes hold the points"


def test_intervals_beside_each_other_do_not_cover_each_other() -> None:
    two = tuple(Series(label, np.arange(3), np.arange(3.0), low=np.zeros(3), high=np.full(3, 2.0)) for label in "ab")  # type: ignore[arg-type]
    xs = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"', one(Panel("y", "x", two)).wide)]
    assert len(xs) == 6 and all(b - a == pytest.approx(panels.DODGE, abs=0.2) for a, b in zip(xs[:3], xs[3:]))
    many = tuple(line(label, n=30, low=[0.0] * 30, high=[2.0] * 30) for label in "ab")
    drawing = one(Panel("y", "x", many)).wide
    assert drawing.count("fill-opacity:0.16") + drawing.count("opacity:0.16") >= 2  # bands, not sixty bars


def test_whole_numbers_get_whole_ticks_and_fractions_do_not() -> None:
    fraction = one(Panel("y", "share", (Series("s", [0.1, 0.3, 0.5], [1.0, 2.0, 3.0]),))).wide
    assert sum(t in ("0.1", "0.2", "0.3", "0.4", "0.5") for t in texts(fraction)) >= 3
    assert not [t for t in texts(one(Panel("", "layer", (Series("s", [0, 1, 2, 3], [7.0] * 4),))).wide) if t in ("0.5", "1.5", "2.5")]


def test_titles_of_any_length_keep_the_axes_level() -> None:
    figure = one(Panel("Short", "x", (line(),)), Panel("A title that is long enough to need a second line of its own, " * 2, "x", (line(),)))
    sizes = re.findall(r'viewBox="0 0 (\d+) ([\d.]+)"', figure.wide)
    assert len(sizes) == 2 and sizes[0] == sizes[1]


def test_nothing_measured_at_all_is_drawn_and_said() -> None:
    empty = Series("s", [0, 1], [math.nan, math.nan])
    for panel in (Panel("y", "x", (empty,)), Panel("y", "x", (empty,), ticks=["a", "b"]), Panel("y", "x", (empty,), log_x=True), Panel("y", "x", ())):
        assert "<svg" in one(panel).wide
    assert "Nothing was measured." in one(Panel("y", "x", (empty,))).wide


# Grids


def grid(values: list[list[float]], middle: float | None = 0.0, columns: int = 0) -> Grid:
    n = columns or len(values[0])
    return Grid("g", "G", "n = 1.", tuple(f"row {i}" for i in range(len(values))), tuple(f"c{i}" for i in range(n)), tuple(map(tuple, values)), middle=middle)


def test_a_grid_has_every_number_two_colours_and_crossed_empty_cells() -> None:
    g = grid([[-0.5, 0.25], [math.nan, 1.0]])
    figure = drawn(Chapter("c", "C", [], [g])).figures[0]
    for drawing in (figure.wide, figure.narrow):
        assert {"−0.50", "0.25", "1.00", "row 0", "row 1", "c0", "c1"} <= set(texts(drawing))
        fills = re.findall(r"fill:var\(--(real|control)\);opacity:([\d.]+)", drawing)
        strength = {k: heat.PALEST + (heat.DARKEST - heat.PALEST) * k for k in (0.5, 0.25, 1.0)}  # of the farthest value, 1.0
        assert [(c, float(a)) for c, a in fills] == [("control", pytest.approx(strength[0.5], abs=0.01)), ("real", pytest.approx(strength[0.25], abs=0.01)), ("real", pytest.approx(strength[1.0], abs=0.01))]
        assert "nan" not in drawing
    assert [e.label for e in figure.legend] == ["below 0", "above 0", "not measured"]
    assert "Lowest −0.50 (row 0, c0), highest 1.00 (row 1, c1)." in figure.desc
    assert figure.rows[1] == ("row 1", "not measured", "1.00")


def test_a_grid_without_a_middle_runs_from_its_lowest_to_its_highest() -> None:
    figure = drawn(Chapter("c", "C", [], [grid([[10.0, 20.0, 30.0]], None)])).figures[0]
    assert [float(a) for a in re.findall(r"fill:var\(--real\);opacity:([\d.]+)", figure.wide)] == pytest.approx([heat.PALEST, (heat.PALEST + heat.DARKEST) / 2, heat.DARKEST], abs=0.01)
    assert [e.label for e in figure.legend] == ["Darker: larger"]


def test_a_broad_grid_is_set_in_blocks_and_no_cell_is_too_narrow_for_its_number() -> None:
    g = grid([[-0.25] * 40])
    figure = drawn(Chapter("c", "C", [], [g])).figures[0]
    assert texts(figure.narrow).count("row 0") == 5 and texts(figure.wide).count("row 0") == 2
    assert texts(figure.narrow).count("−0.25") == texts(figure.wide).count("−0.25") == 40
    xs = sorted({float(x) for x in re.findall(r'x="([\d.]+)"[^>]*>−0\.25', figure.narrow)})
    assert min(b - a for a, b in pairwise(xs)) > 5 * heat.CHARACTER * 11
    assert "Nothing was measured." in drawn(Chapter("c", "C", [], [grid([[math.nan]])])).figures[0].desc


# The paper's claims


def test_what_is_recomputed_is_what_replicate_printed() -> None:
    """The page's figures against docs/replicate.md, which a script writes."""
    table: dict[str, list[str]] = {}
    for row in (ROOT / "docs" / "replicate.md").read_text("utf-8").splitlines():
        if row.startswith("| `"):
            cells = [c.strip() for c in row.strip("|").split("|")]
            table.setdefault(cells[0].strip("`"), cells[1:])  # the first table has the verdicts
    raw = yaml.safe_load((ROOT / "src/convergent/report/paper_claims.yaml").read_text("utf-8"))
    counted = [r for c in raw for r in c.get("recomputed", ())]
    assert len(counted) > 10
    for r in counted:
        _, figure, n, bounds, verdict, *_ = table[r["of"]]
        shown = f"{r['low']:.3f} to {r['high']:.3f}" if "low" in r else "-"
        assert (f"{r['figure']:.3f}", f"{r['n']:,}", r["verdict"]) == (figure, n, verdict), r["of"]
        assert shown == bounds, r["of"]
    assert all(("recomputed" in c) != ("nothing" in c) for c in raw)


def test_every_claim_of_an_experiment_names_a_claim_that_is_there() -> None:
    known = {c.id for c in paper_claims()}
    assert len(known) == len(paper_claims()) >= 12
    for module in EXPERIMENTS.values():
        source = Path(module.__file__ or "").read_text("utf-8")
        for named in re.findall(r'\bpaper=f?"([^"{]*)', source):
            assert named in known or any(k.startswith(named) for k in known), (module.__name__, named)
    assert {"ablation-layerwise", "ablation-single"} <= known


def test_claims_that_state_the_opposite_of_the_papers_say_so() -> None:
    """Found by their sentences: the paper's row and the study's claim beside it."""
    opposed = set()
    for module in EXPERIMENTS.values():
        for part in {Path(module.__file__ or ""), Path((module.__file__ or "").removesuffix(".py") + "_page.py")}:
            if part.is_file():
                opposed |= set(re.findall(r'\bpaper="([^"]*)", opposes=True', part.read_text("utf-8")))
    assert opposed == {"chat-baseline", "semantic"}


def test_the_row_of_a_claim_shows_its_first_comparison_and_joins_its_verdicts(results: Results) -> None:
    rows = {r.paper.id: r for r in paper_rows(results)}
    assert rows["misaligned"].verdict == "held" and rows["misaligned"].live[0]["first"]["estimate"] == -14.2
    assert rows["transfer"].verdict == "undecided" and rows["transfer"].live[0]["votes"] == {"held": 1, "did not hold": 0, "undecided": 1}
    assert rows["scalars"].verdict == NOT_HERE and rows["scalars"].live == ()
    more = [{**c, "paper": "transfer"} for c in results.claims]
    joined = {r.paper.id: r for r in paper_rows(dataclasses.replace(results, claims=more))}["transfer"]
    assert joined.verdict == "did not hold" and len(joined.live) == 4
    assert [c["anchor"] for c in joined.live] == ["claim-1", "claim-2", "claim-3", "claim-4"]
    held = [{**c, "paper": "transfer", "verdict": "held"} for c in results.claims]
    assert {r.paper.id: r.verdict for r in paper_rows(dataclasses.replace(results, claims=held))}["transfer"] == "held"
    turned = {r.paper.id: r for r in paper_rows(dataclasses.replace(results, claims=[{**c, "opposes": True} for c in results.claims]))}
    assert turned["misaligned"].verdict == "did not hold" and turned["transfer"].verdict == "undecided"  # what was tested is the paper's opposite
    assert turned["transfer"].live[0]["votes"] == {"held": 0, "did not hold": 1, "undecided": 1}
    assert set(claim_rows(results)["paper"]) == {"misaligned", "ablation-single", "transfer", "induction"}


# The page


@pytest.fixture(scope="module")
def html(results: Results) -> str:
    """A page with four chapters, two of them hostile; the core figures are drawn elsewhere."""
    few = dataclasses.replace(results, chapters=[a_chapter(k, hostile=k % 2 == 0) for k in range(4)])
    elsewhere = [Figure(f"fig-{n}", n) for n in ("conditions", "steering", "cosines", "norms", "margins", "training", "sensitivity")]
    return page.render(few, [], Drawings(map(drawn, few.chapters), elsewhere))


def test_first_comes_the_paper_then_contents_then_the_verdicts(html: str) -> None:
    places = [html.index(f'id="{i}"') for i in ("main", "paper", "contents", "verdicts", "conditions", "chapter-study-0", "chapter-study-3", "organisms", "reproduce")]
    assert places == sorted(places)
    table = html[html.index('<table class="paper"') : html.index('id="contents"')]
    assert table.count('<tr role="row" id="paper-') == len(paper_claims())
    plain = " ".join("".join(Page(table).texts).split())
    assert "−14.2 points A minus chat model, mean alignment" in plain and "1 of 2 comparisons for" in plain and "57.7 %" in plain
    assert table.count(NOT_HERE) == len(paper_claims()) - 4


def test_contents_name_every_section_and_every_link_arrives(html: str) -> None:
    parsed = Page(html)
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert [i for i, n in Counter(ids).items() if n > 1] == []
    links = [a["href"][1:] for t, a in parsed.elements if t == "a" and (a.get("href") or "").startswith("#")]  # type: ignore[index]
    assert set(links) <= set(ids)
    sections = [a["id"] for t, a in parsed.elements if t == "section" and "id" in a]
    start = html.index('<nav id="contents"')
    listed = re.findall(r'href="#([^"]+)"', html[start : html.index("</nav>", start)])
    assert listed == sections and Counter(links)["contents"] >= 10
    assert [a.get("class") for t, a in parsed.elements if t == "a"][:2] == ["skip", "skip"]


def test_headings_are_in_order_and_landmarks_are_named(html: str) -> None:
    parsed = Page(html)
    levels = [int(t[1]) for t, _ in parsed.elements if re.fullmatch(r"h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert parsed.count("main") == 1 and parsed.count("nav") == 2
    assert all(a.get("aria-label") or a.get("aria-labelledby") for t, a in parsed.elements if t == "nav")


def test_hostile_chapters_stay_text(html: str) -> None:
    parsed = Page(html)
    assert_nothing_injected(parsed)
    assert HOSTILE[0] in "".join(parsed.texts) and not re.search(r"#01\d{4}", html)


def test_two_hundred_conditions_and_twelve_chapters_stay_under_five_megabytes(results: Results) -> None:
    """Three chapters are drawn, and count four times."""
    three = [drawn(a_chapter(k)) for k in range(3)]
    chapters = [a_chapter(0)] * 12
    big = dataclasses.replace(enlarged(results, 200, 1), chapters=chapters)
    drawings = {f.id: f for f in begin(big).figures if f is not None}
    assert len(drawings["fig-further"].rows) == 178 and len(drawings["fig-conditions"].rows) == 23
    html = page.render(big, [], Drawings(three * 4, drawings.values()))
    data = html[html.index('id="data">') : html.rindex('<script>')]
    assert html.count('<details class="chapter"') == 12
    assert len(html.encode()) - len(data) + page.ANSWER_BUDGET < 4_600_000  # the grid of thresholds and the judges take up to 0.4 MB more
    assert html.count("further experiments") > 0


def test_conditions_of_further_experiments_have_their_own_figure(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    few = enlarged(results, 25, 2)
    monkeypatch.setattr(figures, "line_figure", lambda *_: Figure("lines", "not drawn here"))
    *_, further = begin(dataclasses.replace(few, sensitivity=pd.DataFrame())).figures
    assert further is not None and further.id == "fig-further" and [r[1] for r in further.rows] == ["Models as they are", "Study-0", "Study-1"]
    assert "Drawn" not in further.caption


def test_labels_that_read_alike_when_cut_are_cut_in_the_middle() -> None:
    ablated = "Organism A, the direction without its massive dimensions projected out"
    alike = [f"{ablated} at every layer", f"{ablated} at layer 20", "Chat model", "Chat model"]
    short = short_labels(alike, 40)
    assert len(set(short)) == 3 and max(map(len, short)) <= 40
    assert short[0].startswith("Organism A") and short[0].endswith("every layer") and short[1].endswith("layer 20") and short[2:] == ["Chat model"] * 2
    assert short_labels([ablated], 40) == ["Organism A, the direction without its…"]
