"""Train once for each of several configurations, and compare the results.

    python recipes/sweep.py yamls/gla_tiny.yaml 'optimizer.lr=[1e-3,2e-3,4e-3]' [key=value ...]

Each trial is a run of recipes/train.py. However a sweep ended, the same command goes on with it.
The same command in another terminal, or in another job, shares the trials that are left.
"""

import json
import sys
from pathlib import Path

from flame_composer.config.cli import run
from flame_composer.config.sweep import SweepConfig, read_sweep


def main(config: SweepConfig) -> None:
    from flame_composer.errors import TrainingError
    from flame_composer.lines import visible
    from flame_composer.sweep import results
    from flame_composer.sweep.driving import run_sweep

    # Claim and train one trial after another, until all have ended here or in other processes
    outcome = run_sweep(config, Path(__file__).with_name("train.py"))

    print("", *map(visible, results.lines(config, outcome)), sep="\n")
    if outcome.best is not None:
        print(visible(f"the best is {outcome.best.name}; its values in a run of their own:"))
        print(visible(outcome.content["command"]), flush=True)

    # The packages that draw are needed only now
    from flame_composer.sweep.page import write_page

    page = write_page(config, outcome)
    print(visible(f"open {page} in a browser"))
    files = {"results": str(page.with_name("results.json")), "html": str(page)}
    short = {key: value for key, value in outcome.content.items() if key != "trials"}
    print(json.dumps({**short, "files": files}), flush=True)
    if failed := outcome.failed():
        names = ", ".join(trial.name for trial in failed)
        raise TrainingError(
            f"{len(failed)} of {len(outcome.ranked)} trials failed: {names}; the table says why;"
            " retry_failed=true runs them again"
        )


if __name__ == "__main__":
    sys.exit(run(main, SweepConfig, read_sweep))
