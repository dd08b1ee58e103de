"""What earlier versions made: a dataset, runs, an export and what was read from them, and the
commands that made it.

`python -m tests.earlier` makes the folder anew, with the code as it is then: only where a change of
its bytes is meant and CHANGELOG.md says so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.runs import ROOT, Corpus, Ranks, check, last_json, read_log, run_script

MADE = Path(__file__).parent / "fixtures" / "earlier"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # sums are split among threads
# With dropout, which draws random numbers at every step, and weights that are averaged.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "attention_dropout": 0.2,
    "tie_word_embeddings": True,
}
GLA = {
    "model_type": "gla",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "expand_k": 0.5,
    "tie_word_embeddings": True,
}
SHARED_KEYS = (
    "max_duration=20ba",
    "global_batch_size=4",
    "microbatch_size=2",
    "context_length=64",
    "scheduler.warmup=4ba",
    "eval_interval=10ba",
    "eval_data.max_rows=7",
    "log_batch_hash=true",
    "train_data.num_workers=0",
    "tokenizer=tokenizer",
    "train_data.local=train",
    "eval_data.local=val",
    "save_interval=7ba",
)
SHARDED = ("parallelism.fsdp.state_dict_type=sharded", "parallelism.cpu_fsdp=true")
STEP = 7  # of 15 that an epoch has


def run_keys(name: str, *more: str) -> list[str]:
    """Return the arguments of recipes/train.py, for its working folder, of the run `name` that
    is described there.
    """
    folders = (f"run_name={name}", f"log_folder={name}", f"save_folder={name}/checkpoints")
    return [f"{name}.yaml", *SHARED_KEYS, *folders, *more]


def convert(folder: Path) -> None:
    corpus = (
        "source=corpus.jsonl",
        "tokenizer=tokenizer",
        "context_length=64",
        "out=train",
        "val_fraction=0.15",
        "val_out=val",
    )
    check(run_script(ROOT / "convert/to_mds.py", *corpus, "encoder=hf", folder=folder))


def train(folder: Path) -> None:
    """Run to the end, or go on from what lies in the folder."""
    keys = run_keys("averaged", "algorithms.ema.half_life=4ba")
    check(run_script(ROOT / "recipes/train.py", *keys, folder=folder, env=ONE_THREAD))


def train_sharded(folder: Path) -> None:
    Ranks(2, *run_keys("sharded", *SHARDED), folder=folder, env=ONE_THREAD).finish()


def export(folder: Path) -> None:
    checkpoint = f"checkpoint=averaged/checkpoints/ba{STEP}.pt"
    check(
        run_script(
            ROOT / "convert/to_hf.py", checkpoint, "out=export", folder=folder, env=ONE_THREAD
        )
    )


def plan(folder: Path) -> dict[str, Any]:
    keys = run_keys("sharded", "global_batch_size=16", "devices=8", "device=h100", "kernels=none")
    return last_json(run_script(ROOT / "recipes/plan.py", *keys, folder=folder, env=ONE_THREAD))


def generate(folder: Path) -> str:
    keys = ("model=export", "prompt=ka lo", "max_new_tokens=40", "seed=3")
    return check(
        run_script(ROOT / "recipes/generate.py", *keys, folder=folder, env=ONE_THREAD)
    ).stdout


def evaluate(folder: Path) -> dict[str, Any]:
    keys = (f"model=averaged/checkpoints/ba{STEP}.pt", "data.local=val", "block_size=16")
    return last_json(run_script(ROOT / "recipes/evaluate.py", *keys, folder=folder, env=ONE_THREAD))


def logs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: read_log(folder / name) for name in ("averaged", "sharded")}


def processor() -> str:
    """Return what the bits of a sum depend on: torch's version, its kernels for this processor,
    and the processor.
    """
    model = next(
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return (
        f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
        f" {model.partition(': ')[2]}"
    )


def forget_the_end(folder: Path, name: str) -> None:
    """Leave the checkpoint of STEP and the log up to it, as a run that was killed then."""
    for path in (folder / name / "checkpoints").glob("ba*"):
        if path.stem != f"ba{STEP}":
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    log = folder / name / "train_log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:STEP]))
    for path in (folder / name).iterdir():
        if path.name not in ("checkpoints", "train_log.jsonl"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def make(folder: Path) -> None:
    Corpus(folder)
    # What is written holds no folder's name
    keys = ("source=corpus.jsonl", "out=tokenizer", "vocab_size=300")
    check(run_script(ROOT / "convert/train_tokenizer.py", *keys, folder=folder))
    for name, model in (("averaged", LLAMA), ("sharded", GLA)):
        content = yaml.safe_load((ROOT / "yamls/gla_tiny.yaml").read_text())
        (folder / f"{name}.yaml").write_text(yaml.dump({**content, "model": {"config": model}}))
    convert(folder)
    train(folder)
    train_sharded(folder)
    found: dict[str, Any] = {"processor": processor(), "logs": logs(folder)}
    export(folder)
    found |= {"plan": plan(folder), "generated": generate(folder), "evaluation": evaluate(folder)}
    for name in ("averaged", "sharded"):
        forget_the_end(folder, name)
    (folder / "read.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as new:
        make(Path(new))
        shutil.rmtree(MADE, ignore_errors=True)
        shutil.copytree(new, MADE)
    sys.exit(subprocess.call(["git", "-C", str(ROOT), "status", "--short", str(MADE)]))
