"""Across machines nobody has all cohorts, and yet everybody builds the federation of the run in one process."""

import json
import tracemalloc
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omnifm import build
from omnifm.config import Config, digest, parse
from omnifm.data.partition import plans_to_json
from omnifm.data.words import Discretion, read_discretion
from omnifm.deploy.data import Own, data_apart, own_client, public
from omnifm.errors import ConfigError, DataError, FederationError
from omnifm.federation.client import Site
from omnifm.federation.introduction import MOST_EXAMPLES, Introduction, read_introduction
from omnifm.tasks.vqa import Vqa
from tests.run import jobs
from tests.support import differing
from tests.tasks.atlas import COHORTS, make_cohorts
from tests.tasks.test_vqa import raw_config
from tests.tasks.vqa_cohort import write_questions


@dataclass(frozen=True)
class Apart:
    """One federation twice: in one process, and as its hospitals know it."""

    config: Config
    whole: build.Data
    owns: list[Own]

    @property
    def introductions(self) -> list[Introduction]:
        return [own.introduction for own in self.owns]


def take_apart(config: Config, discretion: Discretion = Discretion()) -> Apart:  # noqa: B008  # it is frozen
    whole = build.load_data(config)
    folders = {name: cohort.folder for name, cohort in whole.cohorts.items()}
    return Apart(public(config), whole, [own_client(public(config), folders[p.cohort], p.id, discretion) for p in whole.plans])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


def require_same(one: Site, other: Site) -> None:
    assert one.strategy.context == other.strategy.context
    assert differing(one.initial_shared(), other.initial_shared()) == []
    assert differing(one.model.state_dict(), other.model.state_dict()) == []
    assert (one.task.one_label_space, one.task.label_count) == (other.task.one_label_space, other.task.label_count)


def require_parity(config: Config, tmp_path: Path, discretion: Discretion = Discretion()) -> None:  # noqa: B008
    apart = take_apart(config, discretion)
    site = build.make_site(config, tmp_path, apart.whole)
    heard = apart.introductions[::-1]  # they come in any order
    require_same(site, build.make_site(apart.config, tmp_path, data_apart(apart.config, heard)))
    for own in apart.owns:
        hospital = build.make_site(apart.config, tmp_path, data_apart(apart.config, heard, own))
        require_same(site, hospital)
        for split in ("train", "val", "test"):
            mine, theirs = (s.task.client_data(own.plan.id).split(split) for s in (hospital, site))
            index = torch.arange(len(theirs))
            assert len(mine) == len(theirs)
            assert torch.equal(mine.batch(index).image, theirs.batch(index).image)
            assert torch.equal(mine.batch(index).target, theirs.batch(index).target)


@pytest.mark.parametrize("strategy", ["omnifm", "fedavg"])
@pytest.mark.parametrize("label_space", ["name", "cohort"])
def test_server_and_hospitals_build_what_one_process_builds(data: Path, tmp_path: Path, strategy: str, label_space: str) -> None:
    require_parity(jobs.config(data, strategy, federation={"label_space": label_space}), tmp_path)


