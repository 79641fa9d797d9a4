"""Formulas as docstrings write them, set as HTML: `m <- b1 m + (1 - b1) g^2` with arrows, exponents and Greek."""

import html
import re

GREEK = {
    **{"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eps": "ε", "eta": "η", "theta": "θ"},
    **{"lambda": "λ", "lamb": "λ", "lambd": "λ", "mu": "μ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ"},
}
SIGNS = {"&lt;-": "←", "&gt;=": "≥", "&lt;=": "≤", " - ": " − ", "sum_i": "Σ<sub>i</sub>"}
# what a docstring cites, and where it leads
PAPER = re.compile(
    r"(?P<arxiv>arXiv:(?P<number>\d{4}\.\d{4,5}))|(?P<doi>doi:(?P<doi_name>10\.\S+?))(?=[.,;:)]*(?:\s|$))"
    r"|(?P<site>\b(?:[\w-]+\.)+(?:org|io|net)/[\w/.-]*\w)"
)


def papers(text: str) -> list[tuple[str, str]]:
    """Return (what it is called, its address) for each citation in a text, each once."""
    found = {}
    for match in PAPER.finditer(text):
        if match["arxiv"]:
            found[match["arxiv"]] = f"https://arxiv.org/abs/{match['number']}"
        elif match["doi"]:
            found[match["doi"]] = f"https://doi.org/{match['doi_name']}"
        else:
            found[match["site"]] = f"https://{match['site']}"
    return list(found.items())


def without_papers(text: str) -> str:
    """Return a text without its citations and what they leave behind."""
    text = PAPER.sub("", text)
    text = re.sub(r"(?<!\w)\(\s*(,\s*)*\)", "", text)
    return re.sub(r"[\s,;:.]+$", "", re.sub(r"\s+([,.;)])", r"\1", " ".join(text.split())))


def is_formula(text: str) -> bool:
    """Return whether a paragraph states a rule with signs, not only with words."""
    return bool(re.search(r"<-|(^|\s)v\(t\) =|\s=\s", text))


def typeset(text: str, names: frozenset[str] = frozenset()) -> str:
    """Return a rule as HTML, one line for each of its statements; `names` are hyperparameters, which stay whole."""
    lines = (_line(statement, names) for statement in _statements(without_papers(text)))
    return "\n".join(f"<p>{line}</p>" for line in lines)


def _statements(text: str) -> list[str]:
    """Split at semicolons and behind colons, outside parentheses."""
    found, depth, begin = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if depth == 0 and (sign == ";" or text.startswith(": ", place)):
            found.append(text[begin : place + (sign == ":")].strip())
            begin = place + 1
    return [part for part in (*found, text[begin:].strip()) if part]


def _line(text: str, names: frozenset[str]) -> str:
    text = html.escape(text, quote=False)
    for sign, better in SIGNS.items():
        text = text.replace(sign, better)
    text = re.sub(r"\bsqrt\(", "√(", text)
    text = re.sub(r"\^\(([^()]*)\)", lambda m: f"<sup>{m[1]}</sup>", text)
    text = re.sub(r"\^(-?[\w.]+)", lambda m: f"<sup>{m[1]}</sup>", text)
    text = re.sub(r"\b([A-Za-z])_\(([^()]*)\)", r"<i>\1</i><sub>\2</sub>", text)
    # what is a tag by now stays as it is
    pieces = re.split(r"(<[^>]*>)", text)
    return "".join(piece if piece.startswith("<") else _words(piece, names) for piece in pieces)


def _words(text: str, names: frozenset[str]) -> str:
    return re.sub(r"`[^`]*`|(?<!['\w])[A-Za-z_]\w*", lambda match: _word(match[0], names), text)


def _word(word: str, names: frozenset[str]) -> str:
    if word.startswith("`"):
        return f"<code>{word[1:-1]}</code>"
    if word in GREEK:
        return GREEK[word]
    greek = re.fullmatch(r"([a-z]+?)(\d)", word)
    if greek and greek[1] in GREEK:
        return f"{GREEK[greek[1]]}<sub>{greek[2]}</sub>"
    if word in names and len(word) > 1:
        return f"<code>{word}</code>"
    if re.fullmatch(r"[A-Za-z]\d", word):
        return f"<i>{word[0]}</i><sub>{word[1]}</sub>"
    base, _, index = word.partition("_")
    if index and (len(base) == 1 or base in GREEK):
        return f"{_word(base, names)}<sub>{_word(index, names)}</sub>"
    if len(word) == 1 and word.isalpha() and word not in ("a", "A", "I"):
        return f"<i>{word}</i>"
    return word
