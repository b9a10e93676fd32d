"""An update of weights under way: engines that take what a trainer sends."""

from __future__ import annotations

from ctrlray.actors import ActorPool, last_line
from ctrlray.engine.transfer import Offer, Received
from ctrlray.errors import ClusterError


class Landing:
    """Engines that take weights from a trainer; its text is who has not got them yet."""

    def __init__(self, name: str, engines: ActorPool, offer: Offer) -> None:
        self._name, self._engines, self.offer = name, engines, offer
        self._waiting = engines.begin(lambda engine, index: engine.receive_weights.remote(offer, index))
        self.received: dict[int, Received] = {}

    def over(self) -> bool:
        """Whether all engines have them. Raises what one refused, or ClusterError naming the one that ended."""
        for index, answer in self._engines.arrived(self._waiting).items():
            if isinstance(answer, Exception):
                raise ClusterError(
                    f"{self._name}: engine {index} ended while it took weights from the trainer: {last_line(answer)}"
                ) from answer
            self.received[index] = answer
        return not self._waiting

    def __str__(self) -> str:
        late = ", ".join(str(i) for i in sorted(self._waiting.values()))
        size = f"{self.offer.num_bytes / 1e9:.2f} GB of weights, version {self.offer.version}"
        return f"{self._name}: engine {late} to take {size}, from the trainer at {self.offer.address}"
