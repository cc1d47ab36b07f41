"""A question without what its asker believes: leading sentences and clauses are taken out by rule.

Source: the query neutralizer of Zhao et al. 2024 (arXiv:2408.11261) has a language model rewrite
        the question; these rules for English are ours. They know the usual phrases and no others.
"""

import re
from dataclasses import dataclass

from analyzers.errors import BadInput

_SURE = r"(?:sure|certain|convinced|positive|confident)"
_SAYS = r"(?:says?|said|thinks?|thought|believes?|told me|insists?|claims?)"
_OPINION = (
    r"(?:"
    r"I (?:(?!did|used|never)[\w']+ ){0,2}?"
    r"(?:think|believe|guess|suppose|assume|suspect|reckon|bet|doubt)\b"
    r"(?! (?:of|about|in)\b)"
    rf"|I(?:'m| am) (?:\w+ ){{0,2}}?{_SURE}\b"
    r"|I know (?:that|it|this|the|for)\b"
    r"|I (?:have |had |\w+ )?(?:heard|read|was told|learned) (?:that|it)\b"
    rf"|(?:my (?:\w+ )?|everyone |everybody |most people ){_SAYS}\b"
    r"|(?:everyone|everybody) (?:I know|knows|agrees)\b"
    r"|in my (?:opinion|view)\b|my (?:own )?(?:guess|answer|opinion|view) is\b"
    r"|(?:it|there) (?:seems|looks|appears|sounds)\b"
    r"|(?:the|your) (?:\w+ )?answer (?:is|must be|should be|has to be)\b|it must be\b"
    r")"
)
_ASKS = (
    r"(?:what|which|who|whom|whose|when|where|why|how|is|are|was|were|do|does|did|can|could|will"
    r"|would|should|has|have)\b"
)
_NEGATED = r"(?:is|are|was|were|do|does|did|has|have|had|could|should|would)"
_TAG = rf"(?:{_NEGATED}n't|won't|can't|ain't) (?:it|he|she|they|we|you|I|that|there)"
_AGREE = r"don't you (?:think|agree|believe)|wouldn't you (?:say|agree)|am I right|do you agree"

_LEADING = re.compile(rf"\b{_OPINION}", re.I)
# Of a sentence that asks: what stands before, behind and within the question.
_BEFORE = re.compile(
    rf"^(?:well|so|and|but|as)?,? ?\b{_OPINION}[^?]*?(?:[,;:–-] ?(?:but|so|and) |[;:–] ?| but "
    rf"|, ?(?={_ASKS}))",
    re.I,
)
_WITHIN = re.compile(
    r",? (?:as )?(?:I (?:think|believe|guess|suppose|assume|know)|in my (?:opinion|view)),", re.I
)
_BEHIND = re.compile(
    rf"\s*(?:[,;–-]|[,;]? (?:because|since|as)\b)\s*(?:(?:but|and|as|because|since) )?{_OPINION}"
    r"[^?]*(?=\?)",
    re.I,
)
_ADVERB = re.compile(
    r",? ?\b(?:obviously|clearly|surely|of course|as (?:we|you) all know)\b,?", re.I
)
_TAGGED = re.compile(rf"^(.+?),? ?\b(?:{_TAG}|(?<=, )(?:{_AGREE}|right|correct|no|yes))\s*\?", re.I)
_NEGATIVE = re.compile(rf"^(?:(?:{_AGREE})(?: with me)?(?: that)?|is it not true that) (.+)", re.I)
_CONTRACTED = re.compile(rf"^({_NEGATED})n't\b", re.I)

_SENTENCES = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Dr|Mr|Ms|St|vs)\.)(?<!\bMrs\.)(?<!\be\.g\.)\s+"
)
_OPTION = re.compile(r"\s*(?:\(?\w[.)]|[-*•])\s")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”")
_SMALL = re.compile(
    r"(?:the|an?|it|this|that|there|he|she|they|we|you|these|those|his|her|its|my|our|your)\b", re.I
)


@dataclass(frozen=True)
class Neutral:
    """text: what is left. changes: (what stood there, what stands there now or "")."""

    text: str
    changes: tuple[tuple[str, str], ...]


def neutralise(text: str) -> Neutral:
    """Take out what leads. A text without that comes back as it is, character for character.

    Quotations and the lines of a list of options ("A) ...") are no opinion of the asker's.
    Raises: BadInput where no question would be left.
    """
    lines, changes = [], list[tuple[str, str]]()
    for line in text.replace("’", "'").split("\n"):
        sentences = [] if _OPTION.match(line) else _SENTENCES.split(line)
        plain = [_plain(sentence) for sentence in sentences]
        changed = [pair for pair in zip(sentences, plain, strict=True) if pair[0] != pair[1]]
        changes += changed
        rest = " ".join(filter(None, plain)) if changed else line
        if rest or not changed:
            lines.append(rest)
    if not changes:
        return Neutral(text, ())
    left = "\n".join(lines)
    if not left.strip() or ("?" in text and "?" not in left):
        raise BadInput(
            "Without its leading part nothing of the prompt is left to ask: "
            "write the question as a sentence of its own."
        )
    return Neutral(left, tuple(changes))


def _plain(sentence: str) -> str:
    """The sentence without what leads; "" when all of it does."""
    if "?" not in sentence:
        return "" if _LEADING.search(_QUOTED.sub("", sentence)) else sentence
    plain = _BEHIND.sub("", _BEFORE.sub("", _WITHIN.sub("", sentence)))
    plain = _ADVERB.sub("", plain).strip()
    if tagged := _TAGGED.match(plain):
        plain = _whether(tagged[1])
    elif negative := _NEGATIVE.match(plain):
        plain = _whether(negative[1].rstrip("? "))
    else:
        plain = _CONTRACTED.sub(r"\1", plain)
    if plain == sentence.strip():
        return sentence
    return plain[:1].upper() + plain[1:]


def _whether(statement: str) -> str:
    """The statement as a question that does not lean to either side."""
    if _SMALL.match(statement):
        statement = statement[0].lower() + statement[1:]
    return f"Is it true that {statement.rstrip(' ,')}?"
