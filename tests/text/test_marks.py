"""What templates do to the marks around answers, and what they may not take from chance."""

from __future__ import annotations

import pytest

from flame_composer.text.chat import ChatTemplate, Message, TemplateRefuses

TURNS = (
    Message("user", "One?"),
    Message("assistant", "Two."),
    Message("user", "Three?"),
    Message("assistant", "Four."),
)
MARKED = "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
SET = f"{{% set x %}}{MARKED}{{% endset %}}"


def of_answers(body: str) -> ChatTemplate:
    return ChatTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        f"{body}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}",
        {"eos_token": "</s>"},
    )


@pytest.mark.parametrize(
    "body",
    [
        f"{{% if loop.last %}}{{% generation %}}!{MARKED}{{% endgeneration %}}{{% endif %}}",
        f"{SET}{{{{ x[:-3] }}}}",
        f"{SET}{{{{ x[3:] if loop.last else x }}}}",
        f"{SET}{{{{ x + x if loop.last else '' }}}}",
        f"{{% filter upper %}}{MARKED}{{% endfilter %}}",
        f"{SET}{{{{ x|reverse }}}}",
    ],
    ids=["nested", "end cut", "begin cut", "twice", "upper case", "reversed"],
)
def test_a_damaged_mark_is_refused(body: str) -> None:
    """The rest of one would be a text of chance, which the model would be trained on."""
    with pytest.raises(TemplateRefuses, match="is changed, moved, left out, written twice or"):
        of_answers(body).render(TURNS)


def test_marks_that_come_out_whole() -> None:
    text, spans = of_answers(f"{SET}a: {{{{ x|trim }}}}{{{{ x|length }}}}").render(TURNS)
    assert [text[slice(*span)] for span in spans] == ["Two.</s>", "Four.</s>"]
    assert text.startswith("One?a: Two.</s>")


def test_no_text_depends_on_chance() -> None:
    bodies = f"{SET}{{{{ x }}}}{{{{ x[1:9] }}}}"
    assert of_answers(bodies).render(TURNS) == of_answers(bodies).render(TURNS)
    for body in ("{{ [1, 2]|random }}", "{{ lipsum() }}"):
        with pytest.raises(TemplateRefuses):
            ChatTemplate(body, {}).render(TURNS)


@pytest.mark.parametrize("method", ["ceil", "floor", "common"])
def test_rounding_ends(method: str) -> None:
    """It would take hours otherwise, in which no signal is handled."""
    for digits in (10**10, -(10**10)):
        with pytest.raises(TemplateRefuses, match="300 digits at most"):
            ChatTemplate(f"{{{{ 1.5|round({digits}, '{method}') }}}}", {}).render(TURNS)
    assert ChatTemplate(f"{{{{ 1.25|round(2, '{method}') }}}}", {}).render(TURNS).text == "1.25"


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(TemplateRefuses, match="half of a surrogate pair"):
        ChatTemplate("{{ '\\ud800' }}", {}).render(TURNS)
