"""Loss by the length of the context and bits per byte, each against the plain model, document by
document.
"""

from __future__ import annotations

import math
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from flame_composer.config.data import EvalDataConfig
from flame_composer.cpu.linear import multiplies_bf16
from flame_composer.errors import ConfigError, DataError
from flame_composer.loader.batches import build_evaluator
from flame_composer.loader.datasets import open_for_model
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config
from flame_composer.text.tokenizer import token_bytes
from flame_composer.train.charts import require_plot
from flame_composer.use.perplexity import evaluate, plot_by_context
from tests.conftest import CONTEXT_LENGTH, GLA, LLAMA
from tests.data_fixtures import TEXTS, byte_tokenizer, llama_tokenizer, streaming_dataset
from tests.runs import Corpus, check, last_json, run_script

PNG = b"\x89PNG\r\n\x1a\n"


def test_bytes_of_tokens_add_up_to_those_of_the_text() -> None:
    for tokenizer, before in ((byte_tokenizer(), 0), (llama_tokenizer(), 1)):
        sizes = token_bytes(tokenizer)
        assert sizes is not None
        for text in filter(None, TEXTS):
            special = [token for token in tokenizer.all_special_tokens if token in text]
            ids = tokenizer(text, add_special_tokens=False).input_ids
            spaces = before * (1 + len(special))  # the tokenizer's own, before each stretch of text
            assert sizes[ids].sum() == len(text.encode()) - sum(map(len, special)) + spaces, text
        assert not sizes[tokenizer.all_special_ids].any()
    assert (
        token_bytes(
            PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
            )
        )
        is None
    )


def test_an_added_token_counts_as_it_is_written() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "Ġ": 1}, []))
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.add_tokens(["né"])
    sizes = token_bytes(tokenizer)
    assert sizes is not None
    assert sizes[tokenizer.convert_tokens_to_ids(["a", "Ġ", "né", "<end>"])].tolist() == [
        1,
        1,
        3,
        0,
    ]


