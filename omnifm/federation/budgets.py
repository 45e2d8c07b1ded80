"""What a run gives away, in epsilon: by weights, by what is told of spectra, and by both together, for each kind of neighbours.

Weights and spectra of a client are about the same images, and spectra are read with weights that training made from them. Both
are therefore one adaptive composition: their Renyi divergences add up at every order, and epsilon follows from the sum (I.
Mironov, CSF 2017). It is less than the sum of the two epsilons. A row of the bank names its client, so that whoever reads the
bank knows who took part: the draw of clients helps nobody here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from omnifm.config import Config
from omnifm.federation.effort import Effort, steps_of
from omnifm.federation.strategy import Strategy
from omnifm.privacy.accounting import NO_RELEASES, Releases, epsilon, epsilon_of_examples

NOT_COVERED = (
    "Not covered by any of this: losses, scores, times and numbers of examples, which the server and this report have as they "
    "are; the choice of the best round by validation; and what a client keeps to itself, which nobody is sent."
)


class Worth(NamedTuple):
    """Epsilon at the run's delta; infinite where there is no noise, 0 for what is not sent."""

    weights: float
    prototypes: float
    together: float


def by_client(
    config: Config, num_train: Mapping[str, int], schedule: Sequence[Sequence[str]], strategy: Strategy | None = None
) -> dict[str, Worth]:
    """Return what one training image of each client is worth to whoever sees all that the client sends.

    Args:
        config: the run, with example-level privacy.
        num_train: training images by client.
        schedule: who takes part in which round.
        strategy: says what is told of spectra; needed where that has a budget.
    """
    privacy, size = config.privacy, config.optimiser.batch_size
    effort = Effort(config.federation.local_epochs, steps=config.federation.local_steps)
    rounds = Counter(client for names in schedule for client in names)
    found: dict[str, Worth] = {}
    for client, count in num_train.items():
        # With client-level privacy the noise is on the mean: that of `count` images.
        noise = privacy.prototype_noise * (count if privacy.clip else 1)
        told = _releases(config, strategy, noise, rounds[client])
        steps, rate = rounds[client] * steps_of(effort, count, size), min(1.0, size / count)
        if steps or told.count:
            weights = (privacy.example_noise, privacy.delta, steps, rate)
            spectra = epsilon_of_examples(privacy.example_noise, privacy.delta, 0, rate, told)
            found[client] = Worth(epsilon_of_examples(*weights), spectra, epsilon_of_examples(*weights, told))
    return found


def of_a_client(config: Config, schedule: Sequence[Sequence[str]], strategy: Strategy | None = None) -> Worth:
    """Return what all data of the client with most rounds are worth to whoever sees models and bank, and knows the rounds."""
    privacy = config.privacy
    rounds = max(Counter(client for names in schedule for client in names).values())
    told = _releases(config, strategy, privacy.prototype_noise / 2, rounds)
    z, delta = privacy.noise_multiplier, privacy.delta
    return Worth(epsilon(z, delta, rounds), epsilon(z, delta, 0, releases=told), epsilon(z, delta, rounds, releases=told))


def _releases(config: Config, strategy: Strategy | None, noise: float, rounds: int) -> Releases:
    """Return the releases of a client's spectra over its rounds: prototypes in the first of them, and once the mean spectrum."""
    if not config.privacy.prototype_clip:
        return NO_RELEASES
    if strategy is None:
        raise ValueError("what is told of spectra has a budget: the strategy has to say what that is")
    prototypes = min(rounds, config.privacy.prototype_releases) if strategy.sends_prototypes else 0
    return Releases(noise, prototypes + strategy.needs_description)