def test_so_do_the_other_tasks_that_can_and_a_mixture_of_them(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    atlas = make_cohorts(tmp_path_factory)
    cohorts = [{"path": str(atlas / name)} for name in COHORTS if "vqa" not in name]
    raw = jobs.raw_config(atlas, "omnifm", task="mixed", federation={"cohorts": cohorts})
    require_parity(
        parse(
            raw
            | {
                "data": {"image_size": 48, "cache": str(atlas / "cache")},
                "tasks": {"mixed": {"token_dim": 16}, "super_resolution": {"view": 32}},
            }
        ),
        tmp_path,
    )


def test_super_resolution_has_to_be_told_the_side_of_its_squares(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    atlas = make_cohorts(tmp_path_factory)
    raw = jobs.raw_config(
        atlas, "fedavg", task="super_resolution", federation={"cohorts": [{"path": str(atlas / "atlas_sr_t1")}]}
    )
    with pytest.raises(ConfigError, match=r"tasks\.super_resolution\.view: set it; across machines"):
        apart = take_apart(parse(raw))
        build.make_site(apart.config, tmp_path, data_apart(apart.config, apart.introductions))


def test_an_introduction_says_nothing_of_rows_or_in_free_text(data: Path) -> None:
    apart = take_apart(jobs.config(data))
    for own in apart.owns:
        text = own.introduction.model_dump_json()
        assert "Stripes" not in text and str(data) not in text  # the title, a path
        assert not any(f'"{row.id}"' in text or row.image in text for row in own.cohort.rows)
        assert read_introduction(text) == own.introduction


def test_free_text_that_comes_all_the_same_is_dropped(data: Path) -> None:
    own = take_apart(jobs.config(data)).owns[0]
    spec = own.introduction.spec.model_copy(update={"notes": "Mrs Jane Roe", "title": "Jane"})
    assert read_introduction(own.introduction.model_copy(update={"spec": spec}).model_dump_json()) == own.introduction


def test_numbers_of_rows_cost_no_memory_and_have_a_bound(data: Path) -> None:
    """A few bytes that spoke of thirty million rows took the server more than a GiB."""
    one = take_apart(jobs.config(data)).owns[0].introduction
    most = one.model_copy(update=dict.fromkeys(("train", "val", "test"), MOST_EXAMPLES))
    tracemalloc.start()
    try:
        plan = read_introduction(most.model_dump_json()).plan
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert len(plan.train) == len(plan.val) == len(plan.test) == MOST_EXAMPLES and plan.test[-1] == MOST_EXAMPLES - 1
    more = most.model_copy(update={"val": MOST_EXAMPLES + 1})
    with pytest.raises(FederationError, match=r"an introduction cannot be read: val: [^\n]*1000000"):
        read_introduction(more.model_dump_json())


def test_a_plan_from_elsewhere_is_written_as_one_from_here(data: Path) -> None:
    plan = take_apart(jobs.config(data)).owns[0].introduction.plan
    rows = {split: tuple(range(len(getattr(plan, split)))) for split in ("train", "val", "test")}
    here = replace(plan, **rows)
    as_ever = json.dumps([asdict(here)], separators=(",", ":"), sort_keys=True)  # what the SHA-256 in split.json is of
    assert plans_to_json([plan]) == plans_to_json([here]) == as_ever
    assert json.dumps(plan.record()) == json.dumps(asdict(here)), "the same order of keys"


def test_the_config_that_travels_names_no_path_and_is_the_same_run(data: Path) -> None:
    config = jobs.config(data)
    travels = public(config)
    assert str(data) not in travels.model_dump_json()
    assert digest(travels) == digest(config)
    assert parse(travels.model_dump(mode="json", exclude_none=True)) == travels


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"strategy": "centralised"}, "strategy centralised: pools all data"),
        ({"model": {"weights": "trunk.safetensors"}}, "model.weights: a file of weights does not travel"),
        ({"federation": {"cohorts": [{"path": "a/x"}, {"path": "b/x"}]}}, "two have the same"),
    ],
)
def test_what_cannot_run_across_machines_is_said_at_once(data: Path, change: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        public(jobs.config(data, **{"strategy": "fedavg"} | change))


def test_a_task_that_reads_all_rows_says_so(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omnifm.tasks.classification import Classification

    apart = take_apart(jobs.config(data))
    monkeypatch.setattr(Classification, "apart", False)
    with pytest.raises(ConfigError, match="task classification cannot run across machines yet"):
        build.make_site(apart.config, tmp_path, data_apart(apart.config, apart.introductions))


def test_strangers_are_named(data: Path) -> None:
    config = public(jobs.config(data))
    with pytest.raises(DataError, match="client scan-7: cohort scan has no such client; it is cut into scan-0, scan-1"):
        own_client(config, data / "scan", "scan-7")
    lonely = public(jobs.config(data, federation={"cohorts": [{"path": "echo"}]}))
    with pytest.raises(DataError, match="cohort scan: not in the server's config, whose cohorts are echo"):
        own_client(lonely, data / "scan", "scan-0")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"client": "echo-9", "place": 1}, "both are number 1 of echo"),
        ({"place": 5}, "the same id"),
        ({"client": "x", "place": 5, "classes": ("a", "c")}, "describe cohort echo differently"),
        ({"client": "x", "name": "attic"}, "client x: cohort attic is not one of this federation's"),
    ],
)
def test_introductions_that_contradict_each_other_are_refused(data: Path, change: dict[str, object], line: str) -> None:
    apart = take_apart(jobs.config(data))
    one = next(i for i in apart.introductions if i.client == "echo-1")
    spec = one.spec.model_copy(update={k: v for k, v in change.items() if k in ("classes", "name")})
    other = one.model_copy(update={**{k: v for k, v in change.items() if k in ("client", "place")}, "spec": spec})
    with pytest.raises(FederationError, match=line):
        data_apart(apart.config, [*apart.introductions, other])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"client": "../x"}', "\x00"])
