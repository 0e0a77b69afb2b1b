"""Where the processes of a test find each other."""

import random
import socket


def free_port() -> int:
    """A free port below those that the system gives to whoever asks for any.

    It stays free for the seconds that the processes need to start: connections of other tests never get it.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)  # not seeded: other workers of the suite choose as well
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
