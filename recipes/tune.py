"""Tune the quickstart's model to write docstrings, in minutes on this machine.

    python recipes/tune.py

It shows and runs the commands that a user would type. If interrupted, run it again to continue.
"""

import argparse
import ast
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from flame_composer.lines import clean_streams, flush_streams
from flame_composer.processes import run_and_show

DATA, BASE, RUN = Path("data/tune"), Path("runs/gla_tiny/hf"), Path("runs/sft_tiny")
LONGEST = 200  # characters of a docstring's first paragraph, and of a signature
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
QUESTION = "Write a docstring for this function."
ROUGE = "rouge-l (rouge-score)"


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    clean_streams()
    if not BASE.exists():
        run_and_show("recipes/quickstart.py")
    examples, hf_folder = DATA / "docstrings.jsonl", RUN / "hf"
    if not examples.exists():
        write_examples(examples)
    run_and_show(
        "convert/to_sft.py",
        f"source={examples}",
        "format=alpaca",
        "template=alpaca",
        "tokenizer=data/quickstart/tokenizer",
        "context_length=512",
        f"out={DATA / 'train'}",
        "val_fraction=0.05",
        f"val_out={DATA / 'val'}",
    )
    trained = run_and_show("recipes/train.py", "yamls/sft_tiny.yaml")
    if not hf_folder.exists():
        run_and_show(
            "convert/to_hf.py", f"checkpoint={trained['checkpoint_folder']}", f"out={hf_folder}"
        )
    before, after = (
        run_and_show(
            "recipes/predict.py",
            f"model={model}",
            f"data.local={DATA / 'val'}",
            f"out={RUN / name}",
            "max_examples=100",
            "max_new_tokens=40",
            "batch_size=50",
        )
        for model, name in ((BASE, "answers_before"), (hf_folder, "answers_after"))
    )
    keys = ("train_tokens", "eval_loss_initial", "eval_loss")
    rouge = {"rouge_l_initial": before["scores"][ROUGE], "rouge_l": after["scores"][ROUGE]}
    summary = {key: trained[key] for key in keys} | rouge
    print(json.dumps({**summary, "hf_folder": str(hf_folder)}))
    return 1 if flush_streams() else 0


def write_examples(path: Path) -> None:
    """Write an example for each function of Python's standard library that has a docstring."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        for signature, docstring in find_docstrings(Path(sysconfig.get_path("stdlib"))):
            if max(len(signature), len(docstring)) <= LONGEST:
                example = {"instruction": QUESTION, "input": signature, "output": docstring}
                file.write(json.dumps(example) + "\n")
    path.with_suffix(".tmp").replace(path)


def find_docstrings(library: Path) -> Iterator[tuple[str, str]]:
    """Yield the signature of each function, and the first paragraph of its docstring."""
    warnings.simplefilter("ignore", SyntaxWarning)  # of what is no escape in a string
    warnings.simplefilter("ignore", DeprecationWarning)  # the same in older versions of Python
    for file in sorted(library.rglob("*.py")):
        if NOT_READ & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few files are in older encodings
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                paragraph = " ".join(text.split("\n\n")[0].split())
                yield f"def {node.name}({ast.unparse(node.args)}):", paragraph


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
