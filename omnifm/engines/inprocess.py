"""All clients in this process, one after the other, on one model."""

from collections.abc import Iterable, Iterator

from omnifm.federation.client import Site
from omnifm.federation.messages import Reply, Request


class InProcessEngine:
    """Answers requests with one site. Tensors are handed over, never serialised."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield the replies in request order; a request is drawn when its turn comes."""
        for request in requests:
            yield self._site.handle(request)

    def close(self) -> None:
        """Nothing to let go of."""
