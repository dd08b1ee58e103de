"""The page at `/`, used in a real browser as a person does."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.browser import ENTER, ESCAPE, NO_MORE, SHIFT, Browser
from tests.conftest import GLA
from tests.runs import ROOT
from tests.serve.clients import KEY, Server
from tests.serve.page_talk import ATTENTION, CHINESE, CODE, HOSTILE, TALK
from tests.serve.speaking import speak
from tests.serve.test_serve import make

CHAT, NAME = "/v1/chat/completions", "<i>tiny</i>"
PICTURE = ROOT / "docs/serving.png"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that says what it was taught, and needs no key."""
    folder = tmp_path_factory.mktemp("speaking") / "gla-demo"
    speak(folder, TALK)
    server = Server(folder, "max_new_tokens=600")
    yield server
    ended = server.end()
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model without a chat template whose greedy text never ends, behind a key."""
    folder = tmp_path_factory.mktemp("locked") / "tiny"
    model, tokenizer = make(folder, GLA)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    server = Server(
        folder,
        f"served_name={NAME}",
        "api_key_env=SERVE_KEY",
        "max_new_tokens=100000",
        env={"SERVE_KEY": KEY},
    )
    yield server
    ended = server.end()
    assert ended.returncode == 0, ended.stderr
    assert KEY not in ended.stderr


def address_of(server: Server) -> str:
    return server.url.removesuffix("v1")


def opened(browser: Browser, server: Server, **settings: Any) -> None:
    """Open the page, and set what is to be set as a person would."""
    browser.open(address_of(server))
    browser.wait(lambda: browser.is_seen("#welcome"))
    if settings:
        browser.click("#settings")
        for name, value in settings.items():
            browser.fill(f"#{name}", f"{value}")
        browser.click("#close")


def ask(browser: Browser, text: str) -> Any:
    """Type a question, wait for the answer, and return it as the page has it."""
    browser.write("#input", text + ENTER)
    return last(browser)


def last(browser: Browser) -> Any:
    browser.wait(lambda: browser.run("return running === null"))
    return browser.run("return turns.length ? turns[turns.length - 1].answer : null")


def from_api(server: Server, *texts: str, system: str = "", **settings: Any) -> str:
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(texts)
    ]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    status, _, answer = server.ask({"messages": messages, **settings}, CHAT)
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["message"]["content"]


def continued(server: Server, prompt: str) -> str:
    asked = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
    return json.loads(server.ask(asked)[2])["choices"][0]["text"]


def quiet(browser: Browser, server: Server) -> bool:
    """Whether nothing was in the console, and nothing but this server was asked for anything."""
    assert browser.logged() == []
    foreign = [url for url in browser.requested() if not url.startswith(("chrome:", "data:"))]
    assert all(url.startswith(address_of(server)) for url in foreign), foreign
    return len(foreign) > 1


def test_what_is_sent_with_the_page(server: Server, locked: Server) -> None:
    """It needs no key, and lets the browser run and connect to nothing else."""
    for each in (server, locked):
        status, headers, page = each.ask(path="/", Authorization="")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = dict(
            rule.partition(" ")[::2] for rule in headers["content-security-policy"].split("; ")
        )
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        for rule in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
            assert policy[rule] == "'none'"
        assert policy["script-src"].startswith("'sha256-")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-cache"
        assert b"http" not in page.replace(b"http://www.w3.org/2000/svg", b"").split(b"<script>")[0]
        assert each.ask(path="/", method="HEAD")[::2] == (200, b"")
        assert each.ask(path="/", method="POST")[0] == 405
    assert locked.ask(path="/v1/models", Authorization="")[0] == 401
    for asked in (server, locked):
        card = json.loads(asked.ask(path="/v1/models")[2])["data"][0]
        assert (card["chat"], card["max_new_tokens"]) == (
            (True, 600) if asked is server else (False, 100000)
        )


def test_pages_of_other_sites(server: Server, locked: Server) -> None:
    """What a browser says to be for one is refused, unless it brings a key."""
    body = {"prompt": "x", "max_tokens": 1}
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        for path, asked in (("/v1/models", None), ("/metrics", None), ("/v1/completions", body)):
            assert server.ask(asked, path, Sec_Fetch_Site=site)[0] == status
            assert locked.ask(asked, path, Sec_Fetch_Site=site)[0] == 200
        assert server.ask(path="/", Sec_Fetch_Site=site)[0] == 200  # a link to it
    assert server.ask(path="/", Host="evil.example")[0] == 403


def test_a_conversation_in_the_browser(browser: Browser, server: Server) -> None:
    """Each answer is what the API gives, and is shown while it is written."""
    opened(browser, server, temperature=0, top_p=1)
    first, _, second, _ = TALK[0]
    browser.write("#input", first + ENTER)
    lengths = set()
    while browser.run("return running !== null"):
        lengths.add(browser.run("return document.querySelector('.answer').textContent.length"))
    assert len(lengths) > 3, "it is streamed"
    assert last(browser) == from_api(server, first, temperature=0) == ATTENTION
    assert ask(browser, second) == from_api(server, first, ATTENTION, second, temperature=0) == CODE
    assert browser.text(".turn:last-child pre").startswith("def step(state, q, k, v, gate):\n    ")
    assert "o = S^T q" in browser.text(".turn .answer")
    assert browser.text(".turn:last-child .foot span").startswith("149 tokens · ")
    assert quiet(browser, server)


def test_settings_are_sent(browser: Browser, server: Server) -> None:
    settings = {"temperature": 3, "top_p": 0.9, "seed": 7, "max_tokens": 30}
    opened(browser, server, system="Be <b>odd</b>.", **settings)
    answer = ask(browser, "hello")
    assert answer == from_api(server, "hello", system="Be <b>odd</b>.", **settings)
    assert answer != from_api(server, "hello", **settings)
    assert "ended at the longest length set" in browser.text(".foot")
    browser.click("#settings")
    assert browser.run("return document.getElementById('temperature-range').value") == "2"
    browser.open(address_of(server))  # they are kept; the conversation is not
    browser.wait(lambda: browser.is_seen("#welcome"))
    assert browser.run("return document.getElementById('system').value") == "Be <b>odd</b>."
    browser.click("#settings")
    browser.click("#defaults")
    assert browser.run("return document.getElementById('system').value") == ""
    assert browser.run("return document.getElementById('top_p-range').value") == "0.95"


def test_what_can_be_done_with_an_answer(browser: Browser, server: Server) -> None:
    opened(browser, server, temperature=0)
    browser.devtools("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    ask(browser, TALK[0][0])
    ask(browser, TALK[0][2])
    copied = "return navigator.clipboard.readText()"
    browser.click("figure button")
    browser.wait(lambda: browser.text("figure button") == "Copied")
    assert browser.run(copied) == CODE.partition("```python\n")[2].partition("\n```")[0]
    browser.click(".turn:last-child .foot button:nth-child(1)")
    browser.wait(lambda: browser.run(copied) == CODE)
    browser.click(".turn:last-child .foot button:nth-child(2)")
    assert last(browser) == CODE
    browser.click(".turn:last-child .foot button:nth-child(3)")
    assert browser.run("return [turns.length, $('input').value]") == [1, TALK[0][2]]
    assert last(browser) == ATTENTION
    browser.click("#new")
    assert browser.run("return turns.length") == 0
    assert browser.is_seen("#welcome")
    assert browser.text("#log") == ""


def test_keys(browser: Browser, server: Server) -> None:
    """Enter sends, but not with Shift, nor when it ends what an input method composes."""
    opened(browser, server, max_tokens=3)
    browser.write("#input", f"a{SHIFT}{ENTER}{NO_MORE}b")
    composing = (
        "$('input').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true,"
        " cancelable: true, ...arguments[0]}))"
    )
    browser.run(composing, {"isComposing": True})
    browser.run(composing, {"keyCode": 229})
    assert browser.run("return [turns.length, $('input').value]") == [0, "a\nb"]
    browser.write("#input", ENTER)
    last(browser)
    assert browser.run("return [turns[0].asked, $('input').value]") == ["a\nb", ""]
    browser.write("#input", f"   {ENTER}")
    assert browser.run("return turns.length") == 1


def test_a_text_that_goes_on(browser: Browser, locked: Server) -> None:
    """A model without a chat template continues texts; the key is asked for, and forgotten."""
    browser.open(address_of(locked))
    browser.wait(lambda: browser.is_seen("#locked"))
    assert not browser.is_seen("#welcome")
    assert not browser.is_seen("#input")
    browser.write("#key", f"{KEY}x{ENTER}")
    browser.wait(lambda: browser.text("#error").startswith("The server does not take this key."))
    browser.write("#key", f"{KEY}{ENTER}")
    browser.wait(lambda: browser.is_seen("#welcome"))
    assert NAME in browser.text("#about")
    assert browser.text("#model") == NAME
    kept = "return [JSON.stringify(sessionStorage), JSON.stringify(localStorage), location.href]"
    found = browser.run(kept)
    assert [KEY in each for each in found] == [True, False, False]
    browser.click("#settings")
    assert not browser.is_seen("#system")
    for name, value in {"temperature": 0, "max_tokens": 20}.items():
        browser.fill(f"#{name}", f"{value}")
    browser.click("#close")
    answer = ask(browser, "def")
    assert answer == continued(locked, "def")
    whole = answer + continued(locked, f"def{answer}")
    browser.click(".foot button:nth-child(2)")
    assert last(browser) == whole
    assert "".join(browser.text(".passage").split()) == "".join(f"def{whole}".split())
    browser.click(".foot button:nth-child(4)")
    assert browser.run("return $('input').value") == "def"
    assert browser.text("#hint") == "Enter sends the changed text, Esc leaves it as it was"
    browser.write("#input", ESCAPE)
    assert browser.run("return turns[0].answer") == whole
    browser.click("#settings")
    browser.click("#forget")
    assert browser.is_seen("#locked")
    assert KEY not in browser.run(kept)[0]
    refused = f"{address_of(locked)}v1/models - Failed to load resource"
    assert all(line.startswith(refused) for line in browser.logged())


def test_the_stop_button_frees_the_row(browser: Browser, locked: Server) -> None:
    browser.open(address_of(locked))
    browser.wait(lambda: browser.is_seen("#locked"))
    browser.write("#key", f"{KEY}{ENTER}")
    browser.wait(lambda: browser.is_seen("#welcome"))
    browser.click("#settings")
    browser.fill("#temperature", "0")  # at which it never ends
    browser.fill("#max_tokens", "90000")
    browser.click("#close")
    ways: tuple[Callable[[], Any], ...] = (
        lambda: browser.click("#stop"),
        lambda: browser.write("#input", ESCAPE),
        lambda: browser.click("#new"),
    )
    for stop in ways:
        browser.write("#input", f"def{ENTER}")
        browser.wait(lambda: browser.run("return turns[turns.length - 1].answer.length > 20"))
        assert locked.gauge("flame_rows") == 1
        assert not browser.is_seen("#send")
        stop()
        locked.wait_for("flame_rows", 0)
        browser.wait(lambda: browser.is_seen("#send"))
    assert browser.run("return turns.length") == 0
    browser.write("#input", f"def{ENTER}")
    browser.wait(lambda: browser.run("return turns[turns.length - 1].answer.length > 20"))
    browser.click("#stop")
    browser.wait(lambda: "stopped" in browser.text(".foot"))
    browser.write("#input", f"def{ENTER}")
    browser.wait(lambda: locked.gauge("flame_rows") == 1)
    browser.open("about:blank")  # whoever closes the page, too
    locked.wait_for("flame_rows", 0)


def test_nothing_of_a_model_is_run(browser: Browser, server: Server) -> None:
    """Nor of the person; what looks like HTML is shown as it was written."""
    opened(browser, server, temperature=0, system=HOSTILE.replace("\n", " "))
    assert len(ask(browser, HOSTILE.replace("\n", " "))) > 0
    opened(browser, server, system="")
    assert ask(browser, "Be hostile.") == HOSTILE
    found = browser.run(
        "return [...$('log').querySelectorAll('*')].map(each => each.tagName.toLowerCase())"
    )
    allowed = {"a", "br", "button", "code", "div", "figcaption", "figure", "h2", "li", "p"}
    allowed |= {"pre", "section", "span", "ul"}
    assert set(found) <= allowed
    names = browser.run(
        "return [...$('log').querySelectorAll('*')].flatMap(each => each.getAttributeNames())"
    )
    allowed = {"aria-live", "class", "dir", "href", "rel", "tabindex", "target", "title", "type"}
    assert set(names) <= allowed
    links = browser.run(
        "return [...$('log').querySelectorAll('a')].map(each => [each.href, each.rel])"
    )
    assert [link for link, _ in links] == [
        "http://127.0.0.1:9/seen.png",
        "http://127.0.0.1:9/",
        "https://example.org/a?b=1&c=%22d%22",
    ]
    assert {rel for _, rel in links} == {"noopener noreferrer nofollow"}
    shown = browser.text(".answer")
    for part in (
        '<script>document.title = "run"</script><img src=x onerror="document.title=\'run\'">',
        "<b onclick=alert(1)>Title</b>",
        "[press](javascript:document.title='run') and [here](data:text/html,<script>1</script>)",
        "<svg/onload=document.title='run'>",
        '</code></pre><script>document.title = "run"</script>',
    ):
        assert part in shown
    assert browser.run("return document.title") == "gla-demo"
    assert quiet(browser, server)
    # Even if the page made such a mistake, the browser would not follow it
    with pytest.raises(AssertionError, match="TrustedHTML"):
        browser.run("$('log').innerHTML = '<img src=x>'")
    assert any("TrustedHTML" in line for line in browser.logged())


MARKDOWN = {
    "a *b* **c** ***d*** ~~e~~ `f *g*`": "<p>a <em>b</em> <strong>c</strong>"
    " <strong><em>d</em></strong> <del>e</del> <code>f *g*</code></p>",
    "2 * 3 * 4, snake_case_name, __init__ and \\*no\\*": "<p>2 * 3 * 4, snake_case_name,"
    " <strong>init</strong> and *no*</p>",
    "*a **b** c*": "<p><em>a <strong>b</strong> c</em></p>",
    "**a": "<p>**a</p>",
    "`a": "<p>`a</p>",
    "``a`b``": "<p><code>a`b</code></p>",
    "# A #\n## B\n####### C": "<h2>A</h2><h3>B</h3><p>####### C</p>",
    "a\nb\n\nc": "<p>a<br>b</p><p>c</p>",
    "- a\n- b\n  - c\n    1. d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p>"
    "<ol><li><p>d</p></li></ol></li></ul></li><li><p>e</p></li></ul>",
    "a\n- b\n\n  c\n\nd": "<p>a</p><ul><li><p>b</p><p>c</p></li></ul><p>d</p>",
    "3. a\n4) b": '<ol start="3"><li><p>a</p></li></ol><ol start="4"><li><p>b</p></li></ol>',
    "1. a\n\n   ```\n   x\n     y\n   ```": "<ol><li><p>a</p>CODE[x\n  y]</li></ol>",
    "- [ ] a\n- [x] b": "<ul><li><p>☐ a</p></li><li><p>☑ b</p></li></ul>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "---\n***": "<hr><hr>",
    "```\na\n\n# b\n~~~\n```\nc": "CODE[a\n\n# b\n~~~]<p>c</p>",
    "````\n```\n````": "CODE[```]",
    "```a`b\nc": "<p>```a`b<br>c</p>",
    "```\nnot whole": "CODE[not whole]",
    "|a|b|\n|:-:|-:|\n|1\\|2|**3**|\n|4|\nc": '<div class="scrolls"><table><thead><tr>'
    '<th class="center">a</th><th class="end">b</th></tr></thead><tbody><tr>'
    '<td class="center">1|2</td><td class="end"><strong>3</strong></td></tr><tr>'
    '<td class="center">4</td><td class="end"></td></tr></tbody></table></div><p>c</p>',
    "a | b\nno table": "<p>a | b<br>no table</p>",
    "http://a.org/b). <https://c.org>": "<p>LINK[http://a.org/b|http://a.org/b]). "
    "LINK[https://c.org/|https://c.org]</p>",
    '[a `b`](https://c.org/d_(e) "f") xhttp://no': "<p>LINK[https://c.org/d_(e)|a"
    " <code>b</code>] xhttp://no</p>",
    "[a](/b) [c](//d.org) [e](ftp://f.org) [g](JavaScript:h) [i]( j )": "<p>[a](/b) [c](//d.org)"
    " [e](ftp://f.org) [g](JavaScript:h) [i]( j )</p>",
    "![a](https://b.org/c.png)": "<p>LINK[https://b.org/c.png|a]</p>",
    "&lt;b&gt; <!-- c -->": "<p>&amp;lt;b&amp;gt; &lt;!-- c --&gt;</p>",
}
LINKED = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer nofollow">{1}</a>'
CODED = (
    '<figure><figcaption><span></span><button class="small" type="button">Copy code</button>'
    '</figcaption><pre tabindex="0"><code>{}</code></pre></figure>'
)


def expected(html: str) -> str:
    for name, form in (("CODE[", CODED), ("LINK[", LINKED)):
        while name in html:
            before, _, rest = html.partition(name)
            content, _, after = rest.partition("]")
            html = before + form.format(*content.split("|")) + after
    return html


def test_markdown(browser: Browser, server: Server) -> None:
    """Also as it is shown while it comes, letter by letter."""
    opened(browser, server)
    shown = "const node = document.createElement('div'); show(node, arguments[0]);"
    piecewise = (
        "const node = document.createElement('div');"
        "for (let end = 0; end <= arguments[0].length; end += 1)"
        " show(node, arguments[0].slice(0, end));"
    )
    for text, html in MARKDOWN.items():
        assert browser.run(f"{shown} return node.innerHTML", text) == expected(html), text
    for text in (*MARKDOWN, ATTENTION, CODE, CHINESE, HOSTILE):
        whole = browser.run(f"{shown} return node.innerHTML", text)
        assert browser.run(f"{piecewise} return node.innerHTML", text) == whole, text
    kept = "const before = node.firstChild; show(node, arguments[0] + '\\n\\nmore');"
    assert browser.run(f"{shown} {kept} return before === node.firstChild", "a\n\nb")


def test_no_text_takes_long_to_show(browser: Browser, server: Server) -> None:
    opened(browser, server)
    timed = (
        "const before = performance.now(); show(document.createElement('div'), arguments[0]);"
        "return performance.now() - before"
    )
    size = 40_000  # characters
    for part in (
        *("*a ", "**a ", "_a ", "~~a ", "*a* ", "**", "***", "* ", "[", "![", "[a](", "[a](b", "<"),
        *(
            "`",
            "` ",
            "`` ` ",
            "> ",
            "- ",
            "1. ",
            "#",
            "|",
            "|-",
            "\n|-|",
            "http://",
            "<http:",
            "\\",
        ),
        *("\n- ", "\n> ", "\n```", "\n  ", "a\n", "\n\n", " ", "*_~~`[", "a" * 50 + " ", "(", "~"),
        *("- - ", "[a](http://b", "[[a]]", "- ```\n", "> - ", "**a*", "中*", "\n|a|b", "\t- \n"),
    ):
        text = (part * size)[:size]
        assert browser.run(timed, text) < 3000, part
        assert browser.run(timed, f"a\n\n {text} b") < 3000, part
    deep = "\n".join("  " * depth + "- a" for depth in range(300))
    assert browser.run(timed, deep) < 3000


def test_both_languages(browser: Browser, server: Server) -> None:
    browser.speak("zh-CN")
    opened(browser, server)
    assert browser.run("return document.documentElement.lang") == "zh-CN"
    assert browser.text("#welcome h2") == "想问点什么？"
    browser.click("#settings")
    assert "系统提示词" in browser.text("#panel")
    browser.fill("#temperature", "0")
    browser.click("#close")
    assert ask(browser, TALK[1][0]) == CHINESE
    assert browser.text(".answer strong") == "固定大小"
    assert browser.text(".foot button:nth-child(2)") == "重新回答"
    browser.click("#language")
    assert browser.run("return document.documentElement.lang") == "en"
    assert browser.text(".foot button:nth-child(2)") == "Answer again"
    browser.open(address_of(server))  # it is kept
    browser.wait(lambda: browser.text("#welcome h2") == "What would you like to ask?")
    names = browser.run("return Object.values(TEXTS).map(texts => Object.keys(texts).sort())")
    assert names[0] == names[1]
    assert len(names[0]) > 40
    used = browser.run(
        "return [...document.querySelectorAll('[data-text], [data-label], [data-hint]')]"
        ".flatMap(each => Object.values(each.dataset))"
    )
    assert set(used) <= set(names[0])
    unnamed = browser.run(
        "return [...document.querySelectorAll('button, textarea, input:not([type=range])')]"
        ".filter(each => !each.textContent.trim() && !each.ariaLabel"
        " && !(each.labels && each.labels.length)).map(each => each.id)"
    )
    assert unnamed == []
    assert quiet(browser, server)


def test_a_phone(browser: Browser, server: Server) -> None:
    """Nothing is wider than its screen but code and tables, which scroll by themselves."""
    browser.resize(375, 700, is_phone=True)
    opened(browser, server, temperature=0)
    fits = "return document.scrollingElement.scrollWidth <= innerWidth"
    assert browser.run(fits)
    browser.write("#input", f"{TALK[0][0]}{ENTER}")  # a line feed on a screen's keyboard
    assert browser.run("return turns.length") == 0
    browser.fill("#input", TALK[0][0])
    browser.click("#send")
    assert last(browser) == ATTENTION
    browser.fill("#input", TALK[0][2])
    browser.click("#send")
    assert last(browser) == CODE
    browser.fill("#input", "x" * 300)
    browser.click("#send")
    last(browser)
    assert browser.run(fits)
    assert browser.run("return isAtEnd()")
    assert browser.run("return $('scroller').scrollWidth <= $('scroller').clientWidth")
    assert browser.run("return document.scrollingElement.scrollHeight <= innerHeight")
    assert browser.run("return getComputedStyle($('input')).fontSize") == "16px"
    for button in ("#language", "#new", "#settings", "#send"):
        right, bottom, width = browser.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [box.right, box.bottom, box.width]",
            button,
        )
        assert (right <= 375, bottom <= 700, width >= 40) == (True, True, True), button
    browser.click("#settings")
    assert browser.run(fits)
    assert browser.run("return $('panel').scrollWidth <= 375")
    browser.resize(320, 480, is_phone=True)
    assert browser.run(fits)


def test_an_error_of_the_server(browser: Browser, server: Server) -> None:
    """It is shown in a line, and the question is back where it was written."""
    opened(browser, server, max_tokens=601)
    assert ask(browser, "hello") is None
    assert browser.text("#error").startswith("max_tokens: must be a whole number in [1, 600]")
    assert browser.run("return $('input').value") == "hello"
    browser.click("#dismiss")
    assert not browser.is_seen("#error")
    browser.click("#settings")
    browser.fill("#max_tokens", "5")
    browser.click("#close")
    assert browser.run("return $('most').textContent") == "This server writes 600 at most."
    browser.click("#send")
    assert len(last(browser)) > 0
    refused = f"{address_of(server)}v1/chat/completions - Failed to load resource"
    assert all(line.startswith(refused) for line in browser.logged())


def test_an_answer_is_kept_until_another_comes(browser: Browser, server: Server) -> None:
    """Not one more request that fails, or is stopped before its first token, takes it."""
    opened(browser, server, temperature=0)
    assert ask(browser, TALK[0][0]) == ATTENTION
    foot = browser.text(".foot")
    browser.run("$('max_tokens').value = 601")
    browser.click(".foot button:nth-child(2)")
    assert last(browser) == ATTENTION
    assert browser.text("#error").startswith("max_tokens: must be")
    assert (browser.text(".foot"), browser.run("return turns.length")) == (foot, 1)
    assert browser.text(".answer").startswith("Gated linear attention reads")
    browser.run(
        "$('max_tokens').value = ''; document.querySelectorAll('.foot button')[1].click();"
        "running.abort()"
    )
    assert last(browser) == ATTENTION
    assert browser.text(".foot") == foot
    browser.click(".foot button:nth-child(2)")
    assert last(browser) == ATTENTION
    assert not browser.is_seen("#error")


def test_neither_a_question_nor_a_draft_is_lost(browser: Browser, server: Server) -> None:
    """If the request fails while the next one is written; what has no answer is not sent again."""
    opened(browser, server, temperature=0, max_tokens=601)
    browser.run(
        "$('input').value = arguments[0]; send(); $('input').value = arguments[1]",
        *("Be odd.", TALK[0][0]),
    )
    assert last(browser) == ""
    assert browser.run("return [turns[0].asked, $('input').value]") == ["Be odd.", TALK[0][0]]
    assert browser.run("return document.querySelectorAll('.foot button').length") == 3
    browser.run("$('max_tokens').value = ''; send()")
    assert last(browser) == ATTENTION  # as if it were the first


def test_a_draft_stays_while_a_question_is_changed(browser: Browser, server: Server) -> None:
    """It comes back when the question is sent, or left with Esc, which brings the answer back."""
    opened(browser, server, temperature=0)
    first, second = TALK[0][0], TALK[0][2]
    ask(browser, first)
    ask(browser, second)
    edit, state = ".turn:last-child .foot button:nth-child(3)", "return [turns.length, input.value]"
    hint = browser.text("#hint")
    browser.write("#input", "a draft")
    browser.click(edit)
    assert browser.run(state) == [1, second]
    assert browser.text("#hint").startswith("Enter sends the changed question")
    browser.click(edit)  # the question before, too
    assert browser.run(state) == [0, first]
    for left in ([1, second], [2, "a draft"]):
        browser.write("#input", ESCAPE)
        assert browser.run(state) == left
    assert browser.text("#hint") == hint
    assert last(browser) == CODE
    assert browser.run("return document.querySelectorAll('.foot button').length") == 1 + 3
    browser.write("#input", ESCAPE)  # there is nothing more to leave
    assert browser.run(state) == [2, "a draft"]
    browser.click(edit)
    browser.click(edit)
    browser.fill("#input", TALK[1][0])
    browser.write("#input", ENTER)
    assert last(browser) == TALK[1][1]
    assert browser.run(state) == [1, second]
    browser.write("#input", ESCAPE)  # its answer was to another conversation
    assert browser.run(state) == [1, second]
    browser.write("#input", ENTER)
    last(browser)
    assert browser.run(state) == [2, "a draft"]


def test_a_server_with_another_model(browser: Browser, server: Server) -> None:
    """It says so once, and is asked for its own model then."""
    opened(browser, server, temperature=0)
    browser.run("card = { ...card, id: 'earlier' }")
    assert ask(browser, TALK[0][0]) is None
    assert "earlier" in browser.text("#error")
    assert browser.text("#model") == "gla-demo"
    browser.click("#send")
    assert last(browser) == ATTENTION


class Proxy(http.server.BaseHTTPRequestHandler):
    """What is below /models/tiny/ is asked of a server, as a proxy with TLS would."""

    server_address: tuple[str, int]

    def do_GET(self) -> None:
        assert self.path.startswith("/models/tiny/")
        connection = http.client.HTTPConnection(*self.server_address, timeout=60)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        connection.request(self.command, self.path.removeprefix("/models/tiny"), body, headers)
        response = connection.getresponse()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.end_headers()
        while part := response.read1(1 << 16):
            self.wfile.write(part)
        connection.close()

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


class Odd(Proxy):
    """A proxy that answers what is posted by itself, as its class says."""

    kind, body = "", ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body.encode())


@contextmanager
def proxied(server: Server, kind: type[Proxy] = Proxy) -> Iterator[str]:
    handler = type("Handler", (kind,), {"server_address": server.address})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}/models/tiny/"
        finally:
            proxy.shutdown()


def test_below_a_path_of_a_proxy(browser: Browser, server: Server) -> None:
    with proxied(server) as address:
        browser.open(address)
        browser.wait(lambda: browser.is_seen("#welcome"))
        browser.click("#settings")
        browser.fill("#temperature", "0")
        browser.click("#close")
        assert ask(browser, TALK[0][0]) == ATTENTION
        assert browser.logged() == []
        browser.open("about:blank")


STREAM = "text/event-stream"
ODD = "What came is no answer of this server. "
FILTERED = '{"choices": [{"delta": {}, "finish_reason": "content_filter"}]}'


def test_what_is_no_answer_is_told(
    browser: Browser, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy's page to log in, JSON that is damaged, and a text that is blocked from its start."""
    with proxied(server, Odd) as address:
        browser.open(address)
        browser.wait(lambda: browser.is_seen("#welcome"))
        for kind, body, told in (
            ("text/html", "<p>Log in</p>", ODD),
            ("application/json", "{}", ODD),
            (STREAM, 'data: {"choices"\n\n', ODD),
            (STREAM, "data: null\n\n", ODD),
            (STREAM, f"data: {FILTERED}\n\ndata: [DONE]\n\n", "There is no answer: it would h"),
            (STREAM, "", "The connection ended before"),
        ):
            monkeypatch.setattr(Odd, "kind", kind)
            monkeypatch.setattr(Odd, "body", body)
            browser.run("$('input').value = ''")
            assert ask(browser, "hello") is None
            assert browser.text("#error").startswith(told), body
            assert browser.run("return $('input').value") == "hello"
        monkeypatch.setattr(Odd, "do_GET", Odd.do_POST)
        for body in ("<p>Log in</p>", "{}", '{"data": []}', "null"):
            monkeypatch.setattr(Odd, "body", body)
            browser.run("complain(''); meet()")
            browser.wait(lambda: browser.text("#error").startswith(ODD))
        browser.open("about:blank")


