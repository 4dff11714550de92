"Texts in every script: fonts that have them where there are some, and one line where there are none."

import warnings
from unittest import mock

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

import llmopt.errors
from llmopt.visualization.style import BOXES, FALLBACKS, STYLE, Chart, drawing, fallback_fonts
from llmopt.visualization.texts import MONO
from visualization.drawn import draw


@pytest.fixture
def only():
    "A function that takes the fonts of this machine away but for some; what was said before is forgotten."
    with mock.patch.dict(STYLE), mock.patch.object(llmopt.errors, "_said", set()):  # private: it has no way to forget
        yield lambda *families: STYLE.update({"font.family": [*families]})


def warned(*texts):
    "The warnings that drawing a figure with each of `texts` gives, and the shades of the last one."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for text in texts:
            fig = Chart(figsize=(2, 1))
            fig.text(0.1, 0.5, text, fontsize=20, family=STYLE["font.family"])
            shades = draw(fig)
            fig.png(20)
    return [str(w.message) for w in said], shades


def test_missing_characters_are_one_line(only):
    "However many there are, and however often they are drawn."
    only("DejaVu Sans")
    assert warned("Rain, pluie, Дождь")[0] == []
    assert warned("人工智能", "雨", "人工智能")[0] == [BOXES]
    assert "\n" not in BOXES and warned("비")[0] == []


def test_scripts_that_every_machine_can_draw(only):
    "DejaVu Sans stands behind the font of fixed width, which has no Hebrew."
    only(*MONO[:2])
    assert warned("שלום, مرحبا, Привет, Γειά")[0] == []


def test_other_warnings_pass():
    "Only those about characters are gathered."
    with pytest.warns(UserWarning, match="look out"), drawing():
        warnings.warn("look out", stacklevel=1)


def small_font(path, family, character):
    "Write a font with one character, a full box."
    pen = TTGlyphPen(None)
    for draw_to, point in zip((pen.moveTo, *[pen.lineTo] * 3), [(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        draw_to(point)
    pen.closePath()
    font, glyphs = FontBuilder(1000, isTTF=True), {".notdef": TTGlyphPen(None).glyph(), "box": pen.glyph()}
    font.setupGlyphOrder([*glyphs])
    font.setupCharacterMap({ord(character): "box"})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable(dict(familyName=family, styleName="Regular", fullName=family, psName=family.replace(" ", "")))
    font.setupOS2(sTypoAscender=1000)
    font.setupPost()
    font.save(path)


def test_an_installed_font_is_used(only, tmp_path):
    "A font of the list is found, and draws what DejaVu Sans lacks."
    only("DejaVu Sans")
    _, without = warned("雨")
    manager = font_manager.fontManager
    with mock.patch.object(manager, "ttflist", [*manager.ttflist]):
        small_font(tmp_path / "cjk.ttf", FALLBACKS[0], "雨")
        manager.addfont(tmp_path / "cjk.ttf")
        assert FALLBACKS[0] in fallback_fonts()
        only("DejaVu Sans", FALLBACKS[0])
        said, shades = warned("雨")
        with mock.patch.object(llmopt.errors, "_said", set()):  # private: as above
            assert warned("雨")[0] == [] == said
    assert (shades < 128).sum() > 2 * (without < 128).sum()
