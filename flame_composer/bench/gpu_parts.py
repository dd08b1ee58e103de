"""The parts of `make gpu`, each of which answers one question on a machine with a GPU.

A part is a function of a `Site`, called in a process of its own, that returns its answers. On a
machine without a GPU they can be rehearsed: the same commands on smaller models.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flame_composer.bench.conversions import mistral_tokenizer, write_corpus
from flame_composer.bench.devices import device_of
from flame_composer.bench.gpu_site import ROOT, Answer, Site, run
from flame_composer.bench.measure import median
from flame_composer.errors import DataError
from flame_composer.plan.memory import DEVICES
from flame_composer.processes import lead_session
from flame_composer.train.kernels import KERNELS
from flame_composer.upstream.autotuner import choose_by


def data(site: Site) -> list[Answer]:
    """Make the tokenizer and the rows that the other parts train on, timing the conversion."""
    folder = site.folder / "data"
    folder.mkdir()
    corpus, _ = write_corpus((), (), 400_000 if site.is_rehearsal else 24_000_000, folder)
    tokenizer = mistral_tokenizer(folder / "tokenizer")
    start = time.perf_counter()
    run(
        str(ROOT / "convert/to_mds.py"),
        f"source={corpus}",
        f"tokenizer={tokenizer}",
        f"out={folder}/train",
        f"context_length={128 if site.is_rehearsal else 2048}",
    )
    seconds = time.perf_counter() - start
    tokens = json.loads((folder / "train/manifest.json").read_text())["totals"]["tokens_out"]
    return [
        Answer("tokens to train on", tokens),
        Answer("conversion with its start, all cores", round(tokens / seconds), "tokens/s"),
    ]


def tests(_: Site) -> list[Answer]:
    """Run the tests that need a GPU, of the modules that have any: importing all takes long."""
    paths = [str(path) for path in ROOT.glob("tests/*/test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *sorted(paths)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    *before, last = done.stdout.strip().splitlines() or [""]
    print(*before, last, done.stderr, sep="\n")
    if done.returncode:
        raise DataError(f"tests of GPUs: {last or done.stderr.strip()}")
    return [Answer("tests marked gpu", last.strip("= "))]


def parity(site: Site) -> list[Answer]:
    """Compare the CPU kernels with the compiled ones: loss, logits and gradients of a GLA model.

    Triton multiplies fp32 matrices in TF32 unless it is told otherwise, so errors are of its size.
    """
    from flame_composer.bench.models import build_pair
    from flame_composer.upstream.autotuner import try_the_smallest_only

    try_the_smallest_only()
    width = 64 if site.is_rehearsal else 256
    device = "cpu" if site.is_rehearsal else "cuda"
    tokens = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(0))
    found = []
    for where in ("cpu", device):
        model: Any = build_pair(width, num_layers=2, vocab_size=512)["gla"]
        model.to(where)
        batch = tokens.to(where)
        output = model(input_ids=batch, labels=batch, use_cache=False)
        with torch.no_grad():
            logits = model(input_ids=batch, use_cache=False).logits
        output.loss.backward()
        gradients = [each.grad.cpu() for each in model.parameters()]
        found.append((output.loss.detach().cpu(), logits.cpu(), gradients))

    def error(ours: Any, theirs: Any) -> float:
        return float(f"{(ours - theirs).norm() / theirs.norm():.2g}")

    (loss, logits, gradients), (other_loss, other_logits, other_gradients) = found
    worst = max(map(error, gradients, other_gradients))
    return [
        Answer("CPU kernels against compiled ones, loss", error(loss, other_loss), "relative"),
        Answer("CPU kernels against compiled ones, logits", error(logits, other_logits), "norm"),
        Answer("CPU kernels against compiled ones, worst gradient", worst, "norm"),
    ]


def train(site: Site, recipe: str, run_name: str, *more: str) -> int:
    """Train in this process; return the most bytes of the GPU that torch had in use, or 0."""
    sys.argv = ["recipes/train.py", *site.keys(recipe, run_name, *more)]
    try:
        runpy.run_path(str(ROOT / "recipes/train.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise DataError(f"recipes/train.py yamls/{recipe}.yaml: status {end.code}") from None
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def warm(site: Site, recipe: str) -> list[Answer]:
    """Compile the kernels of a recipe, which Triton keeps for the parts that are timed."""
    start = time.perf_counter()
    train(site, recipe, f"warm_{recipe}", "max_duration=1ba")
    return [
        Answer(f"{recipe}: to the end of its first step", round(time.perf_counter() - start), "s")
    ]


def speed(site: Site, recipe: str) -> list[Answer]:
    """Train at the recipe's shapes: tokens/s, MFU, and the planner's memory against torch's."""
    site.take_choices(f"warm_{recipe}", f"speed_{recipe}")
    used = train(site, recipe, f"speed_{recipe}")
    rows = [json.loads(line) for line in (site.folder / f"speed_{recipe}/train_log.jsonl").open()]
    rate = median([row["throughput"] for row in rows[2:]])
    (site.folder / f"{recipe}.rate").write_text(f"{rate}")
    answers = [Answer(f"{recipe}: training", round(rate), "tokens/s")]
    if site.is_rehearsal:
        return answers
    answers.append(Answer(f"{recipe}: most memory that torch had in use", used, "bytes"))
    device = device_of(torch.cuda.get_device_name())
    planned_for = site.folder / f"{recipe}.plan"
    if device is None or not planned_for.exists():
        return [*answers, Answer(f"{recipe}: MFU", "the part plan has no answer for this GPU")]
    planned = json.loads(planned_for.read_text())
    memory = planned["memory"]
    process = memory["parts"].get("process", 0)  # it is not in torch's books
    over = (memory["total"] - process) / used
    how = "counted" if memory["counted"] else "by formula"
    mfu = rate * planned["flops_per_token"] / DEVICES[device].peak
    return [
        *answers,
        Answer(f"{recipe}: MFU", round(mfu, 3)),
        Answer(f"{recipe}: the planner's memory over torch's", round(over, 3), how),
    ]


