"""The section of a run's page that says what is private, from whom, and what is not: one statement for all of it."""

from omnifm.report.page import Block, Note, Section, Table, number
from omnifm.report.records import ClientLevel, Combined, ExampleLevel, Privacy, Prototypes, SecureSum

SEEDED = "The noise was drawn from the run's seed: whoever knows the seed can take it off, and for them epsilon is infinite."


def privacy_section(found: Privacy | None) -> Section | None:
    """Lay out a run's privacy; nothing for a run that asked for none."""
    if found is None:
        return None
    blocks: list[Block] = [_combined(found.combined)] if found.combined else []
    if found.client_level:
        blocks += _client_level(found.client_level)
    if found.example_level:
        blocks += _example_level(found.example_level)
    if found.prototypes:
        blocks += _prototypes(found.prototypes)
    if found.secure_aggregation:
        blocks.append(Note(_secure(found.secure_aggregation)))
    last = (Note(found.not_covered),) if found.not_covered else ()
    return Section("privacy", "Privacy", (*blocks, *last), "What the model gives away of one client, and to whom.")


def _combined(found: Combined) -> Block:
    rows = [
        (
            unit.unit if unit.client is None else f"{unit.unit} (worst: {unit.client})",
            _epsilon(unit.weights),
            _epsilon(unit.prototypes) if unit.prototypes != 0 else "0: nothing is sent",
            _epsilon(unit.together),
        )
        for unit in found.units
    ]
    head = ("epsilon if the data differ in", "weights", "spectra and prototypes", "both together")
    return Table(head, tuple(rows), caption=f"The whole run, to somebody who knows who took part, at delta = {found.delta:g}")


def _prototypes(found: Prototypes) -> list[Block]:
    rows = (
        ("longest spectrum of an image (clip)", f"{found.clip:g}"),
        (f"noise on {found.of}, standard deviation", f"{found.noise_multiplier:g} times what one adds"),
        ("rounds in which a client sends prototypes, at most", str(found.releases)),
        ("mean spectrum", "once, with the same noise" if found.mean_spectrum else "not sent"),
    )
    table = Table(("budget of the spectra", "value"), rows, caption="Prototypes and mean spectra; retrieval counts are not sent")
    return [table, *((Note(SEEDED),) if found.noise == "seeded" and found.noise_multiplier else ())]


def _client_level(level: ClientLevel) -> list[Block]:
    rows = (
        ("epsilon, if nobody knows who took part when", _epsilon(level.epsilon)),
        ("epsilon, if it is known", _epsilon(level.epsilon_participation_known)),
        ("delta", f"{level.delta:g}"),
        ("longest update of a client (clip)", f"{level.clip:g}"),
        ("noise on the sum of a round, standard deviation", f"{level.noise_multiplier:g} times the clip"),
        ("clients", f"{level.clients_per_round} of {level.clients} in each of {level.rounds} rounds"),
    )
    table = Table(("client-level differential privacy", "value"), rows, caption="Shared weights at the end of every round")
    return [table, *(Note(text) for text in _meaning(level))]


def _example_level(level: ExampleLevel) -> list[Block]:
    rows = (
        (f"epsilon of client {level.client}, the largest", _epsilon(level.epsilon)),
        ("delta", f"{level.delta:g}"),
        ("longest gradient of an example (clip)", f"{level.clip:g}"),
        ("noise on the sum of a step, standard deviation", f"{level.noise_multiplier:g} times the clip"),
    )
    table = Table(
        ("example-level differential privacy", "value"), rows, caption="All that a client sends, its own server included"
    )
    text = (
        "Had any one training image been left out, what its client sent would have been about as probable, to the server as well."
    )
    return [table, Note(text), *((Note(SEEDED),) if level.noise == "seeded" and level.epsilon is not None else ())]


def _epsilon(value: float | None) -> str:
    return "none: no noise, or next to none, is added" if value is None else number(value)


def _meaning(level: ClientLevel) -> tuple[str, ...]:
    if level.epsilon is None:
        return ("Updates are clipped and no noise, or next to none, is added: this run has no differential privacy.",)
    means = (
        "Had any one client held other data, every set of shared models would have been at most exp(epsilon) times as probable, "
        "but for delta. The server itself is trusted: it sees each update"
    )
    return (f"{means}, unless secure aggregation is on.", *((SEEDED,) if level.noise == "seeded" else ()))


def _secure(summed: SecureSum) -> str:
    return (
        f"Secure aggregation: the server had the sum of the updates of a round's {summed.clients_per_round} clients and none of "
        f"them alone; {summed.threshold} must stay to the end. Numbers were rounded to {summed.quantum:.2g}. It protects against "
        "a server that is curious and follows the protocol, and against fewer than that many clients beside it."
    )
