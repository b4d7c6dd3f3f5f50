"""Generate English requests and their JSON records, from a seed.

A request is a template with values in its slots. The record has the same values at the paths of the intent's schema, always in
the order of the schema. A request determines its record completely: dates are either explicit ("3 March 2027" becomes
``2027-03-03``) or symbolic (``"day": "tomorrow"``), and no field depends on anything outside the text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from demo import vocabulary as words
from demo.intents import INTENTS, Intent
from demo.vocabulary import Pool

Split = Literal["train", "held_out"]

_NUMBER_WORDS = "two three four five six seven eight nine ten eleven twelve".split()
_DAYS_IN_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@dataclass(frozen=True, slots=True)
class Value:
    """The value of a slot.

    Attributes:
        text: The words in the request.
        data: The data in the record.
        atoms: The random choices of which the value was made, as pairs (kind, value).
    """

    text: str
    data: Any
    atoms: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One request with its record. ``template`` and ``atoms`` record how it was made, and are not part of the model's input."""

    request: str
    record: dict[str, Any]
    intent: str
    template: str
    atoms: tuple[tuple[str, str], ...]

    @property
    def answer(self) -> str:
        """The record as compact JSON, which is the text that the model has to produce."""
        return json.dumps(self.record, ensure_ascii=False, separators=(",", ":"))


