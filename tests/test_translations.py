"""Every X.zh.md is the Chinese of X.md as it is now, and is set as Chinese is.

Same headings, same commands, and block by block the same inline code, links and numbers. What a
sentence says, no test can compare: whoever changes one here changes it there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, Block, anchors_of, blocks_of, is_heading

TRANSLATIONS = [path for path in PAGES if path.name.endswith(".zh.md")]
CJK, CLOSED = r"\u4e00-\u9fff", "，。、；：？！（）“”"
UNTRANSLATED = "this is not translated"  # unless it is a quotation
# The word for each thing, and those that others have for it
TERMS = {
    "token": ("词元", "令牌", "词符"),
    "分词器": ("tokenizer", "标记器", "词元化器"),
    "分片": ("shard", "碎片"),
    "打包": ("packing", "拼包"),
    "检查点": ("checkpoint", "存档点"),
    "断点续训": ("断点恢复", "续点训练"),
    "继续预训练": ("增量预训练", "持续预训练", "二次预训练"),
    "损失": ("loss",),
    "困惑度": ("perplexity", "困惑值"),
    "评测": ("评估", "测评"),
    "批次": ("batch", "批量"),
    "提示词": ("prompt", "提示语"),
    "对话模板": ("聊天模板", "会话模板"),
    "适配器": ("adapter",),
    "学习率": ("学习速率",),
    "配置项": ("配置键",),
    "算子": ("kernel", "内核"),
    "哈希": ("hash", "散列"),
}


def english_of(path: Path) -> Path:
    return path.with_name(path.name.replace(".zh.md", ".md"))


def complaints(path: Path, chinese: str, english: str) -> list[str]:
    """What of the page `path`, whose text is `chinese`, does not follow its `english`."""
    zh, en = path.name, english_of(path).name
    ours, theirs = blocks_of(chinese), blocks_of(english)
    found: list[str] = []
    for name, blocks, other in ((en, theirs, zh), (zh, ours, en)):
        if len(blocks) < 2 or other not in blocks[1].links:
            found.append(f"{name}: the paragraph under its title has no link to {other}")
    del ours[1:2], theirs[1:2]
    headings = list(compare_headings(zh, ours, en, theirs))
    found += [*headings, *compare_code(zh, ours, en, theirs)]
    if not headings:
        for mine, section in zip(sections_of(ours), sections_of(theirs), strict=True):
            found += list(compare_section(path, mine, section))
    return found + [f"{zh}, line {block.line}: {bad}" for block in ours for bad in faults_of(block)]


def compare_headings(zh: str, ours: list[Block], en: str, theirs: list[Block]) -> Iterator[str]:
    """What sections lack a counterpart, told by their code, if the headings' levels differ."""
    mine, others = sections_of(ours), sections_of(theirs)
    if [section[0].kind for section in mine] == [section[0].kind for section in others]:
        return
    marks = [
        [(each[0].kind, *map(comparable, lines_of_code(each)), *sorted(codes(each))) for each in it]
        for it in (others, mine)
    ]
    for change, start, end, begin, stop in SequenceMatcher(None, *marks, False).get_opcodes():
        if change != "equal":
            for page, sections, other in ((en, others[start:end], zh), (zh, mine[begin:stop], en)):
                for heading, *_ in sections:
                    yield (
                        f"{page} has the section {heading.text!r} ({heading.kind}, line"
                        f" {heading.line}) that {other} lacks, or has otherwise"
                    )


def compare_code(zh: str, ours: list[Block], en: str, theirs: list[Block]) -> Iterator[str]:
    mine, others = lines_of_code(ours), lines_of_code(theirs)
    matcher = SequenceMatcher(None, [*map(comparable, others)], [*map(comparable, mine)], False)
    for change, start, end, begin, stop in matcher.get_opcodes():
        if change != "equal":
            for page, lines, other in ((en, others[start:end], zh), (zh, mine[begin:stop], en)):
                told = [line for line in lines if not line.startswith("```")] or lines
                yield from (
                    f"{page} has the command {line!r} that {other} lacks, or has elsewhere"
                    for line in told
                )


def lines_of_code(blocks: list[Block]) -> list[str]:
    return [
        line
        for block in blocks
        if block.kind == "code"
        for line in (f"```{block.code[0]}", *block.text.splitlines(), "```")
    ]


def comparable(line: str) -> str:
    """The line with a mark in place of what a comment says."""
    return re.sub(r"""^((?:"[^"]*"|'[^']*'|[^"'#]|(?<=\S)#)*)(?<!\S)#.*""", r"\1#", line)


def sections_of(blocks: list[Block]) -> list[list[Block]]:
    sections: list[list[Block]] = []
    for block in blocks:
        if is_heading(block) or not sections:
            sections.append([])
        sections[-1].append(block)
    return sections


