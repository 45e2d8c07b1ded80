"""The page of one run: what the sections are and what stands in them."""

import base64
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from omnifm.report import bank, figures
from omnifm.report import definitions as define
from omnifm.report.load import Run
from omnifm.report.page import (
    Block,
    Cell,
    Gallery,
    Note,
    Page,
    Picture,
    Section,
    Table,
    Terms,
    Verbatim,
    byte_size,
    duration,
    number,
    number_cell,
)
from omnifm.report.privacy import privacy_section
from omnifm.report.records import ClientResult, Example, Scores, Views

SIMULATED = "Simulated data. The images were made by a program, not taken from patients: the scores say nothing about real scans."


def run_page(run: Run) -> Page:
    """Lay out the report of one run."""
    sections = (
        _scores(run),
        _curves(run),
        _clients(run),
        heterogeneity(run),
        _traffic(run),
        privacy_section(run.metrics.privacy),
        _bank(run),
        _neighbourhoods(run),
        _examples(run),
        _definitions(run),
        _settings(run),
    )
    metrics = run.metrics
    return Page(
        title=f"{metrics.strategy}, {metrics.task}",
        subtitle=f"Federated training of {_count(metrics.clients, 'client')} over {metrics.rounds} rounds.",
        facts=_facts(run),
        sections=tuple(section for section in sections if section is not None),
        simulated=run.simulated,
        summary=_summary(run),
    )


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _facts(run: Run) -> tuple[tuple[str, str], ...]:
    metrics = run.metrics
    facts = [
        ("task", metrics.task),
        ("strategy", metrics.strategy),
        ("seed", str(metrics.seed)),
        ("participation", f"{metrics.participation:.0%} of the clients per round"),
        ("commit", str(run.environment.get("commit") or "unknown")),
        ("config", metrics.config_hash or "unknown"),
    ]
    return tuple(facts)


def _summary(run: Run) -> tuple[str, ...]:
    metric = run.metrics.primary
    views = run.metrics.test
    own = (views.personal or {}).get(metric)
    lines = [f"On its own test images a client's own model reaches {_phrase(own, metric)} (mean over clients)."]
    ranked = [(score, c) for c in run.metrics.clients if (score := (c.test.personal or {}).get(metric)) is not None]
    if len(ranked) > 1:
        pick = max if define.lower_is_better(metric) else min
        score, client = pick(ranked, key=lambda pair: pair[0])
        lines.append(f"The worst client is {client.id} ({client.modality}) with {_phrase(score, metric)}.")
    if views.global_ is None:
        lines.append("This method has no single global model.")
    else:
        lines.append(f"The one global model reaches {_phrase(views.global_.get(metric), metric)} on all test images together.")
    return tuple(lines)


def _phrase(score: float | None, metric: str) -> str:
    name = define.metric_label(metric)
    return f"an undefined {name}" if score is None else f"{name} {number(score)}"


def metric_names(primary: str, views: Iterable[Views]) -> list[str]:
    """Return the metrics that occur in some view, the primary one first."""
    found = [name for view in views for scores in view.named().values() for name in scores or {}]
    return list(dict.fromkeys([primary, *found]))


def _scores(run: Run) -> Section:
    best = run.metrics.best
    names = metric_names(run.metrics.primary, [run.metrics.test, *([best.test] if best else [])])
    last = f"At the last round, {run.metrics.rounds - 1}" if run.metrics.rounds else "Before any training"
    tables = [_score_table(run.metrics.test, names, last)]
    if run.metrics.references:
        tables.append(_reference_table(run.metrics.references, names))
    if best is not None:
        tables.append(_score_table(best.test, names, f"At round {best.round}, the best on validation"))
    lead = "On the test split, which no model was trained on. " + (
        "Rounds are counted from 0." if best else "No round was chosen by validation; rounds are counted from 0."
    )
    notes = [Note(note) for note in run.metrics.notes]
    return Section("scores-table", "Test scores", (*notes, *tables), lead)


