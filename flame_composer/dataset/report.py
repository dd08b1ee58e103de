"""A dataset's content for people: tables, histograms and sample rows (100 columns), and a PNG."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import textwrap
from typing import Any

import numpy as np

from flame_composer.dataset.ledger import OF_TUNING, Ledger
from flame_composer.dataset.manifest import Manifest
from flame_composer.dataset.mds import Lengths
from flame_composer.dataset.open import Dataset
from flame_composer.dataset.survey import Survey
from flame_composer.dataset.totals import reason_in_words
from flame_composer.lines import visible
from flame_composer.quantities import align, format_bytes, plural

WIDTH = 100
MAX_UNITS = 12
BAR = 40  # columns of the longest bar


def describe(dataset: Dataset, tokenizer: str | None) -> list[str]:
    """Return lines that describe the dataset; `tokenizer` names a tokenizer known to match it."""
    manifest = dataset.manifest
    totals, theirs = manifest.totals, manifest.tokenizer
    inputs = {part.path: part.num_bytes for unit in manifest.units for part in unit.inputs}
    sizes = sum(part.num_bytes for unit in manifest.units for part in unit.inputs)
    is_text = manifest.kind == "text"
    documents = f"{totals.documents:,}"
    if totals.documents:
        num_tokens = totals.tokens_in if is_text else totals.tokens_in - totals.dropped
        documents += f", {num_tokens / totals.documents:,.0f} tokens each on average"
    if totals.documents_short:
        documents += f"; {totals.documents_short:,} of them were too short and were dropped"
    if totals.documents_skipped:
        documents += f"; {totals.documents_skipped:,} more could not be read"
    facts = {
        "split": manifest.split,
        "rows": (
            f"{totals.rows:,} of {manifest.context_length:,} tokens ({manifest.token_dtype}),"
            f" {format_bytes(totals.bytes)} in {plural(totals.shards, 'shard')}"
        ),
        "documents" if is_text else "examples": documents,
        **({} if is_text else _of_tuning(manifest)),
        "inputs": f"{plural(len(inputs), 'file')}, {format_bytes(sizes)}",
        "tokenizer": (
            f"{theirs.sha256[:12]}: {theirs.vocab_size:,} tokens, bos {_id(theirs.bos_token_id)},"
            f" eos {_id(theirs.eos_token_id)}"
            + ("" if tokenizer is None else f"; matches {tokenizer}")
        ),
        "encoder": ", ".join(
            sorted({unit.encoder for unit in manifest.units if unit.encoder is not None})
        ),
        "settings": "  ".join(
            f"{key}={_setting(value)}" for key, value in sorted(_shown(manifest).items())
        ),
    }
    lines = [visible(dataset.place)]
    for name, fact in facts.items():
        lines += textwrap.wrap(
            visible(fact), WIDTH, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13
        )
    return lines


def _of_tuning(manifest: Manifest) -> dict[str, str]:
    """Return what there is to say of tuning data alone."""
    totals = manifest.totals
    facts = {
        "loss": f"{totals.loss_tokens:,} tokens, {totals.loss_tokens / totals.tokens_out:.1%}",
        "padding": f"{totals.padding:,} tokens, {totals.padding / totals.tokens_out:.1%}",
    }
    if totals.documents_cut:
        facts["cut"] = f"the prompts of {totals.documents_cut:,} examples"
    if totals.left_out:
        reasons = (
            f"{count:,}: {reason_in_words(reason)}" for reason, count in totals.left_out.items()
        )
        facts["left out"] = "; ".join(reasons)
    return facts


def ledger_table(dataset: Dataset) -> list[str]:
    """Return a table of the units' ledgers (of many units, the first and last) and the totals."""
    units = dataset.manifest.units
    names = [
        "unit",
        "documents",
        "tokens in",
        "+ carried in",
        "= tokens out",
        "+ carried out",
        "+ dropped",
        "rows",
        "shards",
    ]
    body = [[visible(unit.name), *_counts(unit.ledger)] for unit in units]
    left_out = len(body) - MAX_UNITS
    if left_out > 0:
        last = MAX_UNITS // 3
        body[MAX_UNITS - last : len(body) - last] = [["..."] * len(names)]
    total = ["total", *_counts(dataset.manifest.totals)]
    # A heading of two words takes two lines, so that the numbers decide how wide a column is.
    heads = [name.rpartition(" ")[::2] if " " in name else ("", name) for name in names]
    cells = [[head[0] for head in heads], [head[1] for head in heads], *body, total]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    gap = "  " if sum(widths) + 2 * len(widths) <= WIDTH else " "
    lines = align(cells, gap=gap)
    rule = "-" * max(map(len, lines))
    totals = dataset.manifest.totals
    padding = "" if dataset.manifest.kind == "text" else f" + {totals.padding:,} of padding"
    return [
        "Ledger"
        + (
            f" (of {plural(len(units), 'unit')}, {left_out:,} are not shown)"
            if left_out > 0
            else ""
        ),
        *lines[:2],
        rule,
        *lines[2:-1],
        rule,
        lines[-1],
        f"{totals.tokens_in:,} tokens in{padding} = {totals.tokens_out:,} out +"
        f" {totals.dropped:,} dropped",
    ]


