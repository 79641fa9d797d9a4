"""A plugin: a valley whose process is killed from outside at the first tries of one seed."""

import os
import signal
from pathlib import Path

from metaopt import Problem, hookimpl, hyper
from metaopt.problems.toys import Rosenbrock


class Mortal(Rosenbrock):
    """rosenbrock; `marks` is a folder in which the tries of seed 1 are marked, of which so many are killed."""

    marks: str = hyper(doc="the folder in which tries are marked")
    tries: int = hyper(1, ge=0, doc="how many tries are killed")
    driver: int = hyper(0, doc="the process that lives")

    def model(self, seed, device="cpu"):
        for number in range(self.tries if seed == 1 and os.getpid() != self.driver else 0):
            mark = Path(self.marks, f"{number}")
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().model(seed, device)


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {"mortal": Mortal}
