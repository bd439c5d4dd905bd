"""Which sampler a study and its strategy have."""

import pytest

from search.errors import StudyError
from search.sampling.make import make_sampler
from studies.rsicap_mini import STUDY as MINI
from tests.search.sampling.runs import GRID


def test_unknown_strategies_are_refused():
    with pytest.raises(StudyError, match="did you mean 'staged'"):
        make_sampler(MINI, "stages")
    with pytest.raises(StudyError, match="leave out --strategy staged"):
        make_sampler(GRID, "staged")
