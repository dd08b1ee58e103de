"""Go all the way from text to a trained model and a sample of it, in minutes on this machine.

    python recipes/quickstart.py

It shows and runs the commands that a user would type. If interrupted, run it again to continue.
"""

import argparse
import json
import sys
import sysconfig
from pathlib import Path

from flame_composer.lines import clean_streams, flush_streams
from flame_composer.processes import run_and_show

DATA, RUN = Path("data/quickstart"), Path("runs/gla_tiny")


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    clean_streams()
    corpus, tokenizer, hf_folder = DATA / "corpus.jsonl", DATA / "tokenizer", RUN / "hf"
    if not corpus.exists():
        write_corpus(corpus)
    if not tokenizer.exists():
        run_and_show(
            "convert/train_tokenizer.py", f"source={corpus}", f"out={tokenizer}", "vocab_size=4096"
        )
    run_and_show(
        "convert/to_mds.py",
        f"source={corpus}",
        f"tokenizer={tokenizer}",
        "context_length=512",
        f"out={DATA / 'train'}",
        "val_fraction=0.05",
        f"val_out={DATA / 'val'}",
    )
    trained = run_and_show("recipes/train.py", "yamls/gla_tiny.yaml")
    if not hf_folder.exists():
        run_and_show(
            "convert/to_hf.py", f"checkpoint={trained['checkpoint_folder']}", f"out={hf_folder}"
        )
    evaluated = run_and_show(
        "recipes/evaluate.py", f"model={hf_folder}", f"data.local={DATA / 'val'}"
    )
    run_and_show(
        "recipes/generate.py",
        f"model={hf_folder}",
        "prompt=def read_lines(path):\n",
        "max_new_tokens=100",
    )
    keys = ("train_tokens", "eval_perplexity_initial", "tokens_per_second", "checkpoint_folder")
    summary = {key: trained[key] for key in keys} | {"eval_perplexity": evaluated["perplexity"]}
    print(json.dumps({**summary, "hf_folder": str(hf_folder)}))
    return 1 if flush_streams() else 0


def write_corpus(path: Path) -> None:
    """Write Python's standard library, without its tests, as JSONL with one document per file."""
    library = Path(sysconfig.get_path("stdlib"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as corpus:
        for file in sorted(library.rglob("*.py")):
            name = file.relative_to(library)
            if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(name.parts):
                continue
            try:
                corpus.write(
                    json.dumps({"path": str(name), "text": file.read_text(encoding="utf-8")}) + "\n"
                )
            except UnicodeDecodeError:
                continue  # a few files are in older encodings
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
