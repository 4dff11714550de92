"What a figure shows, found out with as little drawing as possible: few dots, one pass, no PNG."

from contextlib import contextmanager
from unittest import mock

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.text import Text

from llmopt.visualization.bars import kept_tokens, kv_bars, phase_bars, rss_bars
from llmopt.visualization.charts import drawable
from llmopt.visualization.curves import gap_lines, gap_shares, pareto
from llmopt.visualization.lanes import lanes, ratios
from llmopt.visualization.style import STYLE, Chart, drawing

DOTS = 40  # an inch


def draw(fig):
    "The shades of grey of `fig` (height, width), drawn once."
    fig.set_dpi(DOTS)
    renderer = RendererAgg(*fig.bbox.size, DOTS)
    with drawing():
        fig.draw(renderer)
    return np.asarray(renderer.buffer_rgba())[..., :3].mean(-1)


def panels(results):
    "Every kind of panel on one small figure, with all methods: what dashboards are made of, for a tenth of their time."
    v, fig = drawable(results), Chart(figsize=(6, 8))
    with rc_context(STYLE):
        ax = list(fig.subplots(5, 2).flat)
        lanes(ax[0], v, "ttft_ms", v.methods)
        lanes(ax[1], v, "kl_mean", v.methods)
        ratios(ax[2], v, "e2el_ms", v.methods)
        for a, panel in zip(ax[3:], (phase_bars, kept_tokens, kv_bars, rss_bars, gap_lines, gap_shares)):
            panel(a, v, v.methods)
        pareto(ax[9], v)
    return fig


def says(fig):
    "What the texts of a figure say."
    return [t.get_text() for t in fig.findobj(Text)]


def silent(fig):
    "The panels that show nothing and say nothing, by title."
    return [
        ax.get_title(loc="left")
        for ax in fig.axes
        if ax.axison and not (ax.lines or ax.patches or ax.collections or any(t.get_text().strip() for t in ax.texts))
    ]


@contextmanager
def texts_drawn():
    "A dict that gets what each text says that is drawn, its box and its sheet, in inches."
    drawn, draw_text = {}, Text.draw

    def record(text, renderer):
        draw_text(text, renderer)
        fig = text.get_figure(root=True)
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent(renderer).extents / fig.dpi
            drawn[text] = text.get_text(), box, fig.bbox.extents[2:] / fig.dpi

    with mock.patch.object(Text, "draw", record):
        yield drawn


def collisions(drawn):
    "Pairs of texts that overlap, and texts that leave the sheet, by more than a fiftieth of an inch."
    text, b, sheet = zip(*drawn.values())
    b, slack = np.array(b), 0.02
    w = np.minimum(b[:, None, 2], b[None, :, 2]) - np.maximum(b[:, None, 0], b[None, :, 0])
    h = np.minimum(b[:, None, 3], b[None, :, 3]) - np.maximum(b[:, None, 1], b[None, :, 1])
    pairs = np.argwhere(np.triu((w > slack) & (h > slack), 1))
    out = np.flatnonzero((b[:, :2] < -slack).any(1) | (b[:, 2:] > sheet[0] + slack).any(1))
    return [(text[i], text[j]) for i, j in pairs] + [(text[i], "leaves the sheet") for i in out]
