"""Japanese postal addresses in folded text: a postal code with its mark, or a place with a house number.

A place alone (東京都千代田区で開催) is no address; with 丁目, 番地 or a number such as 1-2-3 it is one. Without the
prefecture, a city or ward needs the longer forms. In English order, the number stands first and -ku, -shi follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Span = tuple[int, int]

_PREFECTURES = (
    "北海道|青森県|岩手県|宮城県|秋田県|山形県|福島県|茨城県|栃木県|群馬県|埼玉県|千葉県|東京都|神奈川県|新潟県|富山県|石川県|福井県|"
    "山梨県|長野県|岐阜県|静岡県|愛知県|三重県|滋賀県|京都府|大阪府|兵庫県|奈良県|和歌山県|鳥取県|島根県|岡山県|広島県|山口県|徳島県|"
    "香川県|愛媛県|高知県|福岡県|佐賀県|長崎県|熊本県|大分県|宮崎県|鹿児島県|沖縄県"
)
_N = "[0-9〇一二三四五六七八九十百千]{1,5}"
_BLOCK = rf"{_N}\s?丁目(?:\s?{_N}\s?(?:番地?|[-の]\s?{_N}|号)?(?:\s?[-の]?\s?{_N}\s?号?)?)?"
_LOT = rf"{_N}\s?番地?(?:\s?[-の]?\s?{_N}\s?号?)?"
_THREE = r"[0-9]{1,4}-[0-9]{1,4}-[0-9]{1,4}(?![-0-9])"
_TWO = r"[0-9]{1,4}-[0-9]{1,3}(?![-0-9/])"
_PLACE = r"[^\s、。,.!?0-9「」()=]"
_FIRM = rf"(?:{_BLOCK}|{_LOT}|{_THREE})"

_POSTAL_CODE = re.compile(r"(?:〒|郵便番号)[は:]?\s{0,2}[0-9]{3}[- ]?[0-9]{4}(?![0-9])")
_WITH_PREFECTURE = re.compile(
    rf"(?:{_PREFECTURES})\s?{_PLACE}{{1,12}}?[市区町村郡島]\s?(?:"
    rf"(?:{_PLACE}{{0,16}}?\s?){_FIRM}|[^\s、。,.!?0-9「」()=でにはをも]{{1,12}}\s?{_TWO})"
)
_WITH_CITY = re.compile(
    rf"[一-龥ァ-ヶー々ヶケのが]{{1,8}}[市区]\s?[^\s、。,.!?0-9「」()=でにはをも]{{1,14}}?\s?(?:{_THREE}|{_N}\s?丁目\s?{_N}\s?[-番])"
)
_ENGLISH = re.compile(
    r"(?<![0-9-])[0-9]{1,4}(?:-[0-9]{1,4}){1,3},?\s[A-Z][A-Za-z-]{1,24}(?:,?\s[A-Z][A-Za-z-]{1,24}){0,3}?"
    r"(?:-(?:ku|shi|cho|chō|machi|gun|mura|son)|,\s(?:Tokyo|Osaka|Kyoto|Hokkaido|Japan))\b"
)


def addresses(text: str) -> Iterator[Span]:
    """Spans of postal codes and addresses."""
    if "〒" in text or "郵便番号" in text:
        yield from (match.span() for match in _POSTAL_CODE.finditer(text))
    if any(mark in text for mark in ("県", "都", "府", "道", "市", "区")):
        yield from (match.span() for match in _WITH_PREFECTURE.finditer(text))
        yield from (match.span() for match in _WITH_CITY.finditer(text))
    if "-" in text and not text.islower():
        yield from (match.span() for match in _ENGLISH.finditer(text))
