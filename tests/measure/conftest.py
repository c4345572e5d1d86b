"""Fixtures of the tests of `rlp/measure`."""

import pytest


@pytest.fixture
def undrawn(monkeypatch):
    """Curves are not drawn, which takes most of the time of a page: for tests that read its
    words."""
    monkeypatch.setattr(
        "rlp.measure.report_plots.draw_curves",
        lambda *curves, **options: "data:image/svg+xml;base64,",
    )
