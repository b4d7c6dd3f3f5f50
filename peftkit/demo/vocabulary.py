"""The words requests are made of, each pool split into a training and a held-out half that share nothing.

A held-out request must not be solvable by recall, so a name, a city, a shopping item or a unit seen in training never occurs in
the evaluation. Numbers, dates and clock times have no lists: ``is_held_out_number``, ``is_held_out_day`` and ``is_held_out_time``
decide by rule.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pool:
    """Values for training and values for the held-out requests, each written ``"a; b; c"``."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def of(cls, train: str, held_out: str) -> Pool:
        return cls(*(tuple(" ".join(v.split()) for v in s.split(";")) for s in (train, held_out)))


def is_held_out_number(number: int) -> bool:
    """Whether a count, a duration or the whole part of an amount belongs to the held-out requests (3, 9, 15, 21, …)."""
    return number % 6 == 3


def is_held_out_day(month: int, day: int) -> bool:
    """Whether a day of the year belongs to the held-out requests."""
    return (month + day) % 5 == 0


def is_held_out_time(hour: int, minute: int) -> bool:
    """Whether a time on the 24-hour clock belongs to the held-out requests."""
    return (hour + minute // 5) % 4 == 3


YEARS = {"train": (2026, 2027, 2028), "held_out": (2029, 2030)}

MONTHS = (
    "January February March April May June July August September October November December"
).split()

WEEKDAYS = Pool.of("Monday; Tuesday; Wednesday; Thursday; Saturday", "Friday; Sunday")

NEAR_DAYS = Pool.of(
    """today; tomorrow; this weekend; next month; next spring; this evening; next weekend; this summer; at Easter;
    later this week; on Christmas Eve""",
    "the day after tomorrow; next week; next autumn; tonight",
)

PEOPLE = Pool.of(
    """Anna; Ben; Carla; David; Emma; Farid; Grace; Hugo; Ines; Jonas; Karim; Laura; Marco; Nadia; Oscar; Paula; Quentin;
    Rosa; Samir; Tina; Ursula; Victor; Wendy; Yusuf; Zoe; Aisha; Boris; Clara; Diego; Elena; Felix; Gina; Hannah; Ivan;
    Julia; Kevin; Lena; Mateo; Nora; Omar; Petra; Rahul; Sofia; Tomas; Vera; Mum; Dad; Grandma; my sister; my boss;
    the landlord; the dentist""",
    """Alice; Bruno; Chloe; Dmitri; Esther; Fatima; George; Helga; Igor; Jasmine; Kofi; Linda; Miguel; Naomi; Otto;
    Priya; Ruben; Stella; Theo; Yara; my brother; the plumber""",
)

CITIES = Pool.of(
    """London; Paris; Berlin; Madrid; Rome; Vienna; Prague; Warsaw; Dublin; Lisbon; Oslo; Helsinki; Athens; Budapest;
    Munich; Hamburg; Milan; Naples; Porto; Seville; Lyon; Geneva; Basel; Ghent; Utrecht; Boston; Chicago; Seattle; Denver;
    Toronto; Montreal; Tokyo; Osaka; Seoul; Mumbai; Cairo; Nairobi; Sydney; Lima; Havana; New York; Cape Town""",
    """Amsterdam; Barcelona; Brussels; Copenhagen; Stockholm; Zurich; Venice; Krakow; Marseille; Valencia; Edinburgh;
    Vancouver; Miami; Kyoto; Delhi; Melbourne; San Diego; Hong Kong""",
)

EVENTS = Pool.of(
    """budget review; team meeting; dentist appointment; yoga class; piano lesson; job interview; project kickoff; haircut;
    school meeting; book club; code review; sales call; sprint review; quick lunch; doctor's visit; board meeting;
    birthday party; football game; German class; hearing test; car inspection; design workshop; tax consultation;
    choir rehearsal; family dinner; flat viewing; staff training; vet appointment; wedding rehearsal; coffee break;
    press briefing; physics tutorial; garden party; safety drill; chess match; contract signing""",
    """product demo; swimming lesson; quarterly check; pottery workshop; barbecue; fire drill; guitar concert; blood test;
    planning session; film night; mentoring chat; passport appointment; tennis match; house warming; thesis defence;
    late brunch""",
)

TASKS = Pool.of(
    """water the plants; call the bank; pay the electricity bill; take out the rubbish; feed the cat; renew my passport;
    book the hotel; send the invoice; charge the camera; walk the dog; pick up the dry cleaning; return the library books;
    back up my laptop; order new glasses; clean the fridge; buy stamps; check the tyres; cancel the gym membership;
    defrost the chicken; print the tickets; iron the shirts; update the spreadsheet; sign the lease; take my medicine;
    wash the car; reply to the survey; bring an umbrella; close the windows; bake a cake; turn off the heating; fix the bike;
    empty the dishwasher; write the minutes; lock the shed; vacuum the stairs; measure the curtains; phone the school;
    post the parcel; change the bed sheets; top up my travel card""",
    """mow the lawn; collect the prescription; pay the rent; descale the kettle; submit the timesheet; pack the suitcase;
    test the smoke alarm; unplug the toaster; paint the fence; download the boarding pass; thank the neighbours;
    book the plumber; oil the hinges; shred the old letters; replace the light bulb; refill the bird feeder""",
)

MESSAGES = Pool.of(
    """the keys are under the mat; I am running late; dinner is ready; the meeting has moved; we are out of coffee;
    the train is delayed; I found the charger; the parcel has arrived; my phone is nearly empty; the tickets are booked;
    I will bring dessert; the car is at the garage; practice is cancelled; the baby is asleep; I left the report on the desk;
    the flight has landed; we need more chairs; the heating works again; I can pick up the kids; the shop closes early;
    the password has changed; lunch is on me; the doctor said yes; I am stuck in traffic; the cake turned out well;
    it is raining here; the printer is broken; I have the spare key; the exam went fine; the guests are waiting;
    we won the match; the water is off; I booked the table; the cat is back; the lift is out of order; I forgot my badge""",
    """the door code is new; I missed the bus; the soup is in the fridge; our flight was cancelled; the plumber is here;
    I will be there soon; the concert is sold out; the bike is repaired; she said no; the laundry is done;
    the road is closed; I need the address; the power is back; grandpa feels better; the slides are finished;
    the kids are at home""",
)

ITEMS = Pool.of(
    """milk; rice; bread; butter; olive oil; tomatoes; onions; apples; bananas; flour; sugar; salt; coffee; green tea; pasta;
    cheese; yoghurt; eggs; potatoes; carrots; chicken; orange juice; toothpaste; shampoo; soap; toilet paper; batteries;
    candles; cat food; honey; walnuts; spinach; lemons; garlic; beans; lentils; chocolate; biscuits; sparkling water; napkins;
    frozen peas; mushrooms""",
    """cream; cucumbers; pears; oats; almonds; peanut butter; cherries; detergent; dog food; mustard; broccoli; ginger;
    tofu; raisins; apple juice; light bulbs; blueberries; vinegar""",
)

UNITS = Pool.of(
    """bottles; packs; kilos; cans; bags; boxes; litres; packets; crates; cases; sacks; tubs; pots; bunches; pints; baskets;
    buckets; cups; rolls; pounds""",
    "jars; cartons; tins; trays",
)

SHOPS = Pool.of(
    """the market; Aldi; the pharmacy; the corner shop; Tesco; the bakery; Lidl; the supermarket; Costco; the kiosk; Target;
    the butcher; the garden centre; Sainsbury's; the petrol station; the fish shop""",
    "the farm shop; Walmart; the deli; Carrefour",
)

MODES = Pool.of(
    """train; flight; bus; night train; taxi; rental car; shuttle; boat; minibus; express train; sleeper; tram; river cruise;
    limousine; van""",
    "ferry; coach; charter flight",
)

WEATHER = Pool.of(
    """chance of rain; wind speed; snow depth; temperature; cloud cover; storm risk; air quality; water temperature;
    UV index; sunset; dew point; heat index; tide; wave height""",
    "humidity; visibility; pollen count; frost risk; sunrise",
)

GENRES = Pool.of(
    """jazz; rock; classical; reggae; hip hop; blues; techno; country; soul; metal; disco; opera; swing; salsa; punk; tango;
    house; film music; ambient; bluegrass; trance; flamenco; piano music""",
    "folk; funk; bossa nova; indie pop; gospel; dance music",
)

ARTISTS = Pool.of(
    """Chopin; Bach; Mozart; Queen; Abba; Vivaldi; Nina Simone; Miles Davis; Bob Marley; Daft Punk; Beethoven; Radiohead;
    Madonna; Johnny Cash; Coldplay; Edith Piaf; David Bowie; Pink Floyd; Schubert; Adele; Fleetwood Mac; Prince""",
    "Debussy; Blur; Ella Fitzgerald; Brahms; Kraftwerk; Elton John; Depeche Mode; Satie; Aretha Franklin",
)

ROOMS = Pool.of(
    """kitchen; living room; office; bathroom; garage; bedroom; dining room; workshop; basement; lobby; guest room; cellar;
    gym; nursery; conservatory""",
    "hallway; study; attic; playroom",
)

LABELS = Pool.of(
    """pasta; tea; pizza; laundry; nap; bread; workout; rice; meditation; cookies; eggs; homework; parking; stretching;
    roast; reading; face mask; soup""",
    "lasagne; plank; dryer; gnocchi; jigsaw; muffins; piano practice; stew",
)

ALARMS = Pool.of(
    "the gym; the school run; work; the early shift; my medicine; the airport; yoga; the market; church; the morning run",
    "the night duty; rowing; the road trip; the harvest; the webinar",
)

SUBJECTS = Pool.of(
    """holiday plans; the rent; invoice; meeting notes; the new contract; travel costs; feedback; job offer; the broken lift;
    exam results; team lunch; website update; the lost parcel; photos; a refund; parking permit; course schedule;
    insurance claim; the heating; flat keys; conference talk; draft report""",
    """school trip; the noisy pipes; next steps; budget cuts; the guest list; delivery address; library fine; room booking;
    press release; test data""",
)

EXPENSES = Pool.of(
    """lunch; taxi; groceries; train tickets; books; parking; coffee; hotel; petrol; office supplies; dinner; haircut;
    museum tickets; printer ink; flowers; stamps; medicine; gym fee; phone bill; shoes""",
    "breakfast; toll; concert tickets; gifts; dry cleaner; bike repair; visa fee; headphones; snacks",
)

CURRENCIES = Pool.of(
    "euros; dollars; quid; yen; kroner; zloty; lira; dirhams; rand; crowns; baht; forints; bucks; shillings",
    "francs; rupees; pesos",
)

NOTES = Pool.of(
    """work; the client visit; the Berlin trip; home; the kids; training; the office party; the book fair; travel; charity;
    the wedding; car costs; marketing; the cottage; hobbies; the spring sale""",
    "the school fair; research; the summer camp; the new flat",
)
