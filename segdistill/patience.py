"""Waiting for a service that is away: for a bounded time, said once an outage, and ended at once by a wish to stop."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from segdistill.errors import Interrupted, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 10.0


class Patience:
    """Patience with one service; several threads may share it.

    Args:
        service: its name or address, for people.
        seconds: how long it may stay away, each time that it is asked for something.
        stop: an event that ends all waiting.
    """

    def __init__(self, service: str, seconds: float, stop: threading.Event | None = None) -> None:
        self.service, self.seconds = service, seconds
        self._stop, self._away = stop or threading.Event(), threading.Event()

    def ask(self, act: Callable[[], T], outage: Callable[[Exception], str | None]) -> T:
        """What ``act`` returns, as often as it is tried.

        Args:
            act: asks once.
            outage: why waiting may help after this error, or None where it cannot, and the error goes on.

        Raises:
            UserError: the service stays away for too long.
            Interrupted: we were told to stop.
        """
        deadline, pause = None, FIRST_PAUSE_SECONDS
        while True:
            try:
                answer = act()
            except Exception as error:
                reason = outage(error)
                if reason is None:
                    self._is_back()
                    raise
            else:
                self._is_back()
                return answer
            deadline = deadline or time.monotonic() + self.seconds
            left = deadline - time.monotonic()
            if left <= 0:
                raise UserError(f"{self.service}: {reason}; gave up after trying for {self.seconds:g} seconds")
            if not self._away.is_set():  # said once an outage, not once a thread
                self._away.set()
                logger.warning("%s: %s; trying for up to %g seconds", self.service, reason, self.seconds)
            self.pause(min(pause * random.uniform(0.75, 1.25), left))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def pause(self, seconds: float) -> None:
        """Waits.

        Raises:
            Interrupted: we were told to stop.
        """
        if self._stop.wait(seconds):
            raise Interrupted("told to stop")

    def _is_back(self) -> None:
        if self._away.is_set():
            self._away.clear()
            logger.info("%s: answers again", self.service)
