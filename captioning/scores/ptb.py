r"""The tokenizer of the official COCO caption evaluation: equal to it token for token, without Java.

    tokenize(["A man's dog (brown) can't run."])  ->  ["a man 's dog -lrb- brown -rrb- ca n't run"]

The official code pipes all captions, one a line, through Stanford's PTBTokenizer (CoreNLP 3.4.1,
`-preserveLines -lowerCase`), and then drops punctuation. PTBTokenizer is a JFlex lexer, a table of rules. At each
position of the text the rule with the longest match wins, and the first rule among equally long ones. For "well-known"
the word rule matches "well", the rule for compounds matches all of it: one token. Python's `re` cannot do this, because
it takes the first alternative that matches at all. The `regex` package can: in POSIX mode it takes the longest.

The file in order: `tokenize`, the functions that turn a match into a token, the rules, and the lexer made of them.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import regex

# What the official code drops. The tokens are in lower case by then, so the names of brackets never match and
# brackets stay in as words: "(" is scored as "-lrb-".
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def tokenize(captions: Iterable[str]) -> list[str]:
    r"""Each caption in lower case, its tokens separated by one space, without punctuation.

    Any text is accepted. Phone numbers, mixed fractions ("1 1/2") and tags are single tokens with no-break
    spaces (U+00A0) in place of spaces.

    All captions form one text, as in the official code, and once in a while what follows a caption matters:
    "Row A." gives "row a." or, if the next caption begins with a word such as "The", "row a". One difference
    is deliberate: every line break inside a caption counts as a space. The official code does so for "\n",
    but takes "\r", "\v", "\f", U+2028 and U+2029 as the end of the caption, and from there on gives every
    image the caption of another one.
    """
    captions = [caption.replace("\n", " ") for caption in captions]
    if not captions:
        return []
    lines = _print_tokens(re.sub("[\r\v\f\u2028\u2029]", " ", "\n".join(captions))).split("\n")
    return [" ".join([w for w in line.rstrip().split(" ") if w and w not in PUNCTUATION]) for line in lines]


# What needs no rule: line breaks, spaces, and most words. No rule for ASCII letters alone looks past a space, so a
# word before a space is a token as it is, unless it is one of the six that are split. Other white space after a space
# is left to the lexer, because it is one token with the space. The short cut makes real captions eight times faster.
_PLAIN = re.compile(
    r"(?:(?:(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna) )[A-Za-z]+)? (?![\t\u00a0\u2000-\u200a\u3000])|\n)++"
)


def _print_tokens(text: str) -> str:
    """What PTBTokenizer prints: lines of tokens in lower case, separated by one space or several."""
    if text and max(text) > "\uffff":  # Java sees two surrogates where Python sees one character
        units = text.encode("utf-16-le", "surrogatepass")
        text = "".join([chr(low | high << 8) for low, high in zip(units[::2], units[1::2], strict=True)])
    lexer = _lexer()
    printed, begin = [], 0
    while begin < len(text):
        if plain := _PLAIN.match(text, begin):
            printed.append(plain[0])
            begin = plain.end()
            continue
        match = lexer.match(text, begin)
        assert match and match.lastindex, "the last rule matches any character"
        rule = _RULES[match.lastindex - 1]
        end = _end_of_head(rule, text, *match.span()) if rule.before else match.end()
        end -= rule.give_back
        printed.append(rule.token(text[begin:end]) + " ")
        begin = end
    # lower() and Java disagree on one thing: a capital sigma with digits or marks between it and more letters.
    return "".join(printed).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").lower()


# --- From a match to a token ------------------------------------------------------------------------------


def _same(text: str) -> str:
    return text


def _drop(text: str) -> str:
    """White space, what the lexer does not know, and punctuation that would be dropped afterwards."""
    return ""


def _word(text: str) -> str:
    """Soft hyphens are left out."""
    return text.replace("\u00ad", "") or "-"


def _full_stop(text: str) -> str:
    return text + "."


def _glue(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _parentheses(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _phone(text: str) -> str:
    return _parentheses(_glue(text))


def _ampersand(text: str) -> str:
    return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def _close_quote(text: str) -> str:
    """LaTeX quotes: ` and `` open, ' and '' close; a straight one closes unless `_open_quote` gets it."""
    for quotes, latex in (
        ("&apos;", "'"),
        ('"|&quot;', "''"),
        ("[\u0091\u2018\u201b\u2039]", "`"),
        ("[\u0092\u2019\u203a]", "'"),
        ("[\u0093\u201c\u00ab]", "``"),
        ("[\u0094\u201d\u00bb]", "''"),
    ):
        text = re.sub(quotes, latex, text)
    return text


