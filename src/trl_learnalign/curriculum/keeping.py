"""The state of an online curriculum, and back."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .flight import Flight
from .prior import digest
from .states import copied


if TYPE_CHECKING:
    from .alignment import Alignment
    from .progress import Progress
    from .settings import OnlineSettings
    from .target import Target


class KeepsState:
    """An online curriculum, as far as its state is concerned: each part has one of its own."""

    alignment: "Alignment | None"
    drawn: int
    flight: Flight
    group_size: int
    seed: int
    settings: "OnlineSettings"
    steps: int
    target: "Target | None"
    progress: "Progress | None"
    _prior: Any

    def state_dict(self) -> dict:
        """
        Return the state: 35 bytes a prompt, what was observed last, 64 bytes a row of the history; and sketches of
        gradients, see [`Alignment`].
        """
        parts: dict[str, dict | None] = {name: copied(getattr(self, name).state_dict()) for name in _PARTS}
        for name in ("alignment", "target", "progress"):  # which there may be none of
            part = getattr(self, name)
            parts |= {name: None if part is None else copied(part.state_dict())}
        return {**parts, "drawn": self.drawn, "steps": self.steps, "made_for": self._made_for()}

    def _made_for(self):
        return {
            "group_size": self.group_size,
            "seed": self.seed,
            "prior": digest(self._prior),
            "target": None if self.target is None else self.target.digest,
            **asdict(self.settings),
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Restore what `state_dict` returned.

        Raises:
            `ValueError`: the state is damaged, or of other prompts, features or settings.
        """
        now, was = self._made_for(), state.get("made_for", {})
        changed = [
            f"`{name}` was {was.get(name)!r} and is {now[name]!r}" for name in now if was.get(name) != now[name]
        ]
        if changed:
            raise ValueError(
                f"The state is of an online curriculum with other settings: {'; '.join(changed)}. Resume with the "
                "same, or start a new run."
            )
        try:
            for name in _PARTS:
                if name != "flight":
                    getattr(self, name).load_state_dict(state[name])
            self.flight = Flight.from_state(state["flight"])
            if self.target is not None:
                self.target.load_state_dict(state["target"])
            if self.progress is not None:
                self.progress.load_state_dict(state["progress"])
            if state["alignment"] is None:  # not wanted, or gradients could not be had
                self.alignment = None
            elif self.alignment is not None:
                self.alignment.load_state_dict(state["alignment"])
            self.drawn, self.steps = int(state["drawn"]), int(state["steps"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(
                f"The state of the online curriculum is damaged or of other data: {error!r}. Resume with the same "
                "dataset and settings, or from an earlier checkpoint."
            ) from error


_PARTS = "memory", "judge", "predictor", "scored", "scale", "curve", "history", "kinds", "order", "flight"
