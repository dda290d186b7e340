"""Plans that a door remembers, so that a call like an earlier one costs the host little."""

from __future__ import annotations

from collections import OrderedDict
from threading import get_ident
from typing import Any

import numpy as np

from cuda_kernels import arrays

MAX_PLANS = 64  # that a door remembers
_OFTEN = frozenset({type(None), bool, int, float, str})
_PLAIN = (int, float, str, np.generic)


def call_of(tensors: tuple[Any, ...], asked: tuple[Any, ...]) -> Any:
    """Name a call by all that its checks look at but addresses; None where that is not quick.

    The host thread is part of it: a plan is for one at a time.
    """
    for x in asked:
        if (
            type(x) not in _OFTEN
            and not isinstance(x, _PLAIN)
            and not (isinstance(x, tuple) and all(isinstance(y, _PLAIN) for y in x))
        ):
            return None
    forms = [arrays.form(x) if x is not None else () for x in tensors]
    return None if None in forms else (get_ident(), asked, *forms)


class Remembered:
    """The plans of the last kinds of call; the one that was not called for longest goes first.

    Examples
    --------
    >>> plans = Remembered()
    >>> plans.keep("a call", "its plan")
    >>> plans.get("a call"), plans.get(None)
    ('its plan', None)
    """

    def __init__(self) -> None:
        self._plans: OrderedDict[Any, Any] = OrderedDict()

    def get(self, call: Any) -> Any:
        """Return the plan of a call of :func:`call_of`, or None."""
        plan = self._plans.get(call)
        if plan is not None:
            self._plans.move_to_end(call)
        return plan

    def keep(self, call: Any, plan: Any) -> None:
        """Remember a plan; nothing for a call without a name."""
        if call is None:
            return
        self._plans[call] = plan
        while len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)
