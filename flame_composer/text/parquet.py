"""Parquet files, opened so that damage is noticed, and the texts in their row groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.text.jsonl import columns
from flame_composer.text.unpacking import reading, reason

# The most rows unpacked at a time, and the most bytes: fewer rows are taken where they are long.
BATCH_ROWS, BATCH_BYTES = 256, 32 << 20


def open_parquet(path: str, version: str | None = None) -> Any:
    """Return a pyarrow ParquetFile that is local or in an object store.

    Checksums of its pages are verified if it has any. Raises DataError if the file cannot be read
    or is not a Parquet file.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file: Any = path
        if is_url(path):
            file = reading(path, lambda path: files.open_file(path, version, block_size=0))
        return reading(path, lambda _: parquet.ParquetFile(file, page_checksum_verification=True))
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: not a Parquet file: {reason(error)}; fetch the file again"
        ) from None


def read_texts(
    path: str,
    version: str | None,
    groups: range,
    text_column: str,
    on_damage: Callable[[DataError], None],
) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each row in these row groups.

    Rows are numbered from 1 in the whole file. For a row without valid text, `on_damage` is called.
    Raises DataError if the file is damaged or `text_column` is missing or does not hold strings,
    and ConfigError if several columns have that name.
    """
    file = open_parquet(path, version)
    num_rows = [file.metadata.row_group(group).num_rows for group in range(groups.stop)]
    if not any(num_rows[groups.start :]):
        return  # a file without rows may have any column types, so do not check them
    _check_column(path, file.schema_arrow, text_column)
    row = sum(num_rows[: groups.start])
    for value in _values(path, file, groups, [text_column], row):
        row += 1
        place = f"{path}: row {row}: column '{text_column}'"
        try:
            (text,) = (each.as_py() for each in value)
        except UnicodeDecodeError as error:
            on_damage(
                DataError(
                    f"{place} is not valid UTF-8 at byte {error.start}; mend or remove the row"
                )
            )
            continue
        if text is None:
            on_damage(DataError(f"{place} must be a string, not null; mend or remove the row"))
            continue
        yield row, text


def _check_column(path: str, schema: Any, text_column: str) -> None:
    import pyarrow as pa

    found = schema.get_all_field_indices(text_column)
    if not found:
        raise DataError(f"{path}: no column '{text_column}'; {columns(schema.names)}")
    if len(found) > 1:
        raise _doubled(path, text_column, len(found), "text_column")
    kind = schema.field(found[0]).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_null,
    )
    if not any(check(value_kind) for check in is_text):
        raise DataError(
            f"{path}: column '{text_column}' must hold strings, not {kind}; name another column"
            " with text_column=..."
        )


def read_rows(
    path: str,
    version: str | None,
    groups: range,
    columns: Sequence[str],
    on_damage: Callable[[DataError], None],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the values of each row in these row groups.

    Only those of `columns` are read that the file has. Rows are numbered from 1 in the whole file.
    `on_damage` is called for a row whose text is not UTF-8. Raises DataError if the file is
    damaged, ConfigError if several of its columns have one of these names.
    """
    file = open_parquet(path, version)
    names = file.schema_arrow.names
    found = [name for name in columns if name in names]
    for name in found:
        if names.count(name) > 1:
            raise _doubled(path, name, names.count(name), "columns")
    row = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
    for values in _values(path, file, groups, found, row):
        row += 1
        try:
            yield row, dict(zip(found, (each.as_py() for each in values), strict=True))
        except UnicodeDecodeError as error:
            on_damage(
                DataError(
                    f"{path}: row {row}: is not valid UTF-8 at byte {error.start} of a value; mend"
                    " or remove the row"
                )
            )


def _doubled(path: str, name: str, count: int, key: str) -> ConfigError:
    return ConfigError(
        f"source: {path}: has {count} columns named '{name}'; write it again with a name for each,"
        f" or name another column with {key}=..."
    )


def _values(
    path: str, file: Any, groups: range, columns: Sequence[str], row: int
) -> Iterator[tuple[Any, ...]]:
    """Yield the values of these columns in each row of the groups; `row` rows come before them."""
    import pyarrow as pa

    for group in groups:
        about = file.metadata.row_group(group)
        long = about.total_byte_size // max(about.num_rows, 1)
        size = max(1, min(BATCH_ROWS, BATCH_BYTES // max(long, 1)))
        batches = file.iter_batches(batch_size=size, row_groups=[group], columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError, MemoryError) as error:
                raise DataError(
                    f"{path}: damaged after row {row}: {reason(error)}; fetch the file again"
                ) from None
            if batch is None:
                break
            row += len(batch)
            yield from zip(*map(batch.column, columns), strict=True)
