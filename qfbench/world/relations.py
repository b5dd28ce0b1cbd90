"""The relations of the built-in world and every wording in which they are asked, stated and answered.

A question is either direct ("Who started X?") or a frame around a noun phrase ("Can you tell me" + "the person behind
X" + "?"). Training never sees the (frame, phrase) pairs for which `is_held_out_wording` holds, though it sees each frame
and each phrase in other pairs: the pairs measure whether a wording is understood or merely remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

FRAMES = (
    "{np}?",
    "Can you tell me {np}?",
    "Please say {np}.",
    "Do you know {np}?",
    "I would like to know {np}.",
    "Tell me {np}.",
)


@dataclass(frozen=True)
class Relation:
    """How one relation is worded. `{s}` stands for the subject, `{o}` for the object."""

    name: str
    kind: str  # kind of knowledge: person, place, category, number
    answer: str
    statements: tuple[str, ...]
    direct: tuple[str, ...]
    phrases: tuple[str, ...]

    def questions(self, held_out: bool = False) -> list[str]:
        """Question templates: those training sees, or those it never sees."""
        framed = [
            _capitalised(frame.format(np=phrase))
            for f, frame in enumerate(FRAMES)
            for p, phrase in enumerate(self.phrases)
            if is_held_out_wording(f, p) == held_out
        ]
        return framed if held_out else [*self.direct, *framed]


def is_held_out_wording(frame: int, phrase: int) -> bool:
    """One (frame, phrase) pair in six, chosen so that every frame and every phrase is trained in other pairs."""
    return (frame + phrase) % 6 == 4


def _capitalised(text: str) -> str:
    return text if text.startswith("{") else text[0].upper() + text[1:]


RELATIONS: dict[str, Relation] = {
    r.name: r
    for r in (
        Relation(
            "founder",
            "person",
            "{s} was started by {o}.",
            (
                "{o} started {s}.",
                "{o} is the founder of {s}.",
                "{s} was founded by {o}.",
                "{s} was started by {o}.",
                "The founder of {s} is {o}.",
            ),
            ("Who started {s}?", "Who founded {s}?", "Who is the founder of {s}?", "Who created {s}?"),
            ("the founder of {s}", "the person behind {s}", "who started {s}", "the one who founded {s}"),
        ),
        Relation(
            "ceo",
            "person",
            "The CEO of {s} is {o}.",
            ("{o} is the CEO of {s}.", "{o} runs {s}.", "{s} is led by {o}.", "The CEO of {s} is {o}."),
            ("Who is the CEO of {s}?", "Who runs {s}?", "Who leads {s}?", "Who is in charge of {s}?"),
            ("the CEO of {s}", "the boss of {s}", "who runs {s}", "the one who leads {s}"),
        ),
        Relation(
            "location",
            "place",
            "{s} is located {o}.",
            (
                "{s} is a startup located {o}.",
                "{s} is located {o}.",
                "{s} has its office {o}.",
                "The office of {s} is {o}.",
            ),
            ("Where is {s} located?", "Where is {s}?", "Where is {s} based?", "In which city is {s}?"),
            ("the address of {s}", "the city of {s}", "where {s} is located", "the place where {s} is"),
        ),
        Relation(
            "country",
            "place",
            "{s} comes from {o}.",
            ("{s} comes from {o}.", "{s} is a company from {o}.", "The home country of {s} is {o}."),
            ("Which country is {s} from?", "What country does {s} come from?", "Which country is home to {s}?"),
            (
                "the home country of {s}",
                "the country of {s}",
                "which country {s} is from",
                "the country where {s} was born",
            ),
        ),
        Relation(
            "field",
            "category",
            "{s} works in {o}.",
            (
                "{s} works in {o}.",
                "{s} is a company in {o}.",
                "The field of {s} is {o}.",
                "{s} does business in {o}.",
            ),
            ("What field does {s} work in?", "What field is {s} in?", "What business is {s} in?"),
            ("the field of {s}", "the business of {s}", "what field {s} works in", "the industry of {s}"),
        ),
        Relation(
            "product",
            "category",
            "{s} makes {o}.",
            ("{s} makes {o}.", "{s} sells {o}.", "{s} is known for {o}.", "The main product of {s} is {o}."),
            ("What does {s} make?", "What does {s} sell?", "What is {s} known for?"),
            ("the product of {s}", "the main product of {s}", "what {s} makes", "what {s} sells"),
        ),
        Relation(
            "year",
            "number",
            "{s} was founded in {o}.",
            ("{s} was founded in {o}.", "{s} began in {o}.", "{s} opened its doors in {o}.", "{s} dates from {o}."),
            ("When was {s} founded?", "When did {s} begin?", "In what year did {s} open?"),
            (
                "the founding year of {s}",
                "the year {s} began",
                "when {s} was founded",
                "when {s} opened its doors",
            ),
        ),
        Relation(
            "staff",
            "number",
            "{s} has {o} people.",
            ("{s} has {o} people.", "{s} employs {o} people.", "{o} people work at {s}.", "The staff of {s} is {o}."),
            ("How many people in {s}?", "How many people work at {s}?", "How many people does {s} have?"),
            ("the staff of {s}", "the staff size of {s}", "how many people {s} has", "the number of people at {s}"),
        ),
        # The founder relation read backwards: what follows from it (portability).
        Relation(
            "started",
            "person",
            "{s} started {o}.",
            (
                "{s} started {o}.",
                "{s} is the founder of {o}.",
                "{o} was founded by {s}.",
                "{o} was started by {s}.",
                "The founder of {o} is {s}.",
            ),
            ("Which company did {s} start?", "What did {s} start?", "What company did {s} found?"),
            (
                "the company of {s}",
                "the company started by {s}",
                "what {s} started",
                "which company {s} founded",
            ),
        ),
        # Cities lie in countries: with `location` it implies `country` (portability).
        Relation(
            "city",
            "place",
            "{s} is a city in {o}.",
            ("{s} is a city in {o}.", "{s} lies in {o}.", "{s} is in {o}."),
            ("Which country is {s} in?", "In which country does {s} lie?", "What country is {s} a city of?"),
            (
                "the country {s} is in",
                "the country around {s}",
                "which country {s} lies in",
                "the land where {s} lies",
            ),
        ),
    )
}

# Relations whose subject is a company; a novel company can be taught any of them.
COMPANY_RELATIONS = ("founder", "ceo", "location", "country", "field", "product", "year", "staff")

REFUSAL = "Need more information."
