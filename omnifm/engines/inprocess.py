"""All clients in this process, one after the other, on one model."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from omnifm.federation.client import Site
from omnifm.federation.messages import Reply, Request

T = TypeVar("T")


class InProcessEngine:
    """Answers requests with one site. Tensors are handed over, never serialised."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield the replies in request order; a request is drawn when its turn comes."""
        for request in requests:
            yield self._site.handle(request)

    def host(self, work: Callable[[], T]) -> T:
        """Run the server's work where this engine wants it: here."""
        return work()

    def close(self) -> None:
        """Nothing to let go of."""