def _counts(ledger: Ledger) -> list[str]:
    shown = (
        ledger.documents,
        ledger.tokens_in,
        ledger.carried_in,
        ledger.tokens_out,
        ledger.carried_out,
        ledger.dropped,
        ledger.rows,
        ledger.shards,
    )
    return [f"{count:,}" for count in shown]


def histograms(dataset: Dataset, survey: Survey) -> list[str]:
    """Return histograms of the document pieces' lengths, and of the number of pieces in a row."""
    pieces = int(survey.piece_lengths.sum())
    rows = int(survey.pieces_per_row.sum())
    context_length = dataset.manifest.context_length
    part = (
        ""
        if survey.num_read == len(dataset.files)
        else f", in {survey.num_read:,} of {len(dataset.files):,} shards"
    )
    return [
        (
            f"Document pieces: {pieces:,}, median length"
            f" {plural(quantile(survey.piece_lengths, 0.5), 'token')}{part}"
        ),
        *histogram(
            survey.piece_lengths, "tokens", "pieces", of_size="of tokens", whole=context_length
        ),
        "(a document that meets the end of a row goes on in another row as another piece)",
        "",
        (
            f"Rows: {rows:,}, median"
            f" {plural(quantile(survey.pieces_per_row, 0.5), 'document piece')}{part}"
        ),
        *histogram(survey.pieces_per_row, "pieces", "rows", of_size="of pieces"),
    ]


def histogram(
    counts: Lengths, size_name: str, name: str, *, of_size: str, whole: int | None = None
) -> list[str]:
    """Return a histogram as lines, where `counts[n]` is the number of things of size n.

    The bins are 1, 2-3, 4-7 and so on. The size `whole`, if given, has a bin of its own.
    """
    top = len(counts) - 1
    edges = [1 << i for i in range(top.bit_length())]
    bins = [(low, min(2 * low - 1, top)) for low in edges]
    if whole is not None and top == whole:
        low = bins.pop()[0]
        bins += [(low, whole - 1), (whole, whole)] if low < whole else [(whole, whole)]
    bins = [bin for bin in bins if bin[1] >= np.flatnonzero(counts)[0]]
    numbers = [int(counts[low : high + 1].sum()) for low, high in bins]
    sizes = [int((counts[low : high + 1] * np.arange(low, high + 1)).sum()) for low, high in bins]
    heads = [size_name, name, f"of {name}", of_size]
    cells = [
        [
            f"{low:,}" if low == high else f"{low:,}-{high:,}",
            f"{number:,}",
            f"{number / sum(numbers):.1%}",
            f"{bytes / sum(sizes):.1%}",
        ]
        for (low, high), number, bytes in zip(bins, numbers, sizes, strict=True)
    ]
    lines = align([heads, *cells])
    bars = [bar(number / max(numbers)) for number in numbers]
    return [
        lines[0],
        *(f"{line}  {bar}".rstrip() for line, bar in zip(lines[1:], bars, strict=True)),
    ]