def test_what_is_no_introduction_is_one_line(text: str) -> None:
    with pytest.raises(FederationError, match=r"^an introduction cannot be read: [^\n]+$"):
        read_introduction(text)


# ---------------------------------------------------------------------- words of questions and answers
ALL = Discretion(least=1)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cohorts of questions; in `echo` one answer is rare, one is for testing alone, and a question is long."""
    root = tmp_path_factory.mktemp("asked")
    write_questions(root / "scan", "scan", "MRI")
    write_questions(root / "echo", "echo", "US", image_disjoint="1")
    text = (root / "echo" / "manifest.csv").read_text(encoding="utf-8")
    first = next(line for line in text.splitlines() if line.startswith("train0,"))
    last = next(line for line in text.splitlines() if line.startswith("test0,"))
    for line, answer in ((first, "Roe's  disease"), (last, "doe")):
        changed = line.replace(",left,", f",{answer},").replace(",right,", f",{answer},")
        assert changed != line
        text = text.replace(line, changed.replace("bright?", "bright and which one is dark?") if line == last else changed)
    (root / "echo" / "manifest.csv").write_text(text, encoding="utf-8")
    return root


def questions(folder: Path, strategy: str = "fedavg", **options: Any) -> Config:
    return parse(raw_config(folder, strategy, **options))


def test_a_federation_of_questions_is_the_one_of_a_single_process_if_all_is_told(asked: Path, tmp_path: Path) -> None:
    config = questions(asked, "omnifm")
    apart = take_apart(config, ALL)
    site = build.make_site(config, tmp_path, apart.whole)
    server = build.make_site(apart.config, tmp_path, data_apart(apart.config, apart.introductions[::-1]))
    require_same(site, server)
    assert isinstance(site.task, Vqa)
    whole = site.task.table
    for own in apart.owns:
        hospital = build.make_site(apart.config, tmp_path, data_apart(apart.config, apart.introductions, own))
        require_same(site, hospital)
        assert isinstance(hospital.task, Vqa)
        table = hospital.task.table
        assert table.texts[: table.classes] == whole.texts[: whole.classes] and hospital.task.types == site.task.types
        for split in ("train", "val", "test"):
            theirs, mine = (s.task.client_data(own.plan.id).split(split) for s in (site, hospital))
            one, other = (part.batch(torch.arange(len(part))) for part in (theirs, mine))
            assert torch.equal(one.image, other.image)
            # Questions have the width of the federation's longest one: dropout draws for padding too.
            for name in ("question", "question_mask", "closed", "disjoint", "question_type"):
                assert torch.equal(one.side[name], other.side[name]), name
            said = [[t.texts[i] for i in b.target.tolist()] for t, b in ((whole, one), (table, other))]
            assert said[0] == said[1] and (split != "train" or torch.equal(one.target, other.target))


def test_a_mixture_with_questions_is_too(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    atlas = make_cohorts(tmp_path_factory)
    cohorts = [{"path": str(atlas / name)} for name in ("atlas_cls_t1", "atlas_vqa_t1")]
    raw = jobs.raw_config(atlas, "omnifm", task="mixed", federation={"cohorts": cohorts})
    sizes = {"data": {"image_size": 48, "cache": str(atlas / "cache")}, "tasks": {"mixed": {"token_dim": 16}}}
    require_parity(parse(raw | sizes), tmp_path, ALL)


def test_rare_answers_are_told_to_nobody_and_their_rows_not_trained_on(asked: Path, tmp_path: Path) -> None:
    apart = take_apart(questions(asked), Discretion(least=2))
    scan, echo = apart.owns
    assert echo.introduction.words is not None
    assert echo.introduction.words.answers.keys() == {"Yes", "No", "left", "right"}
    text = echo.introduction.model_dump_json()
    assert "Roe" not in text and "doe" not in text and "Which side" not in text and read_introduction(text) == echo.introduction
    rare = [i for i in apart.whole.plans[1].train if echo.cohort.rows[i].answer.startswith("Roe")]
    assert len(rare) == 1 and echo.plan.train == tuple(i for i in apart.whole.plans[1].train if i not in rare)
    assert echo.introduction.train == 23 and scan.introduction.train == 24
    task = build.make_site(apart.config, tmp_path, data_apart(apart.config, apart.introductions, echo)).task
    assert isinstance(task, Vqa)
    batch = task.client_data("echo-0").train.batch(torch.arange(23))
    assert int(batch.target.max()) < task.table.classes == 4
    # Those of rows to test on are numbered at home.
    assert "doe" in task.table.texts[4:]


def test_an_answer_that_everybody_knows_may_be_told_however_rare(asked: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.txt"
    file.write_text("roes disease\n\nno\n", encoding="utf-8")
    found = take_apart(questions(asked), read_discretion(1000, file)).owns[1].introduction.words
    assert found is not None and found.answers.keys() == {"No", "Roe's disease"} and found.types == ()


def test_a_hospital_that_may_tell_no_answer_says_so(asked: Path) -> None:
    with pytest.raises(DataError, match=r"^client scan-0: no answer is in 1000 training rows, so none is told"):
        take_apart(questions(asked), Discretion(least=1000))
    with pytest.raises(DataError, match=r"nowhere: no list of answers"):
        read_discretion(5, Path("nowhere"))


def test_words_that_are_missing_or_too_many_and_llava_are_named(asked: Path, data: Path, tmp_path: Path) -> None:
    apart = take_apart(questions(asked), ALL)
    silent = [one.model_copy(update={"words": None}) for one in apart.introductions]
    with pytest.raises(FederationError, match="client scan-0: says no words of a cohort of vqa"):
        data_apart(apart.config, silent)
    other = take_apart(jobs.config(data))
    talking = [one.model_copy(update={"words": apart.introductions[0].words}) for one in other.introductions]
    with pytest.raises(FederationError, match="client scan-0: says words of a cohort of classification"):
        data_apart(other.config, talking)
    llava = take_apart(questions(asked, model="llava"), ALL)
    with pytest.raises(ConfigError, match=r"tasks\.vqa\.model = 'llava' cannot run across machines"):
        build.make_site(llava.config, tmp_path, data_apart(llava.config, llava.introductions))


@pytest.mark.parametrize("answer", ["two\nlines", "", "x" * 2000, "bell\a"])
def test_answers_that_are_no_line_of_words_are_refused(asked: Path, answer: str) -> None:
    record = take_apart(questions(asked), ALL).owns[0].introduction.model_dump(mode="json")
    record["words"]["answers"] = {answer: 3}
    with pytest.raises(FederationError, match=r"an introduction cannot be read: .*printable words"):
        read_introduction(json.dumps(record))