def plan(site: Site) -> list[Answer]:
    """Draw up a plan of each timed run, for what they measure to be compared with."""
    device = "h100" if site.is_rehearsal else device_of(torch.cuda.get_device_name())
    if device is None:
        return [Answer("plan", "this GPU is not in the planner's list")]
    more = ["devices=1", f"device={device}", "kernels=none"]
    if site.is_rehearsal:  # for a GPU all the same
        more += ["precision=amp_bf16"]
    answers = []
    for recipe in RECIPES:
        said = run(str(ROOT / "recipes/plan.py"), *site.keys(recipe, "plan"), *more)
        planned = json.loads(said.splitlines()[-1])
        (site.folder / f"{recipe}.plan").write_text(json.dumps(planned))
        size = planned["largest_microbatch_size"] or "none fits"
        answers.append(Answer(f"{recipe}: largest microbatch by plan", size, "rows"))
    return answers


def auto(site: Site) -> list[Answer]:
    """Train with microbatch_size=auto, which a CPU cannot."""
    if site.is_rehearsal:
        return [Answer("microbatch_size=auto", "not rehearsed: memory is tried out on a GPU only")]
    keys = ("parallelism.fsdp=null", "microbatch_size=auto", "max_duration=3ba")
    site.take_choices("warm_gla_340m", "auto")
    used = train(site, "gla_340m", "auto", "global_batch_size=128", *keys)
    return [Answer("microbatch_size=auto: most memory in use", used, "bytes")]


def rows(site: Site) -> list[Answer]:
    """Time forward and backward alone, by rows of a microbatch, and the host's share of it.

    A share near 1 means that the GPU waits for Python to launch its kernels.
    """
    import yaml
    from composer.utils import dist, get_device

    from flame_composer import cpu
    from flame_composer.model.build import build_model
    from flame_composer.train.kernels import PinnedKernels

    cpu.enable()
    from fla.models import GLAConfig

    keys = yaml.safe_load((ROOT / "yamls/gla_340m.yaml").read_text())["model"]["config"]
    length, counts, device = 2048, (8, 32), "cuda"
    if site.is_rehearsal:
        keys |= {"hidden_size": 64, "num_hidden_layers": 1, "num_heads": 2}
        length, counts, device = 128, (1, 2), "cpu"
    model: Any = build_model(GLAConfig(**keys))
    model.to(device, torch.bfloat16)
    dist.initialize_dist(get_device())  # by which choices of kernels are shared
    choose_by(PinnedKernels(str(site.folder / "warm_gla_340m/checkpoints"), resumes=False))
    found = []
    for count in counts:
        tokens = torch.randint(0, keys["vocab_size"], (1, count * length), device=device)
        starts = torch.arange(0, count * length + 1, length, device=device)

        def steps(number: int, tokens: Any = tokens, starts: Any = starts) -> None:
            for _ in range(number):
                model(
                    input_ids=tokens, labels=tokens, cu_seqlens=starts, use_cache=False
                ).loss.backward()
                model.zero_grad()

        steps(2)
        _synchronize()
        start = time.perf_counter()
        steps(5)
        launched = time.perf_counter()
        _synchronize()
        seconds = time.perf_counter() - start
        name = f"gla_340m, forward and backward of {count} rows"
        found += [
            Answer(name, round(5 * count * length / seconds), "tokens/s"),
            Answer(f"{name}: the host's share", round((launched - start) / seconds, 2)),
        ]
    return found


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def benchmark(name: str, *keys: str) -> list[Answer]:
    """Run a benchmark of recipes/benchmark.py, and return its figures."""
    output = run(str(ROOT / "recipes/benchmark.py"), name, *keys)
    print(output)
    figures = json.loads(output.splitlines()[-1])["figures"]
    return [
        Answer(each["name"], "not measured" if each["value"] is None else each["value"])
        for each in figures
    ]


