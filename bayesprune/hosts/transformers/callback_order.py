"""Where a callback stands among those of its Trainer, which decides who sees what it adds to the logs."""

import logging
import sys

from transformers import DefaultFlowCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler

_LOGGER = logging.getLogger(__name__)
_MAX_FRAMES = 6  # a subclass of the callback adds one


def stand_before_loggers(callback: TrainerCallback) -> None:
    """Moves the callback, whose event is running, from behind the Trainer's loggers to before them.

    The Trainer puts a user's callbacks last, and hands its list of them to no event: it is found with the caller. Right
    behind `DefaultFlowCallback` is early enough for the logs, and late enough to know whether a step is logged.
    """
    handler = _calling_handler()
    callbacks = handler.callbacks if handler is not None else []
    flows = [index for index, other in enumerate(callbacks) if isinstance(other, DefaultFlowCallback)]
    if not flows or callback not in callbacks:
        _LOGGER.warning(
            "the Trainer's callbacks were not found, so its loggers miss what %s adds; put "
            "`trainer.callback_handler.callbacks.insert(1, trainer.pop_callback(callback))` before trainer.train()",
            type(callback).__name__,
        )
    elif callbacks.index(callback) > flows[0] + 1:
        callbacks.remove(callback)
        callbacks.insert(flows[0] + 1, callback)


def _calling_handler() -> CallbackHandler | None:
    frame = sys._getframe(2)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return None
        if isinstance(caller := frame.f_locals.get("self"), CallbackHandler):
            return caller
        frame = frame.f_back
    return None
