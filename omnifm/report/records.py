"""The records of a run folder's JSON files. Keys that a record does not name are ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Scores = dict[str, float | None]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True, protected_namespaces=())


class Views(_Record):
    """The four ways of the evaluation contract to score one model; None where a method has no such view."""

    personal: Scores | None = None
    global_: Scores | None = Field(default=None, alias="global")
    worst: Scores | None = None
    finetuned: Scores | None = None

    def named(self) -> dict[str, Scores | None]:
        """Return the views by the names used in files and tables."""
        return {"personal": self.personal, "worst": self.worst, "global": self.global_, "finetuned": self.finetuned}


class ClientResult(_Record):
    """A client's row of `metrics.json`."""

    id: str
    cohort: str = ""
    modality: str = "unknown"
    num_train: int
    num_test: int
    test: Views = Views()


class Best(_Record):
    """The scores at the round that was best on validation."""

    round: int
    test: Views = Views()
    clients: tuple[ClientResult, ...] = ()


class Traffic(_Record):
    """Bytes of the whole run; the bank's are also counted in `up` and `down`."""

    up: int = 0
    down: int = 0
    bank_up: int = 0
    bank_down: int = 0


class ClientLevel(_Record):
    """Client-level differential privacy of a run; epsilon is None where it is infinite."""

    epsilon: float | None
    epsilon_participation_known: float | None
    delta: float
    clip: float
    noise_multiplier: float
    noise: str
    clients_per_round: int
    clients: int
    rounds: int


class ExampleLevel(_Record):
    """Example-level differential privacy of a run: of the client with the largest epsilon."""

    epsilon: float | None
    client: str
    delta: float
    clip: float
    noise_multiplier: float
    noise: str


class SecureSum(_Record):
    """Secure aggregation in a run."""

    threshold: int
    clients_per_round: int
    quantum: float


class Prototypes(_Record):
    """The budget of what clients tell of their images' spectra."""

    clip: float
    noise_multiplier: float
    noise: str
    of: str
    releases: int
    mean_spectrum: bool


class Unit(_Record):
    """Epsilon for one kind of neighbours; None where it is infinite, 0 for what is not sent."""

    unit: str
    client: str | None
    weights: float | None
    prototypes: float | None
    together: float | None


class Combined(_Record):
    """All epsilons of a run, at one delta."""

    delta: float
    units: tuple[Unit, ...]


class Privacy(_Record):
    """What a run says of its privacy."""

    client_level: ClientLevel | None = None
    example_level: ExampleLevel | None = None
    secure_aggregation: SecureSum | None = None
    prototypes: Prototypes | None = None
    combined: Combined | None = None
    not_covered: str = ""


class Metrics(_Record):
    """`metrics.json`."""

    task: str
    strategy: str
    seed: int
    rounds: int
    primary: str = "accuracy"
    participation: float = 1.0
    config_hash: str = ""
    clients: tuple[ClientResult, ...]
    test: Views = Views()
    best: Best | None = None
    references: dict[str, dict[str, Scores | None]] = {}
    notes: tuple[str, ...] = ()
    best_validation_round: int | None = None
    bytes: Traffic = Traffic()
    seconds: dict[str, float] = {}
    peak_rss_mib: float | None = None
    simulated: bool = False
    privacy: Privacy | None = None


class SplitClient(_Record):
    """A client's rows of its cohort, as in `split.json`."""

    id: str
    cohort: str = ""
    modality: str = "unknown"
    train: list[Any] = []
    val: list[Any] = []
    test: list[Any] = []


class Split(_Record):
    """`split.json`."""

    sha256: str = ""
    heterogeneity: dict[str, float | None] = {}
    clients: tuple[SplitClient, ...] = ()
    simulated: bool = False


class ClientEvent(_Record):
    """One client's training in one round."""

    event: Literal["client"]
    round: int
    client: str
    num_examples: int
    loss: float | None = None
    seconds: float | None = None
    bytes_up: dict[str, int] = {}
    bytes_down: dict[str, int] = {}
    penalty: float | None = None
    retrieval: dict[str, float] | None = None
    effective_rank: float | None = None
    spread: float | None = None


class BankSize(_Record):
    """How many rows the bank holds."""

    rows: int
    by_modality: dict[str, int] = {}


class RoundEvent(_Record):
    """One finished round."""

    event: Literal["round"]
    round: int
    clients: tuple[str, ...] = ()
    loss: float | None = None
    seconds: dict[str, float] = {}
    bank: BankSize | None = None
    neighbourhoods: dict[str, int] | None = None


class EvaluationEvent(Views):
    """Scores of one split after one round."""

    event: Literal["evaluation"]
    round: int
    split: str


class DescriptionEvent(_Record):
    """What a client sent before the first round, so that the server may find its neighbours."""

    event: Literal["description"]
    client: str
    round: int = -1
    bytes_up: dict[str, int] = {}


Event = Annotated[ClientEvent | RoundEvent | EvaluationEvent | DescriptionEvent, Field(discriminator="event")]


class Example(_Record):
    """One test image and what the model said about it."""

    client: str
    modality: str = "unknown"
    file: str
    truth: str | None = None
    prediction: str | None = None
    confidence: float | None = None
    correct: bool | None = None
    panels: tuple[str, ...] = ()
