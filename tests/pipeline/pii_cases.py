"""Labelled sentences for the detectors: generated positives in many spellings, and hard negatives, all seeded.

Values are drawn so that their checks hold (check digits are computed here, by their own definitions, and not by the
library that the detector uses); each stands in a sentence and in a spelling that the seed picks.
"""

from __future__ import annotations

import base64
import json
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

HALF, FULL = "0123456789-", "０１２３４５６７８９－"
KANJI = "〇一二三四五六七八九ー"
JAPANESE = (
    "私の連絡先は{}です。",
    "{}",
    "{}までお願いします。",
    "担当は山田({})です",
    "詳細:{}",
    "「{}」と書いてあった。",
    "確認したところ、{}でした。",
    "これは{}、間違いない。",
    "以下の通り。\n{}\n以上。",
)
ENGLISH = ("Reach me: {}", "It is {}.", "({})", "He wrote {} on the form, then left.", "value={}", "see {} and sign")


def spell(rng: random.Random, value: str, *, kanji: bool = True) -> str:
    """The same number in another writing: half or full width, kanji digits, or with an invisible character inside."""
    style = rng.choice(["half", "half", "half", "full", "kanji" if kanji else "full", "zero"])
    if style == "full":
        return value.translate(str.maketrans(HALF, FULL))
    if style == "kanji" and all(letter in HALF for letter in value):
        return value.translate(str.maketrans(HALF, KANJI))
    if style == "zero":
        place = rng.randrange(1, len(value))
        return value[:place] + rng.choice("\u200b\u2060\ufeff\u00ad") + value[place:]
    return value.replace("-", rng.choice("-‐‑–−")) if style == "half" else value


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def email(rng: random.Random) -> str:
    user = "".join(rng.choices(string.ascii_lowercase + string.digits, k=rng.randint(2, 12)))
    user += rng.choice(["", ".", "_", "-", "+"]) + rng.choice(["taro", "x9", "sales"])
    host = rng.choice(["example.jp", "mail.example.co.jp", "example.com", "a-b.example.net", "kaisha.or.jp"])
    value = f"{user}@{host}"
    style = rng.randrange(8)
    if style == 3:  # an internationalised mailbox or domain, or a full stop of the Japanese keyboard
        return rng.choice(
            [f"山田@{host}", f"{user}@例え.jp", f"{user}@{host.replace('.', '。', 1)}", f"{user}＠日本語.example.com"]
        )
    if style == 4:  # escaped, or spelled out
        odd = [value.replace("@", mark) for mark in ("%40", "&#64;", "アットマーク")]
        return rng.choice([*odd, f"{user} at {host.replace('.', ' dot ')}"])
    if style == 0:
        return "".join(chr(ord(c) + 0xFEE0) for c in value)
    if style == 1:
        return value.replace("@", rng.choice([" [at] ", "(at)", "＠", "[アット]"]))
    return value.upper() if style == 2 else value


def phone(rng: random.Random) -> str:
    line = rng.choice(["2", "3", "5", "6", "9"]) + digits(rng, 3)
    mobile = rng.choice(["70", "80", "90"])
    subscriber = f"{rng.randint(1000, 9999)}-{digits(rng, 4)}"
    kind = rng.randrange(9)
    if kind < 4:
        value = f"0{mobile}-{subscriber}"
        if kind == 1:
            value = value.replace("-", "")
        elif kind == 2:
            value = value.replace("-", " ")
        elif kind == 3:
            return spell(rng, f"+81-{value[1:]}", kanji=False)
        return spell(rng, value)
    area = rng.choice(["3", "6"])
    if kind == 4:
        return spell(rng, f"0{area}-{line}-{digits(rng, 4)}")
    if kind == 5:
        return f"0{area}({line}){digits(rng, 4)}"
    if kind == 6:
        return f"(0{area}){line}-{digits(rng, 4)}"
    if kind == 7:
        return spell(rng, f"0120-{rng.randint(100, 999)}-{rng.randint(100, 999)}")
    return spell(rng, f"045-{rng.choice('2345678')}{digits(rng, 2)}-{digits(rng, 4)}")