def make_examples(split: Split, count: int, seed: int) -> list[Example]:
    """Draw ``count`` different requests of one split, with equally many of each intent.

    Args:
        split: ``"train"`` or ``"held_out"``. The two splits share no template and no value.
        count: Number of requests. Only a few tens of thousands of different requests exist.
        seed: The same seed gives the same requests on every machine.

    Raises:
        ValueError: ``split`` is unknown.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r} is unknown; pass 'train' or 'held_out'")
    rng = random.Random(f"{seed}-{split}")
    examples: list[Example] = []
    seen: set[str] = set()
    while len(examples) < count:
        example = _make_example(INTENTS[len(examples) % len(INTENTS)], split, rng)
        if example.request not in seen:
            seen.add(example.request)
            examples.append(example)
    rng.shuffle(examples)
    return examples


def _make_example(intent: Intent, split: Split, rng: random.Random) -> Example:
    template = rng.choice(getattr(intent, split))
    if template[-1] not in ".?!":  # an imperative; templates with punctuation are whole sentences
        template = rng.choice(getattr(words.MANNERS, split)).replace("~", template)

    data: dict[str, Any] = {}
    atoms: list[tuple[str, str]] = []
    request = template
    for slot in intent.fields:
        if f"{{{slot}}}" in template:
            value = SLOTS[slot](rng, split)
            while any(atom in atoms for atom in value.atoms):  # no trip from Oslo to Oslo
                value = SLOTS[slot](rng, split)
            request = request.replace(f"{{{slot}}}", value.text)
            data[slot] = value.data
            atoms.extend(value.atoms)

    record: dict[str, Any] = {"intent": intent.name}
    for slot, path in intent.fields.items():
        if slot in data:
            _store(record, path.split("."), data[slot])
    request = request[0].upper() + request[1:]
    return Example(request, record, intent.name, template, tuple(atoms))


def _store(record: dict[str, Any], path: list[str], data: Any) -> None:
    *parents, last = path
    for key in parents:
        record = record.setdefault(key, {})
    if isinstance(data, dict):
        record.setdefault(last, {}).update(data)
    else:
        record[last] = data


def _from(kind: str, pool: Pool) -> Callable[[random.Random, Split], Value]:
    """Make the function of a slot whose value is a word of a pool, copied into the record unchanged."""

    def draw(rng: random.Random, split: Split) -> Value:
        text = rng.choice(getattr(pool, split))
        return Value(text, text, ((kind, text),))

    return draw


def _integer(rng: random.Random, split: Split, low: int, high: int, step: int = 1) -> int:
    """Draw a number of the split in ``[low, high]``."""
    held_out = split == "held_out"
    return rng.choice(
        [n for n in range(low, high + 1, step) if words.is_held_out_number(n) == held_out]
    )


def _spelled(rng: random.Random, number: int) -> str:
    """Return the number in digits, or, for 2 to 12, sometimes as a word."""
    if 2 <= number <= 12 and rng.random() < 0.4:
        return _NUMBER_WORDS[number - 2]
    return str(number)


def _count(rng: random.Random, split: Split) -> Value:
    number = _integer(rng, split, 2, 20)
    return Value(_spelled(rng, number), number, (("number", str(number)),))


def _percent(rng: random.Random, split: Split) -> Value:
    number = _integer(rng, split, 5, 95)
    return Value(
        rng.choice((f"{number}%", f"{number} percent")), number, (("number", str(number)),)
    )


def _duration(rng: random.Random, split: Split) -> Value:
    minutes = _integer(rng, split, 2, 59)
    if rng.random() < 0.3:
        hours = _integer(rng, split, 2, 12)
        joint = rng.choice((" and ", " "))
        text = f"{_spelled(rng, hours)} hours{joint}{minutes} minutes"
        atoms = (("number", str(hours)), ("number", str(minutes)))
        return Value(text, {"hours": hours, "minutes": minutes}, atoms)
    text = f"{_spelled(rng, minutes)} minutes"
    return Value(text, {"minutes": minutes}, (("number", str(minutes)),))


def _amount(rng: random.Random, split: Split) -> Value:
    whole, cents = _integer(rng, split, 3, 180), rng.choice((0, 0, 25, 40, 50, 75, 95, 99))
    currency = rng.choice(getattr(words.CURRENCIES, split))
    digits = f"{whole}.{cents:02d}" if cents else str(whole)
    data = {"value": float(digits) if cents else whole, "currency": currency}
    return Value(f"{digits} {currency}", data, (("number", str(whole)), ("currency", currency)))


def _people(rng: random.Random, split: Split) -> Value:
    names = rng.sample(getattr(words.PEOPLE, split), rng.choice((1, 1, 2)))
    return Value(" and ".join(names), names, tuple(("person", name) for name in names))


def _items(rng: random.Random, split: Split) -> Value:
    names = rng.sample(getattr(words.ITEMS, split), rng.choice((1, 1, 2)))
    parts, data, atoms = [], [], []
    for name in names:
        number = _integer(rng, split, 2, 20)
        unit = rng.choice(getattr(words.UNITS, split))
        parts.append(f"{_spelled(rng, number)} {unit} of {name}")
        data.append({"item": name, "count": number, "unit": unit})
        atoms += [("item", name), ("number", str(number)), ("unit", unit)]
    return Value(" and ".join(parts), data, tuple(dict.fromkeys(atoms)))


def _when(rng: random.Random, split: Split) -> Value:
    """Draw a day: a date with or without a year, a weekday, a word such as "tomorrow", or a number of days from now."""
    form = rng.choices(("date", "day_of_year", "weekday", "near", "distance"), (5, 4, 2, 2, 2))[0]
    if form == "weekday":
        day = rng.choice(getattr(words.WEEKDAYS, split))
        return Value(f"on {day}", {"day": day}, (("day", day),))
    if form == "near":
        day = rng.choice(getattr(words.NEAR_DAYS, split))
        return Value(day, {"day": day}, (("day", day),))
    if form == "distance":
        days = _integer(rng, split, 2, 12)
        text = f"in {_spelled(rng, days)} days"
        return Value(text, {"in_days": days}, (("number", str(days)),))

    held_out = split == "held_out"
    month = rng.randint(1, 12)
    days = range(1, _DAYS_IN_MONTH[month - 1] + 1)
    day = rng.choice([d for d in days if words.is_held_out_day(month, d) == held_out])
    name, ordinal = words.MONTHS[month - 1], _ordinal(day)
    date = f"{month:02d}-{day:02d}"
    if form == "day_of_year":
        text = rng.choice((f"{day} {name}", f"{name} {day}", f"the {ordinal} of {name}"))
        return Value(f"on {text}", {"date": date}, (("date", date),))
    year = rng.choice(words.YEARS[split])
    text = rng.choice((f"{day} {name} {year}", f"{name} {day}, {year}", f"{ordinal} {name} {year}"))
    return Value(f"on {text}", {"date": f"{year}-{date}"}, (("date", date), ("year", str(year))))


def _ordinal(day: int) -> str:
    suffix = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def _time(rng: random.Random, split: Split) -> Value:
    """Draw a time from 7:00 to 21:55, written on the 24-hour or the 12-hour clock. The record has the same spelling."""
    held_out = split == "held_out"
    hour, minute = rng.choice(
        [
            (h, m)
            for h in range(7, 22)
            for m in range(0, 60, 5)
            if words.is_held_out_time(h, m) == held_out
        ]
    )
    clock = f"{hour:02d}:{minute:02d}"
    text = clock
    if rng.random() < 0.4:
        short, half = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
        text = f"{short}:{minute:02d} {half}" if minute else f"{short} {half}"
    return Value(f"at {text}", {"time": text}, (("time", clock),))


SLOTS: dict[str, Callable[[random.Random, Split], Value]] = {
    "when": _when,
    "time": _time,
    "people": _people,
    "person": _from("person", words.PEOPLE),
    "event": _from("event", words.EVENTS),
    "task": _from("task", words.TASKS),
    "message": _from("message", words.MESSAGES),
    "origin": _from("city", words.CITIES),
    "city": _from("city", words.CITIES),
    "mode": _from("mode", words.MODES),
    "count": _count,
    "items": _items,
    "shop": _from("shop", words.SHOPS),
    "weather": _from("weather", words.WEATHER),
    "genre": _from("genre", words.GENRES),
    "artist": _from("artist", words.ARTISTS),
    "room": _from("room", words.ROOMS),
    "percent": _percent,
    "label": _from("label", words.LABELS),
    "alarm": _from("alarm", words.ALARMS),
    "duration": _duration,
    "subject": _from("subject", words.SUBJECTS),
    "amount": _amount,
    "expense": _from("expense", words.EXPENSES),
    "note": _from("note", words.NOTES),
}