def _score_table(views: Views, names: Sequence[str], caption: str) -> Table:
    rows = [(Cell(define.VIEWS[view][0], "strong"), *_score_cells(scores, names)) for view, scores in views.named().items()]
    return Table(("whose model", *map(define.metric_label, names)), tuple(rows), caption=caption)


def _reference_table(references: dict[str, dict[str, Scores | None]], names: Sequence[str]) -> Table:
    rows = [
        (Cell(name.replace("_", " "), "strong"), Cell(define.VIEWS[view][0]), *_score_cells(scores, names))
        for name, views in references.items()
        for view, scores in views.items()
    ]
    head = ("untrained rule", "whose images", *map(define.metric_label, names))
    return Table(head, tuple(rows), labels=2, caption="What needs no training, on the same test images")


def _score_cells(scores: Scores | None, names: Sequence[str]) -> list[Cell]:
    if scores is None:
        return [Cell("none", "muted") for _ in names]
    return [
        number_cell(scores[name], "strong" if i == 0 else "") if name in scores else Cell("none", "muted")
        for i, name in enumerate(names)
    ]


def _curves(run: Run) -> Section:
    drawn: list[Block] = [f for f in (figures.score_curve(run), figures.loss_curve(run)) if f is not None]
    if not drawn:
        drawn = [Note("This run recorded no round and no evaluation, so there is no curve to draw.")]
    return Section("curves", "Training, round by round", tuple(drawn))


def _clients(run: Run) -> Section:
    clients = figures.by_modality(run)
    metric = define.metric_label(run.metrics.primary)
    scores = (f"own model, {metric}", "after fine-tuning", "global model", "own model, best on validation")
    head = ("client", "cohort", "modality", "training images", "test images", *scores)
    best = {c.id: c for c in run.metrics.best.clients} if run.metrics.best else {}
    table = Table(head, tuple(_client_row(c, best.get(c.id), run.metrics.primary) for c in clients), labels=3)
    figure = figures.client_scores(run)
    blocks: tuple[Block, ...] = (table,) if figure is None else (figure, table)
    return Section("per-client", "Client by client", blocks, "A federation is only as good as what each of its members gets.")


def _client_row(client: ClientResult, best: ClientResult | None, metric: str) -> tuple[Cell, ...]:
    views = client.test.named()
    later = best.test.personal if best else None
    labels = (Cell(client.id, "strong"), Cell(client.cohort), Cell(client.modality))
    counts = (Cell(str(client.num_train)), Cell(str(client.num_test)))
    scores = [views["personal"], views["finetuned"], views["global"], later]
    return (*labels, *counts, *(Cell("none", "muted") if s is None else number_cell(s.get(metric)) for s in scores))


def heterogeneity(run: Run) -> Section:
    """Lay out how different the clients are: the four numbers, and the sizes."""
    rows = [
        (Cell(label, "strong"), number_cell(run.split.heterogeneity.get(key)), Cell(meaning))
        for key, (label, meaning) in define.HETEROGENEITY.items()
    ]
    sha = run.split.sha256
    table = Table(("measure", "value", "how to read it"), tuple(rows), labels=3, caption=f"Split {sha[:16]}" if sha else "")
    figure = figures.client_sizes(run)
    blocks: tuple[Block, ...] = (table,) if figure is None else (table, figure)
    lead = "The more the clients differ, the harder it is for one model to serve them all."
    return Section("heterogeneity", "How different the clients are", blocks, lead)


