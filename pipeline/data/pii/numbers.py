"""Numbers with a check, in folded text: cards, My Number, corporate number, IBAN, telephone, IP.

    card              Luhn and an issuer's prefix and length; a 13-digit JAN or ISBN is no card number
    my_number         12 digits, check digit of the Individual Number (stdnum.jp.in_)
    corporate_number  13 digits, check digit of the Corporate Number (stdnum.jp.cn), T in front allowed
    iban              country's structure and mod 97 (stdnum.iban)
    phone             numbering plan (phonenumbers, Japan by default)
A bare number passes a check digit by chance one time in nine to eleven. So it does not count behind a word such as
注文番号 or ISBN, or beside a currency or an arithmetic sign, unless a word for its own kind stands there.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from functools import lru_cache

import phonenumbers
from stdnum import ean, iban, luhn
from stdnum.jp import cn, in_

Span = tuple[int, int]

_SEP = "[- .・_]"
_NUMBER = re.compile(
    r"(?<![0-9A-SU-Za-z_])(?<![0-9][.,])(?<![A-Za-z0-9]-)(?<![A-Za-z]T)(?:"
    rf"[0-9]{{4}}(?P<four>{_SEP})[0-9]{{4}}(?P=four)[0-9]{{4}}(?:(?P=four)[0-9]{{4}}(?:(?P=four)[0-9]{{1,3}})?)?"
    rf"|[0-9](?P<one>{_SEP})[0-9]{{4}}(?P=one)[0-9]{{4}}(?P=one)[0-9]{{4}}"
    rf"|[0-9]{{4}}(?P<six>{_SEP})[0-9]{{6}}(?P=six)[0-9]{{4,5}}"
    r"|[0-9]{12,19})(?![0-9A-Za-z_]|[-.,][0-9])"
)
_OTHER_NUMBER = re.compile(
    r"(?:注文|受注|発注|受付|伝票|商品|製品|型番|品番|管理|予約|問い?合わ?せ|追跡|シリアル|整理|製造|請求書?|契約|登録商標|"
    r"タイムスタンプ|書籍|図書|バーコード|order|ticket|tracking|serial|item|product|invoice|receipt|part|isbn|jan|ean|gtin|"
    r"sku|issn|doi|imei|timestamp|epoch|time|unix|commit|build|version|ver|id|no|#)"
    r"[^0-9a-z]{0,10}(?:code|number|no\.?|コード|番号)?[^0-9a-z]{0,4}$",
    re.IGNORECASE,
)
_OWN_WORD = {
    "my_number": re.compile(r"マイナンバー|個人番号|my[ _-]?number|individual number", re.IGNORECASE),
    "corporate_number": re.compile(r"法人番号|登録番号|インボイス|適格請求書|corporate number|T$", re.IGNORECASE),
    "card": re.compile(r"カード|クレジット|card|visa|master|jcb|amex|diners|credit", re.IGNORECASE),
    "phone": re.compile(r"電話|携帯|連絡先|tel|phone|fax|ファ[ック]+ス|mobile|call", re.IGNORECASE),
}
_ARITHMETIC_BEFORE = re.compile(r"[×*+÷^≒≈<>\\¥$€£]\s?$|[0-9)]\s?=\s?$")
_ARITHMETIC_AFTER = re.compile(
    r"\s?(?:[=×*+÷^≒≈]|円|ドル|ユーロ|元|ウォン|yen|dollars|人|個|年|万|億|バイト|bytes)", re.IGNORECASE
)

_ISSUERS = re.compile(  # prefix and length as the networks publish them
    r"(?:4[0-9]{12}(?:[0-9]{3}){0,2}|5[1-5][0-9]{14}|(?:222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"
    r"|3[47][0-9]{13}|35[0-9]{14}|3(?:0[0-5]|[689][0-9])[0-9]{11}(?:[0-9]{2})?"
    r"|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}(?:[0-9]{3})?|62[0-9]{14,17}"
    r"|(?:5018|5020|5038|5[68][0-9]{2}|6304|6390|6759|676[1-3])[0-9]{8,15}|(?:2131|1800)[0-9]{11})"
)
_JAPAN_OR_BOOK = re.compile(r"45|49|97[89]|192")  # JAN country prefixes, ISBN, the second code on Japanese books


def check_numbers(text: str) -> Iterator[tuple[str, Span]]:
    """(kind, span) of cards, My Numbers and corporate numbers."""
    for match in _NUMBER.finditer(text):
        start, end = match.span()
        while end > start:
            kind = _classify(text, start, end)
            if kind is not None:
                yield kind, (start, end)
                break
            end = _without_last_group(text, start, end)


def _without_last_group(text: str, start: int, end: int) -> int:
    """End of the number without its last group, 0 if too little is left: `1234 5678 9018 2024` may end in a year."""
    cut = end - len(re.split(_SEP, text[start:end])[-1]) - 1
    return cut if cut - start >= 12 else 0


def _classify(text: str, start: int, end: int) -> str | None:
    digits = re.sub("[^0-9]", "", text[start:end])
    before, after = text[max(0, start - 24) : start], text[end : end + 8]
    bare = end - start == len(digits)
    own = {kind for kind, words in _OWN_WORD.items() if words.search(before)}
    other = bool(_OTHER_NUMBER.search(before))
    sum_of = bare and bool(_ARITHMETIC_BEFORE.search(before) or _ARITHMETIC_AFTER.match(after))
    numeral = (other and bare) or (sum_of and len(digits) < 16) or (len(digits) == 13 and _is_jan(digits))
    twelve = len(digits) == 12 and in_.is_valid(digits)  # Maestro's shortest cards are as long as a My Number
    if _is_card(digits) and ("card" in own or not (numeral or twelve)):
        return "card"
    if len(set(digits)) == 1:
        return None
    if len(digits) == 12 and in_.is_valid(digits) and ("my_number" in own or not (other or sum_of)):
        return "my_number"
    if len(digits) == 13 and cn.is_valid(digits):
        if "corporate_number" in own:
            return "corporate_number"
        return None if other or sum_of or _is_jan(digits) else "corporate_number"
    return None


def _is_card(digits: str) -> bool:
    return bool(_ISSUERS.fullmatch(digits)) and luhn.is_valid(digits)


def _is_jan(digits: str) -> bool:
    return bool(_JAPAN_OR_BOOK.match(digits)) and ean.is_valid(digits)


_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?:[- ]?[A-Za-z0-9]{1,4}){3,9}", re.ASCII)


def ibans(text: str) -> Iterator[Span]:
    """Spans of IBANs, the longest valid IBAN at each place, without the words behind it."""
    for match in _IBAN.finditer(text):
        for end in range(match.end(), match.start() + 14, -1):
            if not text[end - 1].isalnum() or (end < len(text) and text[end].isascii() and text[end].isalnum()):
                continue
            if iban.is_valid(text[match.start() : end]):
                yield match.start(), end
                break


_PHONE = re.compile(
    r"(?<![0-9])(?<![0-9][.,/-])(?<![A-Za-z_]-)(?:"
    r"(?<![0-9+])(?:\+|00|010-?)[1-9][0-9]{0,2}[-. ]{0,2}(?:\(0[0-9]{0,4}\)|\([0-9]{1,4}\))?(?:[-. ]?[0-9]{1,5}){2,5}"
    r"|\(0[0-9]{1,4}\)[- .]?[0-9]{1,4}[-. ]?[0-9]{3,4}"
    r"|0[0-9]{1,4}(?P<sep> ?- ?|[. ・/_])[0-9]{1,4}(?P=sep)[0-9]{3,4}"
    r"|0[0-9]{1,4}[- ]?\([0-9]{1,4}\)[- ]?[0-9]{3,4}"
    r"|0[0-9]{1,4}[- ][0-9]{5,8}"
    r"|0[0-9]{9,10}"
    r")(?![0-9A-Za-z_]|[-.,/][0-9])"
)


def phones(text: str) -> Iterator[Span]:
    """Spans of telephone numbers that exist in a numbering plan, which is Japan's without a country code."""
    for match in _PHONE.finditer(text):
        start, end = match.span()
        number = match.group()
        before = text[max(0, start - 24) : start]
        if start and text[start - 1].isascii() and text[start - 1].isalnum() and not _OWN_WORD["phone"].search(before):
            continue  # the tail of an identifier
        if number.isdigit() and not _OWN_WORD["phone"].search(before):
            if _OTHER_NUMBER.search(before) or _ARITHMETIC_BEFORE.search(before):
                continue
            if _ARITHMETIC_AFTER.match(text, end):
                continue
        if _is_phone(re.sub("^00(?=[1-9])", "+", number)):
            yield start, end


