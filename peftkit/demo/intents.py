"""What can be asked for: per intent the record's schema and the sentences, training and held-out ones apart.

A template without closing punctuation is an imperative; it gets a manner ("could you ~?"). Slots carry their own
preposition where it depends on the value: ``{when}`` is "on 3 March" or "tomorrow", ``{time}`` is "at half past four".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Manners:
    """Ways to ask for something politely, or not; ``~`` is the imperative."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Intent:
    """One kind of request.

    Attributes:
        fields: Slot to path in the record, in the order of the record; a path with dots is nested.
        train: Templates of training requests.
        held_out: Templates of held-out requests, none of which is a training template.
    """

    name: str
    fields: dict[str, str]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


MANNERS = Manners(
    train=(
        "~.",
        "~.",
        "please ~.",
        "~, please.",
        "could you ~?",
        "can you ~?",
        "hey, ~.",
        "I'd like you to ~.",
        "~, thanks.",
        "~ for me.",
    ),
    held_out=(
        "~",
        "would you ~?",
        "kindly ~.",
        "I need you to ~.",
        "~ if you can.",
        "okay, now ~.",
    ),
)

INTENTS = (
    Intent(
        "calendar",
        {"event": "title", "when": "when", "time": "when", "people": "with"},
        train=(
            "add a {event} to my calendar {when}",
            "schedule a {event} with {people} {when} {time}",
            "put a {event} in the diary {when}",
            "{when} {time} I have a {event} with {people}.",
            "set up a {event} {time} {when}",
            "book a {event} with {people} {time} {when}",
            "I've got a {event} {when}.",
            "plan a {event} with {people} {when}",
            "invite {people} to a {event} {when} {time}",
            "there's a {event} {when} {time}, add it to my calendar.",
            "note down a {event} {when} {time}",
            "I am meeting {people} for a {event} {when} {time}.",
            "make a calendar entry for a {event} {time} {when}",
            "{people} and I are having a {event} {when}.",
            "organise a {event} with {people} {when}",
        ),
        held_out=(
            "create a calendar entry for a {event} {when} {time}",
            "arrange a {event} with {people} {time} {when}",
            "note in my diary that I have a {event} {when}",
            "{people} and I have a {event} {when} {time}.",
        ),
    ),
    Intent(
        "reminder",
        {"task": "task", "when": "when", "time": "when"},
        train=(
            "remind me to {task} {when} {time}",
            "remind me {when} to {task}",
            "remind me {time} {when} to {task}",
            "set a reminder to {task} {when}",
            "don't let me forget to {task} {time}",
            "I have to {task} {when} {time}, remind me.",
            "{when} {time} I must {task}, so remind me.",
            "make sure I {task} {when}",
            "I need a reminder {time} {when} to {task}.",
            "help me not to forget to {task} {when}",
            "I should {task} {when}, please remind me.",
            "give me a nudge {time} to {task}",
            "remember to tell me to {task} {when}",
            "I want to be reminded to {task} {when} {time}.",
        ),
        held_out=(
            "give me a reminder {when} {time} to {task}",
            "help me remember to {task} {when}",
            "see that I don't forget to {task} {time} {when}",
            "I should {task} {when} {time}, remind me of that.",
        ),
    ),
    Intent(
        "message",
        {"person": "to", "message": "text", "when": "send", "time": "send"},
        train=(
            "tell {person} that {message}",
            "text {person} that {message}",
            "send {person} a message saying {message}",
            "let {person} know that {message}",
            "message {person}: {message}.",
            "{when} {time}, please tell {person} that {message}.",
            "send a text to {person} {when}: {message}.",
            "write to {person} that {message}",
            "tell {person} {time} {when} that {message}",
            "inform {person} by text that {message}",
            "drop a message to {person}: {message}.",
            "{person} needs to know that {message}, text it {when}.",
            "send {person} a line {when} {time} saying {message}",
            "pass on to {person} that {message}",
        ),
        held_out=(
            "inform {person} that {message}",
            "drop {person} a line saying {message}",
            "send this to {person} {when} {time}: {message}.",
            "{person} should know that {message}, send a message.",
        ),
    ),
    Intent(
        "travel",
        {
            "origin": "route.from",
            "city": "route.to",
            "mode": "mode",
            "count": "seats",
            "when": "when",
            "time": "when",
        },
        train=(
            "book a {mode} from {origin} to {city} {when}",
            "find me a {mode} to {city} {time}",
            "get {count} seats on the {mode} from {origin} to {city} {when}",
            "I need to travel from {origin} to {city} {when}, book a {mode}.",
            "reserve a {mode} to {city} from {origin} {when} {time}",
            "book {count} seats on a {mode} to {city} {when}",
            "we are {count} people going from {origin} to {city} by {mode} {when}.",
            "{when} I want to take a {mode} from {origin} to {city}.",
            "look for a {mode} leaving {origin} for {city} {time}",
            "arrange {count} seats on a {mode} to {city} {when}",
            "buy a ticket for the {mode} between {origin} and {city} {when} {time}",
            "I have to be in {city} {when}, find a {mode} from {origin}.",
            "search a {mode} from {origin} to {city} {when} {time}",
            "I must get to {city} by {mode} {when}.",
        ),
        held_out=(
            "arrange a {mode} from {origin} to {city} {when} {time}",
            "buy {count} seats for the {mode} to {city} from {origin} {when}",
            "I have to get to {city} by {mode} {when} {time}.",
            "search for a {mode} between {origin} and {city} {when}",
        ),
    ),
    Intent(
        "shopping",
        {"items": "items", "shop": "shop", "when": "when"},
        train=(
            "add {items} to my shopping list",
            "put {items} on the list",
            "buy {items} at {shop}",
            "we need {items} from {shop}.",
            "get {items} from {shop} {when}",
            "order {items} {when}",
            "I want to buy {items} {when}.",
            "{when}, pick up {items} at {shop}.",
            "we're running low, so add {items}.",
            "write down {items} for {shop}",
            "we have no more food, so get {items}.",
            "bring {items} from {shop} {when}",
            "we are out of things, buy {items} at {shop} {when}.",
            "note {items} for shopping {when}",
        ),
        held_out=(
            "write {items} on the shopping list",
            "fetch {items} from {shop}",
            "we have run out, so order {items} {when}.",
            "stock up on {items} at {shop} {when}",
        ),
    ),
    Intent(
        "weather",
        {"weather": "about", "city": "city", "when": "when", "time": "when"},
        train=(
            "what's the {weather} in {city} {when}?",
            "check the {weather} for {city} {when}",
            "tell me about the {weather} in {city} {time}",
            "how is the weather in {city} {when}?",
            "what's the weather like {when} in {city}?",
            "show me the forecast for {city} {when}",
            "what {weather} do we expect in {city} {when} {time}?",
            "give me the {weather} {when} for {city}",
            "look up the weather in {city} {when}",
            "will the weather be good in {city} {when} {time}?",
            "get me the weather forecast {when} {time} for {city}",
            "I'm going to {city} {when}, how is the weather?",
            "find out the {weather} in {city} {when}",
            "I am in {city} {when} {time}, what's the {weather}?",
        ),
        held_out=(
            "how will the weather be in {city} {when} {time}?",
            "look up the {weather} in {city} {when}",
            "I'm in {city} {when}, what about the {weather}?",
            "get the forecast {when} for {city}",
        ),
    ),
    Intent(
        "music",
        {
            "artist": "play.artist",
            "genre": "play.genre",
            "room": "room",
            "percent": "volume",
            "duration": "length",
        },
        train=(
            "play some {genre} in the {room}",
            "play {artist} at {percent} volume",
            "put on {artist} in the {room} for {duration}",
            "I want to hear {genre} for {duration}.",
            "start {genre} in the {room} at {percent}",
            "play {genre} by {artist} in the {room}",
            "in the {room}, play {artist} at {percent}.",
            "turn on some {genre} for {duration}",
            "set the volume to {percent} and play {artist}",
            "listen to {artist} in the {room}",
            "I'm in the {room}, play me some {genre}.",
            "let's have {genre} in the {room} at {percent} volume",
            "stream some {genre} for {duration}",
            "I feel like {artist} for {duration}.",
        ),
        held_out=(
            "stream {artist} in the {room} at {percent}",
            "let me listen to {genre} for {duration}",
            "I'm in the mood for {artist} in the {room}.",
            "fill the {room} with {genre} at {percent} volume",
        ),
    ),
    Intent(
        "timer",
        {"label": "label", "duration": "length"},
        train=(
            "set a {label} timer for {duration}",
            "set a timer for {duration} for the {label}",
            "start a timer of {duration}",
            "count down {duration} for the {label}",
            "put {duration} on the timer for the {label}",
            "time the {label} for {duration}",
            "the {label} needs {duration}, set a timer.",
            "let a timer run for {duration}",
            "begin a timer of {duration} for the {label}",
            "start counting down {duration}",
            "my {label} should take {duration}, time it.",
            "set {duration} for my {label}",
            "keep a timer on the {label}, {duration}",
        ),
        held_out=(
            "begin a countdown of {duration} for the {label}",
            "my {label} takes {duration}, start the timer.",
            "keep the {label} on a timer for {duration}",
            "run a timer for {duration}",
        ),
    ),
    Intent(
        "alarm",
        {"alarm": "label", "when": "when", "time": "when"},
        train=(
            "wake me up {when} {time}",
            "set an alarm {time} {when}",
            "set an alarm {when} {time} for {alarm}",
            "I have to get up {time} {when}.",
            "make an alarm for {alarm} {time} {when}",
            "{when}, wake me {time}.",
            "add an alarm {time} for {alarm}",
            "I have to get up {when} {time} for {alarm}.",
            "get me up {time} {when}",
            "create an alarm {when} {time}",
            "I want an alarm {when} {time} for {alarm}.",
            "be sure to wake me {time} {when} for {alarm}",
            "I need to be awake {when} {time}.",
        ),
        held_out=(
            "get me out of bed {when} {time}",
            "create an alarm for {alarm} {when} {time}",
            "I'd like an alarm {time} {when}.",
            "make sure I'm awake {time} {when} for {alarm}",
        ),
    ),
    Intent(
        "email",
        {"people": "to", "subject": "subject", "message": "body", "when": "send", "time": "send"},
        train=(
            "email {people} about {subject}",
            "send an email to {people} about {subject} {when}",
            "write an email to {people} about {subject} saying {message}",
            "email {people} that {message}, subject {subject}",
            "{when} {time}, send {people} an email about {subject}.",
            "draft a mail about {subject} to {people}",
            "mail {people} {when} about {subject}",
            "send a mail with subject {subject} to {people} {when} {time}",
            "compose a mail to {people} {when} on {subject}",
            "prepare an email about {subject} for {people}",
            "get an email about {subject} out to {people} {when}",
            "{people} should receive a mail about {subject} {when} {time}.",
            "shoot a mail to {people} about {subject}, say {message}",
        ),
        held_out=(
            "compose an email to {people} about {subject} saying {message}",
            "shoot {people} an email about {subject}",
            "{people} should get an email about {subject} {when} {time}.",
            "prepare a mail to {people} {when} on {subject}",
        ),
    ),
    Intent(
        "expense",
        {"amount": "amount", "expense": "for", "note": "account", "when": "when"},
        train=(
            "I spent {amount} on {expense} {when}.",
            "log {amount} for {expense}",
            "add an expense of {amount} for {expense}, account {note}",
            "record {expense} for {amount}, paid {when}",
            "{expense} cost me {amount} {when}.",
            "note {amount} for {expense} under {note}",
            "I paid {amount} for {expense}, put it under {note}.",
            "{when} I paid {amount} for {expense}, book it under {note}.",
            "enter {amount} for {expense} {when}",
            "track {amount} spent on {expense}, charge it to {note}",
            "the {expense} came to {amount} {when}.",
            "my {expense} was {amount}, account {note}.",
            "write down an expense, {amount} for {expense}",
        ),
        held_out=(
            "enter {amount} spent on {expense} under {note}",
            "track an expense of {amount} for {expense} {when}",
            "my {expense} came to {amount}, charge it to {note}.",
            "write down that I paid {amount} for {expense} {when}",
        ),
    ),
)
