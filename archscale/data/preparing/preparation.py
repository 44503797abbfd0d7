"""One call of `prepare`: its recipe, its units, its place to work, and who does the work."""

from collections.abc import Sequence
from dataclasses import dataclass

from archscale.data.preparing.documents import RecipeUnit
from archscale.data.preparing.jobs import Job, run_jobs
from archscale.data.preparing.progress import Say
from archscale.data.preparing.recipe import Recipe
from archscale.data.preparing.work import PartNumber, WorkDirectory

_LIGHT_BYTES = 500_000_000  # read or copied in about the time in which a process starts


@dataclass(frozen=True)
class Preparation:
    """
    Attributes:
        units: all of the recipe's, those of validation sources first.
        workers: processes; 1 is this one.
        part: the share of the work that this call does; None for all of it.
        shard_tokens: tokens per shard file.
        say: receives lines of progress.
    """

    recipe: Recipe
    units: list[RecipeUnit]
    work: WorkDirectory
    workers: int
    part: PartNumber | None
    shard_tokens: int
    say: Say

    def run(self, verb: str, jobs: Sequence[Job]) -> None:
        """Does those of the jobs that belong to this part of the work."""
        run_jobs(verb, self._own(jobs), self.workers, self.say)

    def run_light(self, verb: str, jobs: Sequence[Job]) -> None:
        """As `run`, for jobs that read or copy bytes: so fast that more processes are worth their
        start only where there is much of it."""
        own = self._own(jobs)
        enough = 1 + sum(job.size or 0 for job in own) // _LIGHT_BYTES
        run_jobs(verb, own, min(self.workers, enough), self.say)

    def run_shared(self, verb: str, jobs: Sequence[Job]) -> None:
        """Does all of the jobs that no other part has done. Each part begins with its own, so that
        parts that are started together share the work."""
        self.run(verb, jobs)
        run_jobs(verb, jobs, self.workers, self.say)

    def _own(self, jobs: Sequence[Job]) -> Sequence[Job]:
        if self.part is None:
            return jobs
        return jobs[self.part.number - 1 :: self.part.count]