@lru_cache(maxsize=4096)
def _is_phone(number: str) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(re.sub("[・_]", "-", number), "JP"))
    except phonenumbers.NumberParseException:
        return False


_IPV4 = re.compile(r"(?<![0-9A-Za-z.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z]|\.[0-9])")
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z.])(?<![0-9]:)(?:[0-9A-Fa-f]{1,4}|(?<!:):(?=:))(?::[0-9A-Fa-f]{0,4}){2,7}"
    r"(?:(?<=:)(?:[0-9]{1,3}\.){3}[0-9]{1,3})?(?![0-9A-Za-z:])"
)
_VERSION = re.compile(
    r"(?:\bv|ver\.?|version|バージョン|版|release|リリース|build|ビルド|firmware|[A-Za-z]/|第|§|章|節|section|条|[><~^]=?|==)\s?[::]?\s?$",
    re.IGNORECASE,
)
_SECTION = re.compile(r"\s?(?:節|章|項|条|版|系|より(?:前|後)のバージョン)")


def ip_addresses(text: str) -> Iterator[Span]:
    """Spans of IP addresses of machines, without loopback, unspecified address, netmasks and version numbers."""
    for match in _IPV4.finditer(text):
        before = text[max(0, match.start() - 16) : match.start()]
        if not _VERSION.search(before) and not _SECTION.match(text, match.end()) and _names_a_machine(match.group()):
            yield match.span()
    for match in _IPV6.finditer(text):
        digits = re.sub("[^0-9A-Fa-f]", "", match.group())
        if len(digits) >= 5 and re.search("[0-9]", digits) and _names_a_machine(match.group()):
            yield match.span()


def _names_a_machine(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or text.startswith("255."))
