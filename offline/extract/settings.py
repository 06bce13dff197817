"""The settings of an extraction; the trust boundary of the pipeline."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from vllm_steer.offline.extract.answer_states import AnswerTokens
from vllm_steer.offline.extract.methods import METHODS
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.offline.models.prompts import PrefixRole


class ExtractionSettings(BaseModel):
    """All settings that determine what is extracted from given prompts.

    Attributes:
        method: A key of ``vllm_steer.offline.extract.methods.METHODS``; it fixes some of the other settings and has
            defaults of its own for more.
        learn_from: ``prompts`` for the tokens that end the prompts, or ``answers`` for the tokens of the
            prefixed model's own answers to everyday questions; see ``vllm_steer.offline.extract.answer_states``.
        estimator: How a direction is learned from labelled hidden states; ``trained`` makes the answers
            likely instead, see ``vllm_steer.offline.extract.training``.
        labels: ``soft`` for attention to the prefix (Eq. 4), ``hard`` for 1 and 0.
        token: ``attention`` to choose each block's token by attention (Eq. 3), or a negative index
            for the same token everywhere.
        contrast: Prefixes of the negative statements: ``nothing``, or in turn those of all ``concepts`` that
            are extracted together, so that a direction holds what distinguishes its concept from the others
            and not what all prefixes share; labels must be hard.
        held_out: Whether a fifth of the prompts is held out for validation; only the differences of means can
            do without.
        unit: Whether directions have length 1; else a difference of means keeps its length.
        answer_tokens: How an answer's tokens become one state: their ``mean``, the mean ``weighted`` by
            attention to the prefix, the one that pays it most ``attention``, or the mean of the states that
            they are predicted from, weighted by how ``telling`` each is: how much likelier the prefix makes it.
        answer_length: Most tokens of an answer.
        questions: Number of questions, the first ones, whose answers are learned from.
        answer_share: Share of the answers that is used: those that the prefix makes most likely beside
            the plain prompt, since many answers have nothing of it.
        stopping_questions: Further questions on which training stops.
        prefix_role: Where the prefix stands: before the question, or in a ``system`` message.
        chat_template: Template of the prompts, in Jinja, or ``plain`` for none; None for the tokenizer's own.
        chat_template_kwargs: Arguments of the template, such as ``enable_thinking``.
        train_steps: Most steps of training.
        train_answers: Answers in a step.
        train_rate: Length of a step; see ``vllm_steer.offline.extract.training``.
        train_penalty: Weight of the vectors' squared lengths beside the loss.
        train_warm: Factor of the difference of means that training starts from.
        train_checkpointing: Whether activations are recomputed in the backward pass, to save memory.
        train_together: Concepts that are trained in the same forward passes.
        token_statistic: Whether a token's attention is its ``max`` over prompts, as in Eq. 3, or its
            ``mean``.
        candidate_tokens: Number of last tokens to choose among; None for those of the chat
            template's generation prompt and the one before.
        layers: Blocks to learn directions for, or to choose them among; None for all but block 0.
        block_choice: ``all``; ``top_k`` or ``bottom_k`` of the enrichment score; or all that reach
            a ``threshold`` of it.
        block_count: k.
        block_threshold: The threshold, above 0, where every block would reach it, and at most 1.
        permutations: Random subsets of the enrichment test; 0 for no test.
        positive_count: Number of positive statements to use, the first ones; None for all.
        negative_count: Likewise for the negative statements.
        paired: Whether every statement is asked with and without the prefix, so that the two kinds
            of prompts differ in nothing else.
        compat: Whether to follow the authors' code where the default differs from it:
            tokens are chosen on every other statement of both sides, not on the prompts learned
            from; the last block's state is taken after the final norm, though steering adds before
            it; ridge and logistic regression see raw rows without intercept, not rows of unit norm
            that are centred; statements keep the line breaks of their files.
        batch_size: Prompts per forward pass.
        attention: ``auto`` for the fastest way that gives the numbers of eager attention on the
            model at hand, or ``eager``.
        dtype: Dtype that the model runs in; ``auto`` for bfloat16 where the device computes in it, else
            float32.
        seed: Seed of all randomness.
        rfm_ridge: Ridge of the recursive feature machine; the authors' is 1e-3.
        rfm_center_gradients: Whether its gradients are centred, as the authors do.
        rfm_iterations: Iterations of which the best is taken.
        rfm_bandwidths: Bandwidths of its kernel of which the best is taken.
        rfm_solver: ``xrfm``, the exact ``gram`` form, or ``auto`` for the faster of the two.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["attention_guided", "trained", "caa", "ablation", "angular", "prompt_only"] = (
        "attention_guided"
    )
    learn_from: Literal["prompts", "answers"] = "prompts"
    estimator: Literal[
        "rfm", "ridge", "logistic", "pca", "mean_difference", "unit_mean_difference", "trained"
    ] = "rfm"
    labels: Literal["soft", "hard"] = "soft"
    token: Literal["attention"] | Annotated[int, Field(lt=0)] = "attention"
    contrast: Literal["nothing", "concepts"] = "nothing"
    held_out: bool = True
    unit: bool = True
    answer_tokens: AnswerTokens = "mean"
    answer_length: int = Field(default=48, gt=0)
    questions: int = Field(default=96, ge=8)
    answer_share: float = Field(default=0.5, gt=0, le=1)
    stopping_questions: int = Field(default=24, ge=4)
    prefix_role: PrefixRole = "user"
    chat_template: str | None = Field(default=None, min_length=1)
    chat_template_kwargs: dict[str, JsonValue] = {}
    train_steps: int = Field(default=16, gt=0)
    train_answers: int = Field(default=8, gt=0)
    train_rate: float = Field(default=0.0075, gt=0, allow_inf_nan=False)
    train_penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    train_warm: float = Field(default=0.3, ge=0, allow_inf_nan=False)
    train_checkpointing: bool = False
    train_together: int = Field(default=8, gt=0)
    token_statistic: Literal["max", "mean"] = "max"
    candidate_tokens: Annotated[int, Field(gt=0)] | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    block_choice: Literal["all", "top_k", "bottom_k", "threshold"] = "all"
    block_count: Annotated[int, Field(gt=0)] | None = None
    block_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    permutations: int = Field(default=999, ge=0)
    positive_count: Annotated[int, Field(gt=0)] | None = None
    negative_count: Annotated[int, Field(gt=0)] | None = None
    paired: bool = False
    compat: bool = False
    batch_size: int = Field(default=32, gt=0)
    attention: Literal["auto", "eager"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    seed: int = Field(default=0, ge=0)
    rfm_ridge: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    rfm_center_gradients: bool = True
    rfm_iterations: int = Field(default=9, gt=0)
    rfm_bandwidths: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        default=(1.0, 10.0, 100.0), min_length=1
    )
    rfm_solver: Literal["auto", "xrfm", "gram"] = "auto"

    @property
    def chat(self) -> ChatFormat:
        """The format of prompts."""
        return ChatFormat(
            chat_template=self.chat_template, chat_template_kwargs=self.chat_template_kwargs
        )

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, given: Any) -> Any:
        method = METHODS.get(str(given.get("method"))) if isinstance(given, dict) else None
        if method is None:
            return given
        chosen = {**method.fixed, **method.defaults, **given}
        if chosen.get("learn_from") == "answers" and "token" not in given:
            # A method's token is one of its prompts'.
            chosen.pop("token", None)
        return chosen

    @model_validator(mode="after")
    def _consistent(self) -> ExtractionSettings:
        if self.contrast == "concepts" and self.labels == "soft":
            raise ValueError("contrast 'concepts' needs labels 'hard'")
        if self.learn_from == "answers":
            self._check_answers()
        elif self.estimator == "trained":
            raise ValueError("estimator 'trained' needs learn_from 'answers'")
        elif self.prefix_role == "system":
            raise ValueError("prefix_role 'system' needs learn_from 'answers'")
        elif self.answer_tokens != "mean":
            raise ValueError(f"answer_tokens {self.answer_tokens!r} needs learn_from 'answers'")
        method = METHODS[self.method]
        for field, value in method.fixed.items():
            if getattr(self, field) != value:
                raise ValueError(f"method {self.method!r} takes {field} {value!r}")
        if method.fixed and self.learn_from == "prompts" and self.token == "attention":
            raise ValueError(f"method {self.method!r} takes a fixed token, such as -1")
        if not (self.held_out and self.unit) and not (
            self.estimator.endswith("mean_difference") or self.estimator == "trained"
        ):
            raise ValueError(
                f"estimator {self.estimator!r} needs held-out prompts and gives unit vectors"
            )
        if self.estimator == "logistic" and self.labels == "soft":
            raise ValueError("estimator 'logistic' needs labels 'hard'")
        wanted = {"top_k": "block_count", "bottom_k": "block_count", "threshold": "block_threshold"}
        needed = wanted.get(self.block_choice)
        for field in ("block_count", "block_threshold"):
            if (getattr(self, field) is not None) != (field == needed):
                raise ValueError(
                    f"block_choice {self.block_choice!r} "
                    f"{'needs' if field == needed else 'takes no'} {field}"
                )
        # The least p-value is 1 over one more than there are; the score counts those below 0.01.
        if 0 < self.permutations < 100 or (needed and not self.permutations):
            raise ValueError(
                f"permutations is {self.permutations}: the enrichment score counts p-values below 0.01, "
                f"which needs at least 100, such as 999; 0 disables the test"
            )
        return self

    def _check_answers(self) -> None:
        """Raises ValueError where a setting has no meaning for answers."""
        for field, value in {"contrast": "nothing", "block_choice": "all", "compat": False}.items():
            if getattr(self, field) != value:
                raise ValueError(f"learn_from 'answers' takes {field} {value!r}")
        if self.token != "attention":
            raise ValueError("learn_from 'answers' takes answer_tokens in place of token")
        if self.estimator == "trained" and self.answer_tokens != "mean":
            raise ValueError("estimator 'trained' takes answer_tokens 'mean'")