@pytest.fixture(scope="module")
def reference(
    eval_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[list[list[int]]]:
    """The documents of each row."""
    rows = streaming_dataset(
        shutil.copytree(eval_dataset, tmp_path_factory.mktemp("copy") / "rows")
    )
    split = [
        torch.tensor(row["input_ids"].astype(int)).split(row["doc_lengths"].tolist())
        for row in rows
    ]
    return [[piece.tolist() for piece in row] for row in split]


@pytest.mark.parametrize("varlen", [True, False])
@pytest.mark.parametrize("architecture", [GLA, LLAMA])
@pytest.mark.parametrize("block_size", [1, 7, CONTEXT_LENGTH - 1, 1000])
def test_loss_by_context_is_that_of_the_plain_model(
    eval_dataset: Path,
    copy_of: Any,
    reference: list[list[list[int]]],
    architecture: dict[str, Any],
    varlen: bool,
    block_size: int,
) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = build_model(build_hf_config(architecture, tokenizer, CONTEXT_LENGTH)).eval()
    sizes = token_bytes(tokenizer)
    assert sizes is not None
    dataset = open_for_model(str(copy_of(eval_dataset)), None, tokenizer=tokenizer)
    found = evaluate(
        CausalLM(model, tokenizer, varlen=varlen),
        build_evaluator(dataset, EvalDataConfig(), batch_size=3),
        precision="fp32",
        token_bytes=sizes,
        block_size=block_size,
    )
    blocks: dict[int, list[tuple[float, int]]] = {}
    for row in reference:
        documents = row if varlen else [list(chain(*row))]
        text = iter(list(chain(*row))[1:])  # what is to be predicted
        for document in documents:
            with torch.no_grad():
                logits = model(torch.tensor([document])).logits[0].double()
            for context, values in enumerate(logits, 1):
                target = next(text, None)
                if target is not None:
                    loss = -values.log_softmax(0)[target].item()
                    blocks.setdefault((context - 1) // block_size, []).append(
                        (loss, int(sizes[target]))
                    )
    every = list(chain(*blocks.values()))
    assert found["tokens"] == len(every) == len(reference) * (CONTEXT_LENGTH - 1)
    assert found["loss"] == pytest.approx(sum(loss for loss, _ in every) / len(every), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bytes"] == sum(size for _, size in every)
    assert found["bits_per_byte"] == pytest.approx(
        found["loss"] * len(every) / math.log(2) / found["bytes"]
    )
    assert [block["from"] for block in found["by_context"]] == [
        1 + number * block_size for number in sorted(blocks)
    ]
    for block, number in zip(found["by_context"], sorted(blocks), strict=True):
        assert block["to"] == min((number + 1) * block_size, CONTEXT_LENGTH - 1)
        assert block["tokens"] == len(blocks[number])
        assert block["bytes"] == sum(size for _, size in blocks[number])
        assert block["loss"] == pytest.approx(
            sum(loss for loss, _ in blocks[number]) / len(blocks[number]), abs=2e-5
        )


def test_a_tokenizer_without_bytes_has_no_bits_per_byte(eval_dataset: Path, copy_of: Any) -> None:
    tokenizer = byte_tokenizer()
    model = CausalLM(
        build_model(build_hf_config(GLA, tokenizer, CONTEXT_LENGTH)), tokenizer, varlen=True
    )
    dataset = open_for_model(str(copy_of(eval_dataset)), None, tokenizer=tokenizer)
    found = evaluate(
        model,
        build_evaluator(dataset, EvalDataConfig(), batch_size=3),
        precision="fp32",
        token_bytes=None,
    )
    assert found["bits_per_byte"] is None
    assert found["bytes"] is None
    assert "by_context" not in found


def test_several_datasets_at_once(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    model, plot = f"model={undisturbed / 'checkpoints'}", tmp_path / "plots/context.png"
    process = check(
        run_script(
            "recipes/evaluate.py",
            model,
            f"datasets.held_out.local={corpus.val}",
            f"datasets.seen.remote={corpus.train}",
            f"datasets.seen.local={tmp_path / 'cache'}",
            "datasets.seen.max_rows=5",
            "datasets.seen.loss_across_documents=false",
            "block_size=32",
            f"plot={plot}",
        )
    )
    result = last_json(process)
    assert list(result["datasets"]) == ["held_out", "seen"]
    alone = last_json(
        run_script(
            "recipes/evaluate.py",
            model,
            f"data.remote={corpus.train}",
            f"data.local={tmp_path / 'other'}",
            "data.max_rows=5",
            "data.loss_across_documents=false",
        )
    )
    seen = result["datasets"]["seen"]
    assert {key: seen[key] for key in alone if key in seen} == {
        key: alone[key] for key in alone if key in seen
    }
    assert 0 < alone["tokens"] < 5 * 63, "without the first tokens of documents"
    plain = last_json(
        run_script(
            "recipes/evaluate.py",
            model,
            f"data.local={corpus.train}",
            "data.max_rows=5",
            "varlen=false",
        )
    )
    assert plain["tokens"] == 5 * 63
    across = last_json(
        run_script("recipes/evaluate.py", model, f"data.local={corpus.train}", "data.max_rows=5")
    )
    assert plain["loss"] != pytest.approx(across["loss"], rel=1e-6), (
        "attention state runs across documents"
    )
    for name, shown in result["datasets"].items():
        assert (
            f"{name}: loss {shown['loss']:.4f}, perplexity {shown['perplexity']:.2f}, "
            in process.stdout
        )
    assert "\n        1 to      32 tokens of context: perplexity " in process.stdout
    assert plot.read_bytes().startswith(PNG)


def test_a_plot_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path, message in (
        (tmp_path / "file/a.png", f"{tmp_path}/file cannot be made: File exists"),
        (tmp_path / "folder.png", "is a folder"),
        (Path("/proc/a/b.png"), "/proc/a cannot be made: "),
    ):
        with pytest.raises(ConfigError) as caught:
            require_plot(str(path))
        assert str(caught.value).startswith(f"plot={path}: {message}")
    require_plot(str(tmp_path / "new/a.png"))
    with pytest.raises(DataError, match=r"/folder\.png: cannot be written: Is a directory$"):
        plot_by_context(
            {"": {"by_context": [{"to": 1, "perplexity": 2.0}]}}, str(tmp_path / "folder.png")
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_fp16_needs_a_gpu(undisturbed: Path) -> None:
    process = run_script(
        "recipes/evaluate.py", f"model={undisturbed}", "data.local=d", "precision=amp_fp16"
    )
    message = (
        "precision=amp_fp16: there is no GPU here, and CPUs do not train in fp16; set"
        " precision=fp32"
    )
    assert (process.returncode, process.stderr) == (2, f"error: command line: {message}\n")


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU does not multiply bf16")
def test_bf16_on_a_cpu(undisturbed: Path, corpus: Corpus) -> None:
    keys = (f"model={undisturbed / 'checkpoints'}", f"data.local={corpus.val}")
    fp32, bf16 = (
        last_json(run_script("recipes/evaluate.py", *keys, f"precision={precision}"))["loss"]
        for precision in ("fp32", "amp_bf16")
    )
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.01)


def test_nothing_to_evaluate_on_and_no_such_data(undisturbed: Path, tmp_path: Path) -> None:
    for keys, message in (
        ((), "error: command line: data: must be set (data.local=...), or tasks, or suite\n"),
        (("datasets.a.local=./nowhere",), "error: ./nowhere: no such folder\n"),
        (("data.local=./nowhere",), "error: ./nowhere: no such folder\n"),
        (
            (f"data.local={undisturbed}", "tokenizer=./nowhere"),
            (
                "error: tokenizer: ./nowhere: no such folder; give a Hugging Face tokenizer folder"
                " or hub id\n"
            ),
        ),
    ):
        process = run_script("recipes/evaluate.py", f"model={undisturbed / 'checkpoints'}", *keys)
        assert (process.returncode, process.stderr) == (2, message)