def _open_quote(text: str) -> str:
    return _close_quote(re.sub("'|&apos;", "`", re.sub('"|&quot;', "``", text)))


_SYMBOLS = {
    "(": "-LRB-",
    ")": "-RRB-",
    "[": "-LSB-",
    "]": "-RSB-",
    "{": "-LCB-",
    "}": "-RCB-",
    "&lt;": "<",
    "&gt;": ">",
    "\u00a2": "cents",
    "\u00a3": "#",
    "\u0080": "$",
    "\u00a4": "$",
    "\u20a0": "$",
    "\u20ac": "$",
    "\u00bc": "1/4",
    "\u00bd": "1/2",
    "\u00be": "3/4",
    "\u2153": "1/3",
    "\u2154": "2/3",
}


def _symbol(text: str) -> str:
    return _SYMBOLS.get(text.lower(), text)


# --- The rules --------------------------------------------------------------------------------------------
# Regular expressions of the `regex` package, with two changes: <name> stands for an entry of this table, and
# letters match in either case, except inside [ ]. A plain "<" is written "\<".


def _one_of(ranges: str) -> str:
    """A class of characters from ranges of hexadecimal code points."""
    return "[" + re.sub("[0-9A-F]{4}", r"\\u\g<0>", ranges).replace(" ", "") + "]"


# The official lexer knows the letters and digits of Unicode 6.2, up to U+FFFF; these came later.
_LATER = _one_of(
    "037F 0528-052F 0558 0560 0588 058B-058C 05EF 0860-086A 0870-0887 0889-088F 08A1 08AD-08C9 0978 0980 09FC "
    "0AF9 0C34 0C5A 0C5C-0C5D 0C80 0CDC-0CDD 0D04 0D54-0D56 0D5F 0DE6-0DEF 0E86 0E89 0E8C 0E8E-0E93 0E98 0EA0 "
    "0EA8-0EA9 0EAC 13F5 13F8-13FD 16F1-16F8 170D 171F 1878 191D-191E 19B0-19C0 19C8-19C9 1B4C 1C80-1C8A "
    "1C90-1CBA 1CBD-1CBF 1CF2-1CF3 1CFA 208F 209D-209F 2C2F 2C5F 312E-312F 31BB-31BF 4DB6-4DBF 9FCD-9FFF "
    "A698-A69D A78F A794-A79F A7AB-A7DD A7E2 A7F1-A7F7 A8FD-A8FE A9E0-A9E4 A9E6-A9FE AA7E-AA7F AB30-AB5A "
    "AB5C-AB69 AB6C-AB6D AB70-ABBF"
)

