"""The course of a pilot: the choice of methods, the time of a step, and the runs of both sides."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from lora_limits.instruments import timing
from lora_limits.nn.layered import Layered
from lora_limits.pilot import choosing, models, outcome, records
from lora_limits.pilot import settings as asking
from lora_limits.pilot.settings import Settings
from lora_limits.pilot.texts import Task
from lora_limits.training import batches, checkpoints, loop
from lora_limits.training.loop import Recipe

SIDES = ("exact", "approximate")
EVALUATIONS = 4
HELD_TOKENS = 32768  # of held-out windows that a run is scored on at its end
Say = Callable[[int, int, str], None]  # (steps done, of all, what is going on)


class Pilot:
    """A pilot of a model on a task, its results kept in `out` as they come.

    load: (seed) -> the model with fresh adapters of the settings' LoRA. say: told what goes on.
    Everything that is done is found there again by another of the same `asked`, and a run that was
    killed goes on from its last evaluation.
    Raises ValueError as `records.resume` and `settings.read_method` do, and `run` as
    `settings.check_features` does.
    """

    def __init__(
        self,
        load: Callable[[int], Layered],
        task: Task,
        settings: Settings,
        asked: Mapping[str, Any],
        out: Path,
        say: Say,
    ):
        self.load = load
        self.task = task
        self.settings = settings
        self.out = out
        self.say = say
        self.state = records.resume(out, asked)
        self.state["classes"] = task.classes
        self.reached = 0  # steps done, of all runs
        causal = task.classes is None
        name = settings.method
        if name is None:
            self.approximate = asking.approximate(task.length, causal=causal)
        else:
            self.approximate = {name: asking.read_method(name, task.length, causal=causal)}

    def run(self) -> dict[str, Any]:
        """Does what is not done yet; returns the state, its "outcome" in it."""
        model = self.load(0)
        attention = model.blocks[0].attention
        if self.settings.method is not None:
            asking.check_features(self.settings.method, attention.width)
        exact = asking.exact(self.task.length, self.settings.batch * attention.heads)
        if "choice" not in self.state:
            self.say(0, self.total, "choosing a method for each layer")
            given = (self._watched(), self.settings.batch, exact, self.approximate)
            choice = choosing.choose(model, *given, self.settings.method)
            self._keep("choice", choice)
        choice = self.state["choice"]
        self.exact = exact[choice["exact"]]
        methods = choosing.methods_of(choice, {**exact, **self.approximate})
        self.methods = {"exact": [self.exact] * len(methods), "approximate": methods}
        if any(layer["method"] != choice["exact"] for layer in choice["layers"]):
            if "times" not in self.state:
                self.say(0, self.total, f"timing a step of each side, {choosing.REPEATS} rounds")
                self._keep("times", self._times(model))
            if "start" not in self.state:
                self._keep("start", self._start(model))
            self._train()
        self._keep("outcome", outcome.judge(self.state, self.settings))
        return self.state

    @property
    def total(self) -> int:
        """Steps of all runs."""
        return len(SIDES) * self.settings.seeds * self.settings.steps

    def _watched(self) -> batches.Data:
        return choosing.first_of(self.task.train)

    def _keep(self, name: str, value: Any) -> None:
        self.state[name] = value
        records.save(self.state, self.out)

    def _recipe(self, seed: int) -> Recipe:
        asked = self.settings
        every = max(asked.steps // EVALUATIONS, 1)
        # On the way a quarter of the windows will do.
        tests = max(HELD_TOKENS // 4 // self.task.length, asked.batch)
        return Recipe(asked.steps, asked.batch, asked.rate, seed, every, tests)

    def _scores(self, model: Layered) -> dict[str, list[float]]:
        """Held-out loss and accuracy of every window under exact attention: so adapters are
        served.
        """
        model.set_methods(self.methods["exact"])
        tests = max(HELD_TOKENS // self.task.length, self.settings.batch)
        recipe = dataclasses.replace(self._recipe(0), tests=tests)
        found = loop.scores(model, self.task.test, recipe)
        return {metric: [float(x) for x in each] for metric, each in found.items()}

    def _start(self, model: Layered) -> dict[str, float]:
        """The scores before training, their means."""
        return {metric: sum(each) / len(each) for metric, each in self._scores(model).items()}

    def _times(self, model: Layered) -> dict[str, dict[str, Any]]:
        """Of a training step of each side, by turns: seconds, spread, repeats, temporary bytes."""
        recipe = self._recipe(0)
        data = batches.batch(self.task.train, recipe.batch, 0, 0)
        calls, memory = {}, {}
        for side in SIDES:
            model.set_methods(self.methods[side])
            graphdef, trained, frozen = nnx.split(model, models.TRAINED, ...)
            args = (trained, frozen, loop.optimiser(recipe).init(trained), *data)
            run = loop.compiled_step(recipe, graphdef, *args)
            calls[side] = functools.partial(run, *args)
            memory[side] = timing.temporary_bytes(run)
        times = timing.interleaved(calls, repeats=choosing.REPEATS, max_seconds=math.inf)
        return {side: times[side] | {"temporary": memory[side]} for side in SIDES}

    def _train(self) -> None:
        """Every run that is not among the results."""
        runs = self.state.setdefault("runs", [])
        done = {(run["side"], run["seed"]) for run in runs}
        for seed in range(self.settings.seeds):
            for side in SIDES:
                if (side, seed) not in done:
                    runs.append(self._run(side, seed, len(runs) * self.settings.steps))
                    self._keep("runs", runs)

    def _run(self, side: str, seed: int, before: int) -> dict[str, Any]:
        """One run, and its scores at the end."""
        model = self.load(seed)
        model.set_methods(self.methods[side])
        recipe = self._recipe(seed)
        name = f"{side}-{seed}"
        folder = self.out / "runs" / name

        def watch(model: Layered, _: batches.Data) -> dict[str, float]:
            self.say(self.reached, self.total, f"{side}, seed {seed}: error and noise")
            return choosing.watched(model, self.exact, self._watched(), recipe.batch)

        def told(step: int, history: dict[str, Any]) -> None:
            self.reached = before + step
            said = f"{side}, seed {seed}: step {step}, loss {history['loss'][-1]:.3f}"
            self.say(self.reached, self.total, said)

        self.reached = before
        self.say(before, self.total, f"{side}, seed {seed}")
        history = loop.train(
            model,
            self.task,
            recipe,
            what=models.TRAINED,
            watch=watch if side == "approximate" else None,
            folder=folder,
            told=told,
        )
        self.say(before + recipe.steps, self.total, f"{side}, seed {seed}: held-out text")
        final = self._scores(model)
        models.save(model, self.task.classes, self.out / "adapters" / name)
        checkpoints.forget(folder)
        del history["methods"]
        return {"side": side, "seed": seed, **history, "final": final}
