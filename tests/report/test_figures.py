"""What the figures show: axes that do not exaggerate, one axis a quantity, legends and labels that are all there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.report import figures, load_table, miniature, papers
from pipeline.report.drawing import STYLE, of_method, standalone

FACTORS = {"time": 4.27, "flops": 4.7, "gpu_memory": 2.99, "milliseconds_per_sample": 14.1}
UNITS = {"time": "times", "flops": "times", "gpu_memory": "times", "milliseconds_per_sample": "ms"}


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with mpl.rc_context(STYLE):
        yield


def lengths(figure: Figure) -> dict[str, list[float]]:
    """Each panel's bars in inches, by its title."""
    figure.draw_without_rendering()
    return {
        axes.get_title(loc="left").strip(): [
            bar.get_window_extent().width / figure.dpi for container in axes.containers for bar in container.patches
        ]
        for axes in figure.axes
    }


def texts(figure: Figure) -> list[mpl.text.Text]:
    """Every text that is drawn: ticks beyond the axis are not."""
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        beyond |= {label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)}
    every = [text for text in figure.findobj(mpl.text.Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in every if text not in beyond]


def cost_cells(maker: Any, tasks: tuple[str, ...] = ("mini-vqa", "mini-okvqa", "mini-coco")) -> list[dict[str, Any]]:
    cells = []
    for row, method in (("hificl", "hificl"), ("lora-r16", "lora")):
        for place, task in enumerate(tasks):
            factors = {name: 1.0 if row == "hificl" else value / (1 + place) for name, value in FACTORS.items()}
            factors["milliseconds_per_sample"] *= 3.3 if row == "hificl" else 1.0
            measured = {"metric": "time", "unit": "times", "value": factors["time"], "metrics": factors}
            cells.append(
                maker.cell(row, task, 0) | measured | {"method": method, "measurement": "m.json", "units": UNITS}
            )
    return cells


def test_factors_share_one_axis_that_begins_at_nothing(maker: Any) -> None:
    maker.study("hificl-figure10", cost_cells(maker))
    definition = maker.definition(
        paper="hificl.figure10", layout="bars", metrics=["flops", "gpu_memory", "milliseconds_per_sample"]
    )
    table = load_table("hificl-figure10", maker.params(**{"hificl-figure10": definition}), maker.folder)
    figure = figures.bar_figure(table, table.lines)
    found = lengths(figure)
    assert len(found) == 12  # a row a task, a column a metric
    factors = {title: inches for title, inches in found.items() if "× HiFICL" in title}
    assert len(factors) == 9
    unit = factors["mini-vqa\ntime (× HiFICL)"][0]
    assert all(inches[0] == pytest.approx(unit, rel=0.01) for inches in factors.values())
    assert factors["mini-vqa\nFLOPs (× HiFICL)"][1] == pytest.approx(4.7 * unit, rel=0.01)
    for axes in figure.axes:
        assert axes.get_xlim()[0] == 0
        assert len([tick for tick in axes.get_xticks() if tick <= axes.get_xlim()[1]]) >= 2
    steps = {axes.get_xlim()[1] for axes in figure.axes if "milliseconds" in axes.get_title(loc="left")}
    assert len(steps) == 1 and steps != {figure.axes[0].get_xlim()[1]}


def test_accuracy_and_captions_scores_never_share_an_axis_and_tasks_of_one_metric_do(maker: Any) -> None:
    maker.table("hificl-table1", seeds=2)
    table = load_table("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)
    figure = figures.bar_figure(table, table.lines)
    ends = {axes.get_title(loc="left").strip(): axes.get_xlim() for axes in figure.axes}
    assert ends["mini-vqa\naccuracy (%)"] == ends["mini-okvqa\naccuracy (%)"] != ends["mini-coco\nCIDEr-D"]
    assert ends["VQAv2\naccuracy (%)"] == ends["OK-VQA\naccuracy (%)"] != ends["mini-vqa\naccuracy (%)"]
    assert all(low == 0 for low, _ in ends.values())


@pytest.mark.parametrize("own", [False, True])
def test_the_papers_bars_are_measured_with_ours_on_the_papers_own_model_alone(maker: Any, own: bool) -> None:
    same = {"backbone": "idefics2-8b-base", "task": "vqav2"} if own else {}
    cells = [maker.cell(row, "mini-vqa", 0) | same for row in ("lora-r16", "hificl")]
    maker.study("hificl-table1", cells)
    table = load_table("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)
    ours, printed = (axes.get_xlim() for axes in figures.bar_figure(table, table.lines).axes)
    assert (ours == printed) is own


def test_a_method_has_its_colour_in_bars_and_in_curves_whoever_is_the_reference(maker: Any) -> None:
    rows = {"zero-shot": "zero-shot", "lora-r16": "lora", "hificl": "hificl"}
    for study, reference in (("hificl-table1", "hificl"), ("miniature-methods", "zero-shot")):
        maker.study(study, [maker.cell(row, "mini-vqa", 0) | {"method": method} for row, method in rows.items()])
        table = load_table(study, maker.params(**{study: maker.definition()}), maker.folder)
        assert table.reference == reference
        shown = [
            mpl.colors.to_hex(patch.get_edgecolor()) for patch in figures.bar_figure(table, table.lines).axes[0].patches
        ]
        assert shown == [of_method(method)[0] for method in rows.values()]
    cells = [
        maker.cell(row, "mini-vqa", 0, vary={"num_shots": shots}) | {"method": method}
        for row, method in rows.items()
        for shots in (1, 2)
    ]
    maker.study("hificl-figure4", cells)
    table = load_table(
        "hificl-figure4", maker.params(**{"hificl-figure4": maker.definition(layout="curve")}), maker.folder
    )
    drawn = figures.curve_figure(table, "num_shots").axes[0].get_lines()
    assert [(one.get_color(), one.get_marker()) for one in drawn] == [of_method(method) for method in rows.values()]


def test_the_front_is_what_nothing_cheaper_reaches() -> None:
    assert figures.front([(3, 5.0), (1, 2.0), (2, 2.0), (4, 4.0), (3, 6.0), (9, 6.1)]) == [(1, 2.0), (3, 6.0), (9, 6.1)]
    assert figures.front([]) == []


def test_score_against_each_cost_with_the_front_and_what_costs_nothing_as_a_level(maker: Any) -> None:
    rows = {"zero-shot": 20.0, "live": 60.0, "mimic": 50.0, "lora-r16": 75.0, "hificl": 80.0}
    cells = [
        maker.cell(row, "mini-vqa", seed) | {"value": value + seed} for row, value in rows.items() for seed in (0, 2)
    ]
    maker.study("miniature-factorial", cells)
    known = maker.params(**{"miniature-factorial": maker.definition(layout="pareto")})
    table = load_table("miniature-factorial", known, maker.folder)
    ((name, drawing),) = figures.draw_figures(table, "pareto").items()
    assert name == "cost-mini-idefics2"
    assert "mini-vqa, trainable parameters: LIVE 516, HiFICL 10,240;" in drawing.words  # MimIC and LoRA cost more
    figure = figures.cost_figure(table, table.lines)
    size, *others = figure.axes
    assert [axes.get_xlabel() for axes in (size, *others)] == [
        "trainable parameters", "seconds of training", "FLOPs of training", "peak memory (bytes)",
    ]  # fmt: skip
    (step,) = [line for line in size.get_lines() if line.get_drawstyle() == "steps-post"]
    assert list(zip(*step.get_data(), strict=True)) == [(516, 61.0), (10_240, 81.0)]
    points = {(bars[0].get_xdata()[0], bars[0].get_ydata()[0]): bars[0].get_color() for bars in size.containers}
    assert points.pop((57_344, 76.0)) and points[1_040, 51.0] == of_method("mimic")[0] and len(points) == 3
    (level,) = [line for line in size.get_lines() if list(line.get_ydata()) == [21.0, 21.0]]
    assert level.get_color() == of_method("zero-shot")[0]
    assert [tick.get_text() for tick in size.get_xticklabels() if tick.get_text()][-1] == "100,000"
    assert [tick.get_text() for tick in others[2].get_xticklabels()][:2] == ["512 MiB", "1 GiB"]
    assert all(axes.get_xscale() == "log" for axes in figure.axes)
    legends = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legends) == sorted(["Zero-shot", "LIVE", "MimIC", "LoRA", "HiFICL"])
    figure.draw_without_rendering()


def ranks(maker: Any, values: dict[int, float], seeds: int = 1, **more: Any) -> Any:
    cells = [
        maker.cell("hificl", "mini-vqa", seed, vary={"rank": rank} | more) | {"value": value + seed}
        for rank, value in values.items()
        for seed in range(seeds)
    ]
    maker.study("hificl-figure7", cells)
    known = maker.params(**{"hificl-figure7": maker.definition(paper="hificl.figure7", layout="curve")})
    return load_table("hificl-figure7", known, maker.folder)


def test_a_small_difference_looks_small(maker: Any) -> None:
    (axes,) = figures.curve_figure(ranks(maker, {1: 94.2, 4: 94.0, 8: 94.4}), "rank").axes
    low, high = axes.get_ylim()
    assert low < 94.0 and high > 94.4 and 0.4 / (high - low) < 0.03
    (axes,) = figures.curve_figure(ranks(maker, {1: 20.0, 4: 60.0, 8: 94.4}), "rank").axes
    assert axes.get_ylim()[0] == 0


def test_the_spread_over_seeds_is_on_the_axis(maker: Any) -> None:
    (axes,) = figures.curve_figure(ranks(maker, {1: 80.0, 8: 90.0}, seeds=3), "rank").axes
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((81 - 1, 91 + 1))  # mean of three seeds and their deviation
    assert axes.get_ylim()[0] < heights.min() and axes.get_ylim()[1] > heights.max()


def test_every_text_of_a_figure_is_inside_it_and_runs_into_no_other(maker: Any) -> None:
    cells = [
        maker.cell("hificl", task, 0, vary={"rank": rank, "learning_rate": rate, "num_virtual_tokens": tokens})
        for task in ("mini-vqa", "mini-okvqa", "mini-coco")
        for rank in (1, 300, 500, 700, 1000)
        for rate in (0.002, 0.05)
        for tokens in (1, 8)
    ]
    maker.study("miniature-rank", cells)
    maker.study("hificl-figure10", cost_cells(maker))
    maker.table("hificl-table1", seeds=2)
    long = ["virtual_share_images", "virtual_share_text", "virtual_share_answer", "loss", "loss_without_one",
            "loss_without_layer", "loss_without_all"]  # fmt: skip
    numbers = dict.fromkeys(("virtual_share", *long), 0.3)
    measured = {"metric": "virtual_share", "unit": "fraction", "value": 0.3, "metrics": numbers,
                "units": dict.fromkeys(numbers, "fraction"), "measurement": "m.json"}  # fmt: skip
    maker.study("miniature-inside", [maker.cell(row, "mini-vqa", 0) | measured for row in ("hificl", "mimic")])
    known = maker.params(
        **{
            "miniature-inside": maker.definition(paper=None, layout="bars", metrics=long),
            "miniature-rank": maker.definition(paper=None, layout="curve"),
            "hificl-figure10": maker.definition(
                paper="hificl.figure10", metrics=["flops", "gpu_memory", "milliseconds_per_sample"]
            ),
            "hificl-table1": maker.definition(),
        }
    )
    tables = {study: load_table(study, known, maker.folder) for study in known.studies}
    drawn = [figures.curve_figure(tables["miniature-rank"], "rank")]
    barred = ("hificl-figure10", "hificl-table1", "miniature-inside")
    drawn += [figures.bar_figure(tables[study], tables[study].lines) for study in barred]
    for layers, tokens in ((4, 8), (32, 16)):
        table = layered_table(maker, layers=layers, tokens=tokens)
        drawn.append(figures.layer_figure(table, figures._layered(table, table.lines, "by_layer")))
        drawn.append(figures.token_figure(table, figures._layered(table, table.lines, "by_token")))
    for figure in drawn:
        figure.draw_without_rendering()
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
        inside = figure.bbox.padded(1)
        assert all(inside.containsx(box.x0) and inside.containsx(box.x1) for _, box in boxes)
        assert all(inside.containsy(box.y0) and inside.containsy(box.y1) for _, box in boxes)
        # a title that begins with empty lines leaves room for the model's name above it
        below_it = [
            (text, box.from_extents(box.x0, box.y0, box.x1, box.y1 - box.height * 2 / len(text.split("\n"))))
            if text.startswith("\n\n") else (text, box)
            for text, box in boxes
        ]  # fmt: skip
        labels = [(text, box) for text, box in below_it if re.search("[a-z]|^[0-9]+$", text)]
        clash = [
            (one, other)
            for place, (one, box) in enumerate(labels)
            for other, beside in labels[:place]
            if box.padded(-1).overlaps(beside.padded(-1))
        ]
        assert not clash
    (legend,) = drawn[0].legends
    shown = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
    axes = [papers.label("axes", name) for name in ("learning_rate", "num_virtual_tokens")]
    assert sorted(shown) == sorted(
        f"HiFICL, {axes[0]} = {rate}, {axes[1]} = {tokens}" for rate in (0.002, 0.05) for tokens in (1, 8)
    )


def inside_cells(maker: Any, seeds: int = 2, layers: int = 4, tokens: int = 8) -> list[dict[str, Any]]:
    """Cells of three rows, whose i-th virtual token gets (i + seed) of a hundred in every layer, and of one without."""
    cells = []
    for row, count in (("hificl", tokens), ("prefix", tokens), ("mimic", 1), ("lora-r16", 0)):
        for seed in range(seeds):
            names = ("virtual_share_answer", "virtual_share_images", "virtual_share", "virtual_share_text")
            of_tokens = [[(i + seed) / 100 for i in range(1, count + 1)]] * layers
            by_layer = dict.fromkeys(names, [sum(of_tokens[0])] * layers)
            by_layer["loss_without_layer"] = [0.5 + layer / 10 for layer in range(layers)]
            known = {"by_layer": by_layer, "by_token": dict.fromkeys(names, of_tokens)} if count else None
            cells.append(
                maker.cell(row, "mini-vqa", seed)
                | {
                    "metric": "virtual_share",
                    "unit": "fraction",
                    "value": 0.3,
                    "measurement": "m.json",
                    "layers": known,
                }
                | {"units": {**dict.fromkeys(names, "fraction"), "loss_without_layer": "nats"}}
            )
    return cells


def layered_table(maker: Any, **more: int) -> Any:
    maker.study("miniature-inside", inside_cells(maker, **more))
    metrics = ["virtual_share_images", "virtual_share_text", "virtual_share_answer", "loss_without_layer"]
    known = maker.params(**{"miniature-inside": maker.definition(paper=None, layout="bars", metrics=metrics)})
    return load_table("miniature-inside", known, maker.folder)


def test_what_was_measured_by_layer_is_curves_with_the_spread_over_seeds_and_maps_of_one_seed(maker: Any) -> None:
    table = layered_table(maker)
    drawn = figures.draw_layers(table)
    assert list(drawn) == ["layers-mini-idefics2", "tokens-mini-idefics2"]
    assert all("attention of text" in one.words and "MimIC" in one.words for one in drawn.values())
    figure = figures.layer_figure(table, figures._layered(table, table.lines, "by_layer"))
    shares, *others, losses = [axes for axes in figure.axes if axes.axison]
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in (shares, *others, losses)]
    assert titles == [
        f"mini-vqa {papers.label('metrics', name)}"
        for name in (
            "virtual_share",
            "virtual_share_images",
            "virtual_share_text",
            "virtual_share_answer",
            "loss_without_layer",
        )
    ]  # as the table has them
    assert [one.get_color() for one in shares.get_lines()] == [
        of_method(name)[0] for name in ("hificl", "prefix", "mimic")
    ]
    assert list(shares.get_lines()[2].get_ydata()) == pytest.approx([1.5] * 4)  # percent; of (1, 2)
    assert max(shares.collections[2].get_paths()[0].vertices[:, 1]) == pytest.approx(1.5 + 0.5**0.5)
    assert list(losses.get_lines()[0].get_xdata()) == [1, 2, 3, 4] and losses.get_ylabel() == "nats"
    assert len({axes.get_ylim() for axes in figure.axes if axes.get_ylabel() == "%"}) == 1
    figure = figures.token_figure(table, figures._layered(table, table.lines, "by_token"))
    maps = [axes.collections[0].get_array() for axes in figure.axes[:12]]
    assert maps[0].tolist() == pytest.approx(np.array([[1, 2, 3, 4, 5, 6, 7, 8]] * 4))  # of the first seed, in percent
    assert maps[8].tolist() == pytest.approx(np.array([[1]] * 4))
    assert len({mesh.norm.vmax for axes in figure.axes[:12] for mesh in axes.collections}) == 1


def test_a_study_of_before_or_of_plain_scores_has_no_figures_by_layer(maker: Any) -> None:
    maker.table("hificl-table1", seeds=1)
    table = load_table("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)
    assert figures.draw_layers(table) == {}


def test_losses_have_the_studys_colours_and_their_spread(maker: Any) -> None:
    cells = [
        maker.cell(row, "mini-vqa", seed)
        | {"method": method, "epochs": [{"epoch": e, "ground_truth_loss": (2.0 + seed) / e} for e in (1, 2, 3)]}
        for row, method in (("lora-r16", "lora"), ("hificl", "hificl"))
        for seed in (0, 1)
    ]
    maker.study("hificl-table1", cells)
    table = load_table("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)
    (axes,) = figures.loss_figure(table, table.lines, table.columns).axes
    assert [(one.get_color(), one.get_marker()) for one in axes.get_lines()] == [of_method("lora"), of_method("hificl")]
    assert list(axes.get_lines()[0].get_ydata()) == pytest.approx([2.5, 1.25, 2.5 / 3])
    assert max(axes.collections[0].get_paths()[0].vertices[:, 1]) == pytest.approx(2.5 + 0.5**0.5)
    assert axes.get_ylim()[0] == 0


def test_a_picture_has_a_size_and_may_shrink(maker: Any) -> None:
    maker.table("hificl-table1", seeds=1)
    table = load_table("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)
    for drawing in figures.draw_figures(table, "table").values():
        svg = drawing.svg
        picture = ElementTree.fromstring(svg)  # noqa: S314 - our own
        _, _, width, height = map(float, (picture.get("viewBox") or "").split())
        assert int(picture.get("width") or 0) == pytest.approx(width * 96 / 72, abs=1) and width > 300
        assert int(picture.get("height") or 0) == pytest.approx(height * 96 / 72, abs=1)
        assert "currentColor" in svg
    assert "prefers-color-scheme:dark" in standalone(svg)


def test_a_pretraining_shows_its_losses_in_readable_numbers_and_shares_that_do_not_exaggerate(tmp_path: Path) -> None:
    steps = (100, 200, 300)
    decoder = [
        {"step": step, "loss": {"vqa": 300 / step, "facts": 60 / step}} | dict.fromkeys(miniature.LINES, step / 300)
        for step in steps
    ]
    vision = [{"step": step, "accuracy": 0.96 + step / 10_000} for step in steps]
    (tmp_path / miniature.RECORD).write_text(json.dumps({"vision": vision, "decoder": decoder}))
    picture = ElementTree.parse(miniature.draw_emergence(tmp_path, tmp_path / "out.svg"))  # noqa: S314 - our own
    words = [node.text for node in picture.iter() if node.tag.endswith("text")]
    assert {"vqa", "facts", *miniature.LINES.values(), "0.2", "0.5", "1", "2"} <= set(words)
    assert "0.80" in words  # at least a fifth of the axis, for shares of 0.97 to 0.99