def compare_section(path: Path, ours: list[Block], theirs: list[Block]) -> Iterator[str]:
    zh, en = path.name, english_of(path).name
    title = f"{en}, {theirs[0].text!r}"
    shape, wanted = ([(block.kind, block.depth) for block in each] for each in (ours, theirs))
    if shape != wanted:
        yield (
            f"{title} has {counted(theirs)}; {zh} (line {ours[0].line}) has {counted(ours)}, or has"
            " them in another order"
        )
        pairs = [(ours, theirs)]
    else:
        pairs = [([block], [other]) for block, other in zip(ours, theirs, strict=True)]
    for mine, others in pairs:
        place = f"{en}, line {others[0].line}, {others[0].text[:40]!r}..."
        here = f"{zh} (line {mine[0].line})"
        for what, wants, haves in (
            ("the inline code", codes(others), codes(mine)),
            ("the link", links(others, path), links(mine)),
            ("the number", numbers(others), numbers(mine)),
        ):
            lacking, more = Counter(wants) - Counter(haves), Counter(haves) - Counter(wants)
            yield from (f"{place} has {what} {each} that {here} lacks" for each in lacking)
            yield from (f"{here} has {what} {each} that {place} lacks" for each in more)


def counted(blocks: list[Block]) -> str:
    names: tuple[tuple[str, Callable[[Block], bool]], ...] = (
        ("paragraphs", lambda block: block.kind == "p" and block.depth == 1),
        ("paragraphs in lists", lambda block: block.kind == "p" and block.depth > 1),
        ("cells of tables", lambda block: block.kind in ("th", "td")),
        ("blocks of code", lambda block: block.kind == "code"),
    )
    return ", ".join(f"{sum(map(is_one, blocks))} {name}" for name, is_one in names)


def codes(blocks: list[Block]) -> list[str]:
    return [code for block in blocks if block.kind != "code" for code in block.code]


def numbers(blocks: list[Block]) -> list[str]:
    """The numbers in digits, but those in inline code, without separators of thousands."""
    found = (re.findall(r"\d[\d,]*(?:\.\d+)*", block.prose) for block in blocks)
    return [number.replace(",", "") for each in found for number in each]


def links(blocks: list[Block], translated_at: Path | None = None) -> list[str]:
    """Their links; of an English page, those of its translation at `translated_at`."""
    found = [link for block in blocks for link in block.links]
    if translated_at is None:
        return found
    return [translated(link, translated_at) for link in found]


def translated(link: str, path: Path) -> str:
    """The link as it is in the translation `path`: to a page in Chinese, if there is one."""
    name, _, anchor = link.partition("#")
    page = path.parent / name if name else english_of(path)
    chinese = page.with_name(page.name.replace(".md", ".zh.md"))
    if not page.name.endswith(".md") or re.match(r"\w+:", link) or not chinese.is_file():
        return link
    new = name.replace(".md", ".zh.md")
    if not anchor:
        return new
    anchors, others = (anchors_of(each.read_text(encoding="utf-8")) for each in (chinese, page))
    return f"{new}#{dict(zip(others, anchors, strict=False)).get(anchor, anchor)}"


def faults_of(block: Block) -> Iterator[str]:
    """What is not set as the rest, and what is still English."""
    if block.kind == "code":
        return
    text = block.prose
    for pattern, rule in (
        (r"\n", "a line break inside a paragraph becomes a space: write it in one line"),
        (rf"[{CJK}][A-Za-z0-9`]|[A-Za-z0-9`%][{CJK}]", "a space between Chinese and Latin"),
        (rf"[{CJK}`)][,;:!?]|[{CJK}]\.|[{CJK}]\(|\)[{CJK}]", "Chinese has full-width punctuation"),
        (rf"[{CLOSED}] | [{CLOSED}]", "no space beside full-width punctuation"),
        (r"\*", "emphasis that is not read as such: put punctuation outside of the asterisks"),
        (r"[A-Za-z]+(?:['’,]?[ ,]+[A-Za-z]+){4,}", UNTRANSLATED),
    ):
        said = re.sub("“[^”]*”", "“”", text) if rule == UNTRANSLATED else text
        if match := re.search(pattern, said):
            yield f"{rule}: {said[max(0, match.start() - 15) : match.end() + 15]!r}"
    for term, others in TERMS.items():
        for other in others:
            if re.search(rf"(?<![A-Za-z_-]){other}s?(?![A-Za-z_-])", text, re.IGNORECASE):
                yield f"{other!r}: these pages say {term!r}"


def test_there_are_translations():
    assert {"README.zh.md", "tuning.zh.md"} <= {path.name for path in TRANSLATIONS}