def resume(site: Site) -> list[Answer]:
    """Kill a run by SIGKILL and SIGTERM, and compare it with one that nothing disturbs."""
    steps = {"max_duration": "8ba", "save_interval": "2ba"}
    more = [f"{key}={value}" for key, value in steps.items()]
    if not site.is_rehearsal:
        more.append("model.config.num_hidden_layers=2")

    def start(name: str, *keys: str) -> subprocess.Popen[bytes]:
        place = f"save_folder={site.folder}/{name}/checkpoints"
        given = site.keys("gla_340m", name, place, *more, *keys)
        return subprocess.Popen([sys.executable, str(ROOT / "recipes/train.py"), *given], cwd=ROOT)

    def finish(process: subprocess.Popen[bytes], status: int = 0) -> None:
        if process.wait() != status:
            raise DataError(f"a run ended with status {process.returncode}, not {status}")

    def wait_for(name: str, process: subprocess.Popen[bytes], step: int) -> None:
        log = site.folder / name / "train_log.jsonl"
        while not log.exists() or log.read_text().count("\n") < step:
            if process.poll() is not None:
                raise DataError(f"a run ended with status {process.returncode} before step {step}")
            time.sleep(0.01)

    site.take_choices("warm_gla_340m", "whole")  # its kernels are tuned for the same shapes
    finish(start("whole"))
    kept = site.folder / "whole/checkpoints" / KERNELS
    if not kept.exists() and not site.is_rehearsal:
        raise DataError("the run that nothing disturbs has kept no choices of kernels")
    site.take_choices("whole", "killed")  # from the first step on
    for number, step, status in (
        (signal.SIGKILL, 3, -signal.SIGKILL),
        (signal.SIGTERM, 5, 128 + signal.SIGTERM),
    ):
        process = start("killed")
        wait_for("killed", process, step)
        process.send_signal(number)
        finish(process, status)
    finish(start("killed"))
    is_same = site.log("killed") == site.log("whole")
    finish(start("free", "deterministic=false"))
    differs = site.log("free") != site.log("whole")
    if not is_same:
        raise DataError("after SIGKILL and SIGTERM, the run logged other bits than undisturbed")
    return [
        Answer("after SIGKILL and SIGTERM, with pinned kernels", "bit for bit the undisturbed run"),
        Answer("with deterministic=false", "other bits" if differs else "the same bits"),
    ]


def convert(site: Site) -> list[Answer]:
    """Compare the rate of conversion with what the GPU trains on."""
    found = benchmark("convert", f"megabytes={1 if site.is_rehearsal else 40}", "repeats=1")
    with contextlib.suppress(FileNotFoundError):
        rate = float((site.folder / "gla_340m.rate").read_text())
        found.append(Answer("gla_340m on one GPU trains on", round(rate), "tokens/s"))
    return found


def decode(site: Site) -> list[Answer]:
    sizes = ("hidden_size=64", "num_layers=1", "context_lengths=[32,64]", "batch_sizes=[1]")
    return benchmark("decode", *(sizes if site.is_rehearsal else ()))


def save(site: Site) -> list[Answer]:
    sizes = ("hidden_size=64", "num_layers=1", "repeats=1")
    full = ("hidden_size=1024", "num_layers=24", "vocab_size=32000", "repeats=1")
    return benchmark("checkpoint", *(sizes if site.is_rehearsal else full))


def trainer(site: Site) -> list[Answer]:
    return benchmark("trainer", *(("megabytes=1", "repeats=1", "steps=4") * site.is_rehearsal))


RECIPES = ("gla_340m", "transformer_340m", "gated_deltanet_340m")
PARTS: dict[str, Callable[[Site], list[Answer]]] = {
    "data": data,
    "tests": tests,
    "parity": parity,
    "plan": plan,
    **{f"warm_{recipe}": partial(warm, recipe=recipe) for recipe in RECIPES},
    **{f"speed_{recipe}": partial(speed, recipe=recipe) for recipe in RECIPES},
    "rows": rows,
    "auto": auto,
    "save": save,
    "trainer": trainer,
    "decode": decode,
    "resume": resume,
    "convert": convert,
}


def main() -> None:
    """Run the part that sys.argv names, and write its answers to a file of its folder."""
    lead_session()  # so that nothing of it stays on the GPU
    name, folder, is_rehearsal = sys.argv[1:]
    answers = PARTS[name](Site(Path(folder), is_rehearsal == "rehearsal"))
    Path(folder, f"{name}.json").write_text(json.dumps([vars(answer) for answer in answers]))