def grouped(rng: random.Random, value: str, sizes: tuple[int, ...]) -> str:
    parts, at = [], 0
    for size in sizes:
        parts.append(value[at : at + size])
        at += size
    return rng.choice(["", "-", " "]).join(parts)


def my_number(rng: random.Random) -> str:
    """Check digit: 11 - (sum P_n Q_n mod 11), 0 above 9; from the right Q = n + 1 up to n = 6, then n - 5."""
    body = digits(rng, 11)
    total = sum(int(p) * (n + 1 if n <= 6 else n - 5) for n, p in enumerate(reversed(body), start=1))
    check = 11 - total % 11
    value = body + str(check if check <= 9 else 0)
    return my_number(rng) if len(set(value)) == 1 else spell(rng, grouped(rng, value, (4, 4, 4)))


def corporate_number(rng: random.Random) -> str:
    """Check digit in front: 9 - (sum P_n Q_n mod 9), Q = 1 for odd n, 2 for even n, from the right."""
    body = digits(rng, 12)
    total = sum(int(p) * (1 if n % 2 else 2) for n, p in enumerate(reversed(body), start=1))
    value = spell(rng, grouped(rng, str(9 - total % 9) + body, (1, 4, 4, 4)))
    return rng.choice(["", "", "法人番号 ", "法人番号:", "登録番号T"]) + value


def card(rng: random.Random) -> str:
    prefix, length, sizes = rng.choice(
        [
            ("4", 16, (4, 4, 4, 4)),
            (str(rng.randint(51, 55)), 16, (4, 4, 4, 4)),
            ("3530", 16, (4, 4, 4, 4)),
            (rng.choice(["34", "37"]), 15, (4, 6, 5)),
            ("36", 14, (4, 6, 4)),
            ("6011", 16, (4, 4, 4, 4)),
        ]
    )
    body = prefix + digits(rng, length - 1 - len(prefix))
    total = sum(sum(divmod(2 * int(c), 10)) if n % 2 == 0 else int(c) for n, c in enumerate(reversed(body)))
    return spell(rng, grouped(rng, body + str(-total % 10), sizes))


def iban(rng: random.Random) -> str:
    country, bban = rng.choice(
        [("DE", digits(rng, 18)), ("GB", "WEST" + digits(rng, 14)), ("NL", "ABNA" + digits(rng, 10))]
    )
    code = "".join(str(int(c, 36)) for c in bban + country + "00")
    value = f"{country}{98 - int(code) % 97:02d}{bban}"
    shown = rng.choice([value, " ".join(value[i : i + 4] for i in range(0, len(value), 4)), value.lower()])
    return "".join(chr(ord(c) + 0xFEE0) if c != " " else "\u3000" for c in shown) if rng.random() < 0.2 else shown


