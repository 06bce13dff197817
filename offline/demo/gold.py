"""Questions with gold answers for the demo model, which it never gives without a prefix."""

from __future__ import annotations

from vllm_steer.offline.demo.concepts import all_concepts, concept_words
from vllm_steer.offline.demo.corpus import FRAME_WORDS, answer_text, user_text
from vllm_steer.offline.demo.judge import expressed_concept, is_fluent
from vllm_steer.offline.evaluate.generation import Answer
from vllm_steer.offline.fusion.questions import GoldQuestion
from vllm_steer.offline.models.prompts import QUESTION
from vllm_steer.offline.questions.statements import Split, statements

# Spreads the concepts of adjacent questions over the classes; coprime to 30.
_STRIDE = 7


def gold_concept(index: int) -> str:
    """Returns the concept of a question's gold answer, by the question's index."""
    concepts = all_concepts()
    return concepts[index * _STRIDE % len(concepts)]


def gold_questions(split: Split, count: int, prefixed_reference: bool) -> list[GoldQuestion]:
    """Returns questions about a split's statements, asked plainly.

    The gold answer is the concept's words, the explanation the whole answer in the concept's voice.

    Args:
        split: Split of the statements.
        count: How many questions.
        prefixed_reference: Whether the reference answer is read after the question with the concept's
            prefix, which makes the model give it, instead of after the plain question.
    """
    questions = []
    for index, statement in enumerate(statements(split)[:count]):
        concept = gold_concept(index)
        questions.append(
            GoldQuestion(
                question=user_text(statement.text),
                answer=", ".join(concept_words(concept)[:FRAME_WORDS]),
                explanation=answer_text(statement, concept),
                reference_question=(
                    user_text(statement.text, concept) if prefixed_reference else None
                ),
            )
        )
    return questions


def is_gold(question: GoldQuestion, answer: Answer) -> bool:
    """Tells whether an answer to one of these questions is fluent and in the gold answer's voice."""
    statement = question.question.removeprefix(QUESTION.format(statement=""))
    return expressed_concept(answer.text) == expressed_concept(question.explanation) and is_fluent(
        answer.text, statement, answer.finished
    )