def _traffic(run: Run) -> Section:
    total, seconds = run.metrics.bytes, run.metrics.seconds
    rows = [
        ("up, to the server", byte_size(total.up), byte_size(total.bank_up), _share(total.bank_up, total.up)),
        ("down, to the clients", byte_size(total.down), byte_size(total.bank_down), _share(total.bank_down, total.down)),
    ]
    blocks: list[Block] = [Table(("direction", "all tensors", "of which bank", "share"), tuple(rows))]
    figure = figures.traffic_bars(run)
    if figure is not None:
        blocks.append(figure)
    times = [(name, duration(value)) for name, value in seconds.items()]
    if run.metrics.peak_rss_mib is not None:
        times.append(("peak memory", f"{run.metrics.peak_rss_mib:.0f} MiB"))
    blocks.append(Table(("cost", "value"), tuple(times), caption="Wall-clock time, and the most memory the process held."))
    return Section("cost", "Traffic, time and memory", tuple(blocks))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "0 %"


def _bank(run: Run) -> Section | None:
    draws = (bank.bank_map, bank.bank_rows, bank.retrieval_share, bank.effective_rank, bank.spread)
    drawn: list[Block] = [figure for draw in draws if (figure := draw(run)) is not None]
    if not drawn:
        return None
    lead = (
        "Clients share short vectors that describe the low frequencies of their images, and look up the nearest ones of others."
    )
    return Section("bank", "The prototype bank", tuple(drawn), lead)


def _neighbourhoods(run: Run) -> Section | None:
    events = [event.neighbourhoods for event in run.round_events if event.neighbourhoods]
    if not events:
        return None
    members: dict[int, list[str]] = defaultdict(list)
    for client, group in events[-1].items():
        members[group].append(client)
    moved = {c: sum(a.get(c) != b.get(c) for a, b in pairwise(events) if c in a and c in b) for c in events[-1]}
    rows = []
    for group, clients in sorted(members.items()):
        modalities = ", ".join(sorted({run.modality.get(c, "unknown") for c in clients}))
        rows.append((Cell(str(group), "strong"), ", ".join(sorted(clients)), modalities, str(sum(moved[c] for c in clients))))
    head = ("neighbourhood", "clients", "modalities", "moves during the run")
    table = Table(head, tuple(rows), labels=3, caption="At the last round; a move is a client that changed its neighbourhood.")
    lead = "The server averages only clients whose image spectra are alike. It is never told their modality; here you see it."
    return Section("neighbourhoods", "Who was averaged with whom", (table,), lead)


def _examples(run: Run) -> Section | None:
    if not run.examples:
        return None
    pictures = tuple(_picture(example, content) for example, content in run.examples)
    lead = "Test images of the clients, with what the client's own model said about them."
    return Section("examples", "Example predictions", (Gallery(pictures),), lead)


def _picture(example: Example, content: bytes) -> Picture:
    lines = [f"{example.client} ({example.modality})"]
    if len(example.panels) > 1:
        lines.append(f"left to right: {', '.join(example.panels)}")
    elif example.panels not in ((), ("image",)):
        lines.append(example.panels[0])  # the question
    lines += [f"truth: {example.truth}"] if example.truth is not None else []
    if example.prediction is not None:
        sure = "" if example.confidence is None else f", {example.confidence:.0%} sure"
        lines.append(f"model: {example.prediction}{sure}")
    verdict = "" if example.correct is None else "correct" if example.correct else "wrong"
    source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return Picture(source, tuple(lines), verdict, f"test image of client {example.client}", max(1, len(example.panels)))


def _definitions(run: Run) -> Section:
    names = metric_names(run.metrics.primary, [run.metrics.test])
    terms = (
        *define.VIEWS.values(),
        *((define.UNTRAINED,) if run.metrics.references else ()),
        *define.ROUNDS,
        *define.metric_terms(names),
        *define.TRAINING,
    )
    if run.bank or any(event.bank for event in run.round_events):
        terms += define.BANK
    return Section("definitions", "How each number is defined", (Terms(terms),), folded=True)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(run: Run) -> Section:
    rows = [(name, _plain(value)) for name, value in run.environment.items()]
    blocks = (Verbatim(run.config), Table(("environment", "value"), tuple(rows), labels=2))
    return Section("settings", "The whole configuration, and where it ran", blocks, folded=True)