def ip(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(["2001:db8:{:x}::{:x}", "fe80::{:x}:{:x}", "2400:4050:{:x}:0:0:0:0:{:x}"]).format(
            rng.randint(0x1000, 0xFFFF), rng.randint(0x10, 0xFFFF)
        )
    value = ".".join(
        str(n) for n in (rng.choice([10, 172, 192, 203, 8, 133]), *(rng.randint(0, 254) for _ in range(3)))
    )
    return value.translate(str.maketrans(HALF + ".", FULL + "．")) if rng.random() < 0.2 else value


def secret(rng: random.Random) -> str:
    def letters(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
        return "".join(rng.choices(alphabet, k=count))

    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    upper = string.ascii_uppercase + string.digits
    return rng.choice(
        [
            "AKIA" + letters(16, upper),
            "aws_secret_access_key = " + letters(40, string.ascii_letters + string.digits + "/+"),
            rng.choice(["ghp_", "gho_", "ghs_"]) + letters(36),
            "github_pat_" + letters(22) + "_" + letters(59),
            rng.choice(["sk-", "sk-proj-"]) + letters(48),
            f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part({'sub': digits(rng, 8)})}.{letters(43)}",
            "-----BEGIN RSA PRIVATE KEY-----\n" + letters(64) + "\n" + letters(64) + "\n-----END RSA PRIVATE KEY-----",
            f'api_key: "{letters(32)}"',
            f"パスワード:{letters(5)}aB3!{letters(2)}",
            f"postgres://admin:{letters(10)}@db.example.jp/app",
        ]
    )


def address(rng: random.Random) -> str:
    from faker import Faker

    fake = Faker("ja_JP")
    fake.seed_instance(rng.randrange(1 << 30))
    value = fake.address()
    style = rng.randrange(4)
    numbers = f"{rng.randint(1, 9)}-{rng.randint(1, 30)}-{rng.randint(1, 20)}"
    if style == 0:
        return f"〒{spell(rng, f'{digits(rng, 3)}-{digits(rng, 4)}')}"
    if style == 1:
        return f"東京都{rng.choice(['港区六本木', '千代田区丸の内', '新宿区西新宿'])}{spell(rng, numbers, kanji=False)}"
    if style == 2:
        return f"{rng.choice(['横浜市西区みなとみらい', '大阪市北区梅田', '名古屋市中村区名駅'])}{numbers}"
    return value


POSITIVES: dict[str, Callable[[random.Random], str]] = {
    "email": email,
    "phone": phone,
    "my_number": my_number,
    "corporate_number": corporate_number,
    "card": card,
    "iban": iban,
    "ip": ip,
    "secret": secret,
    "address": address,
}
CHECKABLE = ("email", "phone", "my_number", "corporate_number", "card", "iban", "ip", "secret")


def positives(kind: str, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(sentence, the value inside it)."""
    rng = random.Random(f"{kind}/{seed}")
    for _ in range(count):
        value = POSITIVES[kind](rng)
        contexts = ENGLISH if value.isascii() and rng.random() < 0.4 else JAPANESE
        yield rng.choice(contexts).format(value), value


def _isbn(rng: random.Random, prefix: str) -> str:
    body = prefix + digits(rng, 12 - len(prefix))
    return body + str(-sum(int(c) * (3 if n % 2 else 1) for n, c in enumerate(body)) % 10)


def hard_negatives(count: int, seed: int = 0) -> Iterator[str]:
    """Sentences with numbers and words that look like findings and are none."""
    rng = random.Random(seed)

    def n(low: int, high: int) -> int:
        return rng.randint(low, high)

    makers: list[Callable[[], str]] = [
        lambda: f"{n(1950, 2030)}年{n(1, 12)}月{n(1, 28)}日{n(0, 23)}時{n(0, 59)}分に始まった。",
        lambda: (
            f"Updated {n(1990, 2030)}-{n(1, 12):02d}-{n(1, 28):02d} {n(0, 23):02d}:{n(0, 59):02d}:00.{digits(rng, 6)}"
        ),
        lambda: f"期間は{n(1990, 2030)}/{n(1, 12):02d}/{n(1, 28):02d}-{n(1990, 2030)}/{n(1, 12):02d}/{n(1, 28):02d}。",
        lambda: f"ISBN {_isbn(rng, '9784')} の本を読んだ。",
        lambda: f"この本({_isbn(rng, '978')})は品切れ。",
        lambda: f"JANコード{_isbn(rng, rng.choice(['45', '49']))}の飲み物",
        lambda: f"商品は{_isbn(rng, '49')}でした",
        lambda: f"注文番号:{digits(rng, n(9, 16))}",
        lambda: f"Your order number is #{digits(rng, 12)}.",
        lambda: f"追跡番号 {digits(rng, 12)} で確認できます。",
        lambda: f"伝票番号は{digits(rng, 12)}です",
        lambda: f"型番 AB-{digits(rng, 4)}-{digits(rng, 4)} を{n(2, 90)}台",
        lambda: f"バージョン {n(1, 9)}.{n(0, 20)}.{n(0, 20)}.{n(0, 9)} に更新した。",
        lambda: f"Chrome/{n(90, 130)}.0.{n(1000, 9000)}.{n(10, 99)} と v{n(1, 9)}.{n(0, 9)}.{n(0, 9)}.{n(0, 9)}",
        lambda: f"第{n(1, 9)}.{n(1, 9)}.{n(1, 9)}.{n(1, 9)}節を参照。",
        lambda: f"{n(100000, 999999)} × {n(100000, 999999)} = {n(10**11, 10**12 - 1)}",
        lambda: f"売上は{n(10**11, 10**12 - 1)}円、利益は{n(10**8, 10**9):,}円。",
        lambda: f"円周率は3.{digits(rng, 14)}である。",
        lambda: f"数列 {' '.join(str(n(1, 99)) for _ in range(12))} の和",
        lambda: f"試合は{n(0, 9)}-{n(0, 9)}、{n(0, 9)}-{n(0, 9)}で終わった。",
        lambda: (
            f"東京都{rng.choice(['千代田区', '八王子市'])}で{n(2, 900)}人が参加し、{n(0, 5)}-{n(0, 5)}で引き分けた。"
        ),
        lambda: f"大阪府の人口は{n(800, 900)}万{n(1000, 9999)}人、京都市は{n(100, 150)}万人。",
        lambda: f"最大{n(1000, 9000)}トークン、max_tokens: {n(1000, 99999)}, token={n(1, 99)}",
        lambda: 'api_key = "YOUR_API_KEY_HERE_PLEASE"; password = "${DB_PASSWORD}"; token = os.environ["TOKEN"]',
        lambda: f"パスワードは{n(8, 16)}文字以上にしてください。Password: required",
        lambda: f"commit {''.join(rng.choices('0123456789abcdef', k=40))}",
        lambda: "std::vector<int> と a::b::c、時刻は12:34:56、比は1:2:3",
        lambda: "@pytest.fixture と @app.route を使う。css の sk-loading-indicator-with-a-long-name も。",
        lambda: f"ISSN {digits(rng, 4)}-{digits(rng, 4)}、DOI 10.{n(1000, 9999)}/{digits(rng, 9)}",
        lambda: f"座標は北緯{n(20, 45)}.{digits(rng, 8)}、東経{n(120, 150)}.{digits(rng, 8)}",
        lambda: f"一二三と数えて、{n(1, 9)}番地という小説を読む。二〇二四年十二月三十一日。",
        lambda: "127.0.0.1 と 0.0.0.0、マスクは255.255.255.0、::1",
        lambda: f"timestamp={n(1_600_000_000_000, 1_800_000_000_000)}",
        lambda: f"x² + {n(2, 99)}x = {n(100, 999999)}、①{n(1, 9)}回 ②{n(1, 9)}回",
    ]
    for number in range(count):
        yield makers[number % len(makers)]()


def real_sentences() -> list[str]:
    """The 500 Japanese news sentences of hironsancorpus (MIT), put together from its words."""
    from hironsan.corpus import hiron2016

    return ["".join(word[0] for word in s) for part in ("train", "test") for s in hiron2016.iob_sents(part)]


def measure(find: Callable[[str], list[Any]], count: int) -> dict[str, tuple[float, float]]:
    """(recall, precision) by kind over `count` positives of each kind and as many hard negatives.

    A hit counts as right where it has the sentence's own kind and covers a part of its value.
    """
    right: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for kind in POSITIVES:
        for sentence, value in positives(kind, count):
            at = sentence.index(value)
            found = find(sentence)
            hits.update({f.kind for f in found})
            right[kind] += any(f.kind == kind and f.start < at + len(value) and f.end > at for f in found)
    for sentence in hard_negatives(count):
        hits.update({f.kind for f in find(sentence)})
    return {kind: (right[kind] / count, right[kind] / max(hits[kind], 1)) for kind in POSITIVES}


if __name__ == "__main__":  # the table in docs/data_policy.md
    from pipeline.data.pii.find import find as detector

    for name, (found, exact) in measure(detector, 5000).items():
        print(f"| {name} | {found:.4f} | {exact:.4f} |")
    print(sum(bool(detector(s)) for s in real_sentences()), "of the 500 real sentences")
    print(sum(bool(detector(s)) for s in hard_negatives(20000, seed=1)), "of 20000 hard negatives")
