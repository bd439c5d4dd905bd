"""Which sampler a study and its strategy have."""

import pytest

from search import SearchOptions, Session
from search.errors import StudyError
from search.places import Places
from search.sampling.make import make_sampler
from studies.rsicap_mini import STUDY as MINI
from tests.search.sampling.runs import GRID


def test_unknown_strategies_are_refused():
    with pytest.raises(StudyError, match="did you mean 'rungs'"):
        make_sampler(MINI, "rung")
    with pytest.raises(StudyError, match="leave out --strategy rungs"):
        make_sampler(GRID, "rungs")


@pytest.mark.parametrize("strategy", ["rungs", "freeze-thaw"])
def test_a_grid_is_refused_before_anything_is_created(strategy, tmp_path):
    places = Places.of(tmp_path / "runs")
    with pytest.raises(StudyError, match=f"leave out --strategy {strategy}"):
        Session(GRID, SearchOptions(strategy=strategy, places=places))
    assert not places.runs_dir.exists()
