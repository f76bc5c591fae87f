"""Gradient checkpointing: a layer that is recomputed in a backward pass finds what it was computed with."""

from contextlib import ExitStack
from typing import Any

from rlaif.errors import RoleError
from rlaif.model import attention


class Recomputation:
    """The context of a checkpointed layer's recomputation: the same turn of a role, and the same attention."""

    def __init__(self, base: Any):
        """Keep what `base`, a `SharedBase`, computes with now."""
        self._base, self._turn, self._role = base, base.turn, base.acting
        self._attending = attention.current(base.lm.config.get_text_config())
        self._stack = ExitStack()

    def __enter__(self) -> None:
        if self._base.turn != self._turn or self._base.acting is None:
            now = f"`{self._base.acting}` acts" if self._base.acting else "no role does"
            raise RoleError(
                f"a backward pass of `{self._role}` came after its `acting_as` had ended ({now}): with gradient "
                "checkpointing it would compute wrong gradients. Call backward inside the same `with`."
            )
        self._stack.enter_context(self._attending())

    def __exit__(self, *_: object) -> None:
        self._stack.close()
