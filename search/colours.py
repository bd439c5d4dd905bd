"""A colour of its own for every trial: the same in MLflow's charts and in the log's plots."""

from __future__ import annotations

PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#8700ed"),
    *("#660045", "#0000ed", "#454500", "#ed00cc", "#87cc00", "#ed0066", "#212187", "#8766cc"),
    *("#872100", "#878700", "#ab2187", "#454566", "#87ccab", "#660087", "#876645", "#8787ab"),
    *("#cc66ed", "#4566ed", "#ccabed", "#006666", "#006600", "#874566", "#ab0045", "#ccab87"),
    *("#4521cc", "#ab00cc", "#00ab21", "#ed0000", "#00cc87", "#ed6666", "#452166", "#ed45ab"),
    *("#87ab66", "#45abab", "#668766", "#0000ab", "#458700", "#4545ab", "#ab4545", "#abab00"),
)
"""Okabe and Ito's seven (2008), then each as far as can be from all before it and from white, by distance in OKLab
(Ottosson 2020) over a grid of sRGB with a lightness of 0.3 to 0.8. The nearest two of the first 12 are 0.156 apart, of
the first 40 0.080; MLflow's own choice gave two of five trials the same."""


def of_trial(number: int) -> str:
    """The colour of the trial with this number; 48 trials have different ones."""
    return PALETTE[number % len(PALETTE)]