def bar(fraction: float) -> str:
    """Return a bar, in steps of an eighth of a column; any fraction above 0 is visible."""
    eighths = max(round(fraction * BAR * 8), 1 if fraction > 0 else 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def quantile(counts: Lengths, fraction: float) -> int:
    """Return the smallest size that this fraction of the things counted does not exceed.

    Returns 0 if there are none.
    """
    return int(np.searchsorted(np.cumsum(counts), fraction * counts.sum())) if counts.any() else 0


def _id(token_id: int | None) -> str:
    return "none" if token_id is None else str(token_id)


def _shown(manifest: Manifest) -> dict[str, Any]:
    """Return the settings to show: not the chat template, which may be long, but its hash."""
    template = manifest.template
    if template is None:
        return manifest.config
    digest = hashlib.sha256(template.encode()).hexdigest()[:12]
    return {**manifest.config, "template": f"{len(template):,} characters, hash {digest}"}


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def verdict(dataset: Dataset, survey: Survey) -> str:
    """Return a sentence on how much of the dataset was checked, and whether it is whole."""
    shards, verified = plural(len(dataset.files), "shard"), survey.num_verified
    if survey.bad:
        names = [visible(name) for name in survey.bad]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
        return f"{len(names):,} of {shards} bad: {shown}"
    if verified == len(dataset.files):
        return "Every shard has the size and the hash it was written with."
    if dataset.remote is not None:
        return (
            f"{verified:,} of {shards} were downloaded and have the hash they were written with;"
            " verify=true checks all."
        )
    return "Every shard has the size it was written with; verify=true checks the content as well."


def summary(dataset: Dataset, survey: Survey) -> dict[str, Any]:
    """Return what was found, as JSON values for a program to read."""
    manifest = dataset.manifest
    read = {
        "shards_read": survey.num_read,
        "shards_verified": survey.num_verified,
        "document_pieces": int(survey.piece_lengths.sum()),
        "median_piece_length": quantile(survey.piece_lengths, 0.5),
        "median_pieces_per_row": quantile(survey.pieces_per_row, 0.5),
        "bad_shards": survey.bad,
    }
    totals = dataclasses.asdict(manifest.totals)
    if manifest.kind == "text":
        totals = {name: count for name, count in totals.items() if name not in OF_TUNING}
    return {
        "data": dataset.place,
        "split": manifest.split,
        "context_length": manifest.context_length,
        "tokenizer": manifest.tokenizer.sha256,
        **totals,
        **read,
    }


def draw(dataset: Dataset, survey: Survey, path: str) -> None:
    """Write a PNG with a histogram of document piece lengths, and of the tokens in the pieces.

    Pieces as long as a row would dwarf all others, so the title states them instead.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    context_length = dataset.manifest.context_length
    lengths = np.arange(1, context_length + 1)
    counts = np.pad(survey.piece_lengths, (0, context_length + 1 - len(survey.piece_lengths)))[1:]
    # Four bins for every doubling of the length, or fewer where lengths are too close together.
    edges = np.unique(
        np.round(np.geomspace(1, context_length, 1 + 4 * context_length.bit_length())).astype(
            np.int64
        )
    )
    shares = [100 * weights / weights.sum() for weights in (counts, counts * lengths)]
    pieces, tokens = (
        np.histogram(lengths[:-1], bins=edges, weights=share[:-1])[0] for share in shares
    )
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(pieces, edges, label="of the pieces", color="#88aacc", fill=True)
    axes.stairs(tokens, edges, label="of the tokens", color="#aa4422", linewidth=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set(
        xlabel="length of a document piece, tokens",
        ylabel="per cent in a bin",
        xlim=(1, context_length),
        ylim=(0, None),
    )
    axes.set_title(
        f"{visible(dataset.place)}: {int(counts.sum()):,} document pieces\nnot drawn: whole rows of"
        f" {context_length:,} tokens, {shares[0][-1]:.1f} % of the pieces and {shares[1][-1]:.1f} %"
        " of the tokens",
        fontsize="medium",
        parse_math=False,
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")