def test_a_server_that_ends(browser: Browser, server: Server, tmp_path: Path) -> None:
    with proxied(server) as address:
        browser.open(address)
        browser.wait(lambda: browser.is_seen("#welcome"))
    assert ask(browser, "hello") is None
    assert browser.text("#error").startswith("The server cannot be reached.")
    assert browser.run("return $('input').value") == "hello"


def test_the_picture_in_the_docs(browser: Browser, server: Server, tmp_path: Path) -> None:
    """FLAME_COMPOSER_PICTURES=1 pytest tests/serve/test_page.py -k picture draws it anew."""
    sizes, taken = (1040, 376), []
    browser.resize(sizes[0], 800, scale=1.5)
    browser.prefer("light")
    from_api(server, "hello")  # the first answer of a server is slower
    opened(browser, server, temperature=0)
    assert ask(browser, TALK[0][0]) == ATTENTION
    assert ask(browser, TALK[0][2]) == CODE
    browser.click("#input")
    grounds = []
    for number, scheme in enumerate(("light", "dark")):
        browser.resize(sizes[number], 800, is_phone=number > 0, scale=1.5)
        browser.prefer(scheme)
        browser.run("toEnd(); document.activeElement.blur()")
        browser.picture(tmp_path / f"{scheme}.png")
        with Image.open(tmp_path / f"{scheme}.png") as picture:
            taken.append(picture.convert("RGB"))
        grounds.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
    assert [picture.size for picture in taken] == [(width * 3 // 2, 1200) for width in sizes]
    assert grounds == ["rgb(250, 249, 247)", "rgb(23, 22, 20)"]
    assert [picture.getpixel((5, 600)) for picture in taken] == [(250, 249, 247), (23, 22, 20)]
    whole = Image.new("RGB", (sum(picture.width for picture in taken) + 36, 1200), "white")
    whole.paste(taken[0], (0, 0))
    whole.paste(taken[1], (taken[0].width + 36, 0))
    if os.environ.get("FLAME_COMPOSER_PICTURES"):
        whole.save(PICTURE, optimize=True)
    with Image.open(PICTURE) as kept:
        assert kept.size == whole.size
