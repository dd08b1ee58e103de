"""Draw charts of runs, to look at one or to compare several.

They show loss, perplexity, learning rate, gradient norm and throughput over the steps, and resumes.

    python recipes/report.py runs/gla_tiny [runs/other ...] [smooth=10] [out=DIR]

Writes a PNG for each chart, and report.html, a self-contained page.
"""

import json
import sys
from pathlib import Path

from flame_composer.config.cli import run
from flame_composer.config.use import ReportConfig


def main(config: ReportConfig) -> None:
    from flame_composer.lines import visible
    from flame_composer.train import charts
    from flame_composer.train.run_log import read_run

    runs = [read_run(path) for path in dict.fromkeys(config.runs)]
    out = Path(config.out or Path(runs[0].place, "report"))
    files = charts.write(runs, out, config.smooth)
    head, lines = charts.table(runs)
    for line in lines:
        print(
            "\n".join(f"{name:20}{cell}" for name, cell in zip(head, line, strict=True)), end="\n\n"
        )
    for each in runs:
        print(
            *(visible(f"{each.place}: {note}") for note in each.notes),
            sep="\n",
            end="\n" if each.notes else "",
        )
    print(visible(f"open {files['html']} in a browser"))
    print(
        json.dumps(
            {
                "runs": [each.place for each in runs],
                "files": {name: str(path) for name, path in files.items()},
            }
        )
    )


if __name__ == "__main__":
    sys.exit(run(main, ReportConfig))
