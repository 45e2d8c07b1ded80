"""The one exception family a user may see: a message of one line, without a traceback."""


class OmnifmError(Exception):
    """Something the user can mend. The message is one line and names the file, row, key or client."""


class ConfigError(OmnifmError):
    """A config key is unknown, has the wrong type, or contradicts another key."""


class DataError(OmnifmError):
    """A cohort, an image or a partition cannot be used as it is."""


class FederationError(OmnifmError):
    """A round cannot go on: a reply is missing, malformed or not finite."""


class NotFiniteError(FederationError):
    """A reply holds a number that is none; some strategies leave it out of the round."""


class CheckpointError(OmnifmError):
    """A run folder or checkpoint is missing, truncated or belongs to another run."""