_NAMES = {
    "any": r"[\s\S]",
    "alpha": rf"[^\P{{L}}{_LATER[1:-1]}]|[\u1885\u1886]",
    "digit": rf"[^\P{{Nd}}{_LATER[1:-1]}]",
    # In words, but no letters: combining marks, modifiers, the soft hyphen.
    "mark": _one_of(
        "00AD 02C2-02C5 02D2-02DF 02E5-02EB 02ED 02EF-036F 0375 0378-0379 0384-0385 03F6 0483-0487 055A-055F "
        "0591-05BD 05BF 05C1-05C2 05C4-05C5 05C7 0615-061A 064B-065E 0670 06D6-06E4 06E7-06ED 06FD-06FE 070F "
        "0711 0730-074C 07A6-07B0 07EB-07F3 0900-0903 093C 093E-094E 0951-0955 0962-0963 0981-0983 09BC "
        "09BE-09C4 09C7-09C8 09CB-09CD 09D7 09E2-09E3 0A01-0A03 0A3C 0A3E-0A4F 0A81-0A83 0ABC 0ABE-0ACF 0B82 "
        "0BBE-0BC2 0BC6-0BC8 0BCA-0BCD 0C01-0C03 0C3E-0C56 0D3E-0D44 0D46-0D48 0E31 0E34-0E3A 0E47-0E4E 0EB1 "
        "0EB4-0EBC 0EC8-0ECD"
    ),
    "other symbol": _one_of(
        "00A6-00A9 00AC 00AE-00BA 00D7 00F7 0387 05BE 05C0 05C3 05C6 05F3-05F4 0600-0603 0606-060A 060C 0614 "
        "061B 061E 066A 066D 0703-070D 07F6-07F8 0964-0965 0E4F 1FBD 2016-2017 2020-2023 2030-2038 203B "
        "203E-2042 2044 207A-207F 208A-208E 2100-214F 2190-2BFF 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 "
        "FF5B-FF65"
    ),
    "space": r"[ \t\u00a0\u2000-\u200a\u3000]",
    "blank": r"<space>|[\n\u0085]",
    "apostrophe": r"['\u0092\u2019]|&apos;",
    "inner apostrophe": r"<apostrophe>|[`\u0091\u2018\u201b]",
    "hyphen": r"[-_\u058a\u2010\u2011]",
    "pause": r"[,;:\u3001]",
    # Words. A full stop, exclamation or question mark between letters does not end one ("dog.The").
    "letter": r"<alpha>|<mark>|&[aeiouAEIOU](acute|grave|uml);",
    "word part": r"<letter>(<letter>|<digit>)*",
    "word": r"<word part>([.!?]<word part>)*",
    "alphanumeric": r"<alpha>|<digit>",
    "compound": r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(-([A-Za-z0-9\u00ad]+|<acronym>\.))+",
    "elided": r"[dDoOlL]<inner apostrophe><alphanumeric>",
    "plain compound": r"<elided>?<alphanumeric>+(<hyphen><elided>?<alphanumeric>+)*",
    "initials": r"[A-Z]+(([+&]|&amp;)[A-Z]+)+",
    "slash part": r"[A-Za-z0-9]+(-[A-Za-z]+){0,2}",
    # Clitics: 's, 'll and n't, and the words that take n't.
    "clitic": r"<apostrophe>([msdMSD]|re|ve|ll)",
    "not": r"n<inner apostrophe>t",
    "not stem": r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*",
    # Numbers.
    "number": r"<digit>+|<digit>*([.:,\u00ad\u066b\u066c]<digit>+)+",
    "area": r"[0-9]{2,4}",
    # Abbreviations: that can end a sentence, that cannot, and that stand before a number.
    "ending": (
        "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu(rs)?|Fri|"
        "Ala|Ariz|[A]z|[A]rk|Calif|Colo|Conn|Ct|Dak|[D]el|Fla|Ga|[I]ll|Ind|Kans?|Ky|[L]a|[M]ass|Md|Mich|Minn|"
        "[M]iss|Mo|Mont|Neb|Nev|Okla|[O]re|[P]a|Penn|Tenn|[T]ex|Va|Vt|[W]ash|Wisc?|Wyo|"
        "Inc|Cos?|Corp|Pp?t[ye]s?|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys|"
        r"tel|est|ext|sq|Jr|Sr|Bros|(Ed|Ph)\.D|Blvd|Rd|Esq|etc|al|seq|Bldg"
    ),
    "leading": (
        "Mr|Mrs|Ms|[M]iss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|"
        "Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|"
        r"Msgr|Sfc|vs|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Ph|Invt|Elec|Natl|M[ft]g|Dept|[A-Za-z]|<acronym>"
    ),
    "numbering": "ca|figs?|prop|nos?|art|bldg|pp|op",
    "acronym": r"[A-Za-z](\.[A-Za-z])+|(Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(U\.K|U\.S\.S\.R)",
    # Words that begin a sentence, so that the full stop after a single letter before them is one.
    "beginning": (
        "[A](bout|ccording|dditionally|fter|n|s|t)?|[B]ut|[E]arlier|[H](e|er|ere|owever)|[I](f|n|t)|[L]ast|"
        r"[M](any|ore|r\.|s\.)|[N]ow|[O](nce|ne|ther|ur)|[S](he|ince|o|ome|uch)|"
        "[T]h(at|e|eir|en|ere|ese|ey|is)|[W](e|hen|hile|hat)|[Y](et|ou)|<tag>"
    ),
    # The web.
    "tag": (r"\<([!?][A-Za-z\-][^>\r\n]*|<tag name>( +<tag name>( *= *<tag value>)?)* *\/?|\/<tag name>) *\>"),
    "tag name": r"[A-Za-z][A-Za-z0-9_:.\-]*",
    "tag value": r"'[^']*'|\"[^\"]*\"",
    "url end": r"[^ \t\n\f\r\"<>|.!?(){},-]",
    "site": (
        r"www\.([^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|"
        r"([^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+(com|net|org|edu)"
    ),
    # Officially any "@" can be in it. This one accepts the same addresses, and there is only one way to read each,
    # which saves time if "@" is repeated.
    "domain part": r"[^ \t\n\f\r\"<>|(){}.\u00a0@]+@?|@",
    "extension": (
        "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|"
        "sql|tar|txt|wav|x|xml|zip"
    ),
}


