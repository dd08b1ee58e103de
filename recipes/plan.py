"""Plan a run before anyone pays for it.

It prints the size of the model and the run's steps, memory, time, cost, downloads and losses to
preemption, and warns of settings that look wrong.

    python recipes/plan.py yamls/gla_340m.yaml devices=8 device=h100 dataset_tokens=10_000_000_000

It takes the keys of recipes/train.py and some of its own, and reads the dataset's manifest unless
dataset_tokens is given. It compiles the kernels of fla's models for the device, which takes half a
minute the first time (kernels=none leaves it out), and starts nothing.
"""

import json
import sys

from flame_composer.config.cli import run
from flame_composer.config.plan import PlanConfig


def main(config: PlanConfig) -> None:
    from flame_composer.plan.child import child_for

    with child_for(config.device) as child:  # it starts while the lines below import
        from flame_composer.plan import planning
        from flame_composer.plan.advice import warnings
        from flame_composer.plan.division import with_division
        from flame_composer.plan.memory import read_size
        from flame_composer.plan.supply import find_supply
        from flame_composer.plan.table import describe

        found = find_supply(config)
        supply = None if isinstance(found, str) else found
        hf_config = planning.find_hf_config(config, supply)
        size = read_size(hf_config, config.lora)
        plan, why_not = planning.count_and_draw_up(config, hf_config, size, supply, child.count)
        plan = with_division(plan, config, hf_config, size, child)
        kernels = child.check(config, hf_config)
    wrong = warnings(config, plan)
    if why_not is not None:
        wrong.append(f"memory is estimated by formula, because no step can be counted: {why_not}")
    if isinstance(found, str):
        wrong.append(
            "the training data cannot be read, so the plan leaves it out; give dataset_tokens"
            f" ({found})"
        )
    if kernels is not None:
        wrong.extend(kernels.warnings(config.device, hf_config))
    print("\n".join(describe(plan, wrong)))
    content = plan.to_json(wrong)
    if kernels is not None:
        print(f"kernels: {kernels.line()}")
        content["kernels"] = kernels.to_json()
    print(json.dumps(content))


if __name__ == "__main__":
    sys.exit(run(main, PlanConfig))
