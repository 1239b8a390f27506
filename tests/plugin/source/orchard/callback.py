"""A callback that writes down what it has seen."""

from dimat_jax.callbacks import CALLBACKS, CallbackRecord, Stop
from dimat_jax.options import Option

LIMIT = Option("orchard.limit", 99, "The round after which the run ends.", at_least=1)


class Diary:
    """Writes each row's phase into diary.txt, and ends the run after some round."""

    def __init__(self, run, *, limit: int = LIMIT.default):
        self._path, self._limit = run.workdir / "diary.txt", limit
        self._path.write_text("".join(f"{row['phase']}\n" for row in run.rows))

    def __call__(self, row):
        with self._path.open("a") as file:
            file.write(f"{row['phase']}\n")
        if row["phase"] == "trained" and row["round"] >= self._limit:
            raise Stop("the diary is full")

    def end(self, summary):
        with self._path.open("a") as file:
            file.write(f"the end, round {summary['round']}\n")


CALLBACKS.add(CallbackRecord("diary", Diary, (LIMIT,)))