class _Rule(NamedTuple):
    token: Callable[[str], str]  # what to make of the text
    pattern: str
    before: str = ""  # has to follow, counts for the length of the match, and stays in the input
    give_back: int = 0  # so many characters of the match go back to the input


_RULES = (
    # Words.
    _Rule(_same, "cannot|'twas", give_back=3),
    _Rule(_same, "'tis|gonna|gotta|lemme|gimme|wanna", give_back=2),
    _Rule(_same, r"c\+\+|(c|f)#"),
    _Rule(_word, "<word>", before="<clitic>"),
    _Rule(_word, "<not stem>", before="<not>"),
    _Rule(_word, "<word>"),
    _Rule(
        _same,
        r"<apostrophe>(n<apostrophe>?|em|till?|cause|[2-9]0s)|([lLdDjJ]|Dunkin|somethin|ol)<apostrophe>|"
        r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|O<inner apostrophe>o|"
        "[A-HJ-XZn]<inner apostrophe><alpha>{2}<alpha>*|"
        "<alpha>+[aeiouyAEIOUY]<inner apostrophe>[aeiouA-Z]<alpha>*",
    ),
    _Rule(_same, "y<apostrophe>", before="<alpha>"),
    _Rule(_close_quote, "<clitic>|<not>", before="[^A-Za-z]"),
    # The web.
    _Rule(_glue, "<tag>"),
    _Rule(_same, r"https?:\/\/[^ \t\n\f\r\"<>|(){}]+<url end>"),
    _Rule(_same, r"(<site>)(\/[^ \t\n\f\r\"<>|()]+<url end>)?"),
    _Rule(
        _same,
        r"(&lt;|\<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{}]*@"
        r"(<domain part>\.)*<domain part>(&gt;|\>)?",
    ),
    _Rule(_same, "@[a-zA-Z_][a-zA-Z_0-9]*|#<letter>+"),
    # Numbers and money.
    _Rule(_same, r"<digit>{1,2}[\-\/]<digit>{1,2}[\-\/]<digit>{2,4}"),
    _Rule(_word, r"[\-+]?<number>"),
    _Rule(_same, r"[\u207a\u207b\u208a\u208b]?([\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _Rule(_glue, r"(<digit>{1,4}[- \u00a0])?<digit>{1,4}(\\?\/|\u2044)<digit>{1,4}"),
    _Rule(_symbol, r"[\u00bc-\u00be\u2153-\u215e]"),
    _Rule(_same, r"[A-Z]*\$|#"),
    _Rule(_symbol, r"[\u0080\u00a2-\u00a5\u060b\u0e3f\u20a0\u20a4\u20ac\uffe0\uffe1\uffe5\uffe6]"),
    # Fixed expressions, and words joined by slashes.
    _Rule(
        _ampersand,
        r"-(L|R)(R|C|S)B-|C\.D\.s|pro-|anti-|S(&|&amp;)(P-500|Ls)|(Cap<apostrophe>n|c<apostrophe>est)",
    ),
    _Rule(_same, r"<slash part>(\\?\/<slash part>){1,2}"),
    # Abbreviations and names with full stops.
    _Rule(_same, "[A-Za-z]", before=r"\.<blank>+(<beginning>)<blank>"),
    _Rule(_same, r"(<numbering>)\.", before="<blank>?<digit>"),
    _Rule(_same, r"(pt[eyEY]|co)\.", before="<space>(ltd|lim)"),
    _Rule(_same, r"(<ending>)\.", before="<any><any>"),
    _Rule(_full_stop, "<ending>", before=r"\."),  # at the very end, the full stop counts twice
    _Rule(_same, r"(<leading>)\."),
    _Rule(_same, "<leading>", before="<space>"),
    _Rule(_same, "[A-Za-z]|<acronym>", before="<blank>"),
    _Rule(_same, "<apostrophe>[0-9][0-9]", before="<blank>"),
    _Rule(_same, r"(<letter>|<digit>)+(\.(<letter>|<digit>)+)*\.(<extension>)", before="<blank>|[.?!,]"),
    _Rule(_word, r"<word>\.", before="<pause>"),
    _Rule(
        _phone,
        r"(\([0-9]{2,3}\)[ \u00a0]?|(\+\+?)?(<area>[- \u00a0])?<area>[- \u00a0])"
        r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}|"
        r"((\+\+?)?<area>\.)?<area>\.[0-9]{3,4}\.[0-9]{3,5}",
    ),
    # Punctuation.
    _Rule(_open_quote, r"\"|&quot;", before="[A-Za-z0-9$]"),
    _Rule(_close_quote, r"\"|&quot;"),
    _Rule(_symbol, r"[(){}<>]|\[|\]|&lt;|&gt;"),
    _Rule(_parentheses, r"[<>]?[:;=][\-o*']?([()DPdpO\\{@|]|\[|\])", before="[^A-Za-z0-9]"),
    _Rule(
        _parentheses,
        r"[\^x=~<>]\.\[\^x=[^<]*\<\>\]|[-^x=~<>']_[-^x=~<>']|"
        r"\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
    ),
    _Rule(_drop, r"-{3,4}|&(MD|mdash|ndash);|[\u0096\u0097\u2013-\u2015]"),
    _Rule(_drop, r"\.{3,5}|(\.[ \u00a0]){2,4}\.|[\u0085\u2026]"),
    _Rule(_same, r"-+|@+|#+|_+|\*+|(\\\*){1,3}|=|\/|<pause>|[?!]+"),
    _Rule(_same, r"[.\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700-\u0702\u3002]"),
    # Compounds with hyphens and ampersands.
    _Rule(_word, "<compound>"),
    _Rule(_word, r"<compound>\.", before="<pause>"),
    _Rule(_same, "<plain compound>"),
    _Rule(_same, r"<plain compound>\.", before="<pause>"),
    _Rule(_ampersand, "&amp;|<initials>"),
    _Rule(_ampersand, r"<initials>\.", before="<pause>"),
    # Single quotes.
    _Rule(_open_quote, "'", before=r"[A-Za-z][^ \t\n\r\u00a0]"),
    _Rule(_close_quote, "<clitic>|<not>|<apostrophe>|''"),
    _Rule(_close_quote, r"[`\u0091-\u0094\u2018-\u201f\u2039\u203a\u00ab\u00bb]{1,2}"),
    # The rest: other symbols are tokens, white space and unknown characters are not.
    _Rule(_same, r"\<\<|\>\>|&(HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);|[+%&~^|\\]|<other symbol>"),
    _Rule(_drop, "<space>+|&nbsp;|<any>"),
)