@pytest.mark.parametrize("path", TRANSLATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_translation_is_that_of_its_page(path):
    english = english_of(path)
    assert english.is_file(), f"{path.name} is the translation of no page: {english.name} is gone"
    text = path.read_text(encoding="utf-8")
    found = complaints(path, text, english.read_text(encoding="utf-8"))
    remedy = f"translate into {path.name} what has changed in {english.name}, one for one"
    assert not found, "\n".join((remedy, *found))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_that_links_to_a_translation_has_one(path):
    """A translation that is deleted, or was never added, leaves its link behind."""
    blocks = blocks_of(path.read_text(encoding="utf-8"))
    named = [link for block in blocks[:2] for link in block.links if link.endswith(".zh.md")]
    assert [name for name in named if not (path.parent / name).is_file()] == []


ENGLISH = """# Title

English | [Chinese](X.zh.md)

It takes 1,000 rows ([planning](docs/planning.md), [tuning](docs/tuning.md#lora)) and `key=1`.

```bash
make quickstart  # first
make tune
```

## Next

- one `a`
- two

| key | meaning |
|---|---|
| `a` | **4.5 M** |
"""
CHINESE = """# 标题

[English](X.md) | 简体中文

需要 1000 行（[规划](docs/planning.md)、[微调](docs/tuning.zh.md#lora)）和 `key=1`。

```bash
make quickstart  # 先做
make tune
```

## 其次

- 一个 `a`
- 两个

| 键 | 含义 |
|---|---|
| `a` | **4.5M** |
"""


def test_a_faithful_translation_is_left_in_peace():
    assert complaints(ROOT / "X.zh.md", CHINESE, ENGLISH) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("[English](X.md) | ", "", "X.zh.md: the paragraph under its title has no link to X.md"),
        ("## 其次\n", "", "X.md has the section 'Next' (h2, line 12) that X.zh.md lacks"),
        (
            "## 其次",
            "### 其次",
            "X.zh.md has the section '其次' (h3, line 12) that X.md lacks",
        ),
        ("## 其次", "## 又\n\n`b`\n\n## 其次", "X.zh.md has the section '又' (h2, line 12) that"),
        ("make tune\n", "", "X.md has the command 'make tune' that X.zh.md lacks"),
        ("make tune", "make tunes", "X.zh.md has the command 'make tunes' that X.md lacks"),
        ("  # 先做", "", "X.md has the command 'make quickstart  # first' that X.zh.md lacks"),
        ("```bash", "```sh", "X.md has the command '```bash' that X.zh.md lacks"),
        ("- 两个\n", "", "X.md, 'Next' has 0 paragraphs, 2 paragraphs in lists, 4 cells"),
        ("| `a` | **4.5M** |\n", "", "0 paragraphs, 2 paragraphs in lists, 2 cells"),
        ("- 一个 `a`", "- 一个", "'one `a`'... has the inline code a that X.zh.md (line 14) lacks"),
        ("`key=1`", "`key=2`", "X.zh.md (line 5) has the inline code key=2 that X.md, line 5,"),
        ("planning.md", "gpu.md", "has the link docs/planning.md that X.zh.md (line 5) lacks"),
        ("tuning.zh.md", "tuning.md", "has the link docs/tuning.zh.md#lora that X.zh.md"),
        ("1000", "100", "has the number 1000 that X.zh.md (line 5) lacks"),
        ("**4.5M**", "**45M**", "has the number 4.5 that X.zh.md (line 19) lacks"),
        (
            "两个",
            "两个\n  两个",
            "X.zh.md, line 15: a line break inside a paragraph",
        ),
        ("需要 1000", "需要1000", "a space between Chinese and Latin: '需要1000 行（"),
        ("一个 `a`", "一个`a`", "X.zh.md, line 14: a space between Chinese and Latin"),
        ("1000 行（", "1000 行(", "X.zh.md, line 5: Chinese has full-width punctuation"),
        ("行（", "行 （", "X.zh.md, line 5: no space beside full-width punctuation"),
        ("- 两个", "- **两个：**在", "X.zh.md, line 15: emphasis that is not read as such"),
        ("- 两个", "- two of them are still here", "X.zh.md, line 15: this is not translated"),
        ("- 两个", "- 两个词元", "X.zh.md, line 15: '词元': these pages say 'token'"),
        ("- 两个", "- 两个 checkpoints", "'checkpoint': these pages say '检查点'"),
    ],
)
def test_what_does_not_follow_is_named(old, new, complaint):
    assert old in CHINESE
    found = complaints(ROOT / "X.zh.md", CHINESE.replace(old, new, 1), ENGLISH)
    assert complaint in "\n".join(found), found
