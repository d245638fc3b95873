"""Use of a session by a training loop of the user's: calls are counted, and what was forgotten is said."""

from __future__ import annotations

from dataclasses import dataclass

MOST_PASSES = 64  # training passes for one step that still look like accumulated gradients
NEAR_END = 0.9  # progress from which a search counts as finished


@dataclass
class LoopUse:
    """Numbers of calls during a search."""

    passes: int = 0  # forward passes in training mode, with gradients
    pressures: int = 0
    steps: int = 0
    followed: int = 0  # steps among them that an optimizer called, by `follow`

    def describe_mistakes(self, done: int, steps: int) -> list[str]:
        """A sentence for each call that the loop forgot, and for a search that ends early.

        Args:
            done: steps of the search so far, those before a state was loaded included.
            steps: that the search was to take.
        """
        if not self.passes:
            return []
        said = []
        if not self.steps:
            said.append(
                f"step() was never called in {self.passes} training passes, so the search stands at its beginning: "
                "call it after every optimizer.step()."
            )
        elif self.passes > MOST_PASSES * self.steps:
            said.append(
                f"step() was called {self.steps} times in {self.passes} training passes: call it after every "
                "optimizer.step()."
            )
        if 0 < self.followed < self.steps:
            said.append(
                f"step() was called {self.steps - self.followed} times by the loop, and {self.followed} times by the "
                "optimizer, which does so by itself after follow() and prepare(): leave step() out of the loop."
            )
        if not self.pressures:
            said.append(
                "pressure() was never called, so nothing pulled towards the budget and all of it was cut at once: "
                "add it to the loss."
            )
        if self.steps and done < NEAR_END * steps:
            said.append(
                f"The search ends at step {done} of {steps}, far from its end: give compress the number of optimizer "
                f"steps that it will take (steps={done}), or train longer."
            )
        return said