# --- The lexer --------------------------------------------------------------------------------------------

# Letters whose other cases are more than lower() and upper().
_CASES = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}


@cache
def _lexer() -> regex.Pattern[str]:
    """All rules as one pattern with a group for each. The group that matched tells the rule."""
    rules = [f"({_expand(f'({rule.pattern})({rule.before})')})" for rule in _RULES]
    return regex.compile("|".join(rules), regex.POSIX)


def _end_of_head(rule: _Rule, text: str, begin: int, end: int) -> int:
    """Where the token ends if the match from `begin` to `end` includes `before`: as late as possible, as in JFlex."""
    head, tail = _compile(rule.pattern), _compile(rule.before)
    return next(e for e in range(end - 1, begin, -1) if tail.fullmatch(text, e, end) and head.fullmatch(text, begin, e))


@cache
def _compile(pattern: str) -> regex.Pattern[str]:
    return regex.compile(_expand(pattern))


# Escapes, sets, names, groups, letters.
_PIECE = re.compile(r"\\u....|\\.|\[(?:\\.|[^\\\]])*\]|<[a-z ]+>|\(|[A-Za-z]")


def _expand(pattern: str) -> str:
    """The pattern as `regex` reads it: names replaced, letters in either case, no groups that capture."""

    def expand(match: re.Match[str]) -> str:
        piece = match[0]
        if piece == "(":
            return "(?:"
        if piece[0] == "<":
            return f"(?:{_expand(_NAMES[piece[1:-1]])})"
        if piece.isalpha():
            return f"[{piece.lower()}{piece.upper()}{_CASES.get(piece.lower(), '')}]"
        return piece  # escapes and sets stay as they are

    return _PIECE.sub(expand, pattern)
