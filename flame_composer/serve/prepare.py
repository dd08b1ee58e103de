"""From a request to the jobs of the engine: tokens, where answers end, and what is refused."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.serve.engine import Event, Job, Row
from flame_composer.serve.protocol import BadRequest, Request
from flame_composer.serve.rendering import Renderer
from flame_composer.serve.sampling import Sampler
from flame_composer.serve.states import Abilities
from flame_composer.serve.writing import Answer, BlockedTexts
from flame_composer.text.chat import Refusal, load_template
from flame_composer.text.ends import encode_prompt
from flame_composer.text.surfaces import surfaces_of
from flame_composer.text.tokenizer import bare, explained_failure
from flame_composer.use.chat import require_plain, special_ids
from flame_composer.use.generate import ends_of_answers, row_length

MOST_SCORES = 2_000_000  # log probabilities in the answer to a request


class Preparation:
    """What is known of the model when a request comes."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        abilities: Abilities,
        *,
        max_prompt_tokens: int,
        blocked: BlockedTexts,
    ):
        """Prepare for requests to `model`; raise ConfigError for a template that is no template."""
        self.device, self.tokenizer, self.blocked = model.device, tokenizer, blocked
        self.max_prompt_tokens = max_prompt_tokens
        # A tokenizer's file may set padding or truncation, which the first call takes back. Later
        # calls change nothing, and so may come from several threads.
        tokenizer("x", add_special_tokens=False, verbose=False)
        # A state that grows may also have a last position. A state of a fixed size has none.
        self.context_length = None if abilities.joined else row_length(model)
        self.ends_of_answers = ends_of_answers(model, tokenizer)
        self.ends_of_turns = frozenset(self.ends_of_answers)
        eos = tokenizer.eos_token_id
        self.ends_of_texts = [] if eos is None else [eos]
        self.template = None
        if tokenizer.chat_template is not None:
            self.template = load_template("tokenizer", tokenizer)
            self.special = special_ids(tokenizer, self.template.source, self.ends_of_answers)
            self.renderer = Renderer(self.template)
        self.surfaces = surfaces_of(bare(tokenizer))
        self.longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    def close(self) -> None:
        """End the process that renders conversations, if there is one."""
        if self.template is not None:
            self.renderer.close()

    def render(self, request: Request) -> str:
        """Return the conversation of a request as text, up to where the next answer begins."""
        if self.template is None:
            raise BadRequest(
                "messages: this model has no chat template; use /v1/completions", "messages"
            )
        self._require_short(sum(len(message.content) for message in request.messages))
        try:
            for message in request.messages:
                require_plain(self.tokenizer, self.special, message.content)
            return self.renderer.render(request.messages)
        except (Refusal, ConfigError, DataError) as error:
            raise BadRequest(
                f"messages: {one_line(error)}",  # a template's own words, and the client's in them
                "messages",
                logged="messages: the chat template or the tokenizer does not take them",
            ) from None

    def jobs(
        self,
        request: Request,
        rendered: str | None,
        deliver: Callable[[Event], None],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> list[Job]:
        """Return a job for each prompt of a request, or one for its `rendered` conversation.

        Answers are numbered through: those to the first prompt come first. The first answer to
        each prompt is drawn with the request's seed, the next with the one after it, and so on.
        Without a seed, the answers to each prompt are drawn with one of their own.
        Stop early, with fewer jobs or rows, once the request `is_wanted` no more.
        """
        prompts = request.prompts if rendered is None else [rendered]
        jobs: list[Job] = []
        num_scores = 0
        for number, prompt in enumerate(prompts):
            ids = self._encode(prompt, is_whole=rendered is not None)
            job = Job(
                ids,
                self._max_tokens(request, len(ids)),
                self._ends(request),
                request.num_top,
                request.echo and request.num_top is not None,
                deliver,
                turns=[place for place, id in enumerate(ids, 1) if id in self.ends_of_turns],
                owner=request.cache_key,
            )
            num_scores += self._num_scores(request, len(ids))
            if num_scores > MOST_SCORES:
                raise BadRequest(
                    f"logprobs: the answers could have more than {MOST_SCORES:,} log probabilities;"
                    " ask for less, or in several requests",
                    "logprobs",
                )
            distinct = dict.fromkeys(ids)
            seed = secrets.randbits(62) if request.seed is None else request.seed
            for copy in range(request.n):
                if not is_wanted():
                    return jobs
                own = (seed + copy + 2**63) % 2**64 - 2**63
                sampler = Sampler(request.settings, distinct, own, self.device)
                answer = Answer(self.tokenizer, ids, request.stop, self.blocked)
                job.rows.append(Row(job, number * request.n + copy, sampler, answer))
            if request.echo:
                job.echo = prompt if isinstance(prompt, str) else answer.pieces.prompt
            jobs.append(job)
        return jobs

    def _encode(self, prompt: str | list[int], *, is_whole: bool) -> list[int]:
        """Return a prompt's tokens; `is_whole` if its template already wrote how it begins."""
        if isinstance(prompt, list):
            self._require_length(len(prompt))
            self._require_unblocked(self.tokenizer.decode(prompt))
            return prompt
        self._require_short(len(prompt))
        self._require_unblocked(prompt)
        try:
            with explained_failure():
                ids: list[int] = (
                    self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
                    if is_whole
                    else encode_prompt(self.tokenizer, prompt)
                )
        except (ConfigError, DataError) as error:
            raise BadRequest(
                one_line(error), "prompt", logged="prompt: the tokenizer does not take it"
            ) from None
        if not ids:
            raise BadRequest("messages: the chat template makes no text of them", "messages")
        self._require_length(len(ids))
        return ids

    @property
    def _longest(self) -> int:
        """The largest number of tokens of a prompt."""
        if self.context_length is None:
            return self.max_prompt_tokens
        return min(self.max_prompt_tokens, self.context_length - 1)

    def _require_length(self, length: int) -> None:
        if length > self._longest:
            raise BadRequest(
                f"the prompt has {length:,} tokens, and this server takes {self._longest:,}",
                code="context_length_exceeded",
            )

    def _require_short(self, characters: int) -> None:
        """Raise BadRequest for a text that is too long whatever its tokens are.

        To find these takes seconds for a text of megabytes.
        """
        if characters > self._longest * self.longest_token:
            raise BadRequest(
                f"the prompt has {characters:,} characters, which are more than the"
                f" {self._longest:,} tokens that this server takes",
                code="context_length_exceeded",
            )

    def _require_unblocked(self, text: str) -> None:
        if self.blocked.find(text) is not None:
            raise BadRequest("the prompt holds a text that is blocked here", code="content_filter")

    def _max_tokens(self, request: Request, length: int) -> int:
        if self.context_length is None:
            return request.max_tokens
        return min(request.max_tokens, self.context_length - length)

    def _num_scores(self, request: Request, length: int) -> int:
        """Return how many log probabilities the answers to a prompt may have."""
        if request.num_top is None:
            return 0
        shown = self._max_tokens(request, length) + (length if request.echo else 0)
        return shown * (1 + request.num_top) * request.n

    def _ends(self, request: Request) -> frozenset[int]:
        """Return the tokens that end an answer, among them stop texts that are special tokens.

        Special tokens make no text in which they could be found.
        """
        ends = self.ends_of_answers if request.is_chat else self.ends_of_texts
        special = self.tokenizer.added_tokens_decoder.items()
        named = [id for id, token in special if token.special and token.content in request.stop]
        return frozenset({*ends, *named})
