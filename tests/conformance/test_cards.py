"""What every strategy says of itself, held against what it does."""

from pathlib import Path

import pytest

from omnifm import build
from omnifm.build import STRATEGIES
from omnifm.config import parse, parse_override, put
from omnifm.tune import SIZE, grid
from tests.support import HOSPITALS, NEEDS, Spy, make_lab, spy

pytestmark = pytest.mark.parametrize("strategy", sorted(STRATEGIES))


def test_its_card_says_what_it_keeps_and_sends(strategy: str, tmp_path: Path) -> None:
    """What `omnifm list strategies` prints, held against a run."""
    lab = make_lab(tmp_path, strategy, engine=Spy, **NEEDS.get(strategy, {}))
    server = lab.run()
    card, messages = lab.strategy.card, spy(lab)
    assert bool(card.private) == any(lab.private(h.id) for h in HOSPITALS)
    assert bool(card.up) == any(reply.extra for reply in messages.replies)
    assert bool(card.down) == any(request.extra for request in messages.requests if request.kind == "train")
    assert bool(card.server) == bool(server.extra)
    assert card.paper


def test_its_search_is_as_large_as_any(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, **NEEDS.get(strategy, {}))
    configs = grid(strategy, lab.config)
    assert len(set(configs)) == SIZE
    for overrides in configs:
        raw = lab.config.model_dump()
        for override in overrides:
            put(raw, *parse_override(override))
        build.strategy_options(parse(raw))
